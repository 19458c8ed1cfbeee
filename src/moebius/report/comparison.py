"""A comparison of recipes on one model: the rows, their table, and what each model wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moebius.report.tables import TextTable, number, percent, size


@dataclass(frozen=True)
class ComparisonRow:
    """One model of a comparison.

    Attributes:
        label: what the reader calls it, such as ``"rtn@1"``.
        recipe: the settings it was quantized with; None for the original.
        bits_per_expert_weight: stored bits of everything that stands for the experts, per expert weight of the original.
        file_bytes: of the safetensors files.
        perplexity: on the held-out windows, with its standard error.
        kl: mean KL(original || model) per token in nats; None for the original, as the next two.
        top1_agreement: share of positions where the likeliest token is the original's.
        routing_similarity: of each MoE layer.
        seconds: that quantizing took, loading and writing included.
        peak_memory_bytes: most resident memory of the process while it quantized.
        calibration: what the recipe looked at; None for the original.
        completions: what it wrote after each prompt.
    """

    label: str
    recipe: dict[str, Any] | None
    bits_per_expert_weight: float
    file_bytes: int
    perplexity: float
    perplexity_error: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    routing_similarity: list[float] = field(default_factory=list)
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    calibration: dict[str, Any] | None = None
    completions: list[str] = field(default_factory=list)

    @property
    def mean_routing_similarity(self) -> float | None:
        """Mean over the MoE layers; None for the original."""
        return sum(self.routing_similarity) / len(self.routing_similarity) if self.routing_similarity else None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ComparisonRow:
        """The row that :meth:`to_dict` wrote."""
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {**dataclasses.asdict(self), "mean_routing_similarity": self.mean_routing_similarity}


def comparison_table(rows: Sequence[ComparisonRow], title: str = "", note: str = "") -> TextTable:
    """The rows in the order given."""
    return TextTable(
        title=title,
        columns=(
            "recipe",
            "bits per expert weight",
            "file size",
            "perplexity",
            "KL (nats)",
            "top-1 agreement",
            "routing similarity",
            "seconds",
            "peak memory",
        ),
        rows=tuple(
            (
                row.label,
                number(row.bits_per_expert_weight, 2),
                size(row.file_bytes),
                number(row.perplexity, 2),
                number(row.kl, 4),
                percent(row.top1_agreement),
                number(row.mean_routing_similarity, 4),
                number(row.seconds, 1),
                size(row.peak_memory_bytes),
            )
            for row in rows
        ),
        note=note,
    )


def verdict(rows: Sequence[ComparisonRow], method: str = "moebius") -> str:
    """Whom a method is behind, in KL, where it stores as many bits as the other or fewer; of its rows, the one of most bits."""
    of = {row.label: row.recipe["method"] for row in rows if row.recipe is not None}
    mine = sorted((row for row in rows if of.get(row.label) == method), key=lambda row: row.bits_per_expert_weight)
    behind, compared = [], 0
    for row in rows:
        beside = [own for own in mine if own.bits_per_expert_weight <= row.bits_per_expert_weight]
        if of.get(row.label, method) == method or not beside:
            continue
        own, compared = beside[-1], compared + 1
        assert own.kl is not None and row.kl is not None  # only the original has none
        if own.kl >= row.kl:
            behind.append(
                f"{row.label} ({row.bits_per_expert_weight:.3f} bits, KL {row.kl:.5f}) beats"
                f" {own.label} ({own.bits_per_expert_weight:.3f} bits, KL {own.kl:.5f})"
            )
    if behind:
        return f"KL at equal bits: {'; '.join(behind)}; {method} is ahead of the other {compared - len(behind)} of {compared}"
    return f"KL at equal bits: {method} is ahead of all {compared} others"


def samples_markdown(rows: Sequence[ComparisonRow], prompts: Sequence[str]) -> str:
    """What each model wrote after each prompt, as markdown."""
    lines = []
    for index, prompt in enumerate(prompts):
        lines += [f"### {' '.join(prompt.split())!r}", ""]
        for row in rows:
            lines += [f"**{row.label}**", "", "```text", (prompt + row.completions[index]).rstrip(), "```", ""]
    return "\n".join(lines)
