"""Tokens: if these fail, a user's sequences are embedded as other letters."""

from __future__ import annotations

import esm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.sequences.alphabet import CLS, EOS, LETTERS, tokenise
from schema.esm2_config import ALPHABET


@pytest.fixture(scope="module")
def reference() -> esm.data.Alphabet:
    return esm.data.Alphabet.from_architecture("ESM-1b")


@pytest.mark.parametrize("letter", LETTERS.decode())
def test_every_letter_is_the_token_that_fair_esm_makes_of_it(
    reference: esm.data.Alphabet, letter: str
) -> None:
    expected = [reference.cls_idx, reference.get_idx(letter), reference.eos_idx]
    assert tokenise([letter.encode()]).tolist() == expected


def test_the_letters_are_all_that_fair_esm_knows(reference: esm.data.Alphabet) -> None:
    single = {token for token in reference.all_toks if len(token) == 1}
    assert single == set(LETTERS.decode())
    assert (reference.cls_idx, reference.eos_idx) == (CLS, EOS)
    assert tuple(reference.all_toks) == ALPHABET


@settings(deadline=None)
@given(sequence=st.text(LETTERS.decode(), min_size=1, max_size=80))
def test_a_sequence_is_tokenised_as_by_fair_esms_own_converter(sequence: str) -> None:
    converter = esm.data.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    _, _, expected = converter([("", sequence)])
    assert tokenise([sequence.encode()]).tolist() == expected[0].tolist()


@settings(deadline=None)
@given(sequences=st.lists(st.text(LETTERS.decode(), min_size=1, max_size=20).map(str.encode)))
def test_sequences_stand_end_to_end(sequences: list[bytes]) -> None:
    parts = [tokenise([sequence]) for sequence in sequences]
    expected = np.concatenate([np.empty(0, np.uint8), *parts])
    assert tokenise(sequences).tolist() == expected.tolist()
