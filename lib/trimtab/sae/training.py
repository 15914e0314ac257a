"""Training an SAE from the activation cache: deterministic, resumable, the learning rate swept alike for every arm."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from trimtab.activations import ActivationCache
from trimtab.checkpoint import Checkpoint
from trimtab.errors import InputError
from trimtab.sae.evaluation import squared_errors
from trimtab.sae.model import SAE
from trimtab.sae.objectives import OBJECTIVES

Objective = Literal["topk", "hierarchical"]
WARM_UP, DECAY = 0.05, 0.2
"""Shares of the steps in which the learning rate rises linearly, and falls linearly to zero."""
SAVE_EVERY = 20.0
"""Seconds between checkpoints."""


@dataclass(frozen=True)
class SAEConfig:
    """What every arm of the comparison shares."""

    site: int = 14
    """Decoder block whose residual stream is decomposed."""
    latents: int = 2048
    """Size of the dictionary."""
    steps: int = 1000
    """Optimiser steps of the full run."""
    batch: int = 1024
    """Rows in a step."""
    learning_rates: tuple[float, ...] = (1e-3,)
    """Grid of Adam's learning rate; the best on validation rows is taken, by each arm for itself."""
    sweep_steps: int = 200
    """Steps of each sweep run, with a schedule of their own."""
    seeds: tuple[int, ...] = (0,)
    """One full run each; a seed sets the initial weights and the order of the data."""
    budgets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Sparsities at which every trained SAE is read on held-out rows."""
    precision: str = "bfloat16"
    """Precision of the encoder's matrix product in training; everything else, and evaluation, is fp32."""

    def __post_init__(self) -> None:
        for name in ("latents", "steps", "batch", "sweep_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"sae: {name} must be positive, not {getattr(self, name)}.")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise InputError(f"sae: learning_rates must be positive numbers, not {list(self.learning_rates)}.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"sae: seeds must be distinct integers, not {list(self.seeds)}.")
        if not self.budgets or not 1 <= min(self.budgets) <= max(self.budgets) <= self.latents:
            raise InputError(f"sae: budgets must lie between 1 and latents = {self.latents}, not {list(self.budgets)}.")
        if self.precision not in ("bfloat16", "float32"):
            raise InputError(f"sae: precision must be bfloat16 or float32, not {self.precision!r}.")


