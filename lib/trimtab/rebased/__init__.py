"""Linear transformers with Based's and ReBased's kernels (Aksenov et al. 2024, 2402.10644): attention in time linear in
the sequence, decoding from a state of fixed size.

`attention` is the kernel, `PolynomialAttention` the layer, `LanguageModel` a model of them; `generate` decodes.
"""

from trimtab.rebased.decoding import generate
from trimtab.rebased.kernels import BASED, REBASED, Polynomial, attention
from trimtab.rebased.mixers import PolynomialAttention
from trimtab.rebased.model import LanguageModel, ModelConfig, hybrid

__all__ = [
    "BASED",
    "REBASED",
    "LanguageModel",
    "ModelConfig",
    "Polynomial",
    "PolynomialAttention",
    "attention",
    "generate",
    "hybrid",
]
