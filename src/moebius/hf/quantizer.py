"""The quantizer that transformers runs around loading and saving a packed checkpoint."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from moebius.checkpoint.described import expected_tensors
from moebius.checkpoint.guards import guard_tensors, guarded_parameter
from moebius.checkpoint.manifest import MANIFEST_NAME, verify_modules
from moebius.checkpoint.routing import check_routing
from moebius.checkpoint.shards import StoredTensor, read_files
from moebius.errors import CheckpointError, UnsupportedModelError
from moebius.formats.base import empty_like_spec
from moebius.formats.projection import empty_projection
from moebius.hf.config import MoebiusConfig
from moebius.hf.hashes import hashes_wanted
from moebius.hf.paths import paths_in, renamed_beginnings
from moebius.hf.save import save_packed
from moebius.runtime.packed_module import packed_of

if TYPE_CHECKING:  # modeling_utils imports the table that this class is registered in
    from transformers import PreTrainedModel

register_quantization_config("moebius")(MoebiusConfig)

# Weights that a model may have beyond twice what its files hold.
_SLACK = 1 << 20


@register_quantizer("moebius")
class MoebiusQuantizer(HfQuantizer):
    """Puts packed modules in place of the model's before its weights are loaded, and checks what was loaded."""

    quantization_config: MoebiusConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise UnsupportedModelError(
                "quantization_config of Moebius for a model that is not packed: wanted the folder of a packed checkpoint;"
                " `moebius quantize` or moebius.quantize_model packs one"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        stored = {}
        if checkpoint_files:
            files = [Path(file) for file in checkpoint_files]
            stored = read_files(sorted(set(files)))
            self.source_folder = files[0].parent
            manifest = _manifest(self.source_folder, model.config)
            verify_modules(stored, manifest, config.modules, hashes=hashes_wanted())
            check_routing(model.config.to_dict(), config.modules, self.source_folder / "config.json")
        paths = paths_in(model, config.modules)
        self._beginnings = renamed_beginnings(paths)
        _ignore_guards(model, config.modules, paths)
        config.modules = {here: config.modules[path] for path, here in paths.items()}
        pack_modules(model, config.modules)
        if checkpoint_files:
            _check_room(model, stored)
            _check_no_random_experts(model, stored, self._packed_names | self._beginnings.keys())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _align(model)
        for name, tensor in model.state_dict().items():
            # An infinity may be meant outside of what was packed, which is checked by its own numbers: a mask, a bound.
            if name not in self._packed_names and tensor.is_floating_point() and not tensor.is_meta and tensor.isnan().any():
                raise CheckpointError(f"{name}: holds NaN; the file is damaged, fetch it again")
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            from moebius.hf.offload import fetch_parts

            fetch_parts(model)
        for name, module in model.named_modules():
            if hasattr(module, "_packed_spec"):
                packed_of(module).check(name)
        model.__dict__["save_pretrained"] = functools.partial(save_packed, model)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Packed tensors are what they are, in whatever dtype the model is asked for."""
        if converter.target_patterns[0] in self._packed_names:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Packed tensors are stored under the names they have in the model: no renaming and no fusing is meant for them.

        Converters made for fused experts would match them by the beginning of their names, so those look at the end too.
        """
        endings = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in self._packed_names}))
        for transform in weight_conversions:
            probe = copy.deepcopy(transform)  # a transform remembers that it matched
            if any(probe.rename_source_key(name)[1] is not None for name in self._packed_names):
                pattern = transform.compiled_sources.pattern
                transform.compiled_sources = re.compile(rf"(?:{pattern})(?!.*\.(?:{endings})$)")
        return [*super().update_weight_conversions(weight_conversions, model), *self._renamings(endings)]

    def _renamings(self, endings: str) -> list[Any]:
        """For a class in which the packed modules have another beginning to their paths than in ``config.json``."""
        from moebius.private_transformers import WeightRenaming

        found = []
        for stored, here in self._beginnings.items():
            renaming = WeightRenaming(f"^{re.escape(stored)}", here)
            pattern = renaming.compiled_sources.pattern
            already = f"(?!{re.escape(here)})" if here.startswith(stored) else ""
            renaming.compiled_sources = re.compile(rf"{already}(?:{pattern})(?=.*\.(?:{endings})$)")
            found.append(renaming)
        return found

    @functools.cached_property
    def _packed_names(self) -> frozenset[str]:
        modules = self.quantization_config.modules
        return frozenset(name for module, spec in modules.items() for name in expected_tensors(module, spec))

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: the model's tensors, and the guards that keep others from opening it wrongly."""
        return {**model.state_dict(), **guard_tensors(self.quantization_config.modules)}, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        from moebius.hf.dequantize import unpack_modules

        # save_pretrained leaves the dtype as a word in the config, where the base class finds it.
        unpack_modules(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters are: gradients go through packed layers, which stay as they are


def pack_modules(model: nn.Module, modules: dict[str, Any]) -> None:
    """Swap the modules of a model for packed ones with empty tensors on the meta device.

    Args:
        model: may be on the meta device.
        modules: as in :class:`MoebiusConfig`, by path in this model.

    Raises:
        CheckpointError: a module that the model does not have, that has another shape, or half a layer of experts.
    """
    from moebius.models.layout import layout_of
    from moebius.runtime.packed_experts import pack_experts
    from moebius.runtime.packed_linear import pack_weight

    left = dict(modules)
    for name, module in list(model.named_modules()):
        layout = layout_of(module)
        if layout is None:
            continue
        paths = [f"{name}.{layout.gate_up_name}", f"{name}.{layout.down_name}"]
        found = [path for path in paths if path in left]
        if len(found) == 1:
            raise CheckpointError(f"{name}: config.json says that only {found[0]} is packed; wanted both projections or none")
        if found:
            gate_up, down = (empty_projection(left.pop(path)) for path in paths)
            shape = (layout.experts, layout.inner * (2 if layout.has_gate else 1), layout.hidden)
            _same_shape(paths[0], gate_up.shape, shape)
            _same_shape(paths[1], down.shape, (layout.experts, layout.hidden, layout.inner))
            pack_experts(module, layout, gate_up, down)
    for path, spec in left.items():
        try:
            module = model.get_submodule(path)
            rows, columns = module.weight.shape  # type: ignore[misc]
        except (AttributeError, TypeError, ValueError):
            raise CheckpointError(f"{path}: config.json says that it is packed, but this model has no such matrix") from None
        packed = empty_like_spec(spec)
        _same_shape(path, (packed.batch, packed.rows, packed.columns), (1, rows, columns))
        pack_weight(module, packed)


def _align(model: nn.Module) -> None:
    """Copy tensors that do not start at a multiple of their element: a header of odd length puts them so, and kernels read in
    whole elements.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and tensor.data_ptr() % tensor.element_size():
            tensor.data = tensor.data.clone()


def _check_room(model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse a model far larger than its files before memory is laid out for it: what has no tensor would be random.

    Weights that are tied are stored once, and what is packed is in buffers by now.
    """
    wanted = sum(parameter.numel() for parameter in model.parameters())
    there = sum(math.prod(tensor.shape) for tensor in stored.values())
    if wanted > 2 * there + _SLACK:
        raise CheckpointError(
            f"config.json describes a model of {wanted:,} weights besides those that are packed, but the files hold {there:,}"
        )


def _check_no_random_experts(model: PreTrainedModel, stored: Mapping[str, StoredTensor], packed: frozenset[str]) -> None:
    """Refuse experts that are neither packed nor in the files: transformers would warn, and fill them with random numbers."""
    from moebius.checkpoint.names import parameters_of
    from moebius.models.layout import layout_of

    plain = {name: layout for name, module in model.named_modules() if (layout := layout_of(module))}
    if not plain:
        return
    wide = [name for name, tensor in stored.items() if name not in packed and not tensor.is_guard]
    there = {parameter for targets in parameters_of(wide, model).values() for parameter in targets}
    for name, layout in plain.items():
        for parameter in (f"{name}.{layout.gate_up_name}", f"{name}.{layout.down_name}"):
            if parameter not in there:
                raise CheckpointError(
                    f"{parameter}: `modules` in config.json leaves it out, and the files hold no weights for it;"
                    " they would be random. Fetch the checkpoint again"
                )


def _ignore_guards(model: PreTrainedModel, modules: Mapping[str, Any], paths: Mapping[str, str]) -> None:
    """Guards have done their work when Moebius reads them: they are not to be reported as tensors that nothing wants."""
    from moebius.private_transformers import ignore_unexpected

    names = {guarded_parameter(path, spec) for path, spec in modules.items()}
    names |= {guarded_parameter(here, modules[path]) for path, here in paths.items()}
    pattern = "^(?:" + "|".join(sorted(map(re.escape, names))) + ")$"
    ignore_unexpected(model, pattern)


def _manifest(folder: Path, config: Any) -> Path:
    """Where the manifest is. From the hub, transformers fetches only the files it knows."""
    if (folder / MANIFEST_NAME).is_file() or Path(config.name_or_path).is_dir():
        return folder / MANIFEST_NAME
    from moebius.private_transformers import fetched_file

    found = fetched_file(config.name_or_path, MANIFEST_NAME, config)
    return Path(found) if found else folder / MANIFEST_NAME


def _same_shape(path: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        raise CheckpointError(f"{path}: packed as {got}, but the model wants {wanted}; config.json belongs to another model")
