"""What is used of transformers beyond its documented interface, in one place.

Each name here stands for an assumption about how transformers works inside, and has a test in
``tests/test_private_transformers.py``: with a version that breaks one of them, the test says which. Nothing else of the package
reaches into transformers (``register``, ``one_line`` and ``quantizer`` in ``hf/`` are called by it, while it is imported).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Imported when first used: the quantizer, which needs some of this, is imported from the middle of transformers' imports.
_PLACES = {
    "Cache": "cache_utils",
    "DynamicCache": "cache_utils",
    "DynamicLayer": "cache_utils",
    "WeightConverter": "core_model_loading",
    "WeightRenaming": "core_model_loading",
    "dot_natural_key": "core_model_loading",
    "get_model_conversion_mapping": "conversion_mapping",
    "rename_source_key": "core_model_loading",
    "sdpa_attention_forward": "integrations.sdpa_attention",
}
__all__ = [
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "WeightConverter",
    "WeightRenaming",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "rename_source_key",
    "sdpa_attention_forward",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"transformers.{_PLACES[name]}"), name)


def register_attention(name: str, attend: Callable[..., Any]) -> None:
    """Make an attention function known by a name that ``set_attn_implementation`` takes; masks are those of ``sdpa``."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention function that a model uses, such as ``sdpa``."""
    return str(model.config._attn_implementation)


def is_capturing_hook(hook: object) -> bool:
    """Whether a hook is one of transformers' own, which sleep unless hidden states or router logits are asked for."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def gate(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """How a fused experts module with a gate makes its inner states of the channels of ``gate_up``."""
    experts: Any = module
    function: Callable[[Tensor], Tensor] = experts._apply_gate
    return function


def mark_initialized(value: Any) -> None:
    """Keep loading from initializing a module or tensor that has its values."""
    value._is_hf_initialized = True


def quantizer_of(model: nn.Module) -> Any:
    """The quantizer that a model was loaded by, or None."""
    return getattr(model, "hf_quantizer", None)


def ignore_unexpected(model: PreTrainedModel, pattern: str) -> None:
    """Keep loading from reporting stored tensors whose names match a pattern as ones that nothing wants."""
    known = model._keys_to_ignore_on_load_unexpected or []
    model._keys_to_ignore_on_load_unexpected = {*known, pattern}


def forget_quantization(model: nn.Module) -> None:
    """Of the model and its parts: what is remembered of a quantized checkpoint and would change how a plain one computes or is
    saved.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)  # some mixers compute in another order where it is there
    model.__dict__.pop("_weight_conversions", None)


def ties_of(model: PreTrainedModel) -> Mapping[str, str]:
    """Parameters that are another one's, by name."""
    ties: Mapping[str, str] = model.all_tied_weights_keys
    return ties


def untie(model: PreTrainedModel, name: str) -> None:
    """Let a parameter be one of its own that the config calls tied."""
    model.all_tied_weights_keys.pop(name, None)


def loaded_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtype in which each parameter and buffer is loaded: its own, or that which its class asks for."""
    from transformers.core_model_loading import build_glob_alternation

    plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if plan:
        pattern, key_of_group, _ = build_glob_alternation(list(plan))
        dtypes.update({n: plan[key_of_group[str(found.lastgroup)]] for n in dtypes if (found := pattern.search(n))})
    return dtypes


def must_be_stored(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Of these parameters and buffers, those that a checkpoint may not lack."""

    report: Any = SimpleNamespace(missing_keys=set(names), unexpected_keys=set())
    model._adjust_missing_and_unexpected_keys(report)
    missing: set[str] = report.missing_keys
    return missing


def fetched_file(model_name: str, file: str, config: Any) -> str | None:
    """A file of a model on the hub, of the revision that its config was fetched from; None if there is none."""
    from transformers.utils.hub import cached_file

    found: str | None = cached_file(
        model_name, file, revision=getattr(config, "_commit_hash", None), _raise_exceptions_for_missing_entries=False
    )
    return found


def loading_report(error: BaseException) -> str | None:
    """What kept a checkpoint from loading, where transformers only logged it: its report is held by the frame that raised."""
    trace = error.__traceback__
    while trace is not None:
        report = trace.tb_frame.f_locals.get("loading_info")
        for name in ("conversion_errors", "mismatched_keys"):
            if found := getattr(report, name, None):
                lines = [f"{key}: {value}" for key, value in found.items()] if isinstance(found, dict) else map(str, found)
                return " ".join(next(iter(lines)).split())[:400]
        trace = trace.tb_next
    return None
