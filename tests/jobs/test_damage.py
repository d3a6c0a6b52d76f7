"""Damage: if this fails, a checkpoint file that a disk has altered is taken for good vectors."""

from __future__ import annotations

from tests.jobs.test_kill import torture


def test_every_kind_of_damage_is_refused() -> None:
    table = torture("--only", "damage", "--rounds", "1", "--seed", "5")
    assert [row[0].partition(" (")[0] for row in table] == [
        "checkpoint file truncated",
        "checkpoint file emptied",
        "checkpoint file replaced by a folder",
        "checkpoint file replaced by a link to it",
        "checkpoint files swapped",
        "checkpoint file of another run",
        "run database altered: a page, bits, bytes",
        "one bit of a region of 1024 bytes flipped",
    ]
    for _, trials, _, lost in table:
        assert trials > 0
        assert lost == "nothing"
