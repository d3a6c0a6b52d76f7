"""The six released ESM-2 models, as fair-esm publishes them."""

from __future__ import annotations

from dataclasses import dataclass

from schema.esm2_config import ModelShape

__all__ = ["RELEASED", "ReleasedModel"]


@dataclass(frozen=True)
class ReleasedModel:
    """A released model; `repr_layers` are the layers to keep when the settings name none."""

    shape: ModelShape
    repr_layers: tuple[int, ...]


# Shapes: Lin et al. 2022 (doi:10.1126/science.ade2574), table S1, and the released files.
RELEASED = {
    "esm2_t6_8M_UR50D": ReleasedModel(ModelShape(6, 320, 20, True), (6,)),
    "esm2_t12_35M_UR50D": ReleasedModel(ModelShape(12, 480, 20, True), (12,)),
    "esm2_t30_150M_UR50D": ReleasedModel(ModelShape(30, 640, 20, True), (30,)),
    "esm2_t33_650M_UR50D": ReleasedModel(ModelShape(33, 1280, 20, True), (33,)),
    "esm2_t36_3B_UR50D": ReleasedModel(ModelShape(36, 2560, 40, True), (36,)),
    "esm2_t48_15B_UR50D": ReleasedModel(ModelShape(48, 5120, 40, True), (48,)),
}
