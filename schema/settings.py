"""The shape of config.ini: its sections, options, types, bounds and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from marshmallow import Schema, fields, post_load, validate

__all__ = [
    "INCLUDES",
    "SECTIONS",
    "STANDARD_INPUT",
    "ClusterSettings",
    "ComputeSettings",
    "DatabaseSettings",
    "InputSettings",
    "ModelSettings",
    "OutputSettings",
    "SettingsSchema",
    "SettingsSections",
]

INCLUDES = ("mean", "bos", "per_tok", "contacts")
STANDARD_INPUT = "-"  # in [input] fasta
_LARGEST = 2**31 - 1  # lengths are int32 in checkpoints, and SQLite's integers end
_POSITIVE = validate.Range(min=1, max=_LARGEST)


class Words(fields.List[Any]):
    """A list that config.ini writes as words between spaces or commas, and JSON as a list."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        return super()._deserialize(value, attr, data, **kwargs)


class Paths(fields.List[Any]):
    """A list of paths; runs that were started with one file have it stored as text."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        value = [value] if isinstance(value, str) else value
        return super()._deserialize(value, attr, data, **kwargs)


@dataclass(frozen=True)
class ModelSettings:
    """[model]: which weights, and what may not be detected but said."""

    esm_model: str
    base_model: str | None
    source: str
    weights_directory: str | None
    download_url: str
    repr_layers: list[int] | None
    num_layers: int | None
    hidden_dim: int | None
    attention_heads: int | None
    token_dropout: bool | None


@dataclass(frozen=True)
class InputSettings:
    """[input]: the FASTA files and what is done about letters, lengths and repeated ids."""

    fasta: list[str] | None
    max_residues: int
    long_sequences: str
    unknown_residues: str
    duplicate_ids: str


@dataclass(frozen=True)
class ComputeSettings:
    """[compute]: how it is calculated; precision and compile are part of a run's identity."""

    device: str
    precision: str
    tokens_per_pack: int
    threads: int
    fused_attention: bool
    compile: bool


@dataclass(frozen=True)
class OutputSettings:
    """[output]: what is kept of each record, where, and how often work is committed."""

    folder: str
    include: list[str]
    per_tok_dtype: str
    checkpoint_seconds: float
    checkpoint_records: int
    reuse: bool


@dataclass(frozen=True)
class DatabaseSettings:
    """[database]: where the run database lies."""

    url: str


@dataclass(frozen=True)
class ClusterSettings:
    """[cluster]: the workers that compute, if it is not this process; never part of an identity."""

    ray: str | None
    workers: int
    threads_per_worker: int
    files: str


@dataclass(frozen=True)
class SettingsSections:
    """All sections of config.ini."""

    model: ModelSettings
    input: InputSettings
    compute: ComputeSettings
    output: OutputSettings
    database: DatabaseSettings
    cluster: ClusterSettings


class ModelSchema(Schema):
    """Options of [model]."""

    esm_model = fields.String(load_default="esm2_t36_3B_UR50D")
    base_model = fields.String(load_default=None, allow_none=True)
    source = fields.String(
        load_default="fair-esm", validate=validate.OneOf(["fair-esm", "huggingface"])
    )
    weights_directory = fields.String(load_default=None, allow_none=True)
    download_url = fields.String(
        load_default="https://dl.fbaipublicfiles.com/fair-esm/models",
        validate=validate.Regexp(r"https?://\S+\Z", error="not an http or https address"),
    )
    repr_layers = Words(
        fields.Integer(), load_default=None, allow_none=True, validate=validate.Length(min=1)
    )
    num_layers = fields.Integer(load_default=None, allow_none=True, validate=_POSITIVE)
    hidden_dim = fields.Integer(load_default=None, allow_none=True, validate=_POSITIVE)
    attention_heads = fields.Integer(load_default=None, allow_none=True, validate=_POSITIVE)
    token_dropout = fields.Boolean(load_default=None, allow_none=True)


