"""On the CPU, in C++ (the ``csrc/`` of the routed experts). States are float32 from one end to the other.

The layer is the one that OLMoE, Qwen's MoE models and Mixtral share: ``x + attention(norm(x))``, then ``x + experts(norm(x))``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moebius.kernels.packed_linear.cpu import CpuLinear
from moebius.kernels.routed_experts import cpu as compiled
from moebius.kernels.routed_experts.cpu import CpuExperts

#: What dense matrices, keys and values may be stored as.
DTYPES = (torch.float32, torch.bfloat16)
#: Rows of inputs up to which reading a matrix for each of them is faster than a dense product.
_FEW_INPUTS = 8


class Matrix:
    """A linear layer, packed or dense.

    Args:
        weight: a packed matrix in the hands of its kernel, or (out, in) in one of :data:`DTYPES`.
        bias: (out,) or None.
        dtype: of dense products with a packed matrix, where it has to be unpacked for many inputs.
    """

    def __init__(self, weight: CpuLinear | Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        bias = None if bias is None else bias.float().contiguous()
        self._dtype = compiled.product_dtype(dtype)
        self.held = weight, bias
        address = 0 if bias is None else bias.data_ptr()
        if isinstance(weight, CpuLinear):
            self.rows, self.columns = weight.rows, weight.columns
            self.compiled = compiled.extension().Matrix(weight.linear, 0, False, self.rows, self.columns, address)
            return
        if weight.dtype not in DTYPES or not weight.is_contiguous():
            raise ValueError(f"weight: got {weight.dtype}, strides {weight.stride()}, wanted contiguous float32 or bfloat16")
        self.rows, self.columns = weight.shape
        bf16 = weight.dtype == torch.bfloat16
        self.compiled = compiled.extension().Matrix(None, weight.data_ptr(), bf16, self.rows, self.columns, address)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(n, in) to (n, out), both float32."""
        if len(inputs) > _FEW_INPUTS:
            return self._many(inputs)
        inputs, outputs = inputs.contiguous(), torch.empty(len(inputs), self.rows)
        addresses = inputs.data_ptr(), outputs.data_ptr()
        self.compiled.apply(*addresses, len(inputs), compiled.current(), torch.get_num_threads())
        return outputs

    def exactly(self, inputs: Tensor) -> Tensor:
        """The same without rounding inputs, for a dense matrix: of a router, that could choose other experts."""
        weight, bias = self.held
        assert isinstance(weight, Tensor)
        return functional.linear(inputs, weight.float(), bias)

    def _many(self, inputs: Tensor) -> Tensor:
        weight, bias = self.held
        if isinstance(weight, Tensor):
            outputs = functional.linear(inputs.to(weight.dtype), weight).float()
        elif weight.bytes is not None:
            outputs = weight(inputs)
        else:
            outputs = weight(inputs.to(self._dtype)).float()
        return outputs if bias is None else outputs.add_(bias)


@dataclass(frozen=True)
class Attention:
    """Attention with rotary positions.

    Attributes:
        query, key, value, output: linear layers.
        query_norm, key_norm: weights of RMS norms over all heads or over each, contiguous float32, or None.
        heads, key_heads: of the queries; of keys and values, a divisor of it.
        width: of a head.
        scaling: of the scores.
    """

    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    query_norm: Tensor | None
    key_norm: Tensor | None
    heads: int
    key_heads: int
    width: int
    scaling: float

    def norms_heads(self) -> bool:
        """Whether each head has a norm of its own."""
        return self.query_norm is not None and len(self.query_norm) == self.width


@dataclass(frozen=True)
class GatedMlp:
    """``down(silu(gate(x)) * up(x))``"""

    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class SharedExpert:
    """An expert of every token, weighed by the sigmoid of a gate with one row."""

    mlp: GatedMlp
    gate: Matrix


@dataclass(frozen=True)
class RoutedExperts:
    """The likeliest ``top_k`` experts by a softmax of the router; ``normalized``: their weights add up to one.

    The activation is SiLU of the first half of ``gate_up`` times the second. ``experts`` have to be ``compiled``.
    """

    router: Matrix
    top_k: int
    normalized: bool
    experts: CpuExperts
    shared: SharedExpert | None


