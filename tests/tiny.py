"""Tiny random models of ten architectures and a byte-level tokenizer: everything that reads models is shown on these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 257  # one token per byte, and the end of text

# hidden and inner differ, and neither is a power of two, so that a transposed or swapped matrix cannot pass.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

#: Model type to what its config needs besides :data:`_COMMON`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 40, "num_experts": 8},
    "qwen2_moe": {
        "intermediate_size": 56,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"intermediate_size": 56, "moe_intermediate_size": 40, "num_experts": 8, "head_dim": 16},
    "qwen3_next": {
        "intermediate_size": 56,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "deepseek_v2": {
        "intermediate_size": 56,
        "moe_intermediate_size": 40,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {
        "intermediate_size": 40,
        "num_local_experts": 8,
        "head_dim": 12,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        # The default stretches the rotary embedding from 4096 positions, more than this model has.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "mixtral": {"intermediate_size": 40, "num_local_experts": 8},
    "ernie4_5_moe": {
        "intermediate_size": 56,
        "moe_intermediate_size": 40,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "num_hidden_layers": 3,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
        "intermediate_size": 56,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": 32,
        "n_routed_experts": 8,
        "head_dim": 12,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "pad_token_id": 0,
    },
    "jamba": {
        "intermediate_size": 40,
        "num_experts": 8,
        "num_hidden_layers": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
    },
}


def tiny_config(name: str, **overrides: Any) -> PretrainedConfig:
    """The config of :func:`tiny_model`."""
    common = {k: v for k, v in _COMMON.items() if not (name == "nemotron_h" and k == "num_hidden_layers")}
    return AutoConfig.for_model(name, **{**common, **ARCHITECTURES[name], **overrides})


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode; the same name and seed give the same weights.

    Args:
        name: a key of :data:`ARCHITECTURES`.
        seed: of the weights.
        overrides: fields of its config.
    """
    config = tiny_config(name, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or (parameter.ndim >= 2 and "conv1d" not in parameter_name):
                # Some classes leave experts as torch.empty gave them, others set routers and biases to zero. Twice the
                # usual 0.02 times the width's root makes layers that do something and routers that choose.
                spread = 0.3 if parameter.ndim == 1 else 2 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, END_OF_TEXT])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def save_tiny(name: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Path:
    """Write the model of :func:`tiny_model` and :func:`byte_tokenizer` as a checkpoint; returns ``folder``."""
    tiny_model(name, seed, **overrides).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
