"""Routing similarity: whether a quantized model sends tokens where the original does (MoBiE Eq. 53-55)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear
from transformers import PreTrainedModel

from moebius.calibrate.layerwise import removed
from moebius.errors import UnsupportedModelError
from moebius.models.layout import layout_of
from moebius.runtime.packed_experts import PackedExpertsMixin


def routing_similarity(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Cosine of the two routing distributions of each token (Eq. 53 and 54).

    Args:
        logits: router logits of one layer. (tokens, experts)
        reference_logits: the original's, for the same tokens. (tokens, experts)

    Returns:
        (tokens,) float32, between 0 and 1.
    """
    probabilities = logits.float().softmax(-1)
    reference_probabilities = reference_logits.float().softmax(-1)
    return cosine_similarity(probabilities, reference_probabilities, dim=-1)


@contextmanager
def recorded_router_logits(model: nn.Module, routers: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """Within the context, every forward pass leaves its router logits in the yielded dictionary.

    Args:
        model: any model that has these routers.
        routers: module path of each router, and its number of experts.

    Yields:
        Router path to logits (tokens, experts) of the latest forward pass.

    Raises:
        UnsupportedModelError: the model has no module of that path.
    """
    logits: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, experts in routers.items():
            try:
                router = model.get_submodule(name)
            except AttributeError:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: no router {name!r}, which the reference has; wanted two models of one kind"
                ) from None
            stack.enter_context(removed(router.register_forward_hook(_recorder(logits, name, experts))))
        yield logits


def experts_names(model: nn.Module) -> list[str]:
    """Module paths of the fused experts of a model, packed or not, in forward order."""
    return [n for n, module in model.named_modules() if isinstance(module, PackedExpertsMixin) or layout_of(module) is not None]


@contextmanager
def routed_by(model: nn.Module, source: PreTrainedModel) -> Iterator[Callable[[Tensor], None]]:
    """Within the context, tokens of ``model`` go where the routers of ``source`` send them, with its routing weights.

    Args:
        model, source: two models of one architecture.

    Yields:
        What has to be called with token ids (windows, window_length) before ``model`` is run on them: it runs ``source``.

    Raises:
        UnsupportedModelError: a model whose experts are not handed an index and weights of their tokens, or two that differ.
    """
    names = experts_names(source)
    decisions: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for name in names:
            try:
                experts, others = source.get_submodule(name), model.get_submodule(name)
            except AttributeError:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: no experts {name!r}, wanted two models of one kind"
                ) from None
            stack.enter_context(removed(experts.register_forward_pre_hook(_remembers(decisions, name))))
            stack.enter_context(removed(others.register_forward_pre_hook(_replaces(decisions, name))))

        def decide(ids: Tensor) -> None:
            decisions.clear()
            source(input_ids=ids.to(next(source.parameters()).device), use_cache=False)

        yield decide


@contextmanager
def recorded_decisions(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within the context, every forward pass leaves what its routers decided in the yielded dictionary.

    Args:
        model: any model with these experts.
        names: module paths of experts.

    Yields:
        Path of the experts to the index (tokens, top_k) and the weights (tokens, top_k) they were handed last.
    """
    decisions: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(removed(model.get_submodule(name).register_forward_pre_hook(_remembers(decisions, name))))
        yield decisions


def _remembers(decisions: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
        decisions[name] = _decision(args, name)

    return remember


def _replaces(decisions: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        index, weights = _decision(args, name)
        other_index, other_weights = decisions[name]
        return (args[0], other_index.to(index.device), other_weights.to(weights.device, weights.dtype))

    return replace


def _decision(args: tuple[Any, ...], name: str) -> tuple[Tensor, Tensor]:
    if len(args) != 3:
        raise UnsupportedModelError(
            f"{name}: got experts called with {len(args)} arguments, wanted hidden states, index and weights"
        )
    return args[1], args[2]


def _recorder(logits: dict[str, Tensor], name: str, experts: int) -> Any:
    def record(router: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        logits[name] = _router_logits(router, inputs[0], output, experts, name)

    return record


def _router_logits(router: nn.Module, hidden: Tensor, output: Any, experts: int, name: str) -> Tensor:
    """(tokens, experts). From the weight where the router has one: what routers return differs between architectures."""
    weight = getattr(router, "weight", None)
    if isinstance(weight, Tensor) and weight.shape == (experts, hidden.shape[-1]):
        bias = getattr(router, "bias", None)
        return linear(hidden.flatten(0, -2).float(), weight.float(), None if bias is None else bias.float())
    candidates: Sequence[Any] = output if isinstance(output, (tuple, list)) else (output,)
    for tensor in candidates:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[-1] == experts:
            return tensor.reshape(-1, experts)
    raise UnsupportedModelError(
        f"{name}: got a router ({type(router).__name__}) with neither a weight of ({experts}, {hidden.shape[-1]}) nor"
        f" an output of {experts} logits per token; routing cannot be compared on this architecture"
    )
