"""Notebooks: if this fails, what is embedded there is on no record, or under the wrong id."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import esm
import numpy as np
import pandas  # type: ignore[import-untyped]
import pytest

from lib.embeddings import RunEmbeddings, open_run
from lib.errors import InputError, InterruptedRunError, LedgerError, SettingsError
from lib.jobs.notebook import embed
from lib.ledger.history import query
from tests import processes
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.reference import fasta

Call = Callable[..., RunEmbeddings]
SEQUENCES = {header.split()[0]: sequence for header, sequence in fasta(SOME_PROTEINS)}


@pytest.fixture
def call(place: Place, small_model: Path) -> Call:
    """Embed with the small model, on the record of a fresh folder."""
    return partial(embed, model=small_model, config=place.config)


def test_the_vectors_are_those_of_the_script(
    script: Script,
    place: Place,
    small_model: Path,
    call: Call,
) -> None:
    assert script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS).status == 0
    said: list[str] = []
    run = call(SEQUENCES, say=said.append, label="a notebook")
    assert isinstance(run, RunEmbeddings)
    assert run.facts["label"] == "a notebook"
    assert said == [
        "run 1 has these vectors",
        "run 2: 15 records by esm2_small (untrained weights)",
    ]
    assert run.facts["status"] == "finished"
    assert run.ids == [*SEQUENCES]
    assert run.matrix().tobytes() == open_run(place.database, 1).matrix().tobytes()


def test_a_list_has_its_positions_as_ids_and_settings_as_in_the_shell(
    place: Place,
    call: Call,
) -> None:
    settings = {
        "output.include": "mean bos",
        "model.repr_layers": "0 -1",
        "input.max_residues": 9,
    }
    said: list[str] = []
    run = call(["MKTAYIAKQRQ", "mkv*", "MKTAYIAKQRQ"], settings=settings, say=said.append)
    assert "truncated to 9 residues: 2 records" in said
    assert run.ids == ["0", "1", "2"]
    assert run.layers == [0, 2]
    assert run.table("embedded_length")["embedded_length"].to_pylist() == [9, 3, 9]
    bos = run.matrix("bos", 0)
    assert bos.shape == (3, 64)
    assert np.array_equal(bos[0], bos[2])


def test_a_series_has_its_index_as_ids(call: Call) -> None:
    """They used to be its positions."""
    assert call(pandas.Series({"one": "MKV", "two": "MKTAY"})).ids == ["one", "two"]


def test_pairs_are_those_of_fair_esm_s_batch_converter(call: Call) -> None:
    pairs = [("one", "MKV"), ("two", "MKTAY")]
    labels, sequences, _ = esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()(pairs)
    run = call(pairs)
    assert run.ids == labels
    assert run.table("length")["length"].to_pylist() == [*map(len, sequences)]
    with pytest.raises(InputError, match=r"record 1 \(1\): its sequence is tuple, not str"):
        call(["MKV", ("two", "MKTAY")])


def test_the_run_can_be_verified_and_is_reused(
    script: Script,
    place: Place,
    call: Call,
) -> None:
    first = call(SEQUENCES)
    # The input is kept with it.
    answer = script("validate", "--run", "1")
    assert answer.status == 0, answer.err
    assert script("verify", "--run", "1", "--sample", "2").status == 0
    said: list[str] = []
    settings = {"output.reuse": "yes"}
    again = call({**SEQUENCES, "new": "MKV"}, settings=settings, say=said.append)
    assert any(line.startswith("reused: 15 of 16 sequences") for line in said), said
    assert again.matrix()[:15].tobytes() == first.matrix().tobytes()


@pytest.mark.parametrize(
    ("sequences", "fact"),
    [
        ("MKV", "sequences: one string, not a list of them"),
        ([], "sequences: there are none"),
        (["MKV", "MK\nV"], "record 1: a line break in its sequence"),
        (["MKV\n>two\nMKV"], "record 0: a line break in its sequence"),
        ({"a\r>b": "MKV"}, "record 0: a line break in its id"),
        ({"protein 1": "MKV"}, "record 0 (protein 1): a blank in its id"),
        ({"one": "MKV", " two": "MKV"}, "record 1 ( two): a blank in its id"),
        ([">MKV"], "record 0 (0): empty sequence"),
        ([";MKV"], "record 0 (0): empty sequence"),
        ({"MKV"}, "sequences: set, not a list of them or sequences by their id"),
        (pandas.DataFrame({"seq": ["MKV"]}), "sequences: DataFrame, not a list of them or "),
        (pandas.Series(["MKV", "MKT"], ["a", "a"]), "record 1 (a): id repeats record 0's"),
        (["MKV", None], "record 1 (1): its sequence is NoneType, not str"),
        (["MKV", "MJV"], "record 1 (1): 'J' at residue 2 is not in the ESM-2 alphabet"),
        ({"": "MKV"}, "record 0: empty id"),
    ],
)
def test_what_is_not_a_list_of_proteins_is_refused(
    place: Place,
    call: Call,
    sequences: object,
    fact: str,
) -> None:
    before = place.files()
    with pytest.raises(InputError) as refusal:
        call(sequences)
    assert str(refusal.value).startswith(fact)
    assert place.files() == before


def test_settings_are_refused_as_in_the_shell(call: Call) -> None:
    with pytest.raises(LedgerError, match="unknown option 'includes'"):
        call(["MKV"], settings={"output.includes": "mean"})
    with pytest.raises(SettingsError, match=r"output\.include: list, not text, a number or a path"):
        call(["MKV"], settings={"output.include": ["mean"]})


def test_another_thread_may_embed(call: Call) -> None:
    """Python lets it handle no signals."""
    found: list[RunEmbeddings] = []
    thread = threading.Thread(target=lambda: found.append(call(["MKV"])))
    thread.start()
    thread.join()
    assert len(found[0]) == 1


def interrupted_after_one_checkpoint(place: Place, model: Path) -> None:
    """Embed in a process that receives SIGINT when its first checkpoint is committed."""
    interrupt = partial(signal.raise_signal, signal.SIGINT)
    processes.at_call("lib.ledger.commit.Committer.commit", 1, interrupt, after=True)
    settings = {"output.checkpoint_records": "4", "compute.tokens_per_pack": "3"}
    try:
        embed(SEQUENCES, model=model, config=place.config, settings=settings)
    except InterruptedRunError as error:
        print(error)


def test_ctrl_c_commits_what_is_finished_and_resume_goes_on(
    script: Script, place: Place, small_model: Path
) -> None:
    done = processes.run_function(partial(interrupted_after_one_checkpoint, place, small_model))
    assert done.out.splitlines()[-1] == "SIGINT: run 1 interrupted, finished work committed"
    database = str(place.database)
    assert 0 < query(database, "SELECT records_done FROM run_history").rows[0][0] < 15
    answer = script("resume")
    assert answer.status == 0, answer.err
    assert query(database, "SELECT records_done FROM run_history").rows == [(15,)]
