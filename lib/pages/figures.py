"""Figures: the drawings of a report, each with its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

import numpy as np
import numpy.typing as npt

from lib.pages.charts import Axis, Bars, Points, Step, histogram, mark, scatter, steps
from lib.pages.projection import project
from lib.pages.survey import Survey
from lib.units import count, duration, printable, records

__all__ = [
    "Figure",
    "Work",
    "lengths_figure",
    "norms_figure",
    "projection_figure",
    "short_id",
    "throughput_figure",
]

_BINS = 36
_MOST_STEPS = 200
_UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
# From short to long: the shade gets darker and the mark changes.
_MARKS = ["circle", "triangle", "square", "diamond"]


@dataclass(frozen=True)
class Figure:
    """A drawing (SVG, or empty if there is nothing to draw), its title, words and legend.

    legend: (SVG of a mark, its meaning).
    """

    title: str
    svg: str
    words: list[str]
    legend: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """A checkpoint as work done: its attempt, residues computed, seconds taken."""

    attempt: int
    residues: int
    seconds: float


def short_id(name: str) -> str:
    """Return an id of at most 60 letters: a header may be a megabyte long."""
    return name if len(name) <= 60 else f"{name[:59]}…"


def lengths_figure(found: Survey | None, max_residues: int) -> Figure:
    """Draw the lengths of the sequences, and how many were truncated.

    found: here and below, None if the files of the run were pruned.
    """
    title = "Length of the sequences"
    if found is None:
        return Figure(title, "", [_PRUNED])
    lengths = found.lengths
    if not len(lengths):
        return Figure(title, "", ["No record is embedded yet."])
    truncated = found.embedded < lengths
    edges, logarithmic = _length_edges(int(lengths.min()), int(lengths.max()))
    parts = [
        Bars("whole", np.histogram(lengths[~truncated], edges)[0]),
        Bars("truncated", np.histogram(lengths[truncated], edges)[0]),
    ]
    words = [
        f"{records(len(lengths))}: shortest {count(lengths.min())}, median "
        f"{count(np.median(lengths))}, mean {count(lengths.mean())}, longest "
        f"{count(lengths.max())} residues."
    ]
    limit, legend = None, []
    if truncated.any():
        lost = int((lengths - found.embedded).sum(dtype=np.int64))
        everything = int(lengths.sum(dtype=np.int64))
        words.append(
            f"{records(truncated.sum())} truncated to {count(max_residues)} residues: "
            f"{count(lost)} of {count(everything)} residues ({100 * lost / everything:.1f} %) "
            "are not embedded."
        )
        limit = (float(max_residues), f"embedded up to {count(max_residues)}")
        legend = [(_swatch("whole"), "embedded whole"), (_swatch("truncated"), "truncated")]
    else:
        words.append("All are embedded whole.")
    x = Axis("residues", float(edges[0]), float(edges[-1]), logarithmic, whole=True)
    svg = histogram(f"{title}: {words[0]}", x, "records", edges, parts, limit)
    return Figure(title, svg, words, legend)


def norms_figure(found: Survey | None) -> Figure:
    """Draw the Euclidean norms of the vectors."""
    title = "Norms of the vectors"
    if found is None:
        return Figure(title, "", [_PRUNED])
    norms = found.norms
    if not len(norms):
        return Figure(title, "", [_no_vectors(found)])
    low, high = float(norms.min()), float(norms.max())
    # A margin keeps rounding differences between equal norms from filling the axis.
    margin = max((high - low) * 0.02, high * 1e-4) or 0.5
    edges = np.linspace(max(0.0, low - margin), high + margin, min(_BINS, 5 + len(norms) // 4) + 1)
    heights = np.histogram(norms, edges)[0]
    words = [
        f"Euclidean norm of {found.column}: smallest {low:.4g}, median "
        f"{np.median(norms):.4g}, largest {high:.4g}."
    ]
    x = Axis(f"norm of {found.column}", float(edges[0]), float(edges[-1]))
    svg = histogram(f"{title}: {words[0]}", x, "records", edges, [Bars("whole", heights)])
    return Figure(title, svg, words)


def throughput_figure(work: Sequence[Work]) -> Figure:
    """Draw residues per second over the time spent computing, attempt by attempt.

    work: the checkpoints that were computed, not copied, in the order of their commits.
    """
    title = "Throughput"
    merged = [one for one in _merged(work) if one.seconds > 0]
    if not merged:
        return Figure(title, "", ["No checkpoint has been computed."])
    seconds, residues = sum(one.seconds for one in merged), sum(one.residues for one in merged)
    unit = next((one for one in _UNITS if seconds >= 2 * _UNITS[one]), "seconds")
    parts, start = [], 0.0
    for one in merged:
        stop = start + one.seconds / _UNITS[unit]
        name = f"attempt {one.attempt}"
        parts.append(Step(start, stop, one.residues / one.seconds, name))
        start = stop
    words = [
        f"{count(residues)} residues in {duration(seconds)} of computing, "
        f"{count(residues / seconds)} per second on average; time between attempts is left out.",
        "Within a window of the input the longest sequences come first.",
    ]
    x = Axis(f"time computing, {unit}", 0, start)
    svg = steps(f"{title}: {words[0]}", x, "residues per second", parts)
    return Figure(title, svg, words)


def projection_figure(found: Survey | None) -> Figure:
    """Draw the sampled vectors on their first two principal axes, marked by length."""
    title = "The vectors on a plane"
    if found is None:
        return Figure(title, "", [_PRUNED])
    projection = project(found.sample_vectors) if found.column else None
    if projection is None:
        return Figure(title, "", [_no_vectors(found) if not len(found.norms) else _ALIKE])
    lengths = found.lengths[found.sample]
    truncated = found.embedded[found.sample] < lengths
    titles = [
        f"{printable(short_id(name))}, {count(length)} residues"
        for name, length in zip(found.sample_ids, lengths, strict=True)
    ]
    kinds, legend = [], []
    for style, shape, chosen in _length_classes(lengths, truncated):
        members = [titles[i] for i in np.flatnonzero(chosen)]
        kinds.append(Points(style, shape, projection.points[chosen], members))
        low, high = lengths[chosen].min(), lengths[chosen].max()
        between = count(low) if low == high else f"{count(low)} to {count(high)}"
        what = f"{between} residues" + (", truncated" if shape == "cross" else "")
        legend.append((mark(style, shape), f"{what} ({count(chosen.sum())})"))
    shares = [f"{100 * share:.1f} % of the variance" for share in projection.shares]
    shown = f"All {count(len(lengths))} records"
    if len(lengths) < len(found.lengths):
        shown = f"{count(len(lengths))} of {count(len(found.lengths))} records, evenly spaced"
    words = [
        f"{shown}: {found.column} on its first two principal components, marked by length "
        "(number of records)."
    ]
    labels = (f"component 1: {shares[0]}", f"component 2: {shares[1]}")
    return Figure(title, scatter(f"{title}: {words[0]}", labels, kinds), words, legend)


_PRUNED = "The files of this run were pruned: nothing is left to draw."
_ALIKE = "Fewer than three different vectors: nothing to project."


def _no_vectors(found: Survey) -> str:
    if found.column is None:
        return "The run keeps neither mean nor bos: there is no vector per record."
    return "No record is embedded yet."


def _length_edges(low: int, high: int) -> tuple[npt.NDArray[np.float64], bool]:
    """Return the edges of bins, whole numbers, and whether the axis is logarithmic."""
    if high > 8 * low:
        edges = np.geomspace(low, high + 1, _BINS + 1)
        return np.unique(edges.round()), True
    if high - low < 6:
        low, high = max(0, low - 3), high + 3
    return np.unique(np.linspace(low, high + 1, _BINS + 1).round()), False


def _length_classes(
    lengths: npt.NDArray[np.int32], truncated: npt.NDArray[np.bool_]
) -> list[tuple[str, str, npt.NDArray[np.bool_]]]:
    """Return style, mark and (n,) members of up to four classes by length, and of truncated."""
    classes = []
    if not truncated.all():
        cuts = np.unique(np.quantile(lengths[~truncated], [0.25, 0.5, 0.75]))
        number = np.searchsorted(cuts, lengths, side="left")
        for i, shape in enumerate(_MARKS):
            classes.append((f"length{i}", shape, (number == i) & ~truncated))
    classes.append(("length4", "cross", truncated))
    return [one for one in classes if one[2].any()]


def _merged(work: Sequence[Work]) -> list[Work]:
    """Join neighbours of the same attempt until about 200 are left, which a drawing can show."""
    together, merged = -(-len(work) // _MOST_STEPS), []
    for attempt, found in groupby(work, key=lambda one: one.attempt):
        while some := list(islice(found, together)):
            residues, seconds = sum(one.residues for one in some), sum(one.seconds for one in some)
            merged.append(Work(attempt, residues, seconds))
    return merged


def _swatch(style: str) -> str:
    box = '<svg class="mark" viewBox="0 0 10 10"><rect class="{}" width="10" height="10"/></svg>'
    return box.format(style)
