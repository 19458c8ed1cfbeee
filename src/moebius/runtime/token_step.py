"""The next token of each text through C++ layers in place of transformers' modules, for architectures that have these layers.

A layer of transformers is some hundred operations of PyTorch for a token, which take longer than reading one-bit experts. What
is computed is the same, in float32 between the matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import output_capturing

from moebius.kernels.decoder_layer import (
    DTYPES,
    Attention,
    DecoderLayer,
    GatedMlp,
    Matrix,
    RoutedExperts,
    SharedExpert,
    normalize,
)
from moebius.kernels.packed_linear.cpu import CpuLinear
from moebius.kernels.routed_experts.cpu import CpuExperts
from moebius.runtime.cache import RoomyLayer
from moebius.runtime.packed_experts import PackedExpertsMixin, packed_layout, ready_experts
from moebius.runtime.packed_linear import PackedLinearMixin, ready_linear
from moebius.runtime.packed_module import Watched

#: Architectures whose layers are those of :mod:`moebius.kernels.decoder_layer`.
ARCHITECTURES = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral")
#: Texts at once: beyond, experts meet enough tokens for PyTorch not to be what they wait for.
MOST_TEXTS = 8


class _UnlikeError(Exception):
    """A part of a model that the layers here do not have; says which."""


def token_step(model: PreTrainedModel) -> TokenStep | str:
    """The fast step of a model, or what keeps the model from it, in words."""
    try:
        return TokenStep(model)
    except _UnlikeError as error:
        return str(error)


class TokenStep:
    """A packed model as a list of layers. Built by :func:`token_step`."""

    def __init__(self, model: Any) -> None:
        _check_model(model)
        body = model.model
        self._model, self._watched = model, Watched(model.modules())
        self._embeddings, self._rotary = body.embed_tokens, body.rotary_emb
        self._layers = [_layer(layer, model.config) for layer in body.layers]
        self._norm, self._epsilon = body.norm.weight.float().contiguous(), float(body.norm.variance_epsilon)
        self._head = _matrix(model.lm_head)

    def holds(self) -> bool:
        """Whether no tensor of the model was replaced or written to since, and nobody watches its modules."""
        return self._watched.unchanged() and _hooked(self._model) is None

    def takes(self, texts: int, cache: Cache) -> bool:
        """Whether so many texts can go on from what a cache holds."""
        layers = cache.layers
        return (
            texts <= MOST_TEXTS
            and len(layers) == len(self._layers)
            and all(type(layer) is RoomyLayer and layer.can_grow(texts) for layer in layers)
        )

    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        """One more token of each text.

        Args:
            tokens: (texts,) int64.
            cache: one that :meth:`takes` them; grows by a token.

        Returns:
            Logits, (texts, vocabulary) float32.
        """
        position = torch.tensor([[cache.get_seq_length()]])
        cosines, sines = self._rotary(self._norm, position)  # in the dtype of its first argument
        cosines, sines = cosines.reshape(-1).contiguous(), sines.reshape(-1).contiguous()
        states = functional.embedding(tokens, self._embeddings.weight).float().contiguous()
        for layer, kept in zip(self._layers, cache.layers, strict=True):
            assert isinstance(kept, RoomyLayer)
            layer.step(states, cosines, sines, *kept.grown())
        return self._head(normalize(states, self._norm, self._epsilon))


def _check_model(model: Any) -> None:
    if model.device.type != "cpu":
        raise _UnlikeError(f"the model is on {model.device.type}, wanted cpu")
    kind = getattr(model.config, "model_type", None)
    if kind not in ARCHITECTURES or not type(model).__module__.startswith("transformers.models."):
        raise _UnlikeError(f"the architecture is {kind}, wanted one of {', '.join(ARCHITECTURES)}")
    if model.config.hidden_act != "silu":
        raise _UnlikeError(f"the activation is {model.config.hidden_act}, wanted silu")
    if getattr(model.config, "clip_qkv", None) is not None:
        raise _UnlikeError("queries and keys are clipped")
    if (name := _hooked(model)) is not None:
        raise _UnlikeError(f"{name or 'the model'} has hooks, which would not be called")


def _hooked(model: nn.Module) -> str | None:
    """The first module that somebody watches or whose forward was replaced; transformers' own hooks sleep here."""
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module) or any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks):
            return name
    return None


def _layer(layer: Any, config: Any) -> DecoderLayer:
    return DecoderLayer(
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        float(layer.input_layernorm.variance_epsilon),
        _attention(layer.self_attn, config),
        _routed(layer.mlp) if hasattr(layer.mlp, "experts") else _gated(layer.mlp),
    )


def _attention(module: Any, config: Any) -> Attention:
    query_norm, key_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
    return Attention(
        query=_matrix(module.q_proj),
        key=_matrix(module.k_proj),
        value=_matrix(module.v_proj),
        output=_matrix(module.o_proj),
        query_norm=None if query_norm is None else query_norm.weight,
        key_norm=None if key_norm is None else key_norm.weight,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        width=module.head_dim,
        scaling=float(module.scaling),
    )


def _gated(module: Any) -> GatedMlp:
    return GatedMlp(_matrix(module.gate_proj), _matrix(module.up_proj), _matrix(module.down_proj))


def _routed(module: Any) -> RoutedExperts:
    router, shared = module.gate, getattr(module, "shared_expert", None)
    return RoutedExperts(
        _dense(router.weight),
        router.top_k,
        getattr(router, "norm_topk_prob", True),  # Mixtral's always does
        _experts(module.experts),
        None if shared is None else SharedExpert(_gated(shared), _matrix(module.shared_expert_gate)),
    )


def _experts(module: Any) -> CpuExperts:
    if not isinstance(module, PackedExpertsMixin):
        raise _UnlikeError(f"{type(module).__name__} is not packed")
    layout = packed_layout(module)
    if layout.has_bias or not (layout.has_gate and layout.is_concatenated):
        raise _UnlikeError(f"{type(module).__name__} has biases, no gate, or gates between ups")
    ready = ready_experts(module)
    if not isinstance(ready.experts, CpuExperts):
        raise _UnlikeError(f"{type(module).__name__} does not run on the cpu kernels")
    if ready.gate_up.bias is not None or ready.down.bias is not None:
        raise _UnlikeError(f"{type(module).__name__} has biases")
    if ready.experts.compiled is None:
        raise _UnlikeError(f"{type(module).__name__} has shared factors without a kernel")
    return ready.experts


def _matrix(module: Any) -> Matrix:
    if isinstance(module, PackedLinearMixin):
        ready = ready_linear(module)
        if not isinstance(ready, CpuLinear):
            raise _UnlikeError(f"{type(module).__name__} does not run on the cpu kernels")
        bias: Any = module.bias
        return Matrix(ready, bias)
    if type(module).forward is not nn.Linear.forward:
        raise _UnlikeError(f"got {type(module).__name__}, wanted a linear layer")
    return _dense(module.weight, module.bias)


def _dense(weight: Any, bias: Tensor | None = None) -> Matrix:
    if not isinstance(weight, nn.Parameter):
        raise _UnlikeError("a router is packed")
    if weight.dtype not in DTYPES or not weight.is_contiguous():
        raise _UnlikeError(f"a matrix is {weight.dtype}, wanted contiguous float32 or bfloat16")
    return Matrix(weight.detach(), bias)
