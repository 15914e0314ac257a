"""What every arm of the SAE comparison shares, and the names of the arms."""

from dataclasses import dataclass

from trimtab.errors import InputError
from trimtab.sae.objectives import OBJECTIVES, Objective


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
    learning_rates: tuple[float, ...] = (5e-4,)
    """Grid of Adam's learning rate, for 2^14 latents; the rate used is this over sqrt(latents / 2^14). The best on
    validation rows is taken, by each arm for itself."""
    sweep_steps: int = 200
    """Steps of each sweep run, with a schedule of their own."""
    seeds: tuple[int, ...] = (0,)
    """One full run each; a seed sets the initial weights and the order of the data."""
    budgets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Sparsities at which every trained SAE is read on held-out rows."""
    auxiliary: float = 1 / 32
    """Weight of the auxiliary loss that revives dead latents."""
    dead_after: int = 10_000_000
    """Rows without firing after which a latent counts as dead in training."""
    precision: str = "bfloat16"
    """Precision of the encoder's matrix product in training; everything else, and evaluation, is fp32."""

    def __post_init__(self) -> None:
        for name in ("latents", "steps", "batch", "sweep_steps", "dead_after"):
            if getattr(self, name) < 1:
                raise InputError(f"sae: {name} must be positive, not {getattr(self, name)}.")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise InputError(f"sae: learning_rates must be positive numbers, not {list(self.learning_rates)}.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"sae: seeds must be distinct integers, not {list(self.seeds)}.")
        if not self.budgets or not 1 <= min(self.budgets) <= max(self.budgets) <= self.latents:
            raise InputError(f"sae: budgets must lie between 1 and latents = {self.latents}, not {list(self.budgets)}.")
        if self.auxiliary < 0:
            raise InputError(f"sae: auxiliary must not be negative, not {self.auxiliary}.")
        if self.precision not in ("bfloat16", "float32"):
            raise InputError(f"sae: precision must be bfloat16 or float32, not {self.precision!r}.")


@dataclass(frozen=True, order=True)
class Arm:
    """One side of the comparison: a kind of objective and the largest budget it is trained with."""

    kind: str
    """A key of `objectives.OBJECTIVES`."""
    k: int

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Read `topk-8` or `hierarchical-pow2-64`."""
        kind, _, k = name.rpartition("-")
        if kind not in OBJECTIVES or not k.isdigit() or int(k) < 1:
            raise InputError(f"{name!r} is not an arm: write {' or '.join(f'{kind}-K' for kind in OBJECTIVES)}.")
        arm = cls(kind, int(k))
        arm.objective()  # which may refuse its k
        return arm

    def __str__(self) -> str:
        return f"{self.kind}-{self.k}"

    def objective(self) -> Objective:
        """What it is trained for."""
        return OBJECTIVES[self.kind](self.k)

    def check(self, config: SAEConfig) -> None:
        """Raise InputError, before anything is trained, where the arm does not fit what it will be compared on."""
        if self.k > config.latents:
            raise InputError(f"{self}: k = {self.k} is more than the dictionary has latents ({config.latents}).")
        if self.k not in config.budgets:
            raise InputError(f"{self}: k = {self.k} is not among the budgets {list(config.budgets)} of section `sae`.")
