"""Published models by their dimensions alone: configs to build random models from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import MixtralConfig, OlmoeConfig, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from moebius.errors import UnknownNameError


def shape_config(name: str) -> PretrainedConfig:
    """The config of a published model, in bf16.

    Raises:
        UnknownNameError: a name that is not in :data:`SHAPES`; the message lists those that are.
    """
    if name not in SHAPES:
        raise UnknownNameError(f"no shape named {name!r}; known: {', '.join(SHAPES)}")
    config = SHAPES[name]()
    config.dtype = torch.bfloat16
    return config


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with its first layers only."""
    shorter = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:  # says something of each layer
            setattr(shorter, name, value[:layers])
    shorter.num_hidden_layers = layers
    return shorter


def _olmoe() -> PretrainedConfig:
    """allenai/OLMoE-1B-7B-0924"""
    return OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )


def _qwen15_moe() -> PretrainedConfig:
    """Qwen/Qwen1.5-MoE-A2.7B"""
    return Qwen2MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        norm_topk_prob=False,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
    )


def _qwen3_30b_a3b() -> PretrainedConfig:
    """Qwen/Qwen3-30B-A3B"""
    make: Any = Qwen3MoeConfig  # whose signature does not list head_dim
    return make(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
    )


def _mixtral() -> PretrainedConfig:
    """mistralai/Mixtral-8x7B-v0.1"""
    return MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
    )


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "olmoe-1b-7b": _olmoe,
    "qwen1.5-moe": _qwen15_moe,
    "qwen3-30b-a3b": _qwen3_30b_a3b,
    "mixtral-8x7b": _mixtral,
}
