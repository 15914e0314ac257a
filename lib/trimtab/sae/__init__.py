"""Sparse autoencoders trained for one sparsity (TopK and its kin) or for all at once (HierarchicalTopK, 2505.24473)."""

from trimtab.sae.config import Arm, SAEConfig
from trimtab.sae.evaluation import SquaredErrors, squared_errors
from trimtab.sae.model import SAE, Latents
from trimtab.sae.sweep import sweep
from trimtab.sae.training import Run, Trained, train

__all__ = ["SAE", "Arm", "Latents", "Run", "SAEConfig", "SquaredErrors", "Trained", "squared_errors", "sweep", "train"]
