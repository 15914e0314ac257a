"""Training on recall and on text: it learns, it resumes to the same weights, its readings are what they say."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from trimtab.errors import InputError
from trimtab.rebased import mqar_training, pretraining
from trimtab.rebased.mqar import IGNORED, recall
from trimtab.rebased.mqar_training import MQARConfig, jobs, recalled, train_recall
from trimtab.rebased.pretraining import ARMS, PretrainConfig, by_position, pretrain, reading, token_losses

SMALL = MQARConfig(
    vocabulary=32, time=16, pairs=2, d_model=16, widths=(4,), steps=6, batch=4, valid_rows=8, test_rows=8, readings=3
)
TEXT = PretrainConfig(
    vocabulary=16, block_tokens=12, d_model=16, heads=2, d_k=4, window=4, mlp=24, tokens=480, batch=4, readings=5
)


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
        _, run = train_recall(config, "softmax", 4, 1e-2, seed=0)
        assert run.accuracy > 0.9
        assert run.history[-1]["accuracy"] > run.history[0]["accuracy"]
        assert run.state == 0

    def test_it_goes_on_where_it_was_killed(self, tmp_path, monkeypatch):
        whole, run = train_recall(SMALL, "rebased", 4, 1e-2, seed=0)
        with monkeypatch.context() as patched:
            interrupted(patched, mqar_training, 3)
            with pytest.raises(KeyboardInterrupt):
                train_recall(SMALL, "rebased", 4, 1e-2, seed=0, checkpoint=tmp_path / "run")
        again, resumed = train_recall(SMALL, "rebased", 4, 1e-2, seed=0, checkpoint=tmp_path / "run")
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
        assert resumed.history == run.history
        assert resumed.accuracy == run.accuracy

    def test_pairs_grow_to_all_of_them_in_the_first_half(self):
        config = replace(SMALL, time=128, pairs=32, vocabulary=512, steps=100)
        pairs = [config.pairs_at(step) for step in range(100)]
        assert sorted(set(pairs)) == [4, 8, 16, 32]
        assert pairs == sorted(pairs)
        assert pairs[50:] == [32] * 50

    def test_only_queries_count(self):
        model, _ = train_recall(replace(SMALL, steps=1), "based", 4, 1e-2, seed=0)
        rows = recall(6, 16, 2, 32, torch.Generator().manual_seed(1))
        logits = model(rows.inputs)
        whole = F.cross_entropy(logits.flatten(0, 1), rows.labels.flatten(), ignore_index=IGNORED)
        assert mqar_training.recall_loss(model, rows).item() == pytest.approx(whole.item(), rel=1e-5)
        at = rows.labels != IGNORED
        assert recalled(model, rows, batch=4).tolist() == (logits.argmax(-1) == rows.labels)[at].tolist()

    def test_the_grid_is_the_same_for_every_arm(self):
        config = replace(SMALL, arms=("rebased", "softmax"), widths=(2, 4), learning_rates=(1e-3, 1e-2), seeds=(0, 1))
        found = jobs(config)
        assert len([job for job in found if job[0] == "rebased"]) == 8
        assert {job[2:] for job in found if job[0] == "softmax"} == {job[2:] for job in found if job[0] == "rebased"}

    def test_settings_that_cannot_be_are_named(self):
        with pytest.raises(InputError, match="pairs need rows"):
            replace(SMALL, pairs=9)
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
        found = reading(losses, blocks)
        assert found["overall"] == pytest.approx(math.exp(whole.item()), rel=1e-5)
        mixed = found["share_recalled"] * math.log(found["recalled"])
        mixed += (1 - found["share_recalled"]) * math.log(found["others"])
        assert mixed == pytest.approx(whole.item(), rel=1e-5)
        table = by_position(losses, bins=4)
        assert table["nats"].mean() == pytest.approx(whole.item(), rel=1e-5)
        assert table["position"].to_list() == [1.5, 4.5, 7.5, 10.5]

    def test_the_sweep_takes_the_rate_of_least_loss(self):
        losses = {1e-3: 3.0, 1e-2: 2.0, 1e-1: math.nan}
        run = lambda rate: SimpleNamespace(history=[{"valid": losses[rate]}])  # noqa: E731
        assert pretraining.sweep(run, list(losses))[0] == 1e-2
        with pytest.raises(InputError, match="trains"):
            pretraining.sweep(run, [1e-1])
