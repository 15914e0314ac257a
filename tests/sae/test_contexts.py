"""Windows, densities, ranks and examples against a naive reading of the same rows."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from trimtab.activations import ActivationCache
from trimtab.errors import InputError
from trimtab.sae import SAE
from trimtab.sae.contexts import Contexts

K, WINDOW = 5, 8


@pytest.fixture(scope="module")
def setting(caches):
    """Contexts of an untrained SAE, and {(document, position): (token, {latent: (value, rank)})} read row by row."""
    cache = ActivationCache(caches / "test", 0)
    sae = SAE(cache.d_model, 40, K, generator=torch.Generator().manual_seed(1)).fold(cache.mean, cache.statistics.scale)
    naive = {}
    with torch.no_grad():
        for chunk in cache.read(raw=True):
            for x, token, document, position in zip(*(chunk[n] for n in ("x", "token", "document", "position"))):  # noqa: B905
                pre = (sae.W_enc @ x + sae.b_enc).relu()
                values, indices = pre.sort(descending=True)
                firing = {int(i): (float(v), r + 1) for r, (v, i) in enumerate(zip(values[:K], indices[:K])) if v > 0}  # noqa: B905
                naive[int(document), int(position)] = int(token), firing
    return Contexts.collect(sae, cache, K, window=WINDOW), naive


@pytest.fixture(scope="module")
def windows(setting):
    """{(document, window): rows} of the naive reading, windows less than half full left out."""
    grouped = defaultdict(list)
    for document, position in sorted(setting[1]):
        grouped[document, position // WINDOW].append((document, position))
    return {key: rows for key, rows in grouped.items() if 2 * len(rows) >= WINDOW}


def test_windows_are_stretches_of_one_document_and_hold_every_row_once(setting, windows):
    contexts, naive = setting
    assert contexts.windows == len(windows)
    for w, rows in enumerate(windows.values()):
        example = contexts.example(0, w)
        assert [(example.document, p) for p in example.positions.tolist()] == rows
        assert example.tokens.tolist() == [naive[row][0] for row in rows]
    assert any(len(rows) < WINDOW for rows in windows.values()), "gaps and tails should be among them"


def test_activations_densities_and_ranks_equal_the_naive_reading(setting, windows):
    contexts, naive = setting
    kept = [row for rows in windows.values() for row in rows]
    for latent in range(40):
        ranks = [naive[row][1][latent][1] for row in kept if latent in naive[row][1]]
        assert contexts.density()[latent] == pytest.approx(len(ranks) / len(kept))
        expected = sorted(ranks)[(len(ranks) - 1) // 2] if ranks else np.nan
        np.testing.assert_equal(contexts.median_rank()[latent], expected)
        for w, rows in enumerate(windows.values()):
            values = [naive[row][1].get(latent, (0.0, 0))[0] for row in rows]
            np.testing.assert_allclose(contexts.example(latent, w).activations, values, rtol=1e-4, atol=1e-5)


def test_active_windows_with_peaks_and_best_ranks(setting, windows):
    contexts, naive = setting
    for latent in range(0, 40, 7):
        firing = {
            w: [naive[row][1][latent] for row in rows if latent in naive[row][1]]
            for w, rows in enumerate(windows.values())
        }
        firing = {w: found for w, found in firing.items() if found}
        active = contexts.active(latent)
        assert active.windows.tolist() == list(firing)
        np.testing.assert_allclose(active.peaks, [max(v for v, _ in found) for found in firing.values()], rtol=1e-4)
        assert active.ranks.tolist() == [min(r for _, r in found) for found in firing.values()]


def test_top_quantiles_and_silent_windows(setting):
    contexts, _ = setting
    latent = int(np.argmax(contexts.density()))
    active = contexts.active(latent)
    assert 12 < len(active.windows) < contexts.windows
    peaks = [example.activations.max() for example in contexts.top(latent, 5)]
    assert peaks == sorted(active.peaks.tolist(), reverse=True)[:5]
    # One of each quarter of the windows in order of their peaks, whatever the draw.
    quarters = np.array_split(np.sort(active.peaks)[::-1], 4)
    for seed in range(5):
        drawn = contexts.quantiles(latent, 4, np.random.default_rng(seed))
        assert all(e.activations.max() in quarter for e, quarter in zip(drawn, quarters, strict=True))
    some = contexts.quantiles(latent, 1000, np.random.default_rng(0), ranks=(1, 2))
    assert len(some) == int((active.ranks <= 2).sum()) < len(active.windows)
    silent = contexts.silent(latent, 10_000, np.random.default_rng(0))
    assert len(silent) == contexts.windows - len(active.windows)
    assert all((example.activations == 0).all() for example in silent)
    places = [(example.document, int(example.positions[0])) for example in silent]
    assert len(set(places)) == len(places)


def test_a_latent_that_never_fires_has_no_windows(caches):
    cache = ActivationCache(caches / "test", 0)
    sae = SAE(cache.d_model, 6, 2)
    with torch.no_grad():
        sae.b_enc[3] = -1e6
    contexts = Contexts.collect(sae, cache, 2, window=WINDOW)
    generator = np.random.default_rng(0)
    assert contexts.density()[3] == 0
    assert np.isnan(contexts.median_rank()[3])
    assert contexts.top(3, 2) == contexts.quantiles(3, 2, generator) == []
    assert len(contexts.silent(3, 10_000, generator)) == contexts.windows


def test_shuffling_moves_windows_whole(setting):
    contexts, _ = setting
    shuffled = contexts.shuffled(np.random.default_rng(0))
    np.testing.assert_array_equal(shuffled.density(), contexts.density())
    np.testing.assert_array_equal(shuffled.median_rank(), contexts.median_rank())
    moved = 0
    for latent in range(40):
        before, after = (
            sorted(tuple(e.activations.tolist()) for e in c.top(latent, 10_000)) for c in (contexts, shuffled)
        )
        assert before == after, "activations must keep how they lie within a window"
        moved += not np.array_equal(contexts.active(latent).windows, shuffled.active(latent).windows)
    assert moved > 30


def test_a_cache_too_short_for_the_window_is_named(caches):
    cache = ActivationCache(caches / "test", 0)
    with pytest.raises(InputError, match="holds no window of 100000 tokens"):
        Contexts.collect(SAE(cache.d_model, 6, 2), cache, 2, window=100_000)
