"""The arms: which updates a run is made of, and what of the model they train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.epochs import mix
from trimtab.errors import InputError
from trimtab.interventions import steer
from trimtab.rl.adapters import frozen_model, inject_lora
from trimtab.rl.policy import FullPolicy, Policy
from trimtab.validation import Span, read_name

if TYPE_CHECKING:
    from nnsight import TransformersModel

Kind = Literal["likelihood", "likelihood+tokens", "unlikelihood", "policy", "both"]
"""Of an update: likelihood of a block of text, the same with token unlikelihood, sequence unlikelihood of rollouts,
policy gradient on rollouts, or the last two from one pass over the same rollouts."""
VECTORS = "vectors"
"""Name of the trained tensor of steering arms, [layers, d_model]."""


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of update, together 1: the published code's effective shares, where it flips one coin for the
    policy gradient and, if that fails, another for unlikelihood."""

    shares: Mapping[Kind, float]

    def __post_init__(self) -> None:
        if min(self.shares.values()) < 0 or abs(sum(self.shares.values()) - 1) > 1e-9:
            raise InputError(f"Shares of updates must be at least 0 and together 1, not {dict(self.shares)}.")

    def schedule(self, updates: int, seed: int) -> list[Kind]:
        """The kind of every update. Each kind gets its share of them, rounded by largest remainders, and is spread
        evenly over the run from a random start: drawn one by one, a short run would depend on which kind happened to
        come while the learning rate was still high."""
        exact = {kind: share * updates for kind, share in self.shares.items()}
        counts = {kind: int(value) for kind, value in exact.items()}
        by_remainder = sorted(exact, key=lambda kind: counts[kind] - exact[kind])
        for kind in by_remainder[: updates - sum(counts.values())]:
            counts[kind] += 1
        generator = torch.Generator().manual_seed(mix(seed, 1))
        starts = torch.rand(len(counts), generator=generator).tolist()
        places = [
            ((i + start) / count, kind)
            for start, (kind, count) in zip(starts, counts.items(), strict=True)
            for i in range(count)
        ]
        return [kind for _, kind in sorted(places, key=lambda each: each[0])]


OBJECTIVES: Mapping[str, Mix] = {
    "likelihood": Mix({"likelihood": 1.0}),
    "unlikelihood-token": Mix({"likelihood+tokens": 1.0}),
    "unlikelihood": Mix({"unlikelihood": 0.5, "likelihood": 0.5}),
    "policy": Mix({"policy": 0.5, "likelihood": 0.5}),
    "implicit": Mix({"policy": 0.25, "unlikelihood": 0.1875, "likelihood": 0.5625}),
    "implicit-joint": Mix({"both": 0.4375, "likelihood": 0.5625}),
    "implicit-shuffled": Mix({"policy": 0.25, "unlikelihood": 0.1875, "likelihood": 0.5625}),
}
"""By name. `implicit` is the paper's; `implicit-joint` takes both terms from the same rollouts; `implicit-shuffled` is
its control, whose rewards are dealt out at random within the batch."""
WIDTHS: Mapping[str, Sequence[Span]] = {"": [], "-steering": [], "-lora-R": [(1, 10_000)]}
"""What may follow an objective's name, and LoRA's rank: see `Arm`."""


class PlainPolicy(Policy):
    """A frozen model as it is: nothing is trained."""

    def __init__(self, wrapped: "TransformersModel") -> None:
        super().__init__(wrapped, {})


class SteeredPolicy(Policy):
    """A frozen model with `vectors`, [layers, d_model] in fp32, added after its blocks: they are what is trained."""

    def __init__(self, wrapped: "TransformersModel", vectors: Tensor) -> None:
        self.vectors = vectors
        super().__init__(steer(wrapped, range(len(vectors)), lambda: vectors), {VECTORS: vectors}, wrapped)


@dataclass(frozen=True)
class Arm:
    """One way of training: an objective, and with `-steering` or `-lora-R` what is trained instead of every weight."""

    name: str

    def __post_init__(self) -> None:
        _ = self._parts

    def __str__(self) -> str:
        return self.name

    @property
    def objective(self) -> str:
        """A name of `OBJECTIVES`."""
        return self._parts[0]

    @property
    def mix(self) -> Mix:
        """Its shares of updates."""
        return OBJECTIVES[self.objective]

    @property
    def shuffled(self) -> bool:
        """Whether rewards say nothing about the continuations."""
        return self.objective == "implicit-shuffled"

    @property
    def full(self) -> bool:
        """Whether every weight is trained."""
        return not self._parts[1]

    def policy(self, folder: str, *, dtype: str, device: str, seed: int = 0) -> Policy:
        """A fresh policy of the model in a folder, at the base model's behaviour. `seed`: of LoRA's random factors."""
        wrapped = frozen_model(folder, dtype=dtype, device=device)
        if self.full:
            return FullPolicy(wrapped)
        if self._parts[1] == "-steering":
            layers, width = wrapped._module.config.num_hidden_layers, wrapped._module.config.hidden_size
            vectors = torch.zeros(layers, width, device=device)
            return SteeredPolicy(wrapped, vectors)
        return Policy(wrapped, inject_lora(wrapped, "all-linear", int(self._parts[2]), seed), wrapped)

    @cached_property
    def _parts(self) -> tuple[str, str, str]:
        """Objective, what follows it, and LoRA's rank, the latter two empty where there is none."""
        forms = {objective + width: spans for objective in OBJECTIVES for width, spans in WIDTHS.items()}
        form, numbers = read_name(self.name, "an arm", forms)
        objective = next(each for each in OBJECTIVES if form.removeprefix(each) in WIDTHS)
        return objective, form.removeprefix(objective), "".join(map(str, numbers))
