"""Training SAEs from the activation cache: several on one stream, deterministic, resumable to the bit."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from trimtab.activations import ActivationCache
from trimtab.checkpoint import Checkpoint
from trimtab.identity import machine
from trimtab.sae.config import Arm, SAEConfig
from trimtab.sae.model import SAE, Latents

WARM_UP, DECAY = 0.05, 0.8
"""Shares of the steps in which the learning rate rises linearly, and falls linearly to zero. A long decay was worth
8 to 10 % of FVU to TopK and HierarchicalTopK alike."""
BETAS = (0.7, 0.999)
"""Adam's. With a first one of 0.9 FVU was 6 % worse after 100 steps, and after 480 within 1.5 % in either direction."""
SAVE_EVERY = 20.0
"""Seconds between checkpoints."""
RECORD_EVERY = 20
"""Steps between entries of the history; divergence is looked for as often."""


@dataclass(frozen=True)
class Run:
    """One SAE to train."""

    arm: Arm
    learning_rate: float
    """Adam's peak learning rate for a dictionary of 2^14 latents; see `Learner`."""


@dataclass(frozen=True)
class Trained:
    """A trained SAE, and what was seen on the way."""

    sae: SAE
    history: list[tuple[int, float, int]]
    """(step, training loss, dead latents), every twentieth step and the last."""
    diverged: bool = False
    """The loss stopped being finite, and training with it."""


