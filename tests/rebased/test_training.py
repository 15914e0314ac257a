"""Training on recall and on text: it learns, it resumes to the same weights, its readings are what they say."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models

from trimtab.errors import InputError
from trimtab.launch import CHECKPOINT, each
from trimtab.rebased import mqar_training, pretraining
from trimtab.rebased.model import LanguageModel
from trimtab.rebased.mqar import IGNORED, recall
from trimtab.rebased.mqar_training import Job, MQARConfig, jobs, recalled, train_recall
from trimtab.rebased.pretraining import ARMS, PretrainConfig, by_block, by_position, pretrain, spread, token_losses
from trimtab.rebased.text import Text, recalls

SMALL = MQARConfig(
    vocabulary=32,
    tasks=((16, 2),),
    d_models=(16,),
    widths=(4,),
    steps=6,
    batch=4,
    valid_rows=8,
    test_rows=8,
    readings=3,
)
TEXT = PretrainConfig(
    vocabulary=16, block_tokens=12, d_model=16, heads=2, d_k=4, window=4, mlp=24, tokens=480, batch=4, readings=5
)


def job(arm: str) -> Job:
    return Job(arm, 16, 2, 16, 4, 1e-2, 0)


def interrupted(monkeypatch, module, after):
    """Checkpoints at every step, and a kill at one of them."""
    monkeypatch.setattr(module, "SAVE_EVERY", -1.0)
    real, calls = module.Checkpoint.save, []

    def save(self, *arguments):
        real(self, *arguments)
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Checkpoint, "save", save)


class TestRecall:
    def test_a_model_learns_it(self):
        config = replace(SMALL, steps=900, batch=32, learning_rates=(1e-2,), test_rows=100)
        _, run = train_recall(config, job("softmax"))
        assert run.accuracy > 0.9
        assert run.history[-1]["accuracy"] > run.history[0]["accuracy"]
        assert run.state == 0

    def test_it_goes_on_where_it_was_killed(self, tmp_path, monkeypatch):
        whole, run = train_recall(SMALL, job("rebased"))
        with monkeypatch.context() as patched:
            interrupted(patched, mqar_training, 3)
            with pytest.raises(KeyboardInterrupt):
                train_recall(SMALL, job("rebased"), checkpoint=tmp_path / "run")
        again, resumed = train_recall(SMALL, job("rebased"), checkpoint=tmp_path / "run")
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
        assert resumed.history == run.history
        assert resumed.accuracy == run.accuracy

    def test_a_job_gives_the_run_as_plain_numbers(self, tmp_path):
        _, run = train_recall(SMALL, job("rebased"))
        found = mqar_training.run_job(SMALL, "cpu", *job("rebased"), place=tmp_path)
        assert found == job("rebased")._asdict() | {
            "history": run.history, "accuracy": run.accuracy, "state": run.state
        }  # fmt: skip
        assert (tmp_path / CHECKPOINT).is_file()

    def test_pairs_grow_to_all_of_them_in_the_first_half(self):
        config = replace(SMALL, steps=100)
        pairs = [config.pairs_at(step, 32) for step in range(100)]
        assert sorted(set(pairs)) == [4, 8, 16, 32]
        assert pairs == sorted(pairs)
        assert pairs[50:] == [32] * 50

    def test_only_queries_count(self):
        model, _ = train_recall(replace(SMALL, steps=1), job("based"))
        rows = recall(6, 16, 2, 32, torch.Generator().manual_seed(1))
        logits = model(rows.inputs)
        whole = F.cross_entropy(logits.flatten(0, 1), rows.labels.flatten(), ignore_index=IGNORED)
        assert mqar_training.recall_loss(model, rows).item() == pytest.approx(whole.item(), rel=1e-5)
        at = rows.labels != IGNORED
        assert recalled(model, rows, batch=4).tolist() == (logits.argmax(-1) == rows.labels)[at].tolist()

    def test_the_grid_is_the_same_for_every_arm(self):
        config = replace(SMALL, arms=("rebased", "softmax"), widths=(2, 4), learning_rates=(1e-3, 1e-2), seeds=(0, 1))
        found = jobs(config)
        assert len([each for each in found if each.arm == "rebased"]) == 8
        assert {each[5:] for each in found if each.arm == "softmax"} == {
            each[5:] for each in found if each.arm == "rebased"
        }

    def test_settings_that_cannot_be_are_named(self):
        with pytest.raises(InputError, match="pairs need rows"):
            replace(SMALL, tasks=((16, 9),))
        with pytest.raises(InputError, match="learning_rates"):
            replace(SMALL, learning_rates=())


@pytest.fixture(scope="module")
def blocks():
    return torch.randint(0, 4, (40, 13), generator=torch.Generator().manual_seed(0))


class TestText:
    @pytest.mark.parametrize("arm", ARMS)
    def test_every_arm_learns_which_tokens_there_are(self, arm, blocks):
        run = pretrain(replace(TEXT, tokens=4800), arm, blocks, blocks[:8], learning_rate=1e-2, seed=0)
        assert run.history[-1]["valid"] < math.log(4) + 0.1 < math.log(16)
        assert run.history[-1]["tokens"] == 4800

    def test_it_goes_on_where_it_was_killed(self, blocks, tmp_path, monkeypatch):
        options = {"learning_rate": 1e-2, "seed": 1}
        whole = pretrain(TEXT, "rebased", blocks, blocks[:8], **options)
        with monkeypatch.context() as patched:
            interrupted(patched, pretraining, 2)
            with pytest.raises(KeyboardInterrupt):
                pretrain(TEXT, "rebased", blocks, blocks[:8], checkpoint=tmp_path / "run", **options)
        again = pretrain(TEXT, "rebased", blocks, blocks[:8], checkpoint=tmp_path / "run", **options)
        assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
        assert again.history == whole.history

    def test_readings_are_means_of_token_losses(self, blocks):
        model = pretrain(TEXT, "based", blocks, blocks[:8], learning_rate=1e-2, seed=0).model
        losses = token_losses(model, blocks, batch=7)
        logits = model(blocks[:, :-1])
        whole = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        assert losses.mean().item() == pytest.approx(whole.item(), rel=1e-5)
        again = recalls(blocks, 16)
        found = by_block(losses, again)
        assert found["recalled"].to_list() == again.sum(1).tolist()
        assert found["recalled_nats"][3] == pytest.approx(losses[3][again[3]].sum().item(), rel=1e-5)
        total = (found["recalled_nats"] + found["others_nats"]).sum() / (found["recalled"] + found["others"]).sum()
        assert total == pytest.approx(whole.item(), rel=1e-5)
        table = by_position(losses, bins=4)
        assert table["nats"].mean() == pytest.approx(whole.item(), rel=1e-5)
        assert table["position"].to_list() == [1.5, 4.5, 7.5, 10.5]

    def test_blocks_are_spread_evenly(self):
        assert spread(10, 4).tolist() == [0, 3, 6, 9]
        assert spread(3, 8).tolist() == [0, 1, 2]

    def test_the_sweep_takes_the_rate_of_least_loss(self):
        assert pretraining.best_rate({1e-3: 3.0, 1e-2: 2.0, 1e-1: math.nan}) == 1e-2
        with pytest.raises(InputError, match="trains"):
            pretraining.best_rate({1e-1: math.nan})

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_job_leaves_the_model_of_the_run_in_this_process_or_another(self, blocks, tmp_path, workers):
        tokens = {split: blocks[:, 1:].flatten().int() for split in ("train", "val", "test")}
        groups = {split: torch.zeros(1, dtype=torch.int32) for split in tokens}
        Text(tokens, groups, dict.fromkeys(tokens, 1), 16).save(tmp_path / "text", Tokenizer(models.BPE()))
        job = ("rebased", 1e-2, 1, 960)
        run = partial(pretraining.run_job, TEXT, str(tmp_path / "text"), "cpu")
        (found,) = each(run, [job], tmp_path / "jobs", workers=workers, places=True)
        kept, history = LanguageModel.load(tmp_path / "jobs" / found["model"]), found["history"]
        source = Text.load(tmp_path / "text")
        cut, valid = (source.blocks(split, TEXT.block_tokens) for split in ("train", "val"))
        valid = valid[spread(len(valid), TEXT.valid_blocks)]
        same = pretrain(TEXT, "rebased", cut, valid, learning_rate=1e-2, seed=1, tokens=960)
        assert [row["step"] for row in history] == [row["step"] for row in same.history]
        torch.testing.assert_close(history[-1]["valid"], same.history[-1]["valid"], atol=1e-4, rtol=1e-4)
        for name, weight in same.model.state_dict().items():
            torch.testing.assert_close(kept.state_dict()[name], weight, atol=1e-3, rtol=1e-3)
