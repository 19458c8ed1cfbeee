"""Windows of tokens that a model writes itself, so that its experts are used evenly (EBSS, MoEQuant Sec. 4.2)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from moebius.calibrate.layerwise import computing_device, removed
from moebius.errors import UnsupportedModelError
from moebius.progress import Progress, Silent
from moebius.types import MoeLayer, MoeModel

#: Branches that are kept of every window, and what the imbalance of experts is divided by (τ), as in the paper.
BRANCHES = 4
TEMPERATURE = 1.2
_WINDOWS = 16  # written at a time


@torch.no_grad()
def balanced_windows(
    moe: MoeModel,
    windows: int,
    length: int,
    *,
    head: list[int],
    seed: int,
    branches: int = BRANCHES,
    temperature: float = TEMPERATURE,
    progress: Progress | None = None,
) -> Tensor:
    """Each window begins with ``head`` and a token drawn by seed; what follows is a beam search.

    Of ``branches`` beginnings ``S`` and every next token ``v`` the ``branches`` best are kept, by
    ``−(log P(S) + log P(v | S)) / |S v| + σ(S) / τ`` (Eq. 13, 14), where ``σ`` is the standard deviation of how often the
    experts of a layer are used, in shares of all uses, averaged over the layers (Eq. 3, 4). ``v`` has not met a router yet.

    Args:
        moe: the model, which runs as it is, with its cache.
        windows, length: what is wanted.
        head: tokens before the first, such as begin-of-text.
        seed: of the first tokens, distinct as long as the vocabulary has enough.
        branches: kept of every window.
        temperature: τ.
        progress: told about windows.

    Returns:
        (windows, length) int64.

    Raises:
        UnsupportedModelError: a model whose cache cannot follow the branches.
    """
    progress = progress or Silent()
    progress.stage("calibration: writing windows", windows)
    generator, vocabulary = torch.Generator().manual_seed(seed), moe.model.config.get_text_config().vocab_size
    drawn = torch.cat([torch.randperm(vocabulary, generator=generator) for _ in range(-(-windows // vocabulary))])[:windows]
    training = moe.model.training
    moe.model.eval()
    written = []
    try:
        for first in drawn.split(_WINDOWS):
            begin = torch.cat([torch.tensor(head, dtype=torch.int64).expand(len(first), -1), first.unsqueeze(1)], 1)
            written.append(_search(moe, begin.to(computing_device(moe)), length, branches, temperature).cpu())
            for _ in first:
                progress.advance()
    finally:
        moe.model.train(training)
    return torch.cat(written)


def _search(moe: MoeModel, begin: Tensor, length: int, branches: int, temperature: float) -> Tensor:
    """The best of the branches of each window, (windows, length)."""
    windows, every = len(begin), torch.arange(len(begin), device=begin.device).unsqueeze(1)
    ids = begin.repeat_interleave(branches, 0)
    # All branches are alike in the beginning: only the first may go on.
    likelihood = torch.full((windows, branches), -torch.inf, device=ids.device)
    likelihood[:, 0] = 0
    uses = _Uses(moe, len(ids))
    cache, fresh = None, ids
    # From 5.24 on transformers calls it `cache`, and warns of the name it had.
    name = "cache" if "cache" in inspect.signature(moe.model.forward).parameters else "past_key_values"
    with uses.counted():
        while True:
            output = moe.model(input_ids=fresh, use_cache=True, **{name: cache})
            imbalance = uses.imbalance().view(windows, branches, 1) / temperature
            if ids.shape[1] == length:
                best = (imbalance.squeeze(2) - likelihood / length).argmin(1, keepdim=True)
                return ids[(every * branches + best).squeeze(1)]
            following = likelihood.unsqueeze(2) + output.logits[:, -1].float().log_softmax(1).view(windows, branches, -1)
            scores = (imbalance - following / (ids.shape[1] + 1)).flatten(1)
            chosen = scores.topk(branches, dim=1, largest=False).indices
            rows = (every * branches + chosen // following.shape[2]).flatten()
            fresh = (chosen % following.shape[2]).view(-1, 1)
            likelihood = following.flatten(1).gather(1, chosen)
            ids = torch.cat([ids[rows], fresh], 1)
            cache = _followed(getattr(output, name, None), rows)
            uses.follow(rows)


def _followed(cache: Any, rows: Tensor) -> Any:
    """The cache with the chosen branches in their new places."""
    if not hasattr(cache, "reorder_cache"):
        raise UnsupportedModelError(
            f"self-sampling: the model keeps {type(cache).__name__} between tokens, wanted a cache whose rows can be reordered;"
            " give self_sampling=false to calibrate on a text"
        )
    cache.reorder_cache(rows)
    return cache


class _Uses:
    """How often every expert has been used by every branch so far."""

    def __init__(self, moe: MoeModel, rows: int) -> None:
        self._layers = moe.moe_layers
        device = computing_device(moe)
        self._counts = [torch.zeros(rows, layer.layout.experts, device=device) for layer in self._layers]

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within the context, forwards of the model are counted."""
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                hook = layer.experts.register_forward_pre_hook(self._counter(layer, number), with_kwargs=True)
                stack.enter_context(removed(hook))
            yield

    def _counter(self, layer: MoeLayer, number: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            chosen = index.view(len(self._counts[number]), -1)
            real = chosen < layer.layout.experts
            self._counts[number].scatter_add_(1, chosen * real, real.float())

        return hook

    def follow(self, rows: Tensor) -> None:
        """Branches become continuations of those in ``rows``."""
        self._counts = [counts[rows] for counts in self._counts]

    def imbalance(self) -> Tensor:
        """``σ`` of every branch. (rows,)"""
        shares = [counts / counts.sum(1, keepdim=True).clamp_min(1) for counts in self._counts]
        return torch.stack([share.std(1) for share in shares]).mean(0)
