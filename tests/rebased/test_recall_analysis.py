"""Which runs are compared, and what a trained mixer looks at: by hand."""

import numpy as np
import polars as pl
import pytest
import torch

from trimtab.errors import InputError
from trimtab.plots import figure
from trimtab.rebased import recall_analysis as analysis
from trimtab.rebased.mixers import PolynomialAttention
from trimtab.rebased.model import LanguageModel, ModelConfig
from trimtab.rebased.mqar import IGNORED, Recall, recall
from trimtab.rebased.mqar_training import Job


def run(arm, width, rate, seed, valid, accuracy, state, pairs=4):
    job = Job(arm, 4 * pairs, pairs, 8, width, rate, seed)._asdict()
    history = [{"step": 1, "loss": 1.0, "accuracy": 0.0}, {"step": 2, "loss": 0.5, "accuracy": valid}]
    return job | {"history": history, "accuracy": accuracy, "state": state}


RUNS = [
    *(run("rebased", width, rate, seed, valid, valid - 0.1, 10 * width)
      for width in (2, 4) for rate, valid in ((0.1, 0.9), (0.2, 0.4 + width / 8)) for seed in (0, 1)),
    *(run("softmax", 2, rate, seed, 0.5, 0.6 + seed / 10, 0) for rate in (0.2, 0.1) for seed in (0, 1)),
]  # fmt: skip
"""ReBased is better at rate 0.1 with d_k = 2 (0.9 > 0.65), and at d_k = 4 as well (0.9 = 0.9: the lower of equals)."""


class TestGrid:
    runs = analysis.table_of(RUNS)

    def test_each_cell_takes_its_best_rate_by_validation_the_lowest_of_equals(self):
        best = analysis.chosen(self.runs)
        assert best["learning_rate"].unique().to_list() == [0.1]
        assert len(best) == 6
        worse = self.runs.with_columns(
            pl.when((pl.col("width") == 4) & (pl.col("learning_rate") == 0.2))
            .then(0.95)
            .otherwise("valid")
            .alias("valid")
        )
        rates = analysis.summary(worse).filter(pl.col("arm") == "rebased").sort("width")["learning_rate"].to_list()
        assert rates == [0.1, 0.2]

    def test_cells_by_state_and_their_seeds(self):
        tight, roomy = analysis.tightest(self.runs), analysis.tightest(self.runs, roomiest=True)
        assert tight == {"time": 16, "pairs": 4, "d_model": 8, "width": 2}
        assert roomy["width"] == 4
        assert analysis.accuracies(self.runs, "rebased", tight) == pytest.approx([0.8, 0.8])
        assert analysis.accuracies(self.runs, "softmax", roomy) == pytest.approx([0.6, 0.7]), "it has one width for all"
        assert self.runs["per_pair"].max() == 10
        with pytest.raises(InputError, match="based was not run"):
            analysis.accuracies(self.runs, "based", tight)

    def test_cells_that_nobody_learns_are_not_compared(self):
        hopeless = [run(arm, 1, 0.1, seed, 0.1, 0.1, 5) for arm in ("rebased", "based") for seed in (0, 1)]
        assert analysis.tightest(analysis.table_of([*RUNS, *hopeless]))["width"] == 2
        ours, theirs = hopeless[:2], [run("based", 1, 0.1, seed, 0.3, 0.3, 5) for seed in (0, 1)]
        assert analysis.tightest(analysis.table_of([*RUNS, *ours, *theirs]))["width"] == 1
        plateau = analysis.table_of(hopeless)
        cell = analysis.tightest(plateau)
        assert not analysis.learnt(plateau, cell)
        assert analysis.interval(plateau, cell, np.array([0.0, 0.01])) == (pytest.approx(0.005), -np.inf, np.inf)
        assert analysis.interval(self.runs, analysis.tightest(self.runs), np.array([0.0, 0.01]))[1] > -1
        with pytest.raises(InputError, match="must hold rebased"):
            analysis.tightest(self.runs.filter(pl.col("arm") == "softmax"))

    def test_what_is_the_same_throughout_is_not_shown(self):
        assert "d_model" not in analysis.readable(self.runs).columns
        assert {"arm", "width"} <= set(analysis.readable(self.runs).columns)

    def test_figures_show_every_arm(self):
        _, (left, right) = figure(2)
        analysis.plot_accuracy(left, self.runs)
        analysis.plot_curves(right, self.runs, RUNS, analysis.tightest(self.runs))
        assert [text.get_text() for text in left.get_legend().get_texts()] == ["rebased", "softmax"]
        assert len(right.lines) == 4, "two seeds of each arm, of one width and the best rate"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(32, 16, ("conv", "rebased"), heads=2, d_k=4, positions=16))


def test_the_map_is_what_the_mixer_computes_with(model):
    rows = recall(3, 16, 2, 32, torch.Generator().manual_seed(0))
    seen = []
    mixer = analysis.last_polynomial(model)
    handle = mixer.out.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0],)))
    block = mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with torch.no_grad():
        model.hidden(rows.inputs)
    handle.remove()
    block.remove()
    weights = analysis.attention_map(model, rows)
    assert torch.equal(weights, weights.tril())
    values = mixer.v(seen[0][0]).unflatten(-1, (2, -1))
    mixed = torch.einsum("bhij,bjhd->bihd", weights, values).flatten(-2)
    torch.testing.assert_close(mixed, seen[1][0], rtol=1e-4, atol=1e-5)


def test_a_model_without_polynomial_attention_is_named():
    with pytest.raises(InputError, match="no polynomial attention"):
        analysis.last_polynomial(LanguageModel(ModelConfig(8, 8, ("conv",))))


def test_overlap_by_hand():
    labels = torch.tensor([[IGNORED, IGNORED, IGNORED, IGNORED, 5, 6]])
    rows = Recall(torch.tensor([[1, 5, 2, 6, 1, 2]]), labels)
    weights = torch.zeros(1, 1, 6, 6)
    weights[0, 0, 4] = torch.tensor([0.1, 0.6, 0.4, 0.0, 0.0, 0.0])  # looks at places 1 and 2, answer at 1: 1/2
    weights[0, 0, 5] = torch.tensor([0.9, 0.1, 0.0, 0.0, 0.0, 0.0])  # looks at 0, answer at 3: 0/2
    assert analysis.overlap(weights, rows) == pytest.approx(0.25)


def test_the_shape_of_a_kernel():
    """Based's weight depends on the angle alone: 1 + s + s^2 / 2 with s = sqrt(d_k) cos, over that at cos = 1."""
    table = analysis.kernel_shape(PolynomialAttention(8, 1, 4, arm="based"))
    s = 4**0.5 * torch.tensor(table["cosine"].to_list())
    expected = (1 + s + s**2 / 2) / 5
    torch.testing.assert_close(torch.tensor(table["median"].to_list()), expected, rtol=1e-3, atol=1e-3)
    mixer = PolynomialAttention(8, 1, 4)
    assert min(analysis.kernel_shape(mixer)["median"]) == pytest.approx(0, abs=1e-3)
    with torch.no_grad():
        mixer.gamma_q.mul_(3)
    found = {row["parameter"]: row for row in analysis.maps(mixer).to_dicts()}
    assert (found["gamma_q"]["mean"], found["beta_k"]["greatest"]) == (3.0, 0.0)
    assert analysis.maps(PolynomialAttention(8, 1, 4, arm="rebased-square")).is_empty()
