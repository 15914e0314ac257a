"""What is read of a trained model: continuations by every decoder, held-out text, sentences that are repeated."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab import launch
from trimtab.files import atomic, publish, read_parquet
from trimtab.markup import visible
from trimtab.repetition.experiment import (
    UNTRAINED,
    Bench,
    Run,
    Sweep,
    history_of,
    row_nats,
    save_trained,
    validations_of,
)
from trimtab.repetition.loops import sentence_probability
from trimtab.repetition.ngrams import longest_repeat, periodic_tail, seq_rep
from trimtab.repetition.single_token import SingleToken, single_token
from trimtab.repetition.texts import Passages, stacked
from trimtab.rl.policy import Policy

SENTENCE_TOKENS = (8, 24)
"""Least and most of a sentence that is repeated."""


@dataclass(frozen=True)
class Readings:
    """What was read of an arm; every table has a column `seed`."""

    history: pl.DataFrame
    """See `experiment.history_of`."""
    validations: pl.DataFrame
    """See `experiment.validations_of`."""
    texts: pl.DataFrame
    """A row for each continuation: `domain`, `decoder`, `text` (number of the prefix), `group`, `document`, `prefix`
    and `tokens` (token ids)."""
    nats: pl.DataFrame
    """A row for each row of held-out text: `domain`, `group`, `tokens`, `nats` (their sum)."""
    sentences: pl.DataFrame
    """`sentence`, `repeat` (from 1), `probability` (geometric mean of its tokens')."""
    single: pl.DataFrame
    """A row a seed: what `single_token.SingleToken` has, of the first domain."""
    truncated: pl.DataFrame
    """A row for each seed and truncation."""

    @classmethod
    def of(cls, folder: Path) -> "Readings":
        """What `write` wrote."""
        return cls(**{field.name: read_parquet(folder / f"{field.name}.parquet") for field in fields(cls)})

    @classmethod
    def together(cls, several: list["Readings"]) -> "Readings":
        """Of several seeds as one."""
        return cls(**{field.name: pl.concat(getattr(each, field.name) for each in several) for field in fields(cls)})

    def write(self, folder: Path) -> None:
        """A parquet file for each table."""
        for field in fields(self):
            getattr(self, field.name).write_parquet(folder / f"{field.name}.parquet")


def read_all(bench: Bench, swept: Sweep | None, folder: Path) -> Readings:
    """Train and read every seed; the untrained model, which has none, is read once. `folder` keeps each seed's
    readings, and `trained.safetensors` unless the arm trains every weight: an interrupted call goes on from there."""
    first, *others = bench.config.seeds
    seeds = [*others, first] if swept else [first]  # the first is trained: the shortest job, for the last gap
    rate = swept.best if swept else 0.0
    run, jobs = partial(read_seed, bench, rate, folder), [(seed,) for seed in seeds]
    # As many threads to a run as the sweep had, whose checkpoint of the first seed is of no use to others.
    workers, title, kept = bench.config.workers if swept else 1, f"{bench.arm or UNTRAINED}, seeds", folder / "read"
    for place in launch.each(run, jobs, kept, identity=bench.identity, workers=workers, places=True, title=title):
        publish(kept / place, folder / Path(place).name)
    return Readings.together([Readings.of(folder / f"seed-{seed}") for seed in bench.config.seeds if seed in seeds])


def read_seed(bench: Bench, rate: float, folder: Path, seed: int, place: Path) -> str:
    """One seed's run and readings, as folder `seed-SEED` of the job's place. Returns its path from that place's
    parent."""
    run = bench.train(rate, seed, folder)
    with atomic(place / f"seed-{seed}") as partial_folder:
        partial_folder.mkdir(parents=True)
        read(bench, run, seed).write(partial_folder)
        save_trained(partial_folder, bench, run)
    return f"{place.name}/seed-{seed}"


def keep(bench: Bench, readings: Readings, folder: Path, out: Path) -> None:
    """Write an arm's outputs: its tables, `human.parquet` of the untrained model, and what was trained, by seed."""
    readings.write(out)
    if bench.arm is None:
        human(bench).with_columns(pl.lit(bench.config.seeds[0], pl.Int32).alias("seed")).write_parquet(
            out / "human.parquet"
        )
    for trained in sorted(folder.glob("seed-*/trained.safetensors")):
        (out / trained.parent.name).mkdir()
        shutil.copyfile(trained, out / trained.parent.name / trained.name)


def read(bench: Bench, run: Run, seed: int) -> Readings:
    """Every reading of a policy."""
    policy, config = run.policy, bench.config
    wanted = [
        (domain, passages[:most], decoder, prefixes[:most])
        for domain, passages, prefixes in _domains(bench)
        for decoder in (bench.decoders(seed) if domain == bench.domain else ["greedy"])
        for most in [len(passages) if decoder == "greedy" else config.decoder_prefixes]
    ]
    continued = bench.continued(policy, [(decoder, prefixes) for _, _, decoder, prefixes in wanted])
    texts = [
        _text_rows(passages, domain, decoder, each)
        for (domain, passages, decoder, _), each in zip(wanted, continued, strict=True)
    ]
    budgets = dict.fromkeys(config.domains, config.other_tokens) | {bench.domain: config.test_tokens}
    rows = {
        domain: bench.library.rows("test", domain, config.row_tokens, budget, 0)
        for domain, budget in budgets.items()
        if budget
    }
    single = single_token(logits_of(policy), [row for row, _ in rows[bench.domain]])
    nats = [
        (bench.domain, group, tokens, sum_)
        for (_, group), tokens, sum_ in zip(rows[bench.domain], single.row_tokens, single.row_nats, strict=True)
    ]
    for domain in [each for each in rows if each != bench.domain]:
        nats += [(domain, group, len(row) - 1, float(row_nats(policy, row).sum())) for row, group in rows[domain]]
    of_text = pl.DataFrame(nats, schema=["domain", "group", "tokens", "nats"], orient="row")
    truncated = pl.DataFrame([{"truncation": name, **asdict(each)} for name, each in single.truncated.items()])
    tables = (pl.concat(texts), of_text, _sentences(bench, policy), _single_row(single), truncated)
    return Readings(
        history_of(seed, run.trained),
        validations_of(seed, run.trained),
        *(table.with_columns(pl.lit(seed, pl.Int32).alias("seed")) for table in tables),
    )


def _single_row(single: SingleToken) -> pl.DataFrame:
    rep, wrep, human_rep = single.average_rep
    names = ("ppl", "acc", "hits_10", "mean_rank", "median_rank", "uniq", "human_uniq")
    row = {name: getattr(single, name) for name in names} | {"rep": rep, "wrep": wrep, "human_rep": human_rep}
    for name in ("rep", "wrep", "human_rep"):
        row |= {f"{name}_{window}": value for window, value in getattr(single, name).items()}
    return pl.DataFrame([row])


def human(bench: Bench) -> pl.DataFrame:
    """The reference rows: what people wrote after the same prefixes, at equal lengths; columns of `Readings.texts`."""
    tables = []
    for domain, passages, prefixes in _domains(bench):
        tables.append(_text_rows(passages, domain, "human", passages.tokens[:, prefixes.shape[1] :]))
    return pl.concat(tables)


def logits_of(policy: Policy) -> Callable[[Int[Tensor, " seq"]], Float[Tensor, "seq vocab"]]:
    """Teacher-forced logits of a row, in fp32, where the model is."""

    def logits(row: Int[Tensor, " seq"]) -> Float[Tensor, "seq vocab"]:
        ids = row[None].to(policy.device)
        places = torch.arange(len(row), device=policy.device)[None]
        with torch.no_grad():
            return policy.logits(policy.hidden(ids, torch.ones_like(ids), places)[0]).float()

    return logits


def _domains(bench: Bench) -> Iterator[tuple[str, Passages, Int[Tensor, "texts prefix"]]]:
    for domain in bench.config.domains:
        if domain == bench.domain or bench.config.other_prefixes:
            passages = bench.passages(domain)
            yield domain, passages, passages.tokens[:, : bench.config.prefix_tokens]


def _text_rows(passages: Passages, domain: str, decoder: str, tokens: Int[Tensor, "texts tokens"]) -> pl.DataFrame:
    prefixes = passages.tokens[:, : passages.tokens.shape[1] - tokens.shape[1]]
    return pl.DataFrame(
        {
            "domain": [domain] * len(passages), "decoder": [decoder] * len(passages),
            "text": list(range(len(passages))), "group": passages.group, "document": passages.document,
            "prefix": prefixes.tolist(), "tokens": tokens.tolist(),
        },
        schema_overrides={"text": pl.Int32, "prefix": pl.List(pl.Int32), "tokens": pl.List(pl.Int32)},
    )  # fmt: skip


def _sentences(bench: Bench, policy: Policy) -> pl.DataFrame:
    chosen = sentences(bench)
    schema = {"sentence": pl.Int32, "repeat": pl.Int32, "probability": pl.Float64}
    if not chosen:
        return pl.DataFrame(schema=schema)

    def nats_of(ids: list[int]) -> Float[Tensor, " tokens"]:
        return row_nats(policy, torch.tensor(ids))

    found = sentence_probability(nats_of, chosen, bench.config.repeats)
    rows = [(i, r + 1, p) for i, row in enumerate(found.tolist()) for r, p in enumerate(row)]
    return pl.DataFrame(rows, schema=schema, orient="row")


def sentences(bench: Bench) -> list[list[int]]:
    """Held-out sentences of a few tokens: the second one of a block, for the first may be torn."""
    found: list[list[int]] = []
    length = min(bench.config.prefix_tokens * 3, 128)
    for tokens in bench.library.passages("test", bench.domain, length, 1_000, 2).tokens.tolist():
        texts = str(bench.tokenizer.decode(tokens)).replace("\n", " ").split(". ")
        if len(texts) > 2:
            ids = bench.tokenizer(" " + texts[1].strip() + ".", add_special_tokens=False)["input_ids"]
            if SENTENCE_TOKENS[0] <= len(ids) <= SENTENCE_TOKENS[1]:
                found.append(ids)
        if len(found) >= bench.config.sentences:
            break
    return found[: bench.config.sentences]


def repetition_of(texts: pl.DataFrame) -> pl.DataFrame:
    """A row for each domain, decoder and seed of `Readings.texts`: mean seq-rep-1 to -4 of token ids, and as `loops`
    the share of continuations that end in one unit at least three times."""
    rows = []
    for (domain, decoder, seed), some in texts.group_by("domain", "decoder", "seed", maintain_order=True):
        tokens = stacked(some)
        found = {f"seq_rep_{n}": seq_rep(tokens, n).nanmean().item() for n in (1, 2, 3, 4)}
        loops = periodic_tail(tokens).double().mean().item()
        rows.append({"domain": domain, "decoder": decoder, "seed": seed, **found, "loops": loops})
    return pl.DataFrame(rows)


def longest_repeats(texts: pl.DataFrame, decoders: Sequence[str]) -> dict[str, list[int]]:
    """Tokens of the longest stretch that stands twice in each text, by decoder."""
    of = {decoder: stacked(texts.filter(pl.col("decoder") == decoder)) for decoder in decoders}
    return {decoder: longest_repeat(tokens).tolist() for decoder, tokens in of.items()}


def perplexities(nats: pl.DataFrame) -> pl.DataFrame:
    """Perplexity of held-out text for each domain and seed."""
    by = nats.group_by("domain", "seed", maintain_order=True)
    mean = (pl.col("nats").sum() / pl.col("tokens").sum()).exp().alias("perplexity")
    return by.agg(mean, pl.col("tokens").sum())


def most_repetitive(texts: pl.DataFrame) -> Int[Tensor, " tokens"]:
    """The text of the largest seq-rep-4."""
    tokens = stacked(texts)
    return tokens[int(seq_rep(tokens, 4).argmax())]


def bracketed(tokenizer: PreTrainedTokenizerBase, tokens: Int[Tensor, " tokens"], mask: Bool[Tensor, " tokens"]) -> str:
    """The text with what is masked between ⟦ and ⟧, and nothing in it that a terminal or a page would act on."""
    parts, start = [], 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or mask[end] != mask[start]:
            text = visible(str(tokenizer.decode(tokens[start:end].tolist())))
            parts.append(f"⟦{text}⟧" if mask[start] else text)
            start = end
    return "".join(parts)
