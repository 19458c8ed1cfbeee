"""On the CPU, in C++ (the ``csrc/`` of the routed experts). States are float32 from one end to the other.

The layer is the one that OLMoE, Qwen's MoE models and Mixtral share: ``x + attention(norm(x))``, then ``x + experts(norm(x))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebius.kernels.packed_linear.cpu import CpuLinear
from moebius.kernels.routed_experts import cpu as compiled
from moebius.kernels.routed_experts.cpu import CpuExperts

#: What dense matrices, keys and values may be stored as.
DTYPES = (torch.float32, torch.bfloat16)


class Matrix:
    """A linear layer, packed or dense.

    Args:
        weight: a packed matrix in the hands of its kernel, or (out, in) in one of :data:`DTYPES`.
        bias: (out,) or None.
    """

    def __init__(self, weight: CpuLinear | Tensor, bias: Tensor | None = None) -> None:
        bias = None if bias is None else bias.float().contiguous()
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
        inputs, outputs = inputs.contiguous(), torch.empty(len(inputs), self.rows)
        addresses = inputs.data_ptr(), outputs.data_ptr()
        self.compiled.apply(*addresses, len(inputs), compiled.current(), torch.get_num_threads())
        return outputs


@dataclass(frozen=True)
class Attention:
    """Attention with rotary positions.

    Attributes:
        query, key, value, output: linear layers.
        query_norm, key_norm: weights of RMS norms over all heads or over each, or None.
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
        norms = [
            None if norm is None else norm.float().contiguous()
            for norm in (attention_norm, mlp_norm, attention.query_norm, attention.key_norm)
        ]
        self.held: Any = attention, mlp, norms
        first, second, query_norm, key_norm = (0 if norm is None else norm.data_ptr() for norm in norms)
        matrices = (matrix.compiled for matrix in (attention.query, attention.key, attention.value, attention.output))
        by_head = attention.query_norm is not None and len(attention.query_norm) == attention.width
        shape = attention.heads, attention.key_heads, attention.width, attention.scaling
        self._layer = compiled.extension().DecoderLayer(
            first, second, epsilon, *matrices, query_norm, key_norm, by_head, *shape
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
    """An RMS norm: (n, width) float32 to the same."""
    outputs = torch.empty_like(states)
    compiled.extension().normalize(
        states.data_ptr(), weight.data_ptr(), epsilon, len(states), states.shape[1], outputs.data_ptr()
    )
    return outputs
