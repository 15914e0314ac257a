import pytest
import torch
from transformers.cache_utils import DynamicCache

from trimtab.rl.cache import RoomyCache


def states(batch: int, positions: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, positions, 4, generator=generator) for _ in range(2))


def test_it_holds_what_transformers_own_cache_holds():
    ours, theirs = RoomyCache(12), DynamicCache()

    def both(change):
        found = [change(cache) for cache in (ours, theirs)]
        if found[0] is not None:
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)

    for layer in (0, 1):
        both(lambda cache, layer=layer: cache.update(*states(1, 3, layer), layer))
    both(lambda cache: cache.batch_repeat_interleave(2))
    for layer in (0, 1):
        both(lambda cache, layer=layer: cache.update(*states(2, 4, 10 + layer), layer))
    both(lambda cache: cache.batch_repeat_interleave(3))
    for step, kept in enumerate(([0, 2, 3, 5], [1, 2], [1])):
        both(lambda cache, kept=kept: cache.batch_select_indices(torch.tensor(kept)))
        for layer in (0, 1):
            new = states(len(kept), 1, 20 + 2 * step + layer)
            both(lambda cache, new=new, layer=layer: cache.update(*new, layer))


def test_new_tokens_take_no_new_memory():
    cache = RoomyCache(8)
    cache.update(*states(5, 2, 0), 0)
    place = cache.layers[0].keys.data_ptr()
    for step in range(6):
        if step == 3:
            cache.batch_select_indices(torch.tensor([1, 4]))
        cache.update(*states(len(cache.layers[0].keys), 1, step), 0)
        assert cache.layers[0].keys.data_ptr() == place


def test_one_position_too_many_is_refused():
    cache = RoomyCache(4)
    cache.update(*states(1, 3, 0), 0)
    with pytest.raises(ValueError, match="room for 4 positions, not for 5"):
        cache.update(*states(1, 2, 0), 0)