@dataclass(frozen=True)
class Arm:
    """One side of the comparison: an objective and the largest budget it is trained with."""

    objective: Objective
    k: int

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Read `topk-8` or `hierarchical-64`."""
        objective, _, k = name.rpartition("-")
        if objective not in get_args(Objective) or not k.isdigit() or int(k) < 1:
            raise InputError(f"{name!r} is not an arm: write {' or '.join(f'{o}-K' for o in get_args(Objective))}.")
        return cls(objective, int(k))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.objective}-{self.k}"

    def check(self, config: SAEConfig) -> None:
        """Raise InputError, before anything is trained, where the arm does not fit what it will be compared on."""
        if self.k > config.latents:
            raise InputError(f"{self}: k = {self.k} is more than the dictionary has latents ({config.latents}).")
        if self.k not in config.budgets:
            raise InputError(f"{self}: k = {self.k} is not among the budgets {list(config.budgets)} of section `sae`.")


class DivergedError(InputError):
    """The loss stopped being finite."""


@dataclass(frozen=True)
class Trained:
    """A trained SAE, and its loss on the way."""

    sae: SAE
    history: list[tuple[int, float]]
    """(step, training loss), every twentieth step and the last."""


def train(
    arm: Arm,
    config: SAEConfig,
    cache: ActivationCache,
    *,
    learning_rate: float,
    steps: int,
    seed: int,
    device: str = "cpu",
    checkpoint: Path | None = None,
) -> Trained:
    """Train one SAE for `steps` steps. Interrupted and called again with the same checkpoint file, it goes on and ends
    with the same weights. Raises InputError where the loss stops being finite."""
    identity = [str(arm), config.latents, config.batch, config.precision, learning_rate, steps, seed]
    machine = [device, torch.get_num_threads()]  # another one would not end with the same weights
    saved = Checkpoint(checkpoint, [*identity, *machine, cache.manifest["fingerprint"], cache.site])
    sae = SAE(cache.d_model, config.latents, generator=torch.Generator().manual_seed(seed)).to(device)
    optimiser = torch.optim.Adam(sae.parameters(), lr=learning_rate, betas=(0.9, 0.999), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    dtype = torch.bfloat16 if config.precision == "bfloat16" else None
    loss_of = OBJECTIVES[arm.objective]
    start, history = _restore(saved, sae, optimiser, schedule)
    batches = cache.batches(config.batch, seed=seed, skip=start)
    bar = tqdm(total=steps, initial=start, desc=f"{arm} lr {learning_rate:g} seed {seed}", unit="step", mininterval=1)
    last_save = time.monotonic()
    for step in range(start + 1, steps + 1):
        x = next(batches).to(device)
        optimiser.zero_grad()
        loss = loss_of(x, sae.encode(x, arm.k, dtype), sae)
        loss.backward()
        sae.project_gradient()
        optimiser.step()
        sae.normalise_decoder()
        schedule.step()
        if step % 20 == 0 or step == steps:
            history.append((step, loss.item()))
            if not history[-1][1] < float("inf"):
                raise DivergedError(f"{arm}: the loss is not finite at step {step}: lower lr {learning_rate:g}.")
            bar.set_postfix(loss=f"{history[-1][1]:.4f}", refresh=False)
        bar.update()
        if checkpoint is not None and (step == steps or time.monotonic() - last_save > SAVE_EVERY):
            saved.save(_state(sae, optimiser), {"step": step, "history": history})
            last_save = time.monotonic()
    bar.close()
    return Trained(sae.eval(), history)


def sweep(
    arm: Arm,
    config: SAEConfig,
    train_cache: ActivationCache,
    val_cache: ActivationCache,
    *,
    seed: int,
    device: str = "cpu",
    checkpoints: Path | None = None,
) -> dict[float, float]:
    """Validation FVU after a short run at each learning rate of the grid; infinite for a rate that diverges.

    The arm's own objective decides: FVU at K for TopK, the mean FVU over 1..K for HierarchicalTopK. With a folder in
    `checkpoints`, an interrupted sweep goes on where it stopped. Raises InputError where every rate diverges.
    """
    losses = {}
    budgets = [arm.k] if arm.objective == "topk" else list(range(1, arm.k + 1))
    for rate in config.learning_rates:
        file = checkpoints / f"sweep-{rate:g}.safetensors" if checkpoints else None
        options: dict[str, Any] = {"learning_rate": rate, "steps": config.sweep_steps, "seed": seed, "device": device}
        try:
            run = train(arm, config, train_cache, checkpoint=file, **options)
        except DivergedError:
            losses[rate] = float("inf")
            continue
        fvu = sum(squared_errors(run.sae, val_cache, budgets).fvu().values()) / len(budgets)
        losses[rate] = fvu if fvu < float("inf") else float("inf")  # nan compares false
    if min(losses.values()) == float("inf"):
        raise InputError(
            f"{arm}: the loss diverges at every learning rate of {list(config.learning_rates)}: lower them."
        )
    return losses


def _rate(step: int, steps: int) -> float:
    """Learning rate factor at a step counted from 0: linear warm-up, constant, linear decay."""
    return min(1.0, (step + 1) / max(1.0, WARM_UP * steps), (steps - step) / max(1.0, DECAY * steps))


def _state(sae: SAE, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}
    for index, slots in optimiser.state_dict()["state"].items():
        state |= {f"adam.{index}.{slot}": tensor for slot, tensor in slots.items()}
    return state


def _restore(
    saved: Checkpoint, sae: SAE, optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR
) -> tuple[int, list[tuple[int, float]]]:
    found = saved.load()
    if found is None:
        return 0, []
    tensors, record = found
    sae.load_state_dict({name.removeprefix("sae."): t for name, t in tensors.items() if name.startswith("sae.")})
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, index, slot = name.split(".")
            slots.setdefault(int(index), {})[slot] = tensor
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * schedule.lr_lambdas[0](record["step"])
    schedule.last_epoch = record["step"]
    return record["step"], [(step, loss) for step, loss in record["history"]]
