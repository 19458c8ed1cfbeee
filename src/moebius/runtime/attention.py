"""Attention of one new token on the CPU, where PyTorch's fused kernel takes up to three times as long as two products.

The products are in float32: those in bf16 go through a library that compiles itself anew for every length of the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebius.kernels.choice import tell_once
from moebius.private_transformers import attention_of, register_attention, sdpa_attention_forward

#: What transformers calls it.
NAME = "moebius_sdpa"
#: Model types whose attention is a softmax of scaled products under a mask, whatever name it is called by. Others ask for the
#: name: DeepSeek-V3.2, GLM-5 and MiniMax-M3 leave out what their indexers did not choose under the names they know, only.
KNOWN = ("olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe")
#: Options that do not change what is computed from a mask; any other that is set goes to transformers.
_PLAIN_OPTIONS = {"scaling", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache"}
_PLAIN_OPTIONS |= {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"}


def use_single_query_attention(model: PreTrainedModel) -> None:
    """Let a model on the CPU of a kind in :data:`KNOWN` that attends through ``sdpa`` use :func:`attend`; others stay."""
    if model.device.type != "cpu" or attention_of(model) != "sdpa":
        return
    kind = getattr(model.config, "model_type", None)
    if kind in KNOWN and type(model).__module__.startswith("transformers.models."):
        model.set_attn_implementation(NAME)
    else:
        told = (
            f"attention of {kind} stays transformers' own, which takes longer for single tokens: it may not be a softmax alone"
        )
        tell_once(f"{told}; nothing has to be done, the tokens are the same", warn=True)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' ``sdpa``: (batch, heads, queries, width) to (batch, queries, heads, width).

    Several queries, and options that may change what is computed, are left to it.
    """
    other = [name for name, value in options.items() if not _is_plain(name, value)]
    if other and query.shape[2] == 1:
        told = f"attention is left to transformers, which takes longer for single tokens: {', '.join(other)} may change it"
        tell_once(f"{told}; nothing has to be done, the tokens are the same", warn=True)
    if query.shape[2] != 1 or query.device.type != "cpu" or other:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, heads, _, width = query.shape
    scaling = options.get("scaling")
    query = query.view(batch, key.shape[1], -1, width).float()  # by head of the keys
    query *= width**-0.5 if scaling is None else scaling
    scores = query @ key.float().transpose(2, 3)  # (batch, key heads, heads per key head, length)
    if attention_mask is not None:
        scores = scores + _bias(attention_mask, scores)
    states = scores.softmax(-1) @ value.float()
    return states.reshape(batch, 1, heads, value.shape[3]).to(value.dtype), None


def _is_plain(name: str, value: Any) -> bool:
    return value is None or name in _PLAIN_OPTIONS or (name == "dropout" and not value)


def _bias(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask (batch, 1 or heads, 1, length) in the shape of the scores: what is added to them."""
    if mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], *scores.shape[1:3], mask.shape[3])
    return mask if mask.dtype != torch.bool else torch.zeros_like(scores).masked_fill_(~mask, -torch.inf)


register_attention(NAME, attend)
