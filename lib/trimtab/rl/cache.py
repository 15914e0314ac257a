"""Keys and values of a batch that generates, in memory taken once.

transformers' own cache is copied whole at every new token, and again when rows leave the batch, to tensors a little
larger or smaller than before: a process keeps most of what it so gives back.
"""

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class RoomyCache(Cache):
    """A cache with room for `length` positions of each sequence; longer ones raise ValueError."""

    def __init__(self, length: int) -> None:
        self.length = length
        super().__init__(layer_class_to_replicate=lambda: _RoomyLayer(length))


class _RoomyLayer(DynamicLayer):
    """Of one layer. `keys` and `values` are views of the beginning of what was allocated."""

    keys: Tensor
    values: Tensor
    _keys: Tensor
    _values: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write keys and values of new positions, [batch, heads, positions, dim], beside the earlier ones; all."""
        old = 0
        if self.is_initialized:
            old = self.get_seq_length()
        else:
            self.lazy_initialization(key_states, value_states)
            self._allocate(key_states, value_states)
        new = old + key_states.shape[2]
        if new > self.length:
            raise ValueError(f"The cache has room for {self.length} positions, not for {new}.")
        self._show(new)
        self.keys[:, :, old:], self.values[:, :, old:] = key_states, value_states
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times; the room is taken anew."""
        keys, values, length = self.keys, self.values, self.get_seq_length()
        self._allocate(keys, values, repeats)
        self._show(length)
        for copies, one in ((self.keys, keys), (self.values, values)):
            copies.unflatten(0, (-1, repeats)).copy_(one[:, None].expand(-1, repeats, -1, -1, -1))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, and move them to the front."""
        length, kept = self.get_seq_length(), len(indices)
        for room in (self._keys, self._values):
            room[:kept, :, :length] = room[indices, :, :length]
        self._keys, self._values = self._keys[:kept], self._values[:kept]
        self._show(length)

    def _allocate(self, keys: Tensor, values: Tensor, repeats: int = 1) -> None:
        batch, heads = keys.shape[0] * repeats, keys.shape[1]
        self._keys = keys.new_empty(batch, heads, self.length, keys.shape[3])
        self._values = values.new_empty(batch, heads, self.length, values.shape[3])

    def _show(self, length: int) -> None:
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]
