"""A run is taken up where all that decides its bits is the same, and begun anew where anything differs; then what was
there is kept, told of, and taken up again when its own inputs return. The same of every kind of training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, models
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.repetition.conftest import corpus_folder  # noqa: F401 (a fixture)
from trimtab.activations import ActivationCache
from trimtab.activations.writing import write_cache
from trimtab.corpus import Blocks
from trimtab.interventions import wrap
from trimtab.launch import each
from trimtab.pretrained import load_model
from trimtab.rebased import mqar_training, pretraining
from trimtab.rebased.model import LanguageModel
from trimtab.rebased.mqar_training import MQARConfig
from trimtab.rebased.pretraining import PretrainConfig
from trimtab.rebased.text import Text
from trimtab.repetition import experiment as repeating
from trimtab.repetition import reading
from trimtab.repetition import training as repetition_training
from trimtab.repetition.config import RepetitionConfig
from trimtab.rl import training as rl_training
from trimtab.rl.config import RLConfig
from trimtab.rl.tasks import Task
from trimtab.sae import Arm, Run, SAEConfig
from trimtab.sae import training as sae_training
from trimtab.steering import experiment as steering
from trimtab.steering.arms import Arm as SteeringArm
from trimtab.steering.config import SteeringConfig

Outcome = list[Any]
"""Tensors and numbers that must agree to the bit."""


class Steps:
    """Counts optimiser steps, and raises KeyboardInterrupt in place of the one after `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.taken, self.stop = 0, stop

    def __enter__(self) -> "Steps":
        self.hook = register_optimizer_step_pre_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _count(self, *_: object) -> None:
        if self.taken == self.stop:
            raise KeyboardInterrupt
        self.taken += 1


@dataclass(frozen=True)
class Kind:
    """A kind of training: how it is run with inputs called `a`, or with one of them changed."""

    run: Callable[[Path, str], Outcome]
    changes: tuple[str, ...]
    stop: int
    """Optimiser steps before the interruption, some of them in a checkpoint."""


def equal(one: Outcome, other: Outcome) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


def weights(module: Any) -> Outcome:
    return [tensor.detach().clone() for tensor in module.state_dict().values()]


@pytest.fixture(scope="module")
def folders(tiny_llama, tokenizer, documents, blocks_file, cache_config, tmp_path_factory):
    """Two models of one size, two texts of one length, two caches of one shape: whatever is known by its length, name
    or time is taken for the other."""
    root = tmp_path_factory.mktemp("inputs")
    for name, factor in (("model", 1.0), ("other", -1.0)):
        tiny_llama.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        model = load_model(root / name)
        with torch.no_grad():
            model.lm_head.weight.mul_(15)
            model.model.embed_tokens.weight.mul_(factor)
        model.save_pretrained(root / name)
        wrapped, blocks = wrap(model, tokenizer), Blocks(blocks_file, "train", 2000)
        write_cache(root / f"cache-{name}", wrapped, blocks, cache_config, identity={"model": "one"}, bos=0, pad=1)
    for name, seed in (("text", 0), ("changed", 1)):
        drawn = torch.randint(0, 8, (600,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        tokens = {split: drawn.clone() for split in ("train", "val", "test")}
        groups = {split: torch.zeros(1, dtype=torch.int32) for split in tokens}
        Text(tokens, groups, dict.fromkeys(tokens, 1), 16).save(root / name, Tokenizer(models.BPE()))
    return root


@pytest.fixture(scope="module")
def corpora(corpus_folder, tmp_path_factory):  # noqa: F811
    """A corpus, and one of the same lengths whose tokens are others."""
    other = tmp_path_factory.mktemp("other-corpus")
    for name in ("documents", "sources"):
        (other / f"{name}.parquet").write_bytes((corpus_folder / f"{name}.parquet").read_bytes())
    blocks = pl.read_parquet(corpus_folder / "blocks.parquet")
    blocks.with_columns(pl.col("tokens").list.eval((pl.element() + 1) % 258)).write_parquet(other / "blocks.parquet")
    return corpus_folder, other


def sae(folders: Path, folder: Path, what: str) -> Outcome:
    config = SAEConfig(latents=64, batch=64, budgets=(1, 2, 4), precision="float32", learning_rates=(1e-4,))
    config = replace(config, dead_after=300) if what == "config" else replace(config, dead_after=10_000)
    cache = ActivationCache(folders / ("cache-other" if what == "data" else "cache-model"), 0)
    runs = [Run(Arm.parse("topk-4"), 2e-4)]
    (trained,) = sae_training.train(runs, config, cache, steps=24, seed=0, checkpoint=folder / "run")
    return [*weights(trained.sae), trained.history]


def rl(folders: Path, folder: Path, what: str) -> Outcome:
    built = SteeringArm("steering").policy(str(folders / ("other" if what == "model" else "model")), **POLICY)
    prompts = [[7 + i, 6 + i, 5 + 2 * (what == "data")] for i in range(6)]
    config = RLConfig(updates=6, prompts=3, group=6, max_new_tokens=3, temperature=0.5 if what == "config" else 1.0)
    history = rl_training.train(
        built.policy, prompts, rewarded, config, learning_rate=0.05, seed=0, checkpoint=folder / "run",
        end=range(0, 258, 2) if what == "end" else [1], identity={"answers": what == "identity"},
    )  # fmt: skip
    return [*weights(built.vectors), [update.reward for update in history]]


def rewarded(_, drawn):
    return (drawn.completions[:, :, 0] % 4 == 1).float()


POLICY: dict[str, Any] = {"dtype": "float32", "device": "cpu"}


class Obliging(Task):
    """A task whose answers a random model finds now and then: replies of an even length."""

    divisor = 2

    def _ordered(self, split, order):
        raise NotImplementedError

    def reward(self, completion, item):
        return float(len(completion) % self.divisor == 0)


class Other(Obliging):
    divisor = 3


def sweep(folders: Path, folder: Path, what: str) -> Outcome:
    rates = (0.01, 0.1) if what == "grid" else (0.02, 0.1, 1.0)
    config = SteeringConfig(
        task="sum", train_items=12, test_items=4, other_items=0, learning_rates=rates, sweep_updates=2, seeds=(0,),
        updates=4, prompts=3, group=8, max_new_tokens=8, read_tokens=3, dtype="float32",
    )  # fmt: skip
    config = replace(config, task="product") if what == "task" else config
    bench = steering.Bench.of("steering", config, str(folders / ("other" if what == "model" else "model")), "cpu")
    judge = (Other if what == "judge" else Obliging)(name="obliging", instruction="")
    bench = replace(bench, questions=replace(bench.questions, task=judge))
    found = steering.sweep(bench, folder)
    return [*weights(found.run.built.vectors), dict(found.short), dict(found.whole)]


def repetition(folders: Path, corpora: tuple[Path, Path], folder: Path, what: str) -> Outcome:
    config = RepetitionConfig(
        updates=4, prefixes=2, prefix_tokens=8, tokens=10, n=2, readings=2, learning_rates=(1e-3, 3e-3),
        adapter_rate_factor=10.0, seeds=(0, 1), val_prefixes=3, val_tokens=100, test_prefixes=5, decoder_prefixes=4,
        other_prefixes=0, test_tokens=300, other_tokens=0, row_tokens=100, decoders=("greedy",), once_decoders=(),
        base_decoders=(), sentences=0, dtype="float32", rollout_temperature=1.0 if what == "config" else 0.0,
    )  # fmt: skip
    model = folders / ("other" if what == "model" else "model")
    bench = repeating.Bench.of("implicit-steering", config, str(model), str(corpora[what == "data"]), "cpu")
    found = repeating.sweep(bench, bench.policy(), folder)
    readings = reading.read_all(bench, found, folder)
    return [found.table.rows(), found.untrained, readings.texts.rows(), readings.nats.rows(), readings.history.rows()]


def recall(folder: Path, what: str) -> Outcome:
    config = MQARConfig(
        arms=("rebased",), vocabulary=32, tasks=((16, 2),), d_models=(16,), widths=(4,), steps=6, batch=4,
        valid_rows=8, test_rows=8, readings=3, weight_decay=0.2 if what == "config" else 0.1,
    )  # fmt: skip
    job = mqar_training.Job("rebased", 16, 2, 16, 4, 1e-2, 0)
    return each(partial(mqar_training.run_job, config, "cpu"), [tuple(job)], folder, places=True)


def pretrain(folders: Path, folder: Path, what: str) -> Outcome:
    config = PretrainConfig(
        vocabulary=16, block_tokens=12, d_model=16, heads=2, d_k=4, window=4, mlp=24, tokens=384, batch=4, readings=8,
        valid_blocks=4, weight_decay=0.2 if what == "config" else 0.1,
    )  # fmt: skip
    text = folders / ("changed" if what == "data" else "text")
    run = partial(pretraining.run_job, config, str(folders / "linked"), "cpu")
    link(folders / "linked", text)
    (found,) = each(run, [("rebased", 1e-2, 1, 384)], folder, identity={"text": text}, places=True)
    return [found["history"], *weights(LanguageModel.load(folder / found["model"]))]


def link(path: Path, target: Path) -> None:
    """The same name for either text: a text is known by its contents."""
    path.unlink(missing_ok=True)
    path.symlink_to(target, target_is_directory=True)


@pytest.fixture
def kind(request, folders, corpora, monkeypatch):
    for module in (sae_training, rl_training, repetition_training, mqar_training, pretraining):
        monkeypatch.setattr(module, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(steering.Bench, "end", list(range(0, 258, 2)))
    return {
        "sae": Kind(partial(sae, folders), ("data", "config", "threads"), 11),
        "rl": Kind(partial(rl, folders), ("data", "model", "config", "end", "identity", "threads"), 3),
        "sweep": Kind(partial(sweep, folders), ("task", "judge", "grid"), 5),
        "repetition": Kind(partial(repetition, folders, corpora), ("data", "model", "config"), 6),
        "recall": Kind(recall, ("config", "threads"), 4),
        "pretrain": Kind(partial(pretrain, folders), ("data", "config", "threads"), 5),
    }[request.param]


def run(kind: Kind, folder: Path, what: str, stop: int | None = None) -> tuple[Outcome, int]:
    """What comes out, and how many optimiser steps it took."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if what == "threads" else 1)
    try:
        with Steps(stop) as steps:
            return kind.run(folder, what), steps.taken
    finally:
        torch.set_num_threads(before)


SILENT = ("threads", "identity")
"""Changes that need not show in results so small."""
KINDS = ["sae", "rl", "sweep", "repetition", "recall", "pretrain"]


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_an_interrupted_run_is_no_one_elses_and_waits_for_its_own_inputs(kind, tmp_path, capfd):
    wanted, whole = run(kind, tmp_path / "fresh-a", "a")
    with pytest.raises(KeyboardInterrupt):
        run(kind, tmp_path / "shared", "a", kind.stop)
    for what in kind.changes:
        fresh, count = run(kind, tmp_path / f"fresh-{what}", what)
        assert what in SILENT or not equal(fresh, wanted), f"{what} changes nothing: the test tests nothing"
        capfd.readouterr()
        found, taken = run(kind, tmp_path / "shared", what)
        assert equal(found, fresh), f"with another {what} something of the old run was taken up"
        assert taken == count
        told = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "is of another run" in line]
        assert told, f"nothing was said of another {what}"
        assert what != "threads" or "threads" in told[0]
    again, taken = run(kind, tmp_path / "shared", "a")
    assert equal(again, wanted)
    assert 0 < taken < whole, "the first run's progress was lost"


@pytest.mark.parametrize("kind", ["sweep", "repetition", "recall", "pretrain"], indirect=True)
def test_finished_results_come_back_without_a_step(kind, tmp_path):
    wanted, _ = run(kind, tmp_path, "a")
    run(kind, tmp_path, kind.changes[0])
    again, taken = run(kind, tmp_path, "a")
    assert equal(again, wanted), "a result came with what another run had left"
    assert taken == 0


@pytest.mark.parametrize("kind", ["recall", "pretrain"], indirect=True)
def test_a_jobs_checkpoint_goes_when_its_result_is_kept(kind, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(kind, tmp_path, "a", kind.stop)
    assert len(list(tmp_path.rglob("checkpoint.safetensors"))) == 1
    run(kind, tmp_path, "a")
    assert not list(tmp_path.rglob("checkpoint.safetensors"))
