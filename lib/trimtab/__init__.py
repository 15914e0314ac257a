"""Small levers on language models: sparse autoencoders, steering vectors, learnable kernels, repetition rewards.

The library holds models, kernels, losses and training loops; the notebooks hold the story. Import what you need:
`trimtab.sae`, `trimtab.activations`, `trimtab.interventions`, `trimtab.corpus`, `trimtab.pretrained`.
"""

import warnings

# transformers and datasets look for Jupyter widgets on import; without them they print a bar as text, as we want.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"
