"""Charts: histograms, steps over time and points, as SVG within a page.

Charts are 380 units wide, so that their text is readable on a phone. Every part has a class, and
the style sheet of the page sets its looks. Colour never carries a meaning alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

__all__ = ["Axis", "Bars", "Points", "Step", "histogram", "mark", "scatter", "steps"]

_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 18, 38
_LETTER = 6.5  # width of a letter of the numbers, at most
# Marks by name, one unit from centre to edge and of similar area.
_MARKS = {
    "circle": "M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0z",
    "triangle": "M0,-1.3L1.2,0.9H-1.2z",
    "square": "M-0.9,-0.9H0.9V0.9H-0.9z",
    "diamond": "M0,-1.4L1.1,0L0,1.4L-1.1,0z",
    "cross": "M-1.1,-1.1L1.1,1.1M-1.1,1.1L1.1,-1.1",
}
_MARK_SIZE = 2.6


@dataclass(frozen=True)
class Axis:
    """The label and range of an axis; `whole` puts ticks at whole numbers only."""

    label: str
    low: float
    high: float
    logarithmic: bool = False
    whole: bool = False

    def place(self, value: float) -> float:
        """Return the place of a value: 0 at `low`, 1 at `high`."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return up to eight ticks at 1, 2 or 5 times a power of ten, or at the powers alone."""
        if self.logarithmic:
            tens = [10.0**i for i in range(-3, 10)]
            finer = [ten * factor for ten in tens for factor in (1, 2, 5)]
            found = [value for value in finer if self.low <= value <= self.high]
            return found if len(found) <= 8 else [ten for ten in tens if ten in found]
        rough = (self.high - self.low) / 6
        ten = 10.0 ** math.floor(math.log10(rough))
        step = next(ten * factor for factor in (1, 2, 5, 10) if ten * factor >= rough)
        step = max(step, 1.0) if self.whole else step
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class Bars:
    """One part of every bar: (bins,) heights, and their class."""

    style: str
    heights: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """A height between two places of the x axis, within a named group."""

    start: float
    stop: float
    height: float
    group: str


@dataclass(frozen=True)
class Points:
    """Points of one kind: (n, 2) places, a title for each, their class and mark."""

    style: str
    mark: str
    places: npt.NDArray[np.float64]
    titles: Sequence[str]


def histogram(
    name: str,
    x: Axis,
    y_label: str,
    edges: npt.NDArray[np.float64],
    parts: Sequence[Bars],
    limit: tuple[float, str] | None = None,
) -> str:
    """Draw bars between (bins + 1,) edges, with their parts stacked.

    limit: a place on the x axis to mark, and its label.
    """
    total = np.sum([part.heights for part in parts], axis=0)
    plot = _Plot(name, x, Axis(y_label, 0, float(total.max()) * 1.05, whole=True))
    below = np.zeros(len(total))
    for part in parts:
        for i in np.flatnonzero(part.heights).tolist():
            left, right = plot.x(edges[i]), plot.x(edges[i + 1])
            top, bottom = plot.y(below[i] + part.heights[i]), plot.y(below[i])
            plot.rectangle(part.style, left, right, top, bottom)
        below += part.heights
    if limit is not None:
        plot.upright("limit", limit[0], limit[1])
    return plot.svg()


def steps(name: str, x: Axis, y_label: str, parts: Sequence[Step]) -> str:
    """Draw heights along the x axis; groups alternate in shade and have their names on top."""
    highest = max(one.height for one in parts)
    plot = _Plot(name, x, Axis(y_label, 0, highest * 1.1 or 1.0))
    groups = [list(found) for _, found in groupby(parts, key=lambda one: one.group)]
    for i, group in enumerate(groups):
        for one in group:
            plot.rectangle(
                f"shade{i % 2}", plot.x(one.start), plot.x(one.stop), plot.y(one.height), plot.y(0)
            )
        line = "".join(
            f"{'L' if j else 'M'}{plot.x(one.start):.1f},{plot.y(one.height):.1f}"
            f"H{plot.x(one.stop):.1f}"
            for j, one in enumerate(group)
        )
        plot.path("line", line)
        left, right = plot.x(group[0].start), plot.x(group[-1].stop)
        if i:
            plot.upright("between", group[0].start)
        # A letter is about six units wide.
        if right - left > 6 * len(group[0].group):
            plot.text("group", (left + right) / 2, _TOP - 5, group[0].group)
    return plot.svg()


