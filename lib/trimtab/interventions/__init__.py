"""The only door to nnsight: wrap a loaded model, read its residual stream, replace it, add to it, read it as logits."""

from trimtab.interventions.model import check_sites, device_of, wrap
from trimtab.interventions.residual import capture, direct_logits, resume, splice
from trimtab.interventions.steering import Place, final_hidden, steer

__all__ = [
    "Place",
    "capture",
    "check_sites",
    "device_of",
    "direct_logits",
    "final_hidden",
    "resume",
    "splice",
    "steer",
    "wrap",
]
