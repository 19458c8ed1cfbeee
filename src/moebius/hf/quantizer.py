"""The quantizer that transformers runs around loading and saving a packed checkpoint."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from moebius.checkpoint.manifest import MANIFEST_NAME, expected_tensors, verify_modules, write_manifest
from moebius.checkpoint.routing import check_routing
from moebius.errors import CheckpointError
from moebius.formats.base import empty_like_spec
from moebius.formats.projection import empty_projection
from moebius.hf.config import MoebiusConfig
from moebius.runtime.packed_module import packed_of

if TYPE_CHECKING:  # modeling_utils imports the table that this class is registered in
    from transformers import PreTrainedModel

register_quantization_config("moebius")(MoebiusConfig)


@register_quantizer("moebius")
class MoebiusQuantizer(HfQuantizer):
    """Puts packed modules in place of the model's before its weights are loaded, and checks what was loaded."""

    quantization_config: MoebiusConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        modules = self.quantization_config.modules
        if checkpoint_files:
            folder = Path(checkpoint_files[0]).parent
            verify_modules(folder, _manifest(folder, model.config), modules)
            check_routing(model.config.to_dict(), modules, folder / "config.json")
        pack_modules(model, modules)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
                raise CheckpointError(f"{name}: holds NaN or Inf; the file is damaged, fetch it again")
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
        return super().update_weight_conversions(weight_conversions, model)

    @functools.cached_property
    def _packed_names(self) -> frozenset[str]:
        modules = self.quantization_config.modules
        return frozenset(name for module, spec in modules.items() for name in expected_tensors(module, spec))

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
        modules: as in :class:`MoebiusConfig`.

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


def save_packed(model: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
    """``save_pretrained`` of a packed model: transformers' own, and the manifest.

    Tensors keep the names they have in the model; transformers loads those as well as the original ones.
    """
    type(model).save_pretrained(model, save_directory, **{**options, "save_original_format": False})
    if options.get("is_main_process", True):
        write_manifest(Path(save_directory))


def _manifest(folder: Path, config: Any) -> Path:
    """Where the manifest is. From the hub, transformers fetches only the files it knows."""
    if (folder / MANIFEST_NAME).is_file() or Path(config.name_or_path).is_dir():
        return folder / MANIFEST_NAME
    from transformers.utils.hub import cached_file

    found = cached_file(
        config.name_or_path,
        MANIFEST_NAME,
        revision=getattr(config, "_commit_hash", None),
        _raise_exceptions_for_missing_entries=False,
    )
    return Path(found) if found else folder / MANIFEST_NAME


def _same_shape(path: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        raise CheckpointError(f"{path}: packed as {got}, but the model wants {wanted}; config.json belongs to another model")