def scatter(name: str, labels: tuple[str, str], kinds: Sequence[Points]) -> str:
    """Draw points of several kinds, with the same scale on both axes."""
    places = np.concatenate([kind.places for kind in kinds])
    low, high = places.min(axis=0), places.max(axis=0)
    middle, spread = (low + high) / 2, (high - low) * 1.08
    wide = _WIDTH - _LEFT - _RIGHT
    unit = max(spread[0] / wide, spread[1] / wide)
    tall = max(wide * 0.6, spread[1] / unit)
    x = Axis(labels[0], middle[0] - wide * unit / 2, middle[0] + wide * unit / 2)
    y = Axis(labels[1], middle[1] - tall * unit / 2, middle[1] + tall * unit / 2)
    plot = _Plot(name, x, y, round(tall + _TOP + _BOTTOM))
    drawn = [
        (kind, place, title)
        for kind in kinds
        for place, title in zip(kind.places.tolist(), kind.titles, strict=True)
    ]
    # In random order, so that no kind covers the others.
    random.Random(0).shuffle(drawn)
    size = _MARK_SIZE if len(drawn) < 500 else _MARK_SIZE * 0.7
    for kind, place, title in drawn:
        plot.mark(kind, plot.x(place[0]), plot.y(place[1]), size, title)
    return plot.svg()


def mark(style: str, shape: str) -> str:
    """Draw one mark alone, for a legend."""
    root = ElementTree.Element("svg", {"class": "mark", "viewBox": "-1.8 -1.8 3.6 3.6"})
    ElementTree.SubElement(root, "path", {"class": f"point {style}", "d": _MARKS[shape]})
    return ElementTree.tostring(root, encoding="unicode")


class _Plot:
    """A drawing with its axes, to which shapes are added."""

    def __init__(self, name: str, x: Axis, y: Axis, height: int = _HEIGHT) -> None:
        self._x, self._y, self._height = x, y, height
        self._root = ElementTree.Element(
            "svg",
            {"class": "chart", "viewBox": f"0 0 {_WIDTH} {height}", "role": "img"},
        )
        self._root.set("aria-label", name)
        for value in x.ticks():
            self.path("tick", f"M{self.x(value):.1f},{height - _BOTTOM}v4")
            words = _short(value)
            # Under its tick, or as near as the words stay within the drawing.
            middle = min(self.x(value), _WIDTH - _LETTER * len(words) / 2)
            self.text("number middle", middle, height - _BOTTOM + 15, words)
        for value in y.ticks():
            self.path("grid", f"M{_LEFT},{self.y(value):.1f}H{_WIDTH - _RIGHT}")
            self.text("number end", _LEFT - 5, self.y(value) + 4, _short(value))
        self.path("axis", f"M{_LEFT},{height - _BOTTOM}H{_WIDTH - _RIGHT}")
        self.text("label middle", (_LEFT + _WIDTH - _RIGHT) / 2, height - 6, x.label)
        upright = self.text("label middle", 0, 0, y.label)
        upright.set("transform", f"translate(11,{(_TOP + height - _BOTTOM) / 2:.1f}) rotate(-90)")

    def x(self, value: float) -> float:
        return _LEFT + self._x.place(value) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        bottom = self._height - _BOTTOM
        return bottom - self._y.place(value) * (bottom - _TOP)

    def rectangle(self, style: str, left: float, right: float, top: float, bottom: float) -> None:
        # Even the smallest value stays visible.
        wide, tall = max(right - left, 0.5), max(bottom - top, 1.0)
        box = {"x": left, "y": bottom - tall, "width": wide, "height": tall}
        numbers = {key: f"{value:.1f}" for key, value in box.items()}
        ElementTree.SubElement(self._root, "rect", {"class": style, **numbers})

    def path(self, style: str, line: str) -> None:
        ElementTree.SubElement(self._root, "path", {"class": style, "d": line})

    def text(self, style: str, x: float, y: float, words: str) -> ElementTree.Element:
        place = {"class": style, "x": f"{x:.1f}", "y": f"{y:.1f}"}
        element = ElementTree.SubElement(self._root, "text", place)
        element.text = words
        return element

    def upright(self, style: str, value: float, words: str = "") -> None:
        self.path(style, f"M{self.x(value):.1f},{_TOP - 12}V{self._height - _BOTTOM}")
        if words:
            # On the side of the middle, so that the words stay within the drawing.
            end = self._x.place(value) > 0.5
            shift = -4 if end else 4
            self.text(f"words {'end' if end else ''}", self.x(value) + shift, _TOP - 4, words)

    def mark(self, kind: Points, x: float, y: float, size: float, title: str) -> None:
        transform = f"translate({x:.1f},{y:.1f}) scale({size:.2f})"
        style = f"point {kind.style}"
        attributes = {"class": style, "d": _MARKS[kind.mark], "transform": transform}
        element = ElementTree.SubElement(self._root, "path", attributes)
        ElementTree.SubElement(element, "title").text = title

    def svg(self) -> str:
        return ElementTree.tostring(self._root, encoding="unicode")


def _short(number: float) -> str:
    """Return a number short enough for an axis: `0.25`, `750`, `20k`, `1.5M`."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= factor:
            return f"{number / factor:g}{unit}"
    return f"{number:g}"
