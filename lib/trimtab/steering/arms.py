"""The arms of the comparison: what of the model is trained, and with which reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trimtab.rl.adapters import down_projections, frozen_model, inject_lora
from trimtab.rl.policy import FullPolicy, Policy
from trimtab.steering.vectors import SteeringVectors
from trimtab.validation import Span, read_name

if TYPE_CHECKING:
    from nnsight import TransformersModel

KINDS: Mapping[str, Sequence[Span]] = {
    "steering": [],  # a vector after every block
    "steering-last": [],  # a vector after the last block alone
    "steering-layerN": [(0, 10_000)],  # a vector after one block, counted from 0
    "steering-rankR": [(1, 10_000)],  # vectors of all blocks, low-rank across them
    "random-reward": [],  # as `steering`, rewarded by a coin with the batch's own share of heads: a control
    "lora-R": [(1, 10_000)],  # LoRA of that rank on every down projection, alpha = rank, as in the paper's code
    "full": [],  # every weight
}
"""What names look like, with the bounds of their numbers, and what each trains."""


@dataclass(frozen=True)
class Arm:
    """One side of the comparison."""

    name: str

    def __post_init__(self) -> None:
        read_name(self.name, "an arm", KINDS)

    def __str__(self) -> str:
        return self.name

    @property
    def random_reward(self) -> bool:
        """Whether rewards say nothing about the completions."""
        return self.name == "random-reward"

    @property
    def steers(self) -> bool:
        """Whether steering vectors are what is trained."""
        return self.name.startswith("steering") or self.random_reward

    def policy(
        self,
        folder: str,
        *,
        dtype: str,
        device: str,
        seed: int = 0,
        reference: bool = False,
        frozen: "TransformersModel | None" = None,
    ) -> "Built":
        """A fresh policy of the model in a folder, at the base model's behaviour. `seed` is of LoRA's and low-rank's
        random factors; `reference`: whether a KL penalty will be taken, for which full tuning needs a second copy.
        `frozen`: the model as `frozen_model` gives it, where it is at hand; vectors leave it as it is, so that many
        policies of a steering arm may share it, and other arms load their own."""
        wrapped = frozen if frozen is not None and self.steers else frozen_model(folder, dtype=dtype, device=device)
        layers, width = wrapped._module.config.num_hidden_layers, wrapped._module.config.hidden_size
        _, numbers = read_name(self.name, "an arm", KINDS)
        number = int(numbers[0]) if numbers else 0
        generator = torch.Generator().manual_seed(seed)
        if self.name == "full":
            base = frozen_model(folder, dtype=dtype, device=device) if reference else None
            return Built(FullPolicy(wrapped, base), None)
        if self.name.startswith("lora"):
            base = frozen_model(folder, dtype=dtype, device=device) if reference else None
            return Built(Policy(wrapped, inject_lora(wrapped, down_projections(wrapped), number, seed), base), None)
        if self.name == "steering-last":
            chosen = [layers - 1]
        elif self.name.startswith("steering-layer"):
            chosen = [number]
        else:
            chosen = list(range(layers))
        rank = number if self.name.startswith("steering-rank") else None
        vectors = SteeringVectors(chosen, width, rank=rank, generator=generator).to(device)
        return Built(Policy(vectors.applied_to(wrapped), dict(vectors.named_parameters()), wrapped), vectors)


@dataclass(frozen=True)
class Built:
    """A policy, and its steering vectors where it has any."""

    policy: Policy
    vectors: SteeringVectors | None

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(tensor.numel() for tensor in self.policy.trained.values())

    @property
    def of_model(self) -> int:
        """Numbers of the model itself."""
        parameters = self.policy.view._module.named_parameters()
        return sum(tensor.numel() for name, tensor in parameters if "lora_" not in name)
