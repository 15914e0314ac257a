"""Sparse autoencoders trained for one sparsity (TopK) or for all at once (HierarchicalTopK, arXiv 2505.24473)."""

from trimtab.sae.evaluation import SquaredErrors, squared_errors
from trimtab.sae.model import SAE, Latents
from trimtab.sae.objectives import hierarchical_loss, topk_loss
from trimtab.sae.training import Arm, SAEConfig, Trained, sweep, train

__all__ = [
    "SAE",
    "Arm",
    "Latents",
    "SAEConfig",
    "SquaredErrors",
    "Trained",
    "hierarchical_loss",
    "squared_errors",
    "sweep",
    "topk_loss",
    "train",
]
