"""A key-value cache that grows in place: transformers' own copies everything it holds for every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moebius.private_transformers import Cache, DynamicLayer

_SPARE_TOKENS = 256


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer at the front of tensors with room for more.

    ``keys`` and ``values`` are views of what is filled, so everything that transformers does with a layer still holds; where
    it puts other tensors there (cropping, beams), the next token moves them into a room of their own.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, new, width) states; returns all there are, (batch, heads, length, width)."""
        if self.keys is None or self.values is None or not self.texts():
            return super().update(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def texts(self) -> int:
        """How many texts have tokens here; zero before the first token."""
        return 0 if self.keys is None or self.values is None or self.keys.numel() == 0 else len(self.keys)

    def begin(self, nothing: Tensor) -> None:
        """Hold no token yet, of the texts, heads, width and dtype of a tensor (texts, heads, 0, width)."""
        self.lazy_initialization(nothing, nothing)
        self.keys = self.values = nothing

    def grown(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values with place for so many more tokens, whose contents are the caller's to write."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self._longer("keys", self.keys, count), self._longer("values", self.values, count)
        return self.keys, self.values

    def _appended(self, name: str, held: Tensor, more: Tensor) -> Tensor:
        longer = self._longer(name, held, more.shape[-2])
        longer[..., held.shape[-2] :, :] = more
        return longer

    def _longer(self, name: str, held: Tensor, count: int) -> Tensor:
        begin, end = held.shape[-2], held.shape[-2] + count
        room = self._rooms.get(name)
        ours = room is not None and room.data_ptr() == held.data_ptr() and room.shape[:2] == held.shape[:2]
        if room is None or not ours or room.shape[-2] < end:
            room = held.new_empty(*held.shape[:-2], end + _SPARE_TOKENS, held.shape[-1])
            room[..., :begin, :] = held
            self._rooms[name] = room
        return room[..., :end, :]


def make_room(cache: Cache) -> None:
    """Let the layers of a cache that hold every token grow in place. Other kinds (windows, recurrent states) stay."""
    cache.layers = [RoomyLayer(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]


def can_go_on(cache: Cache) -> bool:
    """Whether more than one token may follow what the cache holds: recurrent states take one at a time."""
    return all(isinstance(layer, DynamicLayer) for layer in cache.layers)
