"""Version 2: released models are proven, adapters name their base; workers, reuse, pruning.

A run may have several input files; each older run has its one. `released` follows from the digest
on record. Nothing else is filled in: what version 1 did not record stays NULL.
"""

from __future__ import annotations

from alembic import op

revision = "2"
down_revision = "1"

# The SHA-256 of the five fair-esm files for which one is known; lib.catalog says where from.
_RELEASED = (
    "46f002a9870c9bdecd0ea887acb1f9a38a6b561e8f8bf8a6990b679b9d31b928",
    "7f21e80e61d16a71735163ef555d3009afb0c98da74c48e29df08606973cc55e",
    "881c7176cf198ef8dec26a3c375d40eb58d0c33df95c22562ca6cc6d3f812c62",
    "ea9d0522b335a8778dea6535a65301f10208dece28cd5865482b0b1fc446168c",
    "7de8b4082ba15891959ab368b77ce3886697af1efb16d3c9e9e7b0c5d3f07500",
)
_LAYERS_WITHOUT_SHA256 = 48

# Comments stand where version-2 databases that were made new have them.
_CHANGES = (
    "ALTER TABLE models ADD COLUMN released BOOLEAN"
    " /* 1 if the SHA-256 is that of a published ESM-2 file, which proves the name */",
    "ALTER TABLE models ADD COLUMN base_name VARCHAR /* model that a LoRA adapter changes */",
    "ALTER TABLE models ADD COLUMN base_sha256 VARCHAR /* SHA-256 of that model's weights */",
    """
CREATE TABLE workers (
	id INTEGER NOT NULL /* number of the worker */,
	attempt_id INTEGER NOT NULL /* the attempt that it works for */,
	host VARCHAR NOT NULL /* name of the machine */,
	pid INTEGER NOT NULL /* process number on that machine */,
	node VARCHAR /* what the cluster calls the machine */,
	device VARCHAR /* cpu or cuda:N; NULL if it was refused before that was known */,
	device_name VARCHAR /* what the processor calls itself */,
	threads INTEGER /* CPU threads */,
	weights_path VARCHAR /* where its weights lay, absolute */,
	weights_sha256 VARCHAR /* SHA-256 that it took of its weights */,
	versions JSON NOT NULL /* JSON of library versions */,
	started_at VARCHAR NOT NULL /* UTC ISO 8601 */,
	seen_at VARCHAR NOT NULL /* when it last answered, UTC ISO 8601 */,
	outcome VARCHAR /* finished, refused or lost; NULL while it lives */,
	error VARCHAR /* why it was refused or lost */,
	PRIMARY KEY (id),
	FOREIGN KEY(attempt_id) REFERENCES attempts (id)
)""",
    """
CREATE TABLE inputs (
	id INTEGER NOT NULL /* number of the row */,
	run_id INTEGER NOT NULL /* its run */,
	number INTEGER NOT NULL /* its place in the input, 0-based */,
	path VARCHAR NOT NULL /* the file, or the copy of standard input; ./ as in runs.input_path */,
	sha256 VARCHAR NOT NULL /* SHA-256 of the file */,
	bytes INTEGER NOT NULL /* size of the file */,
	first_record INTEGER NOT NULL /* number of its first record in the run */,
	records INTEGER NOT NULL /* records in the file */,
	PRIMARY KEY (id),
	UNIQUE (run_id, number),
	FOREIGN KEY(run_id) REFERENCES runs (id)
)""",
    "INSERT INTO inputs (run_id, number, path, sha256, bytes, first_record, records)"
    " SELECT id, 0, input_path, input_sha256, input_bytes, 0, records_total FROM runs",
    "CREATE INDEX ix_workers_attempt_id ON workers (attempt_id)",
    "ALTER TABLE checkpoints ADD COLUMN worker_id INTEGER REFERENCES workers (id)"
    " /* the worker that computed it; NULL: the attempt itself */",
    "ALTER TABLE checkpoints ADD COLUMN reused_run_id INTEGER REFERENCES runs (id)"
    " /* the run that its rows were copied from; NULL: computed */",
    "ALTER TABLE checkpoints ADD COLUMN residues_reused INTEGER"
    " /* residues of the sequences that were copied for it; NULL: computed */",
    "ALTER TABLE runs ADD COLUMN has_digests BOOLEAN"
    " /* 1 if its files have embedded_sha256 and sequence_md5; NULL: they lack them */",
    "ALTER TABLE runs ADD COLUMN sequences_reused INTEGER"
    " /* sequences that its plan copies from earlier runs; NULL: it has no such plan */",
    "ALTER TABLE runs ADD COLUMN reuse_sha256 VARCHAR"
    " /* SHA-256 of that plan, the file .reuse-UUID in its output folder */",
    "ALTER TABLE runs ADD COLUMN pruned_at VARCHAR"
    " /* when its files were taken off the disk, UTC ISO 8601; NULL: they were not */",
)


def upgrade() -> None:
    """Add columns and a table, and prove what is released."""
    for change in _CHANGES:
        op.execute(change)
    known = ", ".join(f"'{digest}'" for digest in _RELEASED)
    # Of a folder or an adapter, version 1 recorded a digest of several files, which proves nothing.
    op.execute(
        f"UPDATE models SET released = sha256 IN ({known}) WHERE weights_format = 'fair-esm' "
        f"AND (sha256 IN ({known}) OR num_layers <> {_LAYERS_WITHOUT_SHA256})"
    )
