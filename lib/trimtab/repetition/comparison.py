"""Arms compared on the same held-out prefixes and rows of text: means by group, differences under resampling."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float

from trimtab.claims import ratio_terms, seeds_and_groups
from trimtab.errors import InputError
from trimtab.files import read_parquet
from trimtab.repetition.arms import Arm
from trimtab.repetition.experiment import UNTRAINED
from trimtab.repetition.ngrams import seq_rep
from trimtab.repetition.texts import stacked

NEEDED = (UNTRAINED, "unlikelihood", "implicit")
"""Arms without which there is nothing to compare; claims about others are judged where these are there."""
HUMAN = "human"
"""What people wrote after the same prefixes, beside the arms."""
Weights = Float[np.ndarray, " groups"]
"""A weight for each group: ones, or the counts of a bootstrap sample."""
Interval = tuple[float, float, float]
"""(effect, low, high)"""


def check_arms(arms: Sequence[str]) -> None:
    """Raise InputError for a name that is no arm, and where one that a claim needs is missing."""
    for arm in arms:
        if arm != UNTRAINED:
            Arm(arm)
    missing = [arm for arm in NEEDED if arm not in arms]
    if missing:
        raise InputError(f"`arms` must hold {', '.join(NEEDED)}; {missing[0]} is missing.")


def read_table(trained: Path, arms: Sequence[str], name: str) -> pl.DataFrame:
    """`NAME.parquet` of every arm, with a column `arm`. Raises InputError for a missing or damaged file."""
    tables = []
    for arm in arms:
        path = trained / arm / f"{name}.parquet"
        if not path.is_file():
            raise InputError(f"{path} is missing: run `dvc repro repetition@{arm}`.")
        tables.append(read_parquet(path).select(pl.lit(arm).alias("arm"), pl.all()))
    return pl.concat(tables)


def read_texts(trained: Path, arms: Sequence[str]) -> pl.DataFrame:
    """Continuations of every arm, and the human ones as arm and decoder `human`; `seq_rep_4` is added."""
    texts = pl.concat(
        [read_table(trained, arms, "texts"), read_table(trained, [UNTRAINED], "human").with_columns(arm=pl.lit(HUMAN))]
    )
    return texts.with_columns(pl.Series("seq_rep_4", seq_rep(stacked(texts), 4).numpy()))


@dataclass(frozen=True)
class Grouped:
    """A mean for each arm and training seed, as sums and counts over groups of documents, the unit that is resampled.
    What was not trained is the same for every seed; trained arms are paired seed by seed."""

    sums: Mapping[str, Float[np.ndarray, "seeds groups"]]
    counts: Float[np.ndarray, " groups"]

    @classmethod
    def of(cls, table: pl.DataFrame, value: str, count: str | None = None) -> "Grouped":
        """From rows with `arm`, `seed`, `group` and `value`, a mean over rows, or over what `count` counts, of which
        `value` is the sum. Raises InputError unless all arms were read on the same texts with the same seeds."""
        if table.is_empty():
            raise InputError("There is nothing to compare: no arm was read.")
        number = pl.len().cast(pl.Float64) if count is None else pl.col(count).sum().cast(pl.Float64)
        summed = table.group_by("arm", "seed", "group").agg(pl.col(value).sum().alias("sum"), number.alias("count"))
        order = {arm: i for i, arm in enumerate(table["arm"].unique(maintain_order=True))}
        summed = summed.with_columns(pl.col("arm").replace_strict(order).alias("order")).sort("order", "seed", "group")
        seeds = int(summed.group_by("arm").agg(pl.col("seed").n_unique())["seed"].max())  # type: ignore[arg-type]
        sums: dict[str, np.ndarray] = {}
        counts = np.empty(0)
        for (arm,), rows in summed.group_by("arm", maintain_order=True):
            of_arm = rows["seed"].n_unique()
            if len(rows) % of_arm or of_arm not in (1, seeds):
                raise InputError(f"{arm} was not read with the seeds and texts of the others.")
            here = rows["count"].to_numpy().reshape(of_arm, -1)
            counts = here[0] if not sums else counts
            if here.shape[1] != len(counts) or (here != counts).any():
                raise InputError(f"{arm} was not read with the seeds and texts of the others.")
            sums[str(arm)] = np.repeat(rows["sum"].to_numpy().reshape(of_arm, -1), seeds // of_arm, axis=0)
        return cls(sums, counts)

    @property
    def seeds(self) -> int:
        """Training seeds."""
        return len(next(iter(self.sums.values())))

    @property
    def groups(self) -> int:
        """Groups of documents."""
        return len(self.counts)

    @property
    def n(self) -> str:
        """For a verdict."""
        return f"{self.seeds} seeds, {self.groups} groups of documents"

    def mean(self, arm: str, seed: int | None = None, weights: Weights | None = None) -> float:
        """Of one training seed, or over all."""
        at = np.ones(self.groups) if weights is None else weights
        rows = self.sums[arm] if seed is None else self.sums[arm][[seed]]
        return float((rows @ at).mean() / (self.counts @ at))

    def apart(self, arm: str, other: str, seed: int, weights: Weights) -> float:
        """mean(arm) - mean(other)"""
        return self.mean(arm, seed, weights) - self.mean(other, seed, weights)

    def difference(self, arm: str, other: str, *, seed: int = 0) -> Interval:
        """Of means; see `claims.seeds_and_groups`."""
        return self._interval(partial(self.apart, arm, other), seed)

    def level(self, arm: str, *, seed: int = 0) -> Interval:
        """A mean with its interval."""
        return self._interval(partial(self.mean, arm), seed)

    def relative(self, arm: str, other: str, *, seed: int = 0) -> Interval:
        """exp(mean(arm) - mean(other)) - 1: of perplexities, where means are nats a token."""
        return self._interval(lambda s, w: float(np.expm1(self.apart(arm, other, s, w))), seed)

    def removed(self, arm: str, other: str, base: str, *, seed: int = 0) -> Interval:
        """(mean(base) - mean(arm)) / (mean(base) - mean(other)): the share of what the other removes. Unbounded unless
        the other removes something with its whole interval; see `claims.ratio_terms`."""

        def share(s: int, weights: Weights) -> float:
            mine, whole = ([self.apart(base, each, i, weights) for i in range(self.seeds)] for each in (arm, other))
            return float(ratio_terms(mine, whole)[s])

        effect, low, high = self._interval(share, seed)
        return (effect, low, high) if self.difference(base, other, seed=seed)[1] > 0 else (effect, -np.inf, np.inf)

    def _interval(self, statistic: Callable[[int, Weights], float], seed: int) -> Interval:
        return seeds_and_groups(statistic, seeds=self.seeds, groups=self.groups, seed=seed)


def worst_difference(readings: Sequence[Grouped], arm: str, other: str, *, seed: int = 0) -> Interval:
    """The largest of mean(arm) - mean(other) over several readings (decoders): (largest effect, largest low, largest
    high). Below 0 with its high, it is so for each by itself at its own level (intersection-union test, Berger 1982); a
    maximum inside the resampling would lie above the truth by the noise of the readings."""
    each = [reading.difference(arm, other, seed=seed) for reading in readings]
    return max(e for e, _, _ in each), max(low for _, low, _ in each), max(high for _, _, high in each)


def magnitude(interval: Interval) -> Interval:
    """Of a difference with its interval: (|effect|, least, largest)."""
    effect, low, high = interval
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return abs(effect), least, max(abs(low), abs(high))


def kept_table(validations: pl.DataFrame) -> pl.DataFrame:
    """A row for each arm and seed: after how many updates the parameters are that were read, of how many."""
    by = validations.group_by("arm", "seed", maintain_order=True)
    return by.agg(pl.col("update").filter("kept").first().alias("kept_after"), pl.col("update").max().alias("updates"))


def by_decoder(
    texts: pl.DataFrame, domain: str, decoders: Sequence[str], value: str = "seq_rep_4"
) -> dict[str, Grouped]:
    """A reading for each decoder, of the arms that it was tried on, and of the human continuations of the prefixes
    that it was given."""
    here = texts.filter(pl.col("domain") == domain)
    found = {}
    for decoder in decoders:
        rows = here.filter(pl.col("decoder") == decoder)
        human = here.filter((pl.col("decoder") == HUMAN) & pl.col("text").is_in(rows["text"].unique().to_list()))
        if len(rows):
            found[decoder] = Grouped.of(pl.concat([rows, human]), value)
    return found


def repetition_table(readings: Mapping[str, Grouped]) -> pl.DataFrame:
    """Means over seeds: a row for each arm, a column for each decoder."""
    arms = list(dict.fromkeys(arm for reading in readings.values() for arm in reading.sums))
    columns = {
        decoder: [reading.mean(arm) if arm in reading.sums else None for arm in arms]
        for decoder, reading in readings.items()
    }
    return pl.DataFrame({"arm": arms} | columns)


def perplexity_table(nats: Mapping[str, Grouped], *, seed: int = 0) -> pl.DataFrame:
    """A row for each domain and arm: perplexity, and its change against the untrained model with the interval, in %."""
    rows = []
    for domain, reading in nats.items():
        for arm in reading.sums:
            change = [100 * each for each in reading.relative(arm, UNTRAINED, seed=seed)]
            rows.append((domain, arm, float(np.exp(reading.mean(arm))), *change))
    columns = ["domain", "arm", "perplexity", "change_percent", "low", "high"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def to_score(texts: pl.DataFrame, domain: str, decoders: Sequence[str], once: Sequence[str] = ()) -> pl.DataFrame:
    """The continuations whose quality is scored: those by `decoders`, by `once` those of the first seed, of the
    untrained model also those by every decoder that was tried on it alone, and the human ones, first. All of the same
    prefixes: those that every decoder was given."""
    here = texts.filter(pl.col("domain") == domain)
    trained = here.filter(~pl.col("arm").is_in([UNTRAINED, HUMAN]))
    alone = set(here["decoder"]) - set(trained["decoder"])
    wanted = pl.col("decoder").is_in([*decoders, *alone])
    if once:
        wanted |= pl.col("decoder").is_in(once) & (pl.col("seed") == here.filter(pl.col("arm") == UNTRAINED)["seed"][0])
    least = int(here.group_by("arm", "decoder", "seed").agg(pl.col("text").n_unique())["text"].min())  # type: ignore[arg-type]
    return here.filter(wanted & (pl.col("text") < least)).sort(pl.col("arm") != HUMAN, maintain_order=True)
