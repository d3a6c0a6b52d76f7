"""SQL files: if this fails, a new database lacks a view, or a column is explained by another's."""

from __future__ import annotations

from lib.ledger.statements import Statement, parse_statements, read_statements

TEXT = """-- About the whole file, which may have
-- two lines.

-- What the rows are.
CREATE VIEW one AS
SELECT
    -- the number; never NULL;
    (SELECT max(id) FROM many) AS number,
    unexplained AS other,
    -- the name
    coalesce(
        many.name, ''
    ) AS name
FROM many;

-- Which?
-- Or how many?
SELECT 1;
SELECT 2;
"""


def test_statements_carry_the_comments_directly_above_them() -> None:
    one, two, three = parse_statements(TEXT)
    assert one.comments == ("What the rows are.",)
    assert one.sql.startswith("CREATE VIEW one AS\nSELECT\n")
    assert one.sql.endswith("\nFROM many")
    assert two == Statement(("Which?", "Or how many?"), "SELECT 1")
    assert three == Statement((), "SELECT 2")


def test_columns_of_a_view_are_explained_by_the_line_above_them() -> None:
    explained = {"number": "the number; never NULL;", "name": "the name"}
    assert parse_statements(TEXT)[0].columns == explained
    assert parse_statements(TEXT)[1].columns == {}


def test_every_statement_of_the_schema_is_read() -> None:
    views = read_statements("views.sql")
    assert [view.sql.split()[2] for view in views] == [
        "run_history",
        "run_progress",
        "record_files",
        "checkpoint_audit",
        "model_usage",
        "worker_throughput",
    ]
    assert all(view.comments and view.columns for view in views)
    questions = read_statements("questions.sql")
    assert len(questions) >= 8
    assert all(one.comments[-1].endswith("?") for one in questions)
