"""Parts: rows in order, cut where a part would become too large."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["bounded_parts"]


def bounded_parts(
    sizes: npt.NDArray[np.integer], most: int, most_rows: int | None = None
) -> Iterator[range]:
    """Cut rows into parts of at most `most` in size and at most `most_rows` rows.

    sizes: (rows,) of each row. A larger row is a part of its own. Without rows there are no parts.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    start = 0
    while start < len(ends):
        limit = (int(ends[start - 1]) if start else 0) + most
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        if most_rows is not None:
            stop = min(stop, start + most_rows)
        yield range(start, stop)
        start = stop
