"""What ``config.json`` says of packed modules, against the tensors that the files hold for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moebius.checkpoint.shards import DTYPE_NAMES, StoredTensor
from moebius.errors import CheckpointError, first_line
from moebius.formats import Packed, PackedProjection
from moebius.formats.base import FORMATS
from moebius.formats.numbers import stored_fields
from moebius.formats.projection import empty_module, module_from_tensors


def packed_from_spec(module: str, spec: Mapping[str, Any]) -> PackedProjection | Packed:
    """A packed module as its description says it is, with tensors on the meta device.

    Args:
        module: its path, such as ``model.layers.0.mlp.experts.gate_up_proj``.
        spec: of a :class:`PackedProjection` or a :class:`Packed`.

    Raises:
        CheckpointError: a spec that no format of this version describes.
    """
    try:
        return empty_module(dict(spec))
    except Exception as error:  # whatever a damaged spec does to the constructor of a format
        message = f"{module}: config.json describes it in a way this version does not know: {first_line(error)}"
        raise CheckpointError(message) from error


def expected_tensors(module: str, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and safetensors dtypes of the tensors that stand for a packed module; arguments as above.

    Raises:
        CheckpointError: a spec that no format of this version describes.
    """
    packed = packed_from_spec(module, spec)
    return {f"{module}.{name}": (tuple(t.shape), DTYPE_NAMES[t.dtype]) for name, t in packed.tensors().items()}


def check_described(stored: Mapping[str, StoredTensor], modules: Mapping[str, Any]) -> None:
    """Refuse files that hold other tensors for a packed module than its description asks for, from their headers alone.

    Args:
        stored: every tensor of the checkpoint, by name; guards do not matter.
        modules: of the ``quantization_config``.

    Raises:
        CheckpointError: names the tensor, what it is and what it should be.
    """
    for module, spec in modules.items():
        expected = expected_tensors(module, spec)
        for name, (shape, dtype) in expected.items():
            if name not in stored:
                raise CheckpointError(f"{name}: missing from the files, though config.json says that {module} is packed")
            if (tensor := stored[name]).shape != shape or tensor.dtype != dtype:
                raise CheckpointError(f"{name}: got {tensor.shape} {tensor.dtype}, wanted {shape} {dtype} as config.json says")
        parts = {f"{module}.{part}": part_spec for part, part_spec in spec.items()} if "factor" in spec else {module: spec}
        for path, part in parts.items():
            known = {f"{path}.{name}" for name in stored_fields(FORMATS[part["format"]])}
            if unasked := sorted(known & stored.keys() - expected.keys()):
                raise CheckpointError(f"{unasked[0]}: in {stored[unasked[0]].file}, but not part of {part}")


def check_contents(stored: Mapping[str, StoredTensor], modules: Mapping[str, Any]) -> None:
    """Read what was packed, a module at a time, and refuse values that no load would accept: see :meth:`Packed.check`.

    Args:
        stored: every tensor of the checkpoint; shapes and dtypes have been checked.
        modules: of the ``quantization_config``.

    Raises:
        CheckpointError: names the tensor.
    """
    for module, spec in modules.items():
        own = {name.removeprefix(f"{module}."): stored[name].load() for name in expected_tensors(module, spec)}
        module_from_tensors(dict(spec), own).check(module)
