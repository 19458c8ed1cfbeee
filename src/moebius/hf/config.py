"""The ``quantization_config`` of a packed checkpoint."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from moebius.checkpoint.manifest import FORMAT_VERSION, check_modules, check_version


class MoebiusConfig(QuantizationConfigMixin):
    """What ``config.json`` says about a packed checkpoint.

    Args:
        modules: format of every packed module by its path: ``{"model.layers.0.mlp.experts.gate_up_proj": {"factor": {...},
            "left": {...}}, ...}``; for a router or a linear layer the format itself.
        format_version: of the checkpoint.
        about: how it was made (``recipe``, ``calibration``), kept as it is.

    Raises:
        CheckpointError: a format version that this Moebius does not read, or modules that are no descriptions.
    """

    def __init__(self, modules: dict[str, Any] | None = None, format_version: Any = FORMAT_VERSION, **about: Any) -> None:
        check_version(format_version, "quantization_config")
        if modules:
            check_modules(modules, "quantization_config")
        about.pop("quant_method", None)
        self.quant_method: Any = "moebius"
        self.format_version = format_version
        for name, value in about.items():
            setattr(self, name, value)
        self.modules = modules or {}
