"""What decides vectors: if this fails, a new setting may mix vectors that are not alike."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

from lib.ledger.identity import settings_identity
from lib.settings import load_settings
from schema.settings import SettingsSections

# A new setting has a place in one of these. The first two stand in lib/ledger/identity.py, too.
# Whatever changes the vector of given residues is compared by `Wanted`, but for `model`, which is
# compared by the snapshot; `include` and the layers by the columns that they make.
CHANGE_VECTORS = {
    "compute": {"precision", "compile"},
    "input": {"long_sequences"},
    "output": {"per_tok_dtype", "include"},
}
CHANGE_RESIDUES_OR_ROWS = {"input": {"max_residues", "unknown_residues", "duplicate_ids"}}
CHANGE_NOTHING = {
    "compute": {"device", "tokens_per_pack", "threads", "fused_attention"},
    "input": {"fasta"},
    "output": {"folder", "checkpoint_seconds", "checkpoint_records", "reuse"},
    "database": {"url"},
    "cluster": {"ray", "workers", "threads_per_worker", "files"},
}


def test_every_setting_is_known_to_change_vectors_or_not() -> None:
    kinds = (CHANGE_VECTORS, CHANGE_RESIDUES_OR_ROWS, CHANGE_NOTHING)
    for section, kind in get_type_hints(SettingsSections).items():
        if section != "model":
            known = [name for one in kinds for name in one.get(section, ())]
            assert sorted(known) == sorted(field.name for field in fields(kind))
    decided = [name for one in kinds[:2] for names in one.values() for name in names]
    assert {*settings_identity(load_settings()), "compile"} == {*decided}
