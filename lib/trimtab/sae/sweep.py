"""The learning rate, swept alike for every arm: one pass over the data trains an SAE at each rate of the grid."""

import math
from pathlib import Path

from trimtab.activations import ActivationCache
from trimtab.errors import InputError
from trimtab.sae.config import Arm, SAEConfig
from trimtab.sae.evaluation import weighted_fvu
from trimtab.sae.training import Run, train


def sweep(
    arm: Arm,
    config: SAEConfig,
    train_cache: ActivationCache,
    val_cache: ActivationCache,
    *,
    seed: int,
    device: str = "cpu",
    checkpoint: Path | None = None,
) -> dict[float, float]:
    """Validation FVU after a short run at each learning rate of the grid; infinite for a rate that diverges.

    The arm's own objective decides: FVU at the budgets of its loss, by their weights. With a `checkpoint` file an
    interrupted sweep goes on where it stopped. Raises InputError where every rate diverges.
    """
    runs = [Run(arm, rate) for rate in config.learning_rates]
    options = {"steps": config.sweep_steps, "seed": seed, "device": device, "checkpoint": checkpoint}
    weights = arm.objective().budgets
    losses = {}
    for run, trained in zip(runs, train(runs, config, train_cache, **options), strict=True):  # type: ignore[arg-type]
        fvu = math.inf if trained.diverged else weighted_fvu(trained.sae, val_cache, weights)
        losses[run.learning_rate] = fvu if fvu < math.inf else math.inf  # nan compares false
    if min(losses.values()) == math.inf:
        raise InputError(
            f"{arm}: the loss diverges at every learning rate of {list(config.learning_rates)}: lower them."
        )
    return losses
