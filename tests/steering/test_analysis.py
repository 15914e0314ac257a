"""Readings of vectors against numpy, plain modules and planted answers."""

import copy
import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from trimtab.errors import InputError
from trimtab.interventions import capture, direct_logits, wrap
from trimtab.steering.analysis import (
    coherence,
    cosines,
    decompose,
    extremes,
    norms,
    overlap,
    random_like,
    real_tokens,
    singular_values,
    stable_rank,
    task_auroc,
    vector_logits,
)


@pytest.fixture(scope="module")
def model(tiny_llama):
    made = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        made.model.norm.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    return made


@pytest.fixture(scope="module")
def wrapped(model, tokenizer):
    return wrap(model, tokenizer)


@pytest.fixture(scope="module")
def residuals(wrapped):
    ids = torch.randint(2, 258, (2, 30), generator=torch.Generator().manual_seed(0))
    return capture(wrapped, ids, torch.ones_like(ids), [2])[2].flatten(0, 1)


def drawn(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def centred(logits):
    return logits - logits.mean(dim=1, keepdim=True)


class TestPromotedTokens:
    def test_a_row_of_the_unembedding_promotes_its_own_token_first(self, model, wrapped):
        rows = model.lm_head.weight.detach()[[9, 200]] * 7
        for reading in ("raw", "cosine"):
            assert extremes(vector_logits(wrapped, rows, reading), 1).promoted[:, 0].tolist() == [9, 200]
            assert extremes(vector_logits(wrapped, -rows, reading), 1).suppressed[:, 0].tolist() == [9, 200]

    def test_beside_longer_rows_only_the_cosine_does(self, model, tokenizer):
        uneven = copy.deepcopy(model)
        with torch.no_grad():
            uneven.lm_head.weight[9] /= 20
        row = uneven.lm_head.weight.detach()[9:10]
        assert extremes(vector_logits(wrap(uneven, tokenizer), row, "raw"), 1).promoted.item() != 9
        assert extremes(vector_logits(wrap(uneven, tokenizer), row, "cosine"), 1).promoted.item() == 9

    def test_raw_cosine_and_norm_are_products(self, model, wrapped, monkeypatch):
        vectors, unembedding = drawn(3, 16), model.lm_head.weight.detach()
        want = centred(vectors @ unembedding.T)
        torch.testing.assert_close(vector_logits(wrapped, vectors, "raw"), want)
        monkeypatch.setattr("trimtab.steering.analysis.CHUNK", 50)
        torch.testing.assert_close(vector_logits(wrapped, vectors, "raw"), want)
        unit = torch.nn.functional.normalize
        cosine = centred(unit(vectors, dim=1) @ unit(unembedding, dim=1).T)
        torch.testing.assert_close(vector_logits(wrapped, vectors, "cosine"), cosine)
        gained = centred(vectors * model.model.norm.weight.detach() @ unembedding.T)
        torch.testing.assert_close(vector_logits(wrapped, vectors, "norm"), gained, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(vector_logits(wrapped, vectors, "norm"), direct_logits(wrapped, vectors))

    def test_the_difference_is_the_mean_over_real_residuals(self, model, wrapped, residuals):
        vectors = drawn(3, 16)
        with torch.no_grad():
            head = lambda h: model.lm_head(model.model.norm(h))  # noqa: E731
            want = torch.stack([(head(residuals + v) - head(residuals)).mean(dim=0) for v in vectors])
        found = vector_logits(wrapped, vectors, "difference", residuals)
        torch.testing.assert_close(found, centred(want), atol=1e-5, rtol=1e-4)
        # The only reading that knows the vector's length.
        assert not torch.allclose(found * 2, vector_logits(wrapped, 2 * vectors, "difference", residuals), atol=1e-3)
        assert vector_logits(wrapped, 0 * vectors, "difference", residuals).abs().max() == 0

    def test_reduced_precision_and_gradients_do_not_matter(self, model, tokenizer, residuals):
        low = wrap(copy.deepcopy(model).to(torch.bfloat16), tokenizer)
        vectors = torch.nn.Parameter(drawn(2, 16))
        for reading, given in (("raw", None), ("norm", None), ("difference", residuals.bfloat16())):
            found = vector_logits(low, vectors, reading, given)
            assert found.dtype == torch.float32
            assert not found.requires_grad
            want = vector_logits(wrap(model, tokenizer), vectors, reading, None if given is None else residuals)
            assert (found - want).abs().max() < 0.02 * want.abs().max()

    def test_special_and_padding_rows_are_left_out(self, tokenizer):
        allowed = real_tokens(tokenizer, 300)
        assert allowed[2:258].all()
        assert not allowed[:2].any()
        assert not allowed[258:].any()
        logits = drawn(2, 300)
        logits[:, 0], logits[:, 299] = 99, -99
        found = extremes(logits, 4, allowed)
        order = logits[:, 2:258].argsort(dim=1) + 2
        assert torch.equal(found.suppressed, order[:, :4])
        assert torch.equal(found.promoted, order.flip(1)[:, :4])
        torch.testing.assert_close(found.promoted_logits, logits.gather(1, found.promoted))

    def test_residuals_are_asked_for_where_they_are_needed(self, wrapped, residuals):
        with pytest.raises(InputError, match="needs residuals of the last block"):
            vector_logits(wrapped, drawn(1, 16), "difference")
        with pytest.raises(InputError, match="take none"):
            vector_logits(wrapped, drawn(1, 16), "raw", residuals)


class TestTaskTokens:
    def test_it_is_the_area_under_the_roc_curve(self):
        logits = (drawn(4, 60) * 3).round()  # with ties
        task = torch.tensor([3, 7, 50, 51])
        allowed = torch.ones(60, dtype=torch.bool)
        allowed[[0, 7]] = False
        labels = np.isin(np.arange(60), task)
        found = task_auroc(logits, task, allowed)
        for row, value in zip(logits.numpy(), found, strict=True):
            assert float(value) == pytest.approx(roc_auc_score(labels[allowed], row[allowed]), abs=1e-6)
        whole = [roc_auc_score(labels, row) for row in logits.numpy()]
        assert task_auroc(logits, task).tolist() == pytest.approx(whole, abs=1e-6)

    def test_a_vector_towards_the_task_scores_above_random_ones(self, wrapped, model):
        task = torch.arange(20, 30)
        towards = model.lm_head.weight.detach()[task].mean(dim=0, keepdim=True)
        own = task_auroc(vector_logits(wrapped, towards, "raw"), task)
        random = random_like(towards.expand(200, -1), torch.Generator().manual_seed(0))
        chance = task_auroc(vector_logits(wrapped, random, "raw"), task)
        assert own > chance.max()
        assert abs(chance.mean() - 0.5) < 0.05
        assert task_auroc(torch.zeros(1, 258), task) == 0.5

    def test_both_sides_need_tokens(self):
        with pytest.raises(InputError, match="one other"):
            task_auroc(drawn(1, 3), torch.arange(3))
        with pytest.raises(InputError, match="one token of the task"):
            task_auroc(drawn(1, 3), torch.tensor([1]), torch.tensor([True, False, True]))

    def test_coherence_is_the_mean_cosine_of_pairs(self):
        unembedding, ids = drawn(40, 16), torch.tensor([[1, 2, 3], [5, 9, 30]])
        rows = unembedding.numpy()[ids.numpy()]
        rows = rows / np.linalg.norm(rows, axis=2, keepdims=True)
        want = [np.mean([one @ other for i, one in enumerate(r) for other in r[i + 1 :]]) for r in rows]
        assert coherence(unembedding, ids).tolist() == pytest.approx(want, abs=1e-6)
        with pytest.raises(InputError, match="at least two"):
            coherence(unembedding, ids[:, :1])

    def test_random_vectors_have_the_same_norms(self):
        vectors = drawn(2, 3, 16) * torch.tensor([1.0, 0.0, 30.0])[:, None]
        made = random_like(vectors, torch.Generator().manual_seed(0))
        torch.testing.assert_close(made.norm(dim=-1), vectors.norm(dim=-1))
        assert torch.equal(made, random_like(vectors, torch.Generator().manual_seed(0)))
        assert (cosines(torch.stack([made[0, 0], vectors[0, 0]]))[0, 1]).abs() < 0.9


class TestGeometry:
    def test_it_equals_numpy(self):
        vectors = drawn(5, 16)
        matrix = vectors.double().numpy()
        lengths = np.linalg.norm(matrix, axis=1)
        np.testing.assert_allclose(norms(vectors), lengths, rtol=1e-5)
        np.testing.assert_allclose(cosines(vectors), matrix @ matrix.T / np.outer(lengths, lengths), atol=1e-6)
        spectrum = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(singular_values(vectors), spectrum, rtol=1e-5)
        assert stable_rank(vectors) == pytest.approx((lengths**2).sum() / spectrum[0] ** 2, rel=1e-5)

    def test_known_ranks(self):
        assert stable_rank(3 * torch.eye(4, 16)) == pytest.approx(4)
        assert stable_rank(torch.arange(1.0, 5)[:, None] * drawn(1, 16)) == pytest.approx(1, rel=1e-5)
        assert np.isnan(stable_rank(torch.zeros(2, 16)))
        assert cosines(torch.zeros(2, 16)).abs().max() == 0

    def test_agreement_of_seeds_is_by_layer(self):
        seeds = drawn(3, 4, 16)  # [seeds, layers, d_model]
        found = cosines(seeds.transpose(0, 1))
        assert found.shape == (4, 3, 3)
        want = torch.cosine_similarity(seeds[0, 2], seeds[1, 2], dim=0)
        torch.testing.assert_close(found[2, 0, 1], want)

    def test_overlap_is_the_share_of_common_tokens(self):
        ids = torch.tensor([[[1, 2, 3, 4], [4, 3, 9, 8]], [[1, 2, 3, 4], [5, 6, 7, 8]]])
        assert overlap(ids).tolist() == [[[1, 0.5], [0.5, 1]], [[1, 0], [0, 1]]]


class TestDecomposition:
    directions = torch.nn.functional.normalize(drawn(200, 64, seed=5), dim=1)

    def test_a_planted_combination_is_found(self):
        planted = {11: 3.0, 150: -2.0, 42: 1.5}
        vector = sum(weight * self.directions[i] for i, weight in planted.items())
        one, three, more = decompose(vector, self.directions, [1, 3, 50])
        assert one.indices.tolist() == [11]
        assert dict(zip(three.indices.tolist(), three.coefficients.tolist(), strict=True)) == pytest.approx(
            planted, abs=1e-4
        )
        torch.testing.assert_close(three.reconstruction, vector, atol=1e-4, rtol=1e-4)
        assert three.explained == pytest.approx(1, abs=1e-9)
        assert more.indices.tolist() == three.indices.tolist()  # nothing was left for more

    def test_each_budget_is_a_least_squares_fit_of_a_prefix(self):
        vector = drawn(64, seed=6)
        found = decompose(vector, self.directions, [8, 1, 32, 200])
        by_size = sorted(found, key=lambda f: len(f.indices))
        assert [len(f.indices) for f in found[:3]] == [8, 1, 32]
        for small, large in itertools.pairwise(by_size):
            assert torch.equal(small.indices, large.indices[: len(small.indices)])
            assert small.explained < large.explained
        for one in by_size:
            chosen = self.directions[one.indices].double().numpy().T
            want, *_ = np.linalg.lstsq(chosen, vector.double().numpy(), rcond=None)
            np.testing.assert_allclose(one.coefficients, want, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(one.reconstruction, chosen @ want, atol=1e-4)
            left = ((vector.double().numpy() - chosen @ want) ** 2).sum() / (vector.double() ** 2).sum()
            assert one.explained == pytest.approx(1 - float(left), abs=1e-6)
        assert len(set(by_size[-1].indices.tolist())) == len(by_size[-1].indices)
        assert by_size[-1].explained == pytest.approx(1, abs=1e-9)
        assert by_size[0].indices[0] == (self.directions @ vector).abs().argmax()

    def test_what_no_direction_reaches_stays_unexplained(self):
        directions = torch.eye(3, 8)
        inside, outside = (torch.tensor([0.0, 2, 0, x, 0, 0, 0, 0]) for x in (2.0, 0.0))
        (half,) = decompose(inside, directions, [3])
        assert half.indices.tolist() == [1]
        assert half.explained == pytest.approx(0.5)
        assert decompose(outside, directions, [3])[0].explained == pytest.approx(1)
        (none,) = decompose(torch.eye(8)[7], directions, [2])
        assert len(none.indices) == 0
        assert none.explained == 0

    def test_nearly_parallel_directions_keep_the_fit_stable(self):
        base = torch.nn.functional.normalize(drawn(30, 64, seed=7), dim=1)
        twins = torch.nn.functional.normalize(base + 1e-4 * drawn(30, 64, seed=8), dim=1)
        (found,) = decompose(drawn(64, seed=9), torch.cat([base, twins]), [60])
        assert 0 < found.explained <= 1

    def test_bad_input_is_refused(self):
        with pytest.raises(InputError, match="between 1 and 200 directions"):
            decompose(drawn(64), self.directions, [201])
        with pytest.raises(InputError, match="between 1 and 200 directions"):
            decompose(drawn(64), self.directions, [])
        with pytest.raises(InputError, match="zero vector"):
            decompose(torch.zeros(64), self.directions, [1])