class InputSchema(Schema):
    """Options of [input]."""

    fasta = Paths(
        fields.String(), load_default=None, allow_none=True, validate=validate.Length(min=1)
    )
    max_residues = fields.Integer(load_default=1022, validate=_POSITIVE)
    long_sequences = fields.String(
        load_default="truncate", validate=validate.OneOf(["truncate", "error", "whole"])
    )
    unknown_residues = fields.String(load_default="error", validate=validate.OneOf(["error", "x"]))
    duplicate_ids = fields.String(load_default="error", validate=validate.OneOf(["error", "keep"]))


class ComputeSchema(Schema):
    """Options of [compute]."""

    device = fields.String(
        load_default="auto",
        validate=validate.Regexp(
            r"(auto|cpu|cuda(:(0|[1-9][0-9]?))?)\Z", error="not auto, cpu or cuda[:N]"
        ),
    )
    precision = fields.String(
        load_default="auto", validate=validate.OneOf(["auto", "float32", "bfloat16", "float16"])
    )
    # <cls>, one residue and <eos> are three tokens.
    tokens_per_pack = fields.Integer(
        load_default=0,
        validate=[
            validate.Range(min=0, max=_LARGEST),
            validate.NoneOf([1, 2], error="must be 0 or at least 3"),
        ],
    )
    threads = fields.Integer(load_default=0, validate=validate.Range(min=0, max=4096))
    fused_attention = fields.Boolean(load_default=True)
    compile = fields.Boolean(load_default=False)


class OutputSchema(Schema):
    """Options of [output]."""

    folder = fields.String(load_default="embeddings")
    include = Words(
        fields.String(validate=validate.OneOf(INCLUDES)),
        load_default=["mean"],
        validate=validate.Length(min=1),
    )
    per_tok_dtype = fields.String(
        load_default="float32", validate=validate.OneOf(["float16", "float32"])
    )
    checkpoint_seconds = fields.Float(
        load_default=60.0, allow_nan=False, validate=validate.Range(min=0)
    )
    checkpoint_records = fields.Integer(load_default=20_000, validate=_POSITIVE)
    reuse = fields.Boolean(load_default=True)


class DatabaseSchema(Schema):
    """Options of [database]."""

    url = fields.String(load_default="runs.sqlite")


class ClusterSchema(Schema):
    """Options of [cluster]."""

    ray = fields.String(
        load_default=None,
        allow_none=True,
        validate=validate.Regexp(r"(auto|[^\s:/]+:[0-9]{1,5})\Z", error="not auto or HOST:PORT"),
    )
    workers = fields.Integer(load_default=0, validate=validate.Range(min=0, max=4096))
    threads_per_worker = fields.Integer(load_default=0, validate=validate.Range(min=0, max=4096))
    files = fields.String(load_default="auto", validate=validate.OneOf(["auto", "shared", "sent"]))


SECTIONS: dict[str, tuple[type[Schema], type[Any]]] = {
    "model": (ModelSchema, ModelSettings),
    "input": (InputSchema, InputSettings),
    "compute": (ComputeSchema, ComputeSettings),
    "output": (OutputSchema, OutputSettings),
    "database": (DatabaseSchema, DatabaseSettings),
    "cluster": (ClusterSchema, ClusterSettings),
}


class SettingsSchema(Schema):
    """All of config.ini; also the JSON in which a run keeps its settings."""

    model = fields.Nested(ModelSchema, load_default=lambda: ModelSchema().load({}))
    input = fields.Nested(InputSchema, load_default=lambda: InputSchema().load({}))
    compute = fields.Nested(ComputeSchema, load_default=lambda: ComputeSchema().load({}))
    output = fields.Nested(OutputSchema, load_default=lambda: OutputSchema().load({}))
    database = fields.Nested(DatabaseSchema, load_default=lambda: DatabaseSchema().load({}))
    cluster = fields.Nested(ClusterSchema, load_default=lambda: ClusterSchema().load({}))

    @post_load
    def _make(self, data: dict[str, Any], **_: object) -> SettingsSections:
        return SettingsSections(
            **{name: made(**data[name]) for name, (_schema, made) in SECTIONS.items()}
        )
