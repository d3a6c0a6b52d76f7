"""The ESM2Config snapshot: everything that identifies a model, as stored beside every result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from marshmallow import Schema, ValidationError, fields, post_load, validate

__all__ = ["ESM2Config", "load_snapshot"]


@dataclass(frozen=True)
class ESM2Config:
    """What identifies a model and the layers taken from it.

    `num_layers` counts transformer layers, `hidden_dim` is the width of the residual stream,
    `repr_layers` are the layers whose vectors are kept (0 is the embedding, `num_layers` the
    last, after the final layer norm). `parameters` counts the numbers in the embedding trunk:
    token embedding, layers and final layer norm, without the language-model head, the contact
    regression and buffers. `sha256` is the digest of the weights as they lie on disk,
    a LoRA adapter's with its base's. `contact_regression_sha256` is there if contacts are
    predicted: the digest of the file or folder that holds the contact regression, or of the
    weights that hold it.
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

    def snapshot(self) -> dict[str, Any]:
        """Return the JSON-ready dictionary that is stored with runs, checkpoints and footers."""
        dumped: dict[str, Any] = ESM2ConfigSchema().dump(self)
        if self.contact_regression_sha256 is None:
            del dumped["contact_regression_sha256"]
        return dumped

    def weights_snapshot(self) -> dict[str, Any]:
        """Return the part of `snapshot` that the table of models holds: no run's choices."""
        chosen = ("repr_layers", "contact_regression_sha256")
        return {key: value for key, value in self.snapshot().items() if key not in chosen}


class ESM2ConfigSchema(Schema):
    """A snapshot is complete or it is refused: no key may be unknown, and every one is required
    but that of the contact regression, which runs without contacts do not have.
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
    weights_format = fields.String(
        required=True,
        validate=validate.OneOf(["fair-esm", "huggingface", "fair-esm+lora", "huggingface+lora"]),
    )
    dtype = fields.String(
        required=True, validate=validate.OneOf(["float16", "bfloat16", "float32"])
    )
    sha256 = fields.String(required=True, validate=_digest)
    untrained = fields.Boolean(required=True)
    contact_regression_sha256 = fields.String(validate=_digest)

    @post_load
    def _make(self, data: dict[str, Any], **_: object) -> ESM2Config:
        return ESM2Config(**{**data, "repr_layers": tuple(data["repr_layers"])})


def load_snapshot(snapshot: object) -> ESM2Config:
    """Read a stored snapshot back.

    Raises ValueError with one line that names every key that is missing, unknown or wrong.
    """
    if snapshot is None:
        raise ValueError("no model metadata (NULL)")
    if not isinstance(snapshot, dict):
        raise ValueError(f"model metadata is {type(snapshot).__name__}, not an object")
    try:
        config: ESM2Config = ESM2ConfigSchema().load(snapshot)
    except ValidationError as error:
        messages = error.messages_dict
        missing = [key for key in messages if key not in snapshot]
        if missing:
            raise ValueError(f"model metadata lacks {', '.join(missing)}") from None
        key = next(iter(messages))
        raise ValueError(f"model metadata has {key} = {snapshot[key]!r}") from None
    return config
