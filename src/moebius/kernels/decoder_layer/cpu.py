"""On the CPU, in C++ (:mod:`moebius.native`). States are float32 from one end to the other.

The layer is the one that OLMoE, Qwen's MoE models and Mixtral share: ``x + attention(norm(x))``, then ``x + experts(norm(x))``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moebius import native
from moebius.errors import KernelError, ShapeError
from moebius.kernels.packed_linear import Linear
from moebius.kernels.packed_linear.cpu import CpuLinear
from moebius.kernels.routed_experts import Run
from moebius.kernels.routed_experts.cpu import CpuExperts

#: What dense matrices, keys and values may be stored as.
DTYPES = (torch.float32, torch.bfloat16)
#: Why experts of another backend cannot be part of a layer.
NOT_ON_CPU = "its experts do not run on the cpu kernels"


class Matrix:
    """A linear layer, packed or dense.

    Args:
        weight: a packed matrix in the hands of its backend, or (out, in) in one of :data:`DTYPES`.
        bias: (out,) or None.
        dtype: of dense products with a packed matrix, where it has to be unpacked for many inputs.

    Raises:
        KernelError: a packed matrix in the hands of another backend.
        ShapeError: a dense matrix of another dtype, or that is not contiguous.
    """

    def __init__(self, weight: Linear | Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        bias = None if bias is None else bias.detach().float().contiguous()
        self._dtype = native.product_dtype(dtype)
        if isinstance(weight, Tensor):
            weight = weight.detach()
            if weight.dtype not in DTYPES or not weight.is_contiguous():
                got = f"{weight.dtype}, strides {weight.stride()}"
                raise ShapeError(f"decoder layer: got a matrix in {got}, wanted contiguous float32 or bfloat16")
            self.rows, self.columns = weight.shape
            self.compiled = native.extension().Matrix(None, weight, bias)
        elif isinstance(weight, CpuLinear):
            self.rows, self.columns = weight.rows, weight.columns
            self.compiled = native.extension().Matrix(weight.linear, None, bias)
        else:
            raise KernelError("decoder layer: got a packed matrix that does not run on the cpu kernels")
        self.held: tuple[CpuLinear | Tensor, Tensor | None] = weight, bias

    def __call__(self, inputs: Tensor) -> Tensor:
        """(n, in) to (n, out), both float32."""
        if len(inputs) > native.extension().FEW_INPUTS:
            return self._many(inputs)
        return native.multiplied(self.compiled, inputs, torch.empty(len(inputs), self.rows))

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

    The activation is SiLU of the first half of ``gate_up`` times the second. Which ``experts`` can be in a layer says
    :func:`refusal`.
    """

    router: Matrix
    top_k: int
    normalized: bool
    experts: Run
    shared: SharedExpert | None


def refusal(experts: Run) -> str | None:
    """What keeps prepared experts from being part of a layer, in words; None if nothing does."""
    if not isinstance(experts, CpuExperts):
        return NOT_ON_CPU
    if experts.compiled is None:
        return "its experts have biases, another activation than gates in SiLU, or shared factors without a kernel"
    return None


def takes_prompts() -> bool:
    """Whether several tokens at once are faster through a layer than through PyTorch."""
    return native.has_tiles()


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
        self.attention_norm, self.mlp_norm = (norm.detach().float().contiguous() for norm in (attention_norm, mlp_norm))
        self.epsilon, self.attention, self.mlp = epsilon, attention, mlp
        matrices = (matrix.compiled for matrix in (attention.query, attention.key, attention.value, attention.output))
        shape = attention.heads, attention.key_heads, attention.width, attention.scaling
        norms = attention.query_norm, attention.key_norm
        self._layer = native.extension().DecoderLayer(self.attention_norm, self.mlp_norm, epsilon, *matrices, *norms, *shape)
        if isinstance(mlp, GatedMlp):
            self._layer.set_dense(mlp.gate.compiled, mlp.up.compiled, mlp.down.compiled)
        else:
            self._set_routed(mlp)

    def _set_routed(self, mlp: RoutedExperts) -> None:
        self._layer.set_routed(mlp.router.compiled, mlp.top_k, mlp.normalized, compiled_experts(mlp.experts).compiled)
        if mlp.shared is not None:
            parts = mlp.shared.mlp.gate, mlp.shared.mlp.up, mlp.shared.mlp.down, mlp.shared.gate
            self._layer.set_shared(*(matrix.compiled for matrix in parts))

    def step(self, states: Tensor, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor) -> None:
        """Let one token of each text through the layer.

        Args:
            states: (texts, hidden) float32, changed in place.
            cosines, sines: (1, width) float32, of the token's position.
            keys, values: (texts, key heads, tokens, width) in one of :data:`DTYPES`, each head contiguous; the last token's
                are written here.
        """
        self._layer.step(states, cosines, sines, keys, values, torch.get_num_threads())


def compiled_experts(experts: Run) -> CpuExperts:
    """Experts that :func:`refusal` lets through.

    Raises:
        KernelError: others.
    """
    if reason := refusal(experts):
        raise KernelError(f"decoder layer: {reason}")
    assert isinstance(experts, CpuExperts)
    return experts


def normalize(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """An RMS norm: (n, width) contiguous float32 to the same."""
    outputs = torch.empty_like(states)
    native.extension().normalize(states, weight, epsilon, outputs, torch.get_num_threads())
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
    cosines, sines = positions or (None, None)
    native.extension().place_heads(states, room, norm, epsilon, cosines, sines, torch.get_num_threads())
