"""One plot of a benchmark: tokens per second by case and contender."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a bar chart of a benchmark's figures; logarithmic, as cases differ by magnitudes."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    cases = result["cases"]
    names = [one["contender"] for one in cases[0]["contenders"]]
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(names)
    hatches = ["", "//", "", "..", "xx"]
    for i, name in enumerate(names):
        rates = [case["contenders"][i]["tokens_per_second"] for case in cases]
        places = [number + (i - (len(names) - 1) / 2) * width for number in range(len(cases))]
        bars = axes.bar(places, rates, width, label=name, hatch=hatches[i % len(hatches)])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), [case["case"] for case in cases])
    axes.set_ylabel("tokens per second (log)")
    axes.set_title(f"ESM-2 embedding, untrained weights; {result['machine']}; {result['date']}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
