"""Which tensors of a checkpoint stand for which parameters of the model, and how they become them.

Checkpoints on the hub mostly keep one tensor per expert; transformers renames, stacks, joins and transposes them while it
loads a whole model. Its own conversion tables are asked here, so that every architecture it loads is known, and its operations
are applied to the tensors of the parameters that are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moebius.checkpoint.dequantized import same_contents
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.errors import CheckpointError, UnsupportedModelError
from moebius.private_transformers import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
    ties_of,
)


@dataclass(frozen=True)
class Conversion:
    """Some tensors of a checkpoint, and the parameters or buffers that transformers makes of them.

    Attributes:
        target: the parameter under whose name transformers collects the tensors: the first of ``targets``.
        targets: names that can come of them; some may be unknown to the model.
        converter: what is done with them; None where a tensor is the parameter.
        sources: name of each tensor in the checkpoint and the pattern of the converter that it fits, in order.
    """

    target: str
    targets: tuple[str, ...]
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)

    def run(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters by name.

        Args:
            model: whose config and shapes some operations ask for; the meta device is enough.
            read: from the name of a tensor to its values, in the dtype and on the device of the result. It is called when a
                tensor is needed, and what it gave is let go as soon as the operations allow.
        """
        if self.converter is None:
            return {self.target: read(self.sources[0][0])}
        converter: Any = deepcopy(self.converter)  # it collects tensors, and the next layer has its own
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, partial(read, name))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def expert_tensor_names(checkpoint: SourceCheckpoint, model: PreTrainedModel, modules: Collection[str]) -> set[str]:
    """The checkpoint tensors that a packed checkpoint leaves out, because packed ones stand for them.

    Args:
        checkpoint: the source.
        model: its model; the meta device is enough.
        modules: what is packed: parameters such as ``model.layers.0.mlp.experts.gate_up_proj``, and modules such as
            ``model.layers.0.mlp.gate`` whose ``weight`` is packed.

    Raises:
        CheckpointError: a parameter for which the checkpoint has no tensor.
        UnsupportedModelError: a checkpoint tensor that holds both parameters that are packed and others that are not.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    packed = {name if name in parameters else f"{name}.weight" for name in modules}
    standing: dict[str, set[str]] = {}
    for source, targets in parameters_of(checkpoint.names(), model).items():
        if hit := targets & packed:
            if others := targets - packed:
                raise UnsupportedModelError(f"{source}: holds {min(hit)}, which is packed, and {min(others)}, which is not")
            standing[source] = hit
    for name in sorted(packed):
        if not any(name in targets for targets in standing.values()):
            raise CheckpointError(f"{checkpoint.folder}: no tensor of it stands for {name}; is it a checkpoint of this model?")
    return set(standing)


def tied_copies(checkpoint: SourceCheckpoint, model: PreTrainedModel) -> set[str]:
    """Checkpoint tensors that repeat, byte for byte, another one that the model ties them to: a head beside its embeddings."""
    ties = ties_of(model)
    if not ties:
        return set()
    stored = {target: name for name, targets in parameters_of(checkpoint.names(), model).items() for target in targets}
    found = set()
    for copy, original in ties.items():
        first, second = stored.get(original), stored.get(copy)
        if first is None or second is None or first == second:
            continue
        if same_contents(checkpoint.tensors[second], checkpoint.tensors[first]):
            found.add(second)
    return found


def parameters_of(names: Collection[str], model: PreTrainedModel) -> dict[str, set[str]]:
    """Checkpoint names to the parameters and buffers they are loaded into; names that the model ignores are left out."""
    state = model.state_dict().keys()
    return {name: state & set(conversion.targets) for conversion in conversions(names, model) for name, _ in conversion.sources}


def conversions(names: Collection[str], model: PreTrainedModel) -> list[Conversion]:
    """How all tensors of a checkpoint are loaded; those that the model ignores are left out.

    Args:
        names: of the tensors.
        model: the meta device is enough.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    found: dict[str, Conversion] = {}
    # The order, and the second try without renaming, are those of transformers' loader: some renamings keep state.
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        targets: tuple[str, ...] = (target,)
        if pattern is not None:
            first, *others = of_pattern[pattern].target_patterns
            targets = (target, *(target.replace(first, other) for other in others))
        if not any(known in state for known in targets):
            continue
        converter = None if pattern is None else of_pattern[pattern]
        conversion = found.setdefault(target, Conversion(target, targets, converter))
        conversion.sources.append((name, name if pattern is None else pattern))
    return list(found.values())