@dataclass
class Learner:
    """One SAE in training: Adam, its schedule, and how long each latent has been idle.

    The learning rate is `rate` / sqrt(latents / 2^14) (Gao et al. 2024, section 3): the grid then fits any size of
    dictionary. Latents idle for `dead_after` rows are dead; while there are any, the auxiliary loss is added.
    """

    arm: Arm
    config: SAEConfig
    rate: float
    steps: int
    sae: SAE
    history: list[tuple[int, float, int]] = field(default_factory=list)
    diverged: bool = False

    def __post_init__(self) -> None:
        self.objective = self.arm.objective()
        self.idle = torch.zeros(self.sae.latents, dtype=torch.int64, device=self.sae.W_dec.device)
        self.peak = self.rate / math.sqrt(self.sae.latents / 2**14)
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=self.peak, betas=BETAS, fused=True)
        self.dtype = torch.bfloat16 if self.config.precision == "bfloat16" else None

    def step(self, x: Float[Tensor, "batch d_model"], number: int) -> Float[Tensor, ""]:
        """One optimiser step, counted from 1. Returns the objective's loss, without the auxiliary one."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.peak * rate_factor(number, self.steps)
        self.optimiser.zero_grad()
        loss, latents = self.objective(x, self.sae, self.dtype)
        total = loss
        dead = self.idle >= self.config.dead_after
        if bool(dead.any()):
            total = loss + self.config.auxiliary * auxiliary_loss(x, latents, self.sae, dead, self.dtype)
        total.backward()
        self.sae.project_gradient()
        self.optimiser.step()
        self.sae.normalise_decoder()
        self.idle += len(x)
        self.idle.index_fill_(0, latents.indices[latents.values > 0], 0)
        return loss.detach()

    def record(self, number: int, loss: Tensor) -> None:
        """Add to the history, and notice divergence."""
        self.history.append((number, loss.item(), int((self.idle >= self.config.dead_after).sum())))
        self.diverged = not self.history[-1][1] < math.inf

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, as flat tensors."""
        state = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()} | {"idle": self.idle}
        for index, slots in self.optimiser.state_dict()["state"].items():
            state |= {f"adam.{index}.{slot}": tensor for slot, tensor in slots.items()}
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.sae.load_state_dict({n.removeprefix("sae."): t for n, t in state.items() if n.startswith("sae.")})
        self.idle.copy_(state["idle"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith("adam."):
                _, index, slot = name.split(".")
                slots.setdefault(int(index), {})[slot] = tensor
        self.optimiser.load_state_dict({"state": slots, "param_groups": self.optimiser.state_dict()["param_groups"]})


def train(
    runs: Sequence[Run],
    config: SAEConfig,
    cache: ActivationCache,
    *,
    steps: int,
    seed: int,
    device: str = "cpu",
    checkpoint: Path | None = None,
) -> list[Trained]:
    """Train one SAE for each of `runs`, all on the same stream of batches, in one pass over the cache.

    `seed` sets the initial weights and the order of the data. Interrupted and called again with the same checkpoint
    file, arguments and machine, it continues and ends with the same weights. A run whose loss stops being finite ends
    there, as diverged.
    """
    shared = {name: getattr(config, name) for name in ("latents", "batch", "precision", "auxiliary", "dead_after")}
    data = [cache.manifest["shards"], cache.manifest["means_sha256"], cache.site, cache.statistics]
    named = [f"{run.arm} at {run.learning_rate!r}" for run in runs]
    saved = Checkpoint(
        checkpoint, config=shared, runs=named, steps=steps, seed=seed, data=data, code=train, **machine(device)
    )  # fmt: skip
    learners = [_learner(run, config, cache.d_model, steps, seed, device) for run in runs]
    start = _restore(saved, learners)
    batches = cache.batches(config.batch, seed=seed, skip=start)
    title = f"{runs[0].arm} seed {seed}" if len(runs) == 1 else f"{len(runs)} SAEs seed {seed}"
    bar = tqdm(total=steps, initial=start, desc=title, unit="step", mininterval=1)
    last_save = time.monotonic()
    for number in range(start + 1, steps + 1):
        x = next(batches).to(device)
        for learner in learners:
            if not learner.diverged:
                loss = learner.step(x, number)
                if number % RECORD_EVERY == 0 or number == steps:
                    learner.record(number, loss)
                    bar.set_postfix(loss=f"{learner.history[-1][1]:.4f}", refresh=False)
        bar.update()
        if checkpoint is not None and (number == steps or time.monotonic() - last_save > SAVE_EVERY):
            _save(saved, learners, number)
            last_save = time.monotonic()
    bar.close()
    return [Trained(learner.sae.eval(), learner.history, learner.diverged) for learner in learners]


def auxiliary_loss(
    x: Float[Tensor, "batch d_model"],
    latents: Latents,
    sae: SAE,
    dead: Bool[Tensor, " latents"],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, ""]:
    """mean((e - e_hat)^2): the residual e of the reconstruction, predicted by the k_aux largest of the dead latents.

    k_aux = d_model / 2, or all dead ones, with the loss scaled down, where there are fewer (Gao et al. 2024, appendix
    A.2). Dense over the dead part of the dictionary, which is small; the residual carries no gradient.
    """
    residual = (x - sae.decode(latents)).detach()
    which = dead.nonzero().squeeze(1)
    wanted = sae.d_model // 2
    k = min(wanted, len(which))
    kind = dtype or sae.W_dec.dtype
    acts = F.relu(F.linear(x.to(kind), sae.W_enc[which].to(kind), sae.b_enc[which].to(kind)))
    if k < len(which):
        acts = torch.where(acts >= acts.detach().topk(k, dim=1).values[:, -1:], acts, 0)
    predicted = (acts @ sae.W_dec[which].to(kind)).to(x.dtype)
    return (k / wanted) * (residual - predicted).square().mean()


def rate_factor(number: int, steps: int) -> float:
    """Factor of the learning rate at a step counted from 1: linear warm-up, constant, linear decay to zero."""
    return min(1.0, number / max(1.0, WARM_UP * steps), (steps - number + 1) / max(1.0, DECAY * steps))


def _learner(run: Run, config: SAEConfig, d_model: int, steps: int, seed: int, device: str) -> Learner:
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(d_model, config.latents, run.arm.k, jump=run.arm.kind == "jumprelu", generator=generator).to(device)
    return Learner(run.arm, config, run.learning_rate, steps, sae)


def _save(saved: Checkpoint, learners: Sequence[Learner], number: int) -> None:
    tensors = {f"{i}.{name}": t for i, learner in enumerate(learners) for name, t in learner.state().items()}
    record = {"step": number, "runs": [{"history": each.history, "diverged": each.diverged} for each in learners]}
    saved.save(tensors, record)


def _restore(saved: Checkpoint, learners: Sequence[Learner]) -> int:
    found = saved.load()
    if found is None:
        return 0
    tensors, record = found
    for i, (learner, entry) in enumerate(zip(learners, record["runs"], strict=True)):
        mark = f"{i}."
        learner.restore({name.removeprefix(mark): t for name, t in tensors.items() if name.startswith(mark)})
        learner.history = [(int(step), float(loss), int(dead)) for step, loss, dead in entry["history"]]
        learner.diverged = entry["diverged"]
    return int(record["step"])
