"""Tables of the run database (SQLite); what is done with them is in lib/ledger."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, UniqueConstraint
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.schema import CreateColumn

__all__ = [
    "Attempt",
    "Base",
    "Checkpoint",
    "Input",
    "Model",
    "Run",
    "SchemaVersion",
    "Worker",
]


@compiles(CreateColumn, "sqlite")
def _column_with_comment(element: CreateColumn, compiler: Any, **kw: Any) -> str:  # noqa: ANN401
    # SQLite keeps no column comments, but it keeps the text of CREATE TABLE: written there,
    # they are what `.schema` shows.
    text = compiler.visit_create_column(element, **kw)
    return f"{text} /* {element.element.comment} */" if text else text


class _List(JSON):
    """JSON that holds a list."""

    cache_ok = True
    python_type = list


class _Dictionary(JSON):
    """JSON that holds a dictionary."""

    cache_ok = True
    python_type = dict


class Base(DeclarativeBase):
    """Base of every table; JSON columns hold dictionaries and lists.

    Paths below the folder of the database begin with `./` and start there; lib/ledger/places.py
    tells where they lead. Others are absolute, and so are all in rows of older versions.
    """

    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own declaration)
        dict[str, Any]: _Dictionary(none_as_null=True),
        list[int]: _List(none_as_null=True),
        list[str]: _List(none_as_null=True),
    }


class SchemaVersion(Base):
    """A row for each version that these tables have had; the largest is theirs."""

    __tablename__ = "schema_version"

    version: Mapped[int] = mapped_column(primary_key=True, comment="version of these tables")
    created_at: Mapped[str] = mapped_column(comment="when they got it, UTC ISO 8601")
    writer: Mapped[str] = mapped_column(comment="the program and version that did it")


class Model(Base):
    """Weights that some run used; one row per digest, name, token dropout and heads."""

    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("sha256", "name", "token_dropout", "attention_heads"),)

    id: Mapped[int] = mapped_column(primary_key=True, comment="number of the model")
    name: Mapped[str] = mapped_column(comment="released name, or name of the file or folder")
    num_layers: Mapped[int | None] = mapped_column(comment="transformer layers")
    hidden_dim: Mapped[int | None] = mapped_column(comment="width of a vector")
    attention_heads: Mapped[int | None] = mapped_column(comment="attention heads per layer")
    token_dropout: Mapped[bool | None] = mapped_column(
        comment="1 if embeddings are scaled by 0.88, as trained with token dropout"
    )
    parameters: Mapped[int | None] = mapped_column(
        comment="numbers in the embedding trunk (no language-model head)"
    )
    # Of tensors alone: safetensors or state-dict. The comment of version 1 stays in its databases.
    weights_format: Mapped[str | None] = mapped_column(
        comment="fair-esm or huggingface; +lora: with an adapter"
    )
    dtype: Mapped[str | None] = mapped_column(comment="type of the stored numbers")
    sha256: Mapped[str | None] = mapped_column(comment="SHA-256 of the weights on disk")
    untrained: Mapped[bool | None] = mapped_column(
        comment="1 if the weights say that they were made by scripts/make_model.py"
    )
    released: Mapped[bool | None] = mapped_column(
        comment="1 if the SHA-256 is that of a published ESM-2 file, which proves the name"
    )
    base_name: Mapped[str | None] = mapped_column(comment="model that a LoRA adapter changes")
    base_sha256: Mapped[str | None] = mapped_column(comment="SHA-256 of that model's weights")


class Run(Base):
    """One model, one input, one set of outputs."""

    __tablename__ = "runs"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012 (a number is never used again)

    id: Mapped[int] = mapped_column(primary_key=True, comment="number of the run")
    uuid: Mapped[str] = mapped_column(unique=True, comment="the run's name in Parquet footers")
    model_id: Mapped[int | None] = mapped_column(
        ForeignKey("models.id"), comment="the model; NULL is refused by resume"
    )
    esm2_config: Mapped[dict[str, Any] | None] = mapped_column(
        comment="JSON snapshot of the model (ESM2Config); NULL is refused by resume"
    )
    repr_layers: Mapped[list[int]] = mapped_column(comment="JSON list of the layers kept")
    include: Mapped[list[str]] = mapped_column(comment="JSON list: mean, bos, per_tok, contacts")
    precision: Mapped[str] = mapped_column(
        comment="type of matrix products: float32, bfloat16 or float16"
    )
    per_tok_dtype: Mapped[str] = mapped_column(comment="type of per_tok values")
    max_residues: Mapped[int] = mapped_column(comment="residues above which a sequence is long")
    long_sequences: Mapped[str] = mapped_column(comment="truncate, error or whole")
    unknown_residues: Mapped[str] = mapped_column(comment="error, or x: mapped to X")
    duplicate_ids: Mapped[str] = mapped_column(comment="error or keep")
    plan: Mapped[str] = mapped_column(comment="how the order of work is decided")
    # Of several files: the path of the first, the size of all, the digest of their digests.
    input_path: Mapped[str] = mapped_column(
        comment="the FASTA file; ./ is the folder of the database"
    )
    input_bytes: Mapped[int] = mapped_column(comment="size of the FASTA file, bytes")
    input_sha256: Mapped[str] = mapped_column(comment="SHA-256 of the FASTA file")
    records_total: Mapped[int] = mapped_column(comment="records in the input")
    sequences_total: Mapped[int] = mapped_column(
        comment="different sequences in the input: what is computed"
    )
    residues_total: Mapped[int] = mapped_column(comment="residues of those sequences, embedded")
    records_truncated: Mapped[int] = mapped_column(comment="records embedded in part only")
    residues_mapped: Mapped[int] = mapped_column(comment="letters read as X")
    output_folder: Mapped[str] = mapped_column(
        comment="the folder of its checkpoints; ./ is the folder of the database"
    )
    settings: Mapped[dict[str, Any]] = mapped_column(
        comment="JSON of every setting it was started with"
    )
    status: Mapped[str] = mapped_column(
        comment="running, interrupted, failed or finished; running with an old heartbeat is dead"
    )
    started_at: Mapped[str] = mapped_column(comment="UTC ISO 8601")
    finished_at: Mapped[str | None] = mapped_column(comment="UTC ISO 8601; NULL if unfinished")
    has_digests: Mapped[bool | None] = mapped_column(
        comment="1 if its files have embedded_sha256 and sequence_md5; NULL: they lack them"
    )
    sequences_reused: Mapped[int | None] = mapped_column(
        comment="sequences that its plan copies from earlier runs; NULL: it has no such plan"
    )
    reuse_sha256: Mapped[str | None] = mapped_column(
        comment="SHA-256 of that plan, the file .reuse-UUID in its output folder"
    )
    pruned_at: Mapped[str | None] = mapped_column(
        comment="when its files were taken off the disk, UTC ISO 8601; NULL: they were not"
    )
    label: Mapped[str | None] = mapped_column(comment="what its user called it; NULL: nothing")
    records_nucleotide_like: Mapped[int | None] = mapped_column(
        comment="records of nothing but A, C, G, T, U, N and gaps; NULL: not counted"
    )
    records_with_gaps: Mapped[int | None] = mapped_column(
        comment="records with gaps (- or .) as of an alignment; NULL: not counted"
    )

    model: Mapped[Model | None] = relationship()
    inputs: Mapped[list[Input]] = relationship(order_by="Input.number")
    attempts: Mapped[list[Attempt]] = relationship(back_populates="run", order_by="Attempt.id")
    checkpoints: Mapped[list[Checkpoint]] = relationship(
        back_populates="run",
        order_by="Checkpoint.first_position",
        foreign_keys="Checkpoint.run_id",
    )


class Input(Base):
    """A FASTA file of a run's input; of several, `runs` has the first path and a digest of all."""

    __tablename__ = "inputs"
    __table_args__ = (UniqueConstraint("run_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True, comment="number of the row")
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), comment="its run")
    number: Mapped[int] = mapped_column(comment="its place in the input, 0-based")
    path: Mapped[str] = mapped_column(
        comment="the file, or the copy of standard input; ./ as in runs.input_path"
    )
    sha256: Mapped[str] = mapped_column(comment="SHA-256 of the file")
    bytes: Mapped[int] = mapped_column(comment="size of the file")
    first_record: Mapped[int] = mapped_column(comment="number of its first record in the run")
    records: Mapped[int] = mapped_column(comment="records in the file")


