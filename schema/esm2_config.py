"""A model's shape, and the ESM2Config snapshot that identifies it beside every result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from marshmallow import Schema, ValidationError, fields, post_load, validate

__all__ = [
    "ALPHABET",
    "VOCABULARY",
    "WEIGHTS_FORMATS",
    "ESM2Config",
    "ModelShape",
    "load_snapshot",
]

# fair-esm 2.0.0, esm.data.Alphabet.from_architecture("ESM-1b"): a token's number is its place.
ALPHABET = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    *("<null_1>", "<mask>"),
)
VOCABULARY = len(ALPHABET)
# What a snapshot may have as its format; `+lora` where an adapter was merged into the weights.
WEIGHTS_FORMATS = (
    *("fair-esm", "huggingface", "safetensors", "state-dict"),
    *("fair-esm+lora", "huggingface+lora", "safetensors+lora", "state-dict+lora"),
)


@dataclass(frozen=True)
class ModelShape:
    """The properties that an ESM-2 network is built from.

    `num_layers` counts transformer layers, `hidden_dim` is the width of the residual stream,
    `token_dropout` tells whether embeddings are scaled as in training with token dropout.
    """

    num_layers: int
    hidden_dim: int
    attention_heads: int
    token_dropout: bool

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.hidden_dim // self.attention_heads

    @property
    def has_even_heads(self) -> bool:
        """Whether `hidden_dim` divides into heads of even width, as rotary positions need."""
        return self.attention_heads > 0 and self.hidden_dim % (2 * self.attention_heads) == 0

    @property
    def parameters(self) -> int:
        """How many numbers the tensors of `trunk_shapes` hold."""
        d = self.hidden_dim
        return VOCABULARY * d + self.num_layers * (12 * d * d + 13 * d) + 2 * d

    def trunk_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that an embedding needs, by fair-esm's name."""
        d, ffn = self.hidden_dim, 4 * self.hidden_dim
        layer: dict[str, tuple[int, ...]] = {}
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer[f"self_attn.{projection}.weight"] = (d, d)
            layer[f"self_attn.{projection}.bias"] = (d,)
        layer |= {"fc1.weight": (ffn, d), "fc1.bias": (ffn,)}
        layer |= {"fc2.weight": (d, ffn), "fc2.bias": (d,)}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            layer |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCABULARY, d)}
        for i in range(self.num_layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes | {"emb_layer_norm_after.weight": (d,), "emb_layer_norm_after.bias": (d,)}


@dataclass(frozen=True)
class ESM2Config:
    """What identifies a model and the layers taken from it.

    The first four properties of the model are its ModelShape. `repr_layers` are the layers whose
    vectors are kept (0 is the embedding, `num_layers` the last, after the final layer norm).
    `parameters` counts the numbers in the embedding trunk: token embedding, layers and final
    layer norm, without the language-model head, the contact regression and buffers. `sha256` is
    the digest of the weights as they lie on disk; a LoRA adapter's covers its base.
    `contact_regression_sha256` is set if contacts are predicted: the digest of the file that
    holds the contact regression, or of the weights that hold it. `released` says whether `sha256`
    is that of a published ESM-2 file; None in snapshots older than that question.
    `base_name` and `base_sha256` name the model that a LoRA adapter changes.
    """

    name: str
    num_layers: int
    hidden_dim: int
    attention_heads: int
    token_dropout: bool
    repr_layers: tuple[int, ...]
    parameters: int
    weights_format: str
    dtype: str
    sha256: str
    untrained: bool
    contact_regression_sha256: str | None = None
    released: bool | None = None
    base_name: str | None = None
    base_sha256: str | None = None

    def snapshot(self) -> dict[str, Any]:
        """Return the JSON-ready dictionary that is stored with runs, checkpoints and footers."""
        dumped: dict[str, Any] = _SCHEMA.dump(self)
        return {key: value for key, value in dumped.items() if value is not None}

    def weights_snapshot(self) -> dict[str, Any]:
        """Return the part of `snapshot` that the table `models` holds: not what a run chooses."""
        chosen = ("repr_layers", "contact_regression_sha256")
        return {key: value for key, value in self.snapshot().items() if key not in chosen}


class ESM2ConfigSchema(Schema):
    """The keys and types of a snapshot.

    An unknown key is refused, and so is a missing one, except for those of contacts, of released
    weights and of adapters, which not every snapshot has.
    """

    _positive = validate.Range(min=1)
    _digest = validate.Regexp(r"[0-9a-f]{64}\Z")

    name = fields.String(required=True, validate=validate.Length(min=1))
    num_layers = fields.Integer(required=True, strict=True, validate=_positive)
    hidden_dim = fields.Integer(required=True, strict=True, validate=_positive)
    attention_heads = fields.Integer(required=True, strict=True, validate=_positive)
    token_dropout = fields.Boolean(required=True)
    repr_layers = fields.List(
        fields.Integer(strict=True, validate=validate.Range(min=0)),
        required=True,
        validate=validate.Length(min=1),
    )
    parameters = fields.Integer(required=True, strict=True, validate=_positive)
    weights_format = fields.String(required=True, validate=validate.OneOf(WEIGHTS_FORMATS))
    dtype = fields.String(
        required=True, validate=validate.OneOf(["float16", "bfloat16", "float32"])
    )
    sha256 = fields.String(required=True, validate=_digest)
    untrained = fields.Boolean(required=True)
    contact_regression_sha256 = fields.String(validate=_digest)
    released = fields.Boolean()
    base_name = fields.String(validate=validate.Length(min=1))
    base_sha256 = fields.String(validate=_digest)

    @post_load
    def _make(self, data: dict[str, Any], **_: object) -> ESM2Config:
        return ESM2Config(**{**data, "repr_layers": tuple(data["repr_layers"])})


_SCHEMA = ESM2ConfigSchema()


def load_snapshot(snapshot: object) -> ESM2Config:
    """Read a stored snapshot back.

    Raises ValueError, in one line, that names every missing key, or the first unknown or wrong one.
    """
    if snapshot is None:
        raise ValueError("no model metadata (NULL)")
    if not isinstance(snapshot, dict):
        raise ValueError(f"model metadata is {type(snapshot).__name__}, not an object")
    try:
        config: ESM2Config = _SCHEMA.load(snapshot)
    except ValidationError as error:
        messages = error.messages_dict
        missing = [key for key in messages if key not in snapshot]
        if missing:
            raise ValueError(f"model metadata lacks {', '.join(missing)}") from None
        key = next(iter(messages))
        raise ValueError(f"model metadata has {key} = {snapshot[key]!r}") from None
    return config
