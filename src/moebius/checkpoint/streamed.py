"""A model whose weights come from its checkpoint when they are used, and go when they are not.

The model is a skeleton on the meta device. What is small and outside of the decoder layers (norms, rotary tables) is read once
and stays. A decoder layer is read through transformers' own conversions, used, and let go; so is the head. Of embeddings only
the rows of the tokens at hand are read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebius.checkpoint.dequantized import SourceTensor, same_contents
from moebius.checkpoint.names import Conversion, conversions
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.shards import DTYPES, StoredTensor
from moebius.errors import CheckpointError, first_line
from moebius.private_transformers import loaded_dtypes, must_be_stored, ties_of, untie
from moebius.types import MoeModel

#: Where a module holds a tensor, under which name, and what it held before.
_Place = tuple[dict[str, Any], str, Any]


class StreamedWeights:
    """The weights of a model on the meta device, which the model itself asks for from then on.

    A decoder layer that is run is read for that run; :meth:`layer` keeps it for longer.

    Args:
        checkpoint: where they are.
        moe: its model, all of it on the meta device, in the dtype in which it is to be used.
        device: where they come to.

    Raises:
        CheckpointError: parameters that the checkpoint has no tensors for, or tensors of other shapes; known from the headers.
    """

    def __init__(self, checkpoint: SourceCheckpoint, moe: MoeModel, device: str | torch.device = "cpu") -> None:
        self._checkpoint, self._model, self._device = checkpoint, moe.model, torch.device(device)
        self._decoder_name = moe.decoder_name
        self._state: dict[str, Tensor] = moe.model.state_dict()
        self._dtypes = loaded_dtypes(moe.model)
        self._of: dict[str, Conversion] = {}
        for conversion in conversions(checkpoint.names(), moe.model):
            self._of.update(dict.fromkeys(self._made_by(conversion), conversion))
        self._stored_as = self._ties()
        self._make_what_is_not_stored()
        self._resident: set[int] = set()
        self._by_row: set[str] = set()
        self._head: _Head | None = None
        self._stream(moe)

    @contextmanager
    def layer(self, index: int, without: Collection[str] = ()) -> Iterator[None]:
        """Within the context, the weights of a decoder layer are there.

        Args:
            index: of the layer.
            without: parameters that are not wanted.
        """
        if index in self._resident:
            yield
            return
        if self._head is not None:
            self._head.let_go()
        inside = f"{self._decoder_name}.{index}."
        names = [name for name in self._of if name.startswith(inside) and name not in self._by_row and name not in without]
        self._resident.add(index)
        before = self._put(self._load(names))
        try:
            yield
        finally:
            _restore(before)
            self._resident.discard(index)

    def load(self, name: str) -> Tensor:
        """A parameter or buffer, in the dtype in which the model holds it."""
        return self._load([name])[name]

    def _load(self, names: Collection[str]) -> dict[str, Tensor]:
        """Parameters and buffers by name; those that are not stored are left out."""
        wanted = {self._stored_as.get(name, name): name for name in names}
        loaded: dict[str, Tensor] = {}
        for conversion in {id(of): of for stored in wanted if (of := self._of.get(stored))}.values():
            made = conversion.run(self._model, partial(self._read, self._dtypes[conversion.target]))
            loaded.update({wanted[stored]: made[stored] for stored in list(made) if stored in wanted})
        for name, tensor in loaded.items():
            loaded[name] = tensor.to(self._held(name)[2].dtype)
        return loaded

    def _read(self, dtype: torch.dtype, name: str) -> Tensor:
        return self._checkpoint.load(name).to(self._device, dtype)

    def _held(self, name: str) -> _Place:
        path, _, own = name.rpartition(".")
        module = self._model.get_submodule(path)
        held: dict[str, Any] = module._parameters if own in module._parameters else module._buffers
        return held, own, held[own]

    def _put(self, tensors: dict[str, Tensor]) -> list[_Place]:
        """Have the model hold these tensors, which the mapping then holds no more; what it held before."""
        before = []
        for name in list(tensors):
            held, own, there = place = self._held(name)
            before.append(place)
            value = tensors.pop(name)
            held[own] = nn.Parameter(value, requires_grad=False) if isinstance(there, nn.Parameter) else value
        return before

    def _made_by(self, conversion: Conversion) -> list[str]:
        """The parameters of the model that a conversion makes, tried on tensors without contents."""

        def read(name: str) -> Tensor:
            stored = self._checkpoint.tensors[name]
            return torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta")

        where = f"{self._checkpoint.folder}: cannot read its weights"
        try:
            made = conversion.run(self._model, read)
        except Exception as error:  # operations raise whatever torch raises for shapes that do not fit together
            raise CheckpointError(
                f"{where}: {conversion.sources[0][0]} and those like it do not make {conversion.target} ({first_line(error)})"
            ) from error
        for name in (known := [name for name in made if name in self._state]):
            if (got := tuple(made[name].shape)) != (wanted := tuple(self._state[name].shape)):
                raise CheckpointError(f"{where}: {name}: got {got}, wanted {wanted}; is config.json that of these weights?")
        return known

    def _ties(self) -> dict[str, str]:
        """For parameters that are tied to others, the one that is stored; a copy with other contents stands for itself."""
        groups: dict[str, list[str]] = {}
        for copy, original in ties_of(self._model).items():
            groups.setdefault(original, [original]).append(copy)
        stored_as = {}
        for names in groups.values():
            stored = [name for name in names if name in self._of]
            for name in stored[1:]:
                if not same_contents(self._tensor(name), self._tensor(stored[0])):
                    untie(self._model, name)
            stored_as.update({name: stored[0] for name in names if stored and name not in stored})
        return stored_as

    def _tensor(self, name: str) -> SourceTensor:
        """The first tensor that a parameter is made of."""
        return self._checkpoint.tensors[self._of[name].sources[0][0]]

    @torch.no_grad()
    def _make_what_is_not_stored(self) -> None:
        """Buffers that are never stored, and what may be missing, as transformers makes them."""
        missing = {name for name in self._state if name not in self._of and name not in self._stored_as}
        if lacking := must_be_stored(self._model, missing):
            raise CheckpointError(
                f"{self._checkpoint.folder}: {len(lacking)} tensors are missing, such as {min(lacking)}; "
                "fetch the checkpoint again"
            )
        made = [*missing, *(name for name, _ in self._model.named_non_persistent_buffers())]
        self._put({name: torch.empty_like(self._held(name)[2], device="cpu") for name in made})
        with torch.random.fork_rng(devices=[]):
            self._model.initialize_weights()
        self._put({name: self._held(name)[2].to(self._device) for name in made})

    def _stream(self, moe: MoeModel) -> None:
        """Let modules ask for their weights when they are run, and read what is to stay."""
        head, of_head = moe.model.get_output_embeddings(), set()
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for path, module in moe.model.named_modules():
            if isinstance(module, nn.Embedding) and (stored := self._stored_by_row(f"{path}.weight")):
                self._by_row.add(f"{path}.weight")
                forwards[module] = _EmbeddingByRow(module, stored, self._device)
            elif module is head:
                of_head = {f"{path}.{own}" for own, _ in module.named_parameters()}
                self._head = _Head(module, partial(self._load, of_head), self._put)
                forwards[module] = self._head
        elsewhere = (f"{moe.decoder_name}.", *(f"{path}." for path in _towers(moe)))
        stays = [n for n in self._of if not n.startswith(elsewhere) and n not in self._by_row and n not in of_head]
        self._put(self._load(stays))
        forwards.update({layer: self._for_one_run(index, layer.forward) for index, layer in enumerate(moe.decoder)})
        for module, forward in forwards.items():
            vars(module)["forward"] = forward

    def _stored_by_row(self, name: str) -> StoredTensor | None:
        """The tensor that an embedding is stored as, if it is stored as it is."""
        conversion = self._of.get(self._stored_as.get(name, name))
        stored = self._checkpoint.tensors[conversion.sources[0][0]] if conversion and conversion.converter is None else None
        return stored if isinstance(stored, StoredTensor) else None

    def _for_one_run(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.layer(index):
                return forward(*args, **kwargs)

        return run


class _EmbeddingByRow:
    """The forward of an embedding that reads the rows of the tokens at hand."""

    def __init__(self, module: nn.Embedding, stored: StoredTensor, device: torch.device) -> None:
        self._module: Any = module
        self._stored, self._device, self._forward = stored, device, module.forward

    def __call__(self, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows, places = ids.unique(return_inverse=True)
        weight, padding = self._module.weight, self._module.padding_idx
        values = self._stored.rows(rows.cpu()).to(self._device, weight.dtype)
        try:
            self._module._parameters["weight"] = nn.Parameter(values, requires_grad=False)
            self._module.padding_idx = None  # whose gradient is not wanted: a row of the whole
            return self._forward(places, *args, **kwargs)
        finally:
            self._module._parameters["weight"], self._module.padding_idx = weight, padding


class _Head:
    """The forward of a module whose weights come when it is run, and stay near until they are let go."""

    def __init__(
        self, module: nn.Module, load: Callable[[], dict[str, Tensor]], put: Callable[[dict[str, Tensor]], list[_Place]]
    ) -> None:
        self._module, self._load, self._put, self._forward = module, load, put, module.forward
        self._near: dict[str, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wanted = {parameter.dtype for parameter in self._module.parameters()}
        if {tensor.dtype for tensor in self._near.values()} != wanted:
            self._near = self._load()
        before = self._put(dict(self._near))
        try:
            return self._forward(*args, **kwargs)
        finally:
            _restore(before)

    def let_go(self) -> None:
        """Free what is near."""
        self._near = {}


def _restore(places: list[_Place]) -> None:
    for held, own, tensor in places:
        held[own] = tensor


def _towers(moe: MoeModel) -> Iterator[str]:
    """Paths of the models within the model that do not hold its decoder."""
    for path, module in moe.model.named_modules():
        if path and isinstance(module, PreTrainedModel) and not moe.decoder_name.startswith(f"{path}."):
            yield path