class DecoderLayer:
    """One layer, ready to run. It reads the tensors of its parts as long as it lives.

    Args:
        attention_norm, mlp_norm: weights of RMS norms, (hidden,).
        epsilon: of all norms.
        attention, mlp: the two halves.
    """

    def __init__(
        self, attention_norm: Tensor, mlp_norm: Tensor, epsilon: float, attention: Attention, mlp: GatedMlp | RoutedExperts
    ) -> None:
        self.attention_norm, self.mlp_norm = attention_norm.float().contiguous(), mlp_norm.float().contiguous()
        self.epsilon, self.attention, self.mlp = epsilon, attention, mlp
        norms = (self.attention_norm, self.mlp_norm, attention.query_norm, attention.key_norm)
        first, second, query_norm, key_norm = (0 if norm is None else norm.data_ptr() for norm in norms)
        matrices = (matrix.compiled for matrix in (attention.query, attention.key, attention.value, attention.output))
        shape = attention.heads, attention.key_heads, attention.width, attention.scaling
        self._layer = compiled.extension().DecoderLayer(
            first, second, epsilon, *matrices, query_norm, key_norm, attention.norms_heads(), *shape
        )
        if isinstance(mlp, GatedMlp):
            self._layer.set_dense(mlp.gate.compiled, mlp.up.compiled, mlp.down.compiled)
        else:
            self._set_routed(mlp)

    def _set_routed(self, mlp: RoutedExperts) -> None:
        self._layer.set_routed(mlp.router.compiled, mlp.top_k, mlp.normalized, mlp.experts.compiled)
        if mlp.shared is not None:
            parts = mlp.shared.mlp.gate, mlp.shared.mlp.up, mlp.shared.mlp.down, mlp.shared.gate
            self._layer.set_shared(*(matrix.compiled for matrix in parts))

    def step(self, states: Tensor, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor) -> None:
        """Let one token of each text through the layer.

        Args:
            states: (texts, hidden) float32, changed in place.
            cosines, sines: (width,) float32, of the token's position.
            keys, values: (texts, key heads, tokens, width) in one of :data:`DTYPES`, each head contiguous; the last token's
                are written here.
        """
        caches = (number for part in (keys, values) for number in (part.data_ptr(), part.stride(0), part.stride(1)))
        bf16, length = keys.dtype == torch.bfloat16, keys.shape[2] - 1
        addresses = states.data_ptr(), len(states), cosines.data_ptr(), sines.data_ptr()
        self._layer.step(*addresses, *caches, bf16, length, compiled.current(), torch.get_num_threads())


def normalize(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """An RMS norm: (n, width) contiguous float32 to the same."""
    outputs = torch.empty_like(states)
    sizes = epsilon, len(states), states.shape[1]
    level, threads = compiled.current(), torch.get_num_threads()
    compiled.extension().normalize(states.data_ptr(), weight.data_ptr(), *sizes, outputs.data_ptr(), level, threads)
    return outputs


def place_heads(
    states: Tensor,
    room: Tensor,
    *,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    positions: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Queries, keys or values where attention reads them, each head with its norm and turned to its position.

    Args:
        states: (texts * tokens, heads * width) contiguous float32; overwritten.
        room: (texts, heads, length, width) in one of :data:`DTYPES`, each head contiguous; its last tokens are written.
        norm: of each head, (width,) contiguous float32.
        epsilon: of the norm.
        positions: cosines and sines, (tokens, width) contiguous float32.
    """
    texts, heads, length, width = room.shape
    tokens = len(states) // texts
    weight = 0 if norm is None else norm.data_ptr()
    cosines, sines = (0, 0) if positions is None else (tensor.data_ptr() for tensor in positions)
    target = room.data_ptr(), room.stride(0), room.stride(1), room.dtype == torch.bfloat16, length - tokens
    compiled.extension().place_heads(
        states.data_ptr(), heads, width, weight, epsilon, cosines, sines, texts, tokens, *target,
        compiled.current(), torch.get_num_threads(),
    )  # fmt: skip
