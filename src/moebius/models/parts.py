"""Which module of a layer is its router, and which linear layers are the language model's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from moebius.private_transformers import ties_of
from moebius.types import ExpertsLayout, MoeLayer

# What transformers' decoders call the matrices of an MLP. Attention and state-space mixers use none of these names.
MLP_LINEARS = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "fc1", "fc2"}
MLP_LINEARS |= {"c_fc", "input_linear", "output_linear", "dense_h_to_4h", "dense_4h_to_h"}

_ROUTER_NAMES = {"router", "gate"}
_ATTENTION_NAMES = ("attn", "attention")


def router_name(model: nn.Module, experts_name: str, layout: ExpertsLayout) -> str | None:
    """The module beside the experts whose 2-D ``weight`` gives each of them a logit, the last one of a router that has several.

    A part of something called a router or a gate goes before any other matrix of that height: a layer may hold more of them,
    such as the gate of per-layer inputs. A router may have one row more than there are experts, which picks none.
    """
    block_name, _, own = experts_name.rpartition(".")
    found = []
    for name, module in model.get_submodule(block_name).named_modules():
        weight, parts = getattr(module, "weight", None), name.split(".")
        if parts[0] == own or "shared" in name or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            continue
        if any(word in name for word in _ATTENTION_NAMES) or parts[-1] in MLP_LINEARS:
            continue
        called_so = not _ROUTER_NAMES.isdisjoint(parts)
        extra = weight.shape[0] - layout.experts
        if extra == 0 or (extra == 1 and called_so):
            # Experts in a latent space have another width than their router: the width only ranks.
            found.append((not called_so, extra, len(parts), weight.shape[1] != layout.hidden, name))
    return f"{block_name}.{min(found)[-1]}" if found else None


def router_module(layer: MoeLayer) -> str | None:
    """Path of all of a layer's router, which may hold more than the matrix that :func:`router_name` found."""
    if layer.router_name is None:
        return None
    block = layer.name.rpartition(".")[0]
    parts = layer.router_name.removeprefix(f"{block}.").split(".")
    depth = next((index for index, part in enumerate(parts, 1) if part in _ROUTER_NAMES), len(parts))
    return ".".join([block, *parts[:depth]])


def linears_outside(model: PreTrainedModel, decoder_name: str, layers: Sequence[MoeLayer]) -> tuple[str, ...]:
    """Linear layers of the language model outside of experts and routers that have a matrix of their own, in forward order.

    The towers of a model that sees or hears, and what joins them to it, are not of the language model.
    """
    left_out = tuple(f"{name}." for layer in layers for name in (layer.name, router_module(layer)) if name)
    ties = ties_of(model)
    tied = {*ties, *ties.values()}
    head = model.get_output_embeddings()
    text = decoder_name.rpartition(".")[0]
    towers = tuple(f"{name}." for name in _towers(model, text))
    return tuple(
        name
        for name, linear in linears(model)
        if linear.out_features > 1
        and f"{name}.weight" not in tied
        and not f"{name}.".startswith((*left_out, *towers))
        and (linear is head or f"{name}.".startswith(f"{text}." if text else ""))
    )


def _towers(model: nn.Module, text: str) -> Iterator[str]:
    """Paths of other models within the one that holds the decoder."""
    for name, module in model.get_submodule(text).named_modules() if text else model.named_modules():
        if name and isinstance(module, PreTrainedModel):
            yield f"{text}.{name}" if text else name


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a module, by path."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            yield name, child
