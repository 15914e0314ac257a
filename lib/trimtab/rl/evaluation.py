"""How often a policy is right on held-out items: greedily, and in several samples of each."""

from collections.abc import Callable, Collection, Mapping, Sequence

import polars as pl
import torch
from tqdm import tqdm

from trimtab.rl.advantages import pass_at_k
from trimtab.rl.policy import Policy
from trimtab.rl.rollouts import rollout

GREEDY = 0
"""The sample number of the greedy completion; drawn ones count from 1."""
ANSWERS = {
    "item": pl.Int32, "sample": pl.Int32, "completion": pl.String, "correct": pl.Float64, "length": pl.Int32,
    "finished": pl.Boolean,
}  # fmt: skip
"""Columns of `answers`."""


def answers(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    judge: Callable[[int, str], float],
    decode: Callable[[list[int]], str],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    end: Sequence[int],
    seed: int,
    sampled: Collection[int] | None = None,
    batch: int = 128,
) -> pl.DataFrame:
    """One greedy completion of every prompt, and `samples` drawn ones of those whose numbers are in `sampled` (None: of
    all), judged: columns `ANSWERS`.

    `judge(i, text)` is 1 where the text answers prompt i rightly. A completion that was cut off is never
    right. `batch` completions are made at a time. Equal seeds give equal draws, whoever the policy is.
    """
    drawing = [i for i in range(len(prompts)) if samples and (sampled is None or i in sampled)]
    passes = [(GREEDY, 1, 0.0, chosen) for chosen in _batches(range(len(prompts)), batch)]
    passes += [(GREEDY + 1, samples, temperature, chosen) for chosen in _batches(drawing, batch // max(1, samples))]
    rows = []
    for first, group, warmth, chosen in tqdm(passes, desc="evaluate", unit="batch", mininterval=1):
        drawn = rollout(
            policy, [prompts[i] for i in chosen], group=group, max_new_tokens=max_new_tokens, temperature=warmth,
            end=end, generator=torch.Generator().manual_seed(seed * 1_000_003 + chosen[0]),
        )  # fmt: skip
        for row, i in enumerate(chosen):
            for member in range(group):
                text = decode(drawn.completion(row, member))
                length, finished = int(drawn.mask[row, member].sum()), bool(drawn.finished[row, member])
                correct = judge(i, text) if finished else 0.0
                rows.append((i, first + member, text, correct, length, finished))
    return pl.DataFrame(rows, schema=ANSWERS, orient="row")


def summary(table: pl.DataFrame) -> Mapping[str, float]:
    """From a table of `answers`: greedy accuracy, mean over samples (mean@k), pass@k for k = 1, 2, 4, ..., and the mean
    length and share of finished completions of either kind."""
    greedy, drawn = table.filter(pl.col("sample") == GREEDY), table.filter(pl.col("sample") > GREEDY)
    found = {
        "greedy": _mean(greedy, "correct"), "greedy_length": _mean(greedy, "length"),
        "greedy_finished": _mean(greedy, "finished"),
    }  # fmt: skip
    if len(drawn):
        samples = drawn["sample"].n_unique()
        correct = torch.from_numpy(drawn.sort("item", "sample")["correct"].to_numpy().reshape(-1, samples).copy())
        found |= {"mean": _mean(drawn, "correct"), "length": _mean(drawn, "length")}
        found |= {"finished": _mean(drawn, "finished")}
        found |= {f"pass@{k}": pass_at_k(correct, k).mean().item() for k in (1, 2, 4, 8, 16, 32) if k <= samples}
    return found


def _batches(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    size = max(1, size)
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _mean(table: pl.DataFrame, column: str) -> float:
    return float(table[column].cast(pl.Float64).mean() or 0.0)  # type: ignore[arg-type]
