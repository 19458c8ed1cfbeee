"""Tiny models of every family of transformers that has fused experts: their config classes' own defaults, shrunk."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_MOST_WEIGHTS = 6_000_000

#: Field of a config to its value in a tiny model, by a pattern of its name; the first that fits counts.
_SMALL: list[tuple[str, Any]] = [
    (r"vocab_size|unpadded_vocab_size|vocab_size_per_layer_input", 257),
    (r"hidden_size|embedding_size", 32),
    (r"(.*_)?(moe|shared_experts?|shared|expert)_intermediate_size", 24),
    (r"(.*_)?intermediate_size", 40),
    (r"num_hidden_layers", 3),
    (r"(num|swa_num|linear_num)_(attention_|value_)?heads|index_n_heads|indexer_n_heads", 4),
    (r"(num|swa_num|linear_num)_key(_value)?_heads", 2),
    (r"(swa_)?head_dim|index(er)?_head_dim", 16),
    (r"linear_(key_|value_)?head_dim", 8),
    (r"(swa_)?(qk_rope|qk_nope|v)_head_dim|rotary_dim", 8),
    (r"(swa_)?kv_lora_rank", 16),
    (r"(swa_)?q_lora_rank|o_lora_rank", 12),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 6),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts", 2),
    (r"(moe_)?(num|n)_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|o_groups", 1),
    (r"max_position_embeddings", 128),
    (r"sliding_window(_size)?", 8),
    (r"index(er)?_topk|indexer_budget|mamba_chunk_size|chunk_size|block_size", 8),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"mamba_d_state|ssm_state_size|router_hidden_size|hidden_size_per_layer_input|moe_latent_size", 8),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_n_groups|n_groups", 1),
    (r"num_mtp_layers|num_nextn_predict_layers|num_kv_shared_layers", 0),
    (r"router_jitter_noise", 0.0),
    (r"(bos|eos)_token_id", 256),
    (r"pad_token_id", 0),
    (r"(hc|gated_norm|loop_gate|hc_low)_?(mult|count|rank|lowrank)", 2),
]

#: What a family needs besides: its layers are of several kinds, or a number of it follows from others.
_OWN: dict[str, dict[str, Any]] = {
    "inkling2_text": {"n_layers_per_attn_res_block": 1},
    "inkling2_loop_text": {"loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2,
                           "n_layers_per_attn_res_block": 1},
    "hunyuan_v1_moe": {"head_dim": 16},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "indexer_n_heads": 2,
                       "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4,
                       "ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 101, "split_ngram_parts": 1,
                       "make_ngram_vocab_size_divisible_by": 8, "heads_per_ngram": 2},
    "dots3_note_text": {"num_hidden_layers": 4, "swa_num_key_value_heads": 4, "swa_num_attention_heads": 4,
                        "num_key_value_heads": 4},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding", "hybrid"]},
    "glm_moe_dsa": {"num_key_value_heads": 4, "indexer_types": ["full", "full", "shared"]},
    "hy_v4": {"num_key_value_heads": 4},
    "gemma4_text": {"enable_moe_block": True, "num_kv_shared_layers": 1, "num_hidden_layers": 4,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
    "mellum": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention"], "num_hidden_layers": None},
}  # fmt: skip


def families() -> list[str]:
    """Model types whose causal language model has experts in the layout that transformers marks by a decorator."""
    root, found = Path(transformers.__file__).parent / "models", []
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        module = transformers.models.auto.configuration_auto.model_type_to_module_name(model_type)
        source = root / module / f"modeling_{module}.py"
        if source.is_file() and "@use_experts_implementation" in (text := source.read_text()) and f"class {class_name}" in text:
            found.append(model_type)
    return sorted(found)


def tiny(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of a family, in evaluation mode; raises whatever the family raises if it cannot be so small."""
    kind = CONFIG_MAPPING[model_type]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        small = next((value for pattern, value in _SMALL if re.fullmatch(pattern, field.name)), None)
        optional = field.default is None and re.search(r"lora_rank|latent|head_dim|first_k", field.name)
        if small is not None and not optional:
            values[field.name] = small
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = 4
    values.update(_OWN.get(model_type, {}))
    config = kind(**{name: value for name, value in values.items() if value is not None})
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if weights > _MOST_WEIGHTS:
        raise ValueError(f"{weights:,} weights, wanted at most {_MOST_WEIGHTS:,}")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            elif not parameter.isfinite().all():
                parameter.zero_()
    return model
