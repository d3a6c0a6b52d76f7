"""The six released ESM-2 models, as fair-esm publishes them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RELEASED", "ReleasedModel", "trunk_parameters", "trunk_shapes"]

VOCABULARY = 33  # tokens in the ESM-2 alphabet


@dataclass(frozen=True)
class ReleasedModel:
    """Properties of a released model; `repr_layers` is the layer to use when nothing is said."""

    num_layers: int
    hidden_dim: int
    attention_heads: int
    token_dropout: bool
    repr_layers: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Numbers in the embedding trunk."""
        return trunk_parameters(self.num_layers, self.hidden_dim)


# Shapes: Lin et al. 2022 (doi:10.1126/science.ade2574), table S1, and the released files.
RELEASED = {
    "esm2_t6_8M_UR50D": ReleasedModel(6, 320, 20, True, (6,)),
    "esm2_t12_35M_UR50D": ReleasedModel(12, 480, 20, True, (12,)),
    "esm2_t30_150M_UR50D": ReleasedModel(30, 640, 20, True, (30,)),
    "esm2_t33_650M_UR50D": ReleasedModel(33, 1280, 20, True, (33,)),
    "esm2_t36_3B_UR50D": ReleasedModel(36, 2560, 40, True, (36,)),
    "esm2_t48_15B_UR50D": ReleasedModel(48, 5120, 40, True, (48,)),
}


def trunk_shapes(num_layers: int, hidden_dim: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors that every ESM-2 embedding needs, by fair-esm name, with their shapes."""
    d, ffn = hidden_dim, 4 * hidden_dim
    layer: dict[str, tuple[int, ...]] = {}
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer[f"self_attn.{projection}.weight"] = (d, d)
        layer[f"self_attn.{projection}.bias"] = (d,)
    layer |= {"fc1.weight": (ffn, d), "fc1.bias": (ffn,)}
    layer |= {"fc2.weight": (d, ffn), "fc2.bias": (d,)}
    for norm in ("self_attn_layer_norm", "final_layer_norm"):
        layer |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCABULARY, d)}
    for i in range(num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"emb_layer_norm_after.weight": (d,), "emb_layer_norm_after.bias": (d,)}


def trunk_parameters(num_layers: int, hidden_dim: int) -> int:
    """Return how many numbers `trunk_shapes` holds."""
    d = hidden_dim
    return VOCABULARY * d + num_layers * (12 * d * d + 13 * d) + 2 * d
