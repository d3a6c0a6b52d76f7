"""Digests: if these fail, two different proteins share one vector, or one is computed twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.sequences import digests
from lib.sequences.digests import Digests, index_type


def first_equal(made: list[bytes], chunk: int) -> list[int]:
    found = Digests()
    found._digests += b"".join(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_CHUNK", chunk)
        return [int(number) for number in found.first_equal()]


@settings(deadline=None)
@given(
    made=st.lists(st.text("ab", min_size=2, max_size=2), min_size=1, max_size=30),
    chunk=st.integers(1, 8),
)
def test_digests_that_share_a_half_are_told_apart(made: list[str], chunk: int) -> None:
    whole = [(one[0] * 8 + one[1] * 8).encode() for one in made]
    assert first_equal(whole, chunk) == [made.index(one) for one in made]


@settings(deadline=None)
@given(texts=st.lists(st.binary(max_size=2), min_size=1), chunk=st.integers(1, 8))
def test_equal_texts_are_found(texts: list[bytes], chunk: int) -> None:
    found = Digests()
    for start in range(0, len(texts), 3):
        found.extend(texts[start : start + 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_CHUNK", chunk)
        assert found.first_equal().tolist() == [texts.index(text) for text in texts]


@pytest.mark.parametrize(("total", "kind"), [(2**31 - 1, np.int32), (2**31, np.int64)])
def test_numbers_have_room(total: int, kind: type) -> None:
    """Of 2 billion metagenomic proteins, the last would else have a negative number."""
    assert index_type(total) is kind
    assert np.array([total - 1, -1]).astype(index_type(total)).tolist() == [total - 1, -1]
