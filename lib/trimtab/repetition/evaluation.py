"""Quality beside repetition: every continuation scored by the frozen model and a sentence encoder, every set by what
sets have. One minus seq-rep alone is won by random tokens; that is what the controls here are for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from trimtab.errors import InputError
from trimtab.repetition.losses import accumulate
from trimtab.repetition.ngrams import as_ids, distinct, periodic_tail, seq_rep, uniq_seq, words
from trimtab.repetition.text_quality import (
    Scores,
    coherence,
    copied,
    embedding_mauve,
    mtld,
    rejected_by,
    self_bleu,
    zlib_ratio,
)
from trimtab.repetition.texts import stacked
from trimtab.rl.policy import Policy

CONTROLS = ("a loop", "random tokens", "a copied prefix")
"""Sets of continuations that no set of metrics may take for text."""
LOOP = 8
"""Tokens of the control's loop."""
KMEANS_SEEDS = (0, 1, 2)
CHUNK_ROWS = 8


@dataclass(frozen=True)
class Judge:
    """What scores continuations."""

    base: Policy
    """The untrained model, frozen."""
    embed: Callable[[Sequence[str]], Float[Tensor, "texts width"]]
    """Of a sentence encoder."""
    tokenizer: PreTrainedTokenizerBase
    clusters: int
    """Of the MAUVE-like divergence."""

    def scored(self, texts: pl.DataFrame) -> pl.DataFrame:
        """Rows of `reading.Readings.texts` with `string` (the continuation), `nats` (mean -log p of its tokens under
        the frozen model, after the prefix), `coherence` (cosine of prefix and continuation) and `copied` (share of its
        4-grams that stand in the prefix). Raises InputError, before anything is scored, where the sets are smaller than
        the MAUVE-like divergence has clusters."""
        least = int(texts.group_by("arm", "decoder", "seed").len()["len"].min())  # type: ignore[arg-type]
        if self.clusters > least:
            raise InputError(
                f"repetition_compare: clusters must be at most {least}, the prefixes that every decoder continued, not "
                f"{self.clusters}."
            )
        prefixes, tokens = (stacked(texts, column) for column in ("prefix", "tokens"))
        strings, before = self._decoded(tokens), self._decoded(prefixes)
        distinct_texts = list(dict.fromkeys([*before, *strings]))
        at = {text: i for i, text in enumerate(distinct_texts)}
        vectors = self.embed(distinct_texts)
        of_prefix, of_text = (vectors[[at[text] for text in side]] for side in (before, strings))
        return texts.with_columns(
            pl.Series("string", strings),
            pl.Series("nats", self._nats(prefixes, tokens).numpy()),
            pl.Series("coherence", coherence(of_prefix, of_text).numpy()),
            pl.Series("copied", copied(prefixes, tokens).numpy()),
        )

    def summary(self, scored: pl.DataFrame, human: pl.DataFrame) -> pl.DataFrame:
        """A row for each `arm`, `decoder` and `seed` of `scored`: repetition of tokens and words, diversity, and
        quality; `rejected_by` names what tells the set from `human`, the same prefixes' scored human continuations."""
        reference = _scores(human)
        vectors = self.embed(human["string"].to_list())
        rows = []
        for (arm, decoder, seed), some in scored.group_by("arm", "decoder", "seed", maintain_order=True):
            tokens, strings = stacked(some), some["string"].to_list()
            ids, lengths = as_ids([words(text) for text in strings])
            row: dict[str, Any] = {"arm": arm, "decoder": decoder, "seed": seed}
            row |= {f"seq_rep_{n}": seq_rep(tokens, n).nanmean().item() for n in (1, 2, 3, 4)}
            row |= {f"seq_rep_{n}_words": seq_rep(ids, n, lengths).nanmean().item() for n in (1, 4)}
            row |= {"uniq_seq": uniq_seq(tokens), "distinct_2": distinct(tokens, 2)}
            row |= {"loops": periodic_tail(tokens).float().mean().item()}
            row |= {column: _mean(some, column) for column in ("nats", "coherence", "copied")}
            row |= {"base_perplexity": float(np.exp(row.pop("nats")))}
            row |= {"self_bleu": self_bleu(strings), "mtld": mtld(strings)}
            row |= {"zlib_ratio": zlib_ratio(strings)}
            row |= {"mauve_like": embedding_mauve(self.embed(strings), vectors, self.clusters, KMEANS_SEEDS)}
            row |= {"rejected_by": ", ".join(rejected_by(_scores(some), reference))}
            rows.append(row)
        return pl.DataFrame(rows, infer_schema_length=None)

    def _decoded(self, ids: Int[Tensor, "texts time"]) -> list[str]:
        return [str(self.tokenizer.decode(row, skip_special_tokens=False)) for row in ids.tolist()]

    def _nats(
        self, prefixes: Int[Tensor, "texts prefix"], tokens: Int[Tensor, "texts time"]
    ) -> Float[Tensor, " texts"]:
        rows, first = torch.cat([prefixes, tokens], dim=1), prefixes.shape[1]
        found = [
            -accumulate(self.base, some, first, None)[1].view(len(some), -1).mean(dim=1)
            for some in tqdm(rows.split(CHUNK_ROWS), desc="score", unit="batch", mininterval=1)
        ]
        return torch.cat(found)


def controls(human: pl.DataFrame, vocabulary: int, seed: int) -> pl.DataFrame:
    """`CONTROLS`, as arms, for the same prefixes: the first tokens of the human continuation over and over, tokens
    drawn uniformly, and the prefix again."""
    prefixes, tokens = (stacked(human, column) for column in ("prefix", "tokens"))
    time = tokens.shape[1]
    generator = torch.Generator().manual_seed(seed)
    sets = {
        "a loop": _cycled(tokens[:, :LOOP], time),
        "random tokens": torch.randint(vocabulary, tokens.shape, generator=generator),
        "a copied prefix": _cycled(prefixes, time),
    }
    tables = [
        human.with_columns(
            arm=pl.lit(name), decoder=pl.lit("control"), tokens=pl.Series(made.tolist(), dtype=pl.List(pl.Int32))
        )
        for name, made in sets.items()
    ]
    return pl.concat(tables)


def halves(people: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Human continuations of every second prefix, and of the others: one half beside the other is what the checks must
    pass, and what text as good as human gets of the MAUVE-like divergence at this size."""
    even = pl.col("text") % 2 == 0
    return people.filter(even).with_columns(arm=pl.lit("one human half")), people.filter(~even)


def _cycled(ids: Int[Tensor, "texts unit"], time: int) -> Int[Tensor, "texts time"]:
    return ids.repeat(1, -(-time // ids.shape[1]))[:, :time]


def _scores(scored: pl.DataFrame) -> Scores:
    means = {column: _mean(scored, column) for column in ("nats", "coherence", "copied")}
    return Scores(seq_rep(stacked(scored), 4).mean().item(), **means)


def _mean(rows: pl.DataFrame, column: str) -> float:
    return float(rows[column].to_numpy().mean())
