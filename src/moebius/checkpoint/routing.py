"""How many experts a token chooses, as a ``config.json`` says it, checked against how many there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moebius.errors import CheckpointError

#: What transformers' configs call the number of experts per token.
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "experts_per_token",
)


def experts_per_token(config: Mapping[str, Any]) -> int | None:
    """Top-k of a model, by whichever name its config uses; None if by none that is known."""
    return next((value for _, value in _top_k(config) if type(value) is int), None)


def check_routing(config: Mapping[str, Any], modules: Mapping[str, Any], where: object) -> None:
    """Refuse a config that has tokens choose more experts than are packed, or groups of experts that they do not fall into.

    Args:
        config: ``config.json`` of a packed checkpoint.
        modules: of its ``quantization_config``; each description has been checked by itself.
        where: the file, for the message.

    Raises:
        CheckpointError: names the field, what it is and what it should be.
    """
    experts = max((spec["factor"]["batch"] for spec in modules.values() if "factor" in spec), default=0)
    if not experts:
        return
    for name, value in _top_k(config):
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (type(each) is not int or not 1 <= each <= experts):
                raise CheckpointError(f"{where}: {name} is {str(each)[:40]}, wanted 1 to {experts}, the number of experts")
    for part in (config, *_nested(config)):
        groups, chosen = part.get("n_group"), part.get("topk_group")
        if groups is None or chosen is None:
            continue
        whole = type(groups) is int and type(chosen) is int
        if not whole or not 1 <= chosen <= groups or experts % groups:
            got = f"{str(chosen)[:40]} of n_group {str(groups)[:40]}"
            raise CheckpointError(f"{where}: topk_group is {got}, wanted some of the equal groups of {experts} experts")


def _top_k(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for part in (config, *_nested(config)):
        yield from ((name, part[name]) for name in TOP_K_NAMES if name in part)


def _nested(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Configs of the parts of a model, such as ``text_config``."""
    return [part for name, part in config.items() if isinstance(part, Mapping) and name != "quantization_config"]