class Attempt(Base):
    """One process that worked on a run."""

    __tablename__ = "attempts"

    id: Mapped[int] = mapped_column(primary_key=True, comment="number of the attempt")
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), index=True, comment="its run")
    host: Mapped[str] = mapped_column(comment="name of the machine")
    pid: Mapped[int] = mapped_column(comment="process number on that machine")
    weights_path: Mapped[str] = mapped_column(
        comment="where the weights lay; ./ is the folder of the database"
    )
    device: Mapped[str] = mapped_column(comment="cpu or cuda:N")
    device_name: Mapped[str] = mapped_column(comment="what the processor calls itself")
    threads: Mapped[int] = mapped_column(comment="CPU threads")
    tokens_per_pack: Mapped[int] = mapped_column(comment="tokens that go through at once")
    versions: Mapped[dict[str, Any]] = mapped_column(comment="JSON of library versions")
    started_at: Mapped[str] = mapped_column(comment="UTC ISO 8601")
    heartbeat_at: Mapped[str] = mapped_column(comment="when it last said it was alive")
    ended_at: Mapped[str | None] = mapped_column(comment="UTC ISO 8601; NULL while it lives")
    # rebuilt: stands for all attempts at a run whose database was lost; what is not known of them
    # is `unknown` or 0. The comment of version 1 stays in its databases.
    outcome: Mapped[str | None] = mapped_column(
        comment="finished, interrupted, failed, or lost (it died without a word)"
    )
    error: Mapped[str | None] = mapped_column(comment="the line that a failed attempt printed")

    run: Mapped[Run] = relationship(back_populates="attempts")


