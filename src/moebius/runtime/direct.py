"""Tokens through C++ layers in place of transformers' modules, for architectures that have these layers.

A layer of transformers is some hundred operations of PyTorch, which for a token take longer than reading one-bit experts, and a
fifth of the time of a prompt. What is computed is the same, in float32 between the matrices; of the last layer, only what the
next token needs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moebius import native
from moebius.errors import KernelError
from moebius.kernels.choice import forced, tell_once
from moebius.kernels.decoder_layer import (
    DTYPES,
    NOT_ON_CPU,
    Attention,
    DecoderLayer,
    GatedMlp,
    Matrix,
    RoutedExperts,
    SharedExpert,
    normalize,
    read,
    refusal,
    takes_prompts,
)
from moebius.kernels.routed_experts import Run
from moebius.private_transformers import Cache, DynamicCache, is_capturing_hook
from moebius.runtime.cache import RoomyLayer, make_room
from moebius.runtime.packed_experts import PackedExpertsMixin, packed_layout, ready_experts
from moebius.runtime.packed_linear import PackedLinearMixin, ready_linear
from moebius.runtime.packed_module import Watched

#: Architectures whose layers are those of :mod:`moebius.kernels.decoder_layer`.
ARCHITECTURES = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral")
#: Texts at once: beyond, experts meet enough tokens for PyTorch not to be what they wait for.
MOST_TEXTS = 8


class _UnlikeError(Exception):
    """A part of a model that the layers here do not have; says which."""


def direct_forward(model: PreTrainedModel) -> DirectForward | str:
    """The fast way through a model, or what keeps the model from it, in words."""
    try:
        return DirectForward(model)
    except _UnlikeError as error:
        return str(error)


def tell_of_slow_layers(model: PreTrainedModel, reason: str) -> None:
    """Warn, once for each cause, that a packed model on the CPU goes through transformers' modules."""
    packed = any(isinstance(module, PackedExpertsMixin) for module in model.modules())
    # What keeps the experts from their kernels was said when they were prepared, or asked for.
    if packed and model.device.type == "cpu" and not forced() and not native.missing() and NOT_ON_CPU not in reason:
        kind = getattr(model.config, "model_type", type(model).__name__)
        told = f"tokens go through transformers' modules in place of C++ layers, which is slower, with {kind}: {reason}"
        tell_once(f"{told}; nothing has to be done, the tokens are the same", warn=True)


class DirectForward:
    """A packed model as a list of layers. Built by :func:`direct_forward`."""

    def __init__(self, model: Any) -> None:
        _check_model(model)
        body = model.model
        self._embeddings, self._rotary = body.embed_tokens, body.rotary_emb
        self._layers = [_layer(layer, model.config) for layer in body.layers]
        self._norm, self._epsilon = body.norm.weight.detach().float().contiguous(), float(body.norm.variance_epsilon)
        self._head = _matrix(model.lm_head)
        self._model, self._modules = model, list(model.modules())
        self._watched = Watched(self._modules, _copied(model))

    def holds(self) -> bool:
        """Whether no module and no tensor of the model was replaced or written to since, and nobody watches its modules."""
        now = list(self._model.modules())
        same = len(now) == len(self._modules) and all(map(operator.is_, now, self._modules))
        return same and self._watched.unchanged() and _hooked(self._model) is None

    def new_cache(self) -> Cache:
        """A cache that holds no token."""
        cache = DynamicCache(config=self._model.config)
        make_room(cache)
        return cache

    def takes(self, tokens: Tensor, cache: Cache) -> bool:
        """Whether tokens (texts, new) can follow what a cache holds."""
        texts, new = tokens.shape
        layers = cache.layers
        return (
            texts <= MOST_TEXTS
            and (new == 1 or takes_prompts())
            and len(layers) == len(self._layers)
            and all(type(layer) is RoomyLayer and layer.texts() in (0, texts) for layer in layers)
        )

    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        """More tokens of each text.

        Args:
            tokens: (texts, new) int64.
            cache: one that :meth:`takes` them; grows by them.

        Returns:
            Logits after the last one, (texts, vocabulary) float32.
        """
        texts, new = tokens.shape
        before = cache.get_seq_length()
        positions = self._rotary(self._norm, torch.arange(before, before + new).unsqueeze(0))  # dtype of its first argument
        cosines, sines = (part[0].contiguous() for part in positions)
        states = functional.embedding(tokens.reshape(-1), self._embeddings.weight).float().contiguous()
        for layer, kept in zip(self._layers, cache.layers, strict=True):
            assert isinstance(kept, RoomyLayer)
            if not kept.texts():
                shape = texts, layer.attention.key_heads, 0, layer.attention.width
                kept.begin(torch.empty(shape, dtype=self._model.dtype))
            room = kept.grown(new)
            if new == 1:
                layer.step(states, cosines, sines, *room)
            else:
                states = read(layer, states, (cosines, sines), *room, only_last=layer is self._layers[-1])
        return self._head(normalize(states, self._norm, self._epsilon))


def _copied(model: nn.Module) -> Iterator[Tensor]:
    """What the layers may hold something made of: norms, biases, and what the kernels of packed modules do."""
    yield from (tensor for tensor in model.parameters() if tensor.dim() < 2)
    for module in model.modules():
        if isinstance(module, PackedExpertsMixin):
            yield from ready_experts(module).copied
        elif isinstance(module, PackedLinearMixin):
            yield from ready_linear(module).copied


def _check_model(model: Any) -> None:
    if (missing := native.missing()) is not None:
        raise _UnlikeError(missing)
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
        if "forward" in vars(module) or not all(is_capturing_hook(hook) for hook in hooks):
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
        query_norm=None if query_norm is None else query_norm.weight.detach().float().contiguous(),
        key_norm=None if key_norm is None else key_norm.weight.detach().float().contiguous(),
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


def _experts(module: Any) -> Run:
    if not isinstance(module, PackedExpertsMixin):
        raise _UnlikeError(f"{type(module).__name__} is not packed")
    layout = packed_layout(module)
    if layout.has_bias or not (layout.has_gate and layout.is_concatenated):
        raise _UnlikeError(f"{type(module).__name__} has biases, no gate, or gates between ups")
    ready = ready_experts(module)
    if reason := refusal(ready.run):
        raise _UnlikeError(f"{type(module).__name__}: {reason}")
    return ready.run


def _matrix(module: Any) -> Matrix:
    if isinstance(module, PackedLinearMixin):
        ready = ready_linear(module)
        bias: Any = module.bias
        try:
            return Matrix(ready, bias, module.weight_dtype)
        except KernelError as error:
            raise _UnlikeError(f"{type(module).__name__}: {error}") from None
    if type(module).forward is not nn.Linear.forward:
        raise _UnlikeError(f"got {type(module).__name__}, wanted a linear layer")
    return _dense(module.weight, module.bias)


def _dense(weight: Any, bias: Tensor | None = None) -> Matrix:
    if not isinstance(weight, nn.Parameter):
        raise _UnlikeError("a router is packed")
    if weight.dtype not in DTYPES or not weight.is_contiguous():
        raise _UnlikeError(f"a matrix is {weight.dtype}, wanted contiguous float32 or bfloat16")
    return Matrix(weight.detach(), bias)
