"""Layers: which ones a run keeps, counted as fair-esm counts them.

0 is the embedding, `num_layers` is the last layer, after the final layer norm; negative numbers
count from the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from lib.catalog import ReleasedModel
from lib.errors import SettingsError

__all__ = ["choose_layers", "select_layers"]


def choose_layers(
    asked: Sequence[int] | None, num_layers: int, released: ReleasedModel | None
) -> tuple[tuple[int, ...], str]:
    """Return the layers to keep, and where they come from; raises as `select_layers` does."""
    if asked is not None:
        return select_layers(asked, num_layers), "override"
    if released is not None:
        return released.repr_layers, "catalog"
    return (num_layers,), "last layer"


def select_layers(asked: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return `asked` with negative layers counted from the end, as fair-esm's extract does.

    Raises SettingsError for a layer that does not exist, and for one that is asked for twice.
    """
    chosen: dict[int, int] = {}
    for layer in asked:
        index = layer + num_layers + 1 if layer < 0 else layer
        if layer > num_layers:
            raise SettingsError(f"repr_layer {layer} exceeds model depth {num_layers}")
        if index < 0:
            raise SettingsError(
                f"repr_layer {layer} is before the first: model depth {num_layers} ends at "
                f"{-num_layers - 1}"
            )
        if index in chosen:
            raise SettingsError(f"repr_layers {chosen[index]} and {layer} are the same layer")
        chosen[index] = layer
    return tuple(chosen)