class Worker(Base):
    """A process of a cluster that computes stretches for an attempt."""

    __tablename__ = "workers"

    id: Mapped[int] = mapped_column(primary_key=True, comment="number of the worker")
    attempt_id: Mapped[int] = mapped_column(
        ForeignKey("attempts.id"), index=True, comment="the attempt that it works for"
    )
    host: Mapped[str] = mapped_column(comment="name of the machine")
    pid: Mapped[int] = mapped_column(comment="process number on that machine")
    node: Mapped[str | None] = mapped_column(comment="what the cluster calls the machine")
    device: Mapped[str | None] = mapped_column(
        comment="cpu or cuda:N; NULL if it was refused before that was known"
    )
    device_name: Mapped[str | None] = mapped_column(comment="what the processor calls itself")
    threads: Mapped[int | None] = mapped_column(comment="CPU threads")
    weights_path: Mapped[str | None] = mapped_column(comment="where its weights lay, absolute")
    weights_sha256: Mapped[str | None] = mapped_column(
        comment="SHA-256 that it took of its weights"
    )
    versions: Mapped[dict[str, Any]] = mapped_column(comment="JSON of library versions")
    started_at: Mapped[str] = mapped_column(comment="UTC ISO 8601")
    seen_at: Mapped[str] = mapped_column(comment="when it last answered, UTC ISO 8601")
    outcome: Mapped[str | None] = mapped_column(
        comment="finished, refused or lost; NULL while it lives"
    )
    error: Mapped[str | None] = mapped_column(comment="why it was refused or lost")


class Checkpoint(Base):
    """A stretch of a run's work that is safely on disk: one Parquet file, one row."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("run_id", "first_position"),)

    id: Mapped[int] = mapped_column(primary_key=True, comment="number of the checkpoint")
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), index=True, comment="its run")
    attempt_id: Mapped[int] = mapped_column(ForeignKey("attempts.id"), comment="who made it")
    path: Mapped[str] = mapped_column(comment="file name in the run's output folder")
    first_position: Mapped[int] = mapped_column(comment="first place in the plan, 0-based")
    stop_position: Mapped[int] = mapped_column(comment="place in the plan after the last")
    records: Mapped[int] = mapped_column(comment="rows in the file")
    residues: Mapped[int] = mapped_column(comment="residues that were computed for it")
    seconds: Mapped[float] = mapped_column(comment="wall time from the checkpoint before, s")
    bytes: Mapped[int] = mapped_column(comment="size of the file")
    sha256: Mapped[str] = mapped_column(comment="SHA-256 of the file")
    esm2_config: Mapped[dict[str, Any] | None] = mapped_column(
        comment="JSON snapshot of the model (ESM2Config); NULL is refused by resume"
    )
    committed_at: Mapped[str] = mapped_column(comment="UTC ISO 8601")
    worker_id: Mapped[int | None] = mapped_column(
        ForeignKey("workers.id"), comment="the worker that computed it; NULL: the attempt itself"
    )
    reused_run_id: Mapped[int | None] = mapped_column(
        ForeignKey("runs.id"), comment="the run that its rows were copied from; NULL: computed"
    )
    residues_reused: Mapped[int | None] = mapped_column(
        comment="residues of the sequences that were copied for it; NULL: computed"
    )

    run: Mapped[Run] = relationship(back_populates="checkpoints", foreign_keys=[run_id])
    attempt: Mapped[Attempt] = relationship()
