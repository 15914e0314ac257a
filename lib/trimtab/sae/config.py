"""What every arm of the SAE comparison shares, and the names of the arms."""

from dataclasses import dataclass

from trimtab.errors import InputError
from trimtab.sae.objectives import OBJECTIVES, Objective
from trimtab.validation import WIDEST, ascending, at_least, not_negative, one_of, rates, read_name, require, seeds


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
        at_least(0, self, "site", most=10_000)
        at_least(1, self, "latents", "steps", "batch", "sweep_steps", "dead_after")
        rates(self, "learning_rates")
        seeds(self, "seeds")
        ascending(self, "budgets")
        require(self.budgets[-1] <= self.latents, "budgets", self.budgets, f"at most `latents` = {self.latents}")
        not_negative(self, "auxiliary")
        one_of(("bfloat16", "float32"), self, "precision")


@dataclass(frozen=True, order=True)
class Arm:
    """One side of the comparison: a kind of objective and the largest budget it is trained with."""

    kind: str
    """A key of `objectives.OBJECTIVES`."""
    k: int

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Read `topk-8` or `hierarchical-pow2-64`."""
        form, (k,) = read_name(name, "an arm", {f"{kind}-K": [(1, WIDEST)] for kind in OBJECTIVES})
        arm = cls(form.removesuffix("-K"), int(k))
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
