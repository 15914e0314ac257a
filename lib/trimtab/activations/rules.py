"""What sections `activations` need of others."""

from trimtab.rules import Section, rule
from trimtab.validation import require


@rule("activations", "corpus")
@rule("activations_random", "corpus")
def _blocks_fit_the_budget(activations: Section, corpus: Section) -> None:
    for key in ("train_tokens", "val_tokens", "test_tokens"):
        least = corpus["min_block_tokens"]
        require(activations[key] >= least, key, activations[key], f"at least `min_block_tokens` = {least}")
