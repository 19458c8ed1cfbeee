"""A decoder layer for several tokens of each text: dense products are PyTorch's, what lies between them is not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moebius.kernels.decoder_layer.cpu import (
    Attention,
    DecoderLayer,
    GatedMlp,
    Matrix,
    RoutedExperts,
    compiled_experts,
    normalize,
    place_heads,
)

#: Queries that meet their keys together, and keys up to which that is faster in float32 than PyTorch's fused attention.
_QUERIES, _FEW_KEYS = 64, 1024


def read(
    layer: DecoderLayer, states: Tensor, positions: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, *, only_last: bool
) -> Tensor:
    """Let several tokens of each text through a layer.

    Args:
        layer: its norms, attention and experts.
        states: (texts * tokens, hidden) contiguous float32, text after text.
        positions: cosines and sines of the tokens, (tokens, width) contiguous float32.
        keys, values: (texts, key heads, length, width), each head contiguous; those of the tokens, the last ones, are
            written here.
        only_last: what the layer makes of the last token of each text is enough.

    Returns:
        (texts * tokens, hidden) float32, or (texts, hidden).
    """
    attention, tokens = layer.attention, len(states) // len(keys)
    normed = normalize(states, layer.attention_norm, layer.epsilon)
    _place(layer, attention.key, attention.key_norm, normed, keys, positions)
    place_heads(attention.value(normed), values)
    if only_last:
        states, normed = states[tokens - 1 :: tokens].contiguous(), normed[tokens - 1 :: tokens].contiguous()
        positions, tokens = (positions[0][-1:], positions[1][-1:]), 1
    queries = keys.new_empty(len(keys), attention.heads, tokens, attention.width)
    _place(layer, attention.query, attention.query_norm, normed, queries, positions)
    states = attention.output(_attend(attention, queries, keys, values)).add_(states)
    return _through_mlp(layer.mlp, normalize(states, layer.mlp_norm, layer.epsilon)).add_(states)


def _place(
    layer: DecoderLayer, matrix: Matrix, norm: Tensor | None, normed: Tensor, room: Tensor, positions: tuple[Tensor, Tensor]
) -> None:
    """Queries or keys in their room."""
    states = matrix(normed)
    by_head = layer.attention.norms_heads()
    if norm is not None and not by_head:
        states = normalize(states, norm, layer.epsilon)
    place_heads(states, room, norm=norm if by_head else None, epsilon=layer.epsilon, positions=positions)


def _attend(attention: Attention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Queries of the last tokens, (texts, heads, tokens, width), to (texts * tokens, heads * width) float32."""
    texts, heads, tokens, width = queries.shape
    if keys.shape[2] <= _FEW_KEYS or tokens == 1:
        states = _attend_by_blocks(attention, queries, keys, values)
    else:
        several = heads // keys.shape[1]
        mask, length = None, keys.shape[2]
        if length > tokens:
            mask = torch.ones(tokens, length, dtype=torch.bool, device=keys.device).tril(length - tokens)
        keys, values = (part.repeat_interleave(several, 1) if several > 1 else part for part in (keys, values))
        states = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=attention.scaling
        ).float()
    return states.transpose(1, 2).reshape(texts * tokens, heads * width)


def _attend_by_blocks(attention: Attention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Some queries at a time meet the keys up to their own."""
    texts, heads, tokens, width = queries.shape
    before, several = keys.shape[2] - tokens, heads // keys.shape[1]
    keys, values = keys.float().mT, values.float()
    states = torch.empty(texts, heads, tokens, width)
    for begin in range(0, tokens, _QUERIES):
        end = min(begin + _QUERIES, tokens)
        block = queries[:, :, begin:end].float() * attention.scaling
        scores = block.reshape(texts, -1, several * (end - begin), width) @ keys[..., : before + end]
        later = scores.view(texts, heads, end - begin, -1)[..., before + begin :]
        later += torch.full((end - begin, end - begin), -torch.inf).triu_(1)
        found = scores.softmax(-1) @ values[:, :, : before + end]
        states[:, :, begin:end] = found.view(texts, heads, end - begin, width)
    return states


def _through_mlp(mlp: GatedMlp | RoutedExperts, inputs: Tensor) -> Tensor:
    if isinstance(mlp, GatedMlp):
        return _through_gate(mlp, inputs)
    weights, chosen = mlp.router.exactly(inputs).softmax(-1).topk(mlp.top_k)
    if mlp.normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    outputs = compiled_experts(mlp.experts).in_one_call(inputs, chosen, weights)
    if mlp.shared is not None:
        outputs += _through_gate(mlp.shared.mlp, inputs) * mlp.shared.gate(inputs).sigmoid_()
    return outputs


def _through_gate(mlp: GatedMlp, inputs: Tensor) -> Tensor:
    return mlp.down(functional.silu(mlp.gate(inputs)).mul_(mlp.up(inputs)))
