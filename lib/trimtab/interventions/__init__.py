"""The only door to nnsight: wrap a loaded model, read its residual stream, replace it, add to it, read it as logits."""

from trimtab.interventions.lens import NO_TARGET, Lens, LensComparison, compare_lenses, lens, next_tokens
from trimtab.interventions.model import check_sites, device_of, wrap
from trimtab.interventions.readout import Head, Readout, token_text
from trimtab.interventions.residual import capture, direct_logits, resume, splice
from trimtab.interventions.steering import Place, final_hidden, steer

__all__ = [
    "NO_TARGET",
    "Head",
    "Lens",
    "LensComparison",
    "Place",
    "Readout",
    "capture",
    "check_sites",
    "compare_lenses",
    "device_of",
    "direct_logits",
    "final_hidden",
    "lens",
    "next_tokens",
    "resume",
    "splice",
    "steer",
    "token_text",
    "wrap",
]
