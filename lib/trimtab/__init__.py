"""Small levers on language models: sparse autoencoders, steering vectors, learnable kernels, repetition rewards.

The library holds models, kernels, losses and training loops; the notebooks hold the story. Import what you need:
`trimtab.sae`, `trimtab.activations`, `trimtab.interventions`, `trimtab.corpus`, `trimtab.pretrained`.
"""

__version__ = "0.1.0"
