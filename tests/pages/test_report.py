"""Reports: if this fails, the page that a user passes on says something that is not so, does not
open elsewhere, or runs what a stranger wrote into a FASTA header."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.embeddings import open_run
from lib.files import file_sha256
from lib.ledger.database import open_for_writing, transaction
from lib.pages.charts import Axis, Bars, Step, histogram, steps
from lib.pages.figures import Work, norms_figure, throughput_figure
from lib.pages.projection import project
from lib.pages.survey import Extreme, Survey, survey
from schema.parquet import FOOTER_KEY
from tests import processes
from tests.conftest import ROOT, SOME_PROTEINS, Place, Script
from tests.reference import Array, fasta, read_run, write_fasta
from tests.test_make import make

# Ids and headers as nobody wants them.
STRANGE = [
    "<script>document.title='owned'</script>",
    "</svg></title><img/src=x/onerror=alert(1)>",
    "]]>&amp;&lt;\"'`{{7*7}}{%raw%}",
    "turned\u202eesrever\u2066around",
    "a" * 200_000,
]


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: list[str] = field(default_factory=list)

    @property
    def styles(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def number(self, name: str) -> float:
        return float(self.attributes[name])


class Page(HTMLParser):
    """A page as its elements, each with the text right within it and the tags around it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        around = [one.tag for one in self._open]
        self.elements.append(Element(tag, {k: v or "" for k, v in attrs}, inside=around))
        if tag != "meta":
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1].text += data

    def all(self, tag: str, style: str = "") -> list[Element]:
        return [
            one for one in self.elements if one.tag == tag and (not style or style in one.styles)
        ]

    @property
    def facts(self) -> dict[str, str]:
        names = [one.text for one in self.all("dt")]
        values = [one.text for one in self.all("bdi") if "dd" in one.inside]
        return dict(zip(names, values, strict=True))

    @property
    def warnings(self) -> list[str]:
        return [one.text for one in self.all("li") if not one.inside.count("figure")]

    @property
    def words(self) -> list[str]:
        return [one.text for one in self.all("p") if "figcaption" in one.inside]

    def figure(self, title: str) -> str:
        """Return the source of one figure."""
        return self.source.split(f"<h2>{title}</h2>")[1].split("</figure>")[0]


Embed = Callable[..., Path]


@pytest.fixture
def embed(script: Script, place: Place, small_model: Path) -> Embed:
    """Embed some proteins or other entries; gives the run's folder."""

    def run(*flags: str, entries: Sequence[tuple[str, str]] | None = None) -> Path:
        source = SOME_PROTEINS
        if entries is not None:
            source = write_fasta(place.folder / "given.fasta", entries)
        answer = script("embed", "--esm-model", small_model, "--input", source, *flags, "--json")
        assert answer.status == 0, answer.err
        return Path(answer.json["output_folder"])

    return run


def page_of(script: Script, place: Place, run: int = 1) -> Page:
    answer = script("report", "--run", str(run))
    assert answer.status == 0, answer.err
    path = place.folder / "reports" / f"run-{run:06d}.html"
    assert answer.out.startswith(f"run {run} ")
    assert f": report in {path}\n" in answer.out
    return Page(path)


def change(place: Place, *statements: str) -> None:
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        for statement in statements:
            session.connection().exec_driver_sql(statement)


def vectors(folder: Path, column: str = "mean_2") -> Array:
    rows = read_run(folder)
    return np.stack([rows[record][column] for record in sorted(rows)])


def marks(page: Page) -> list[tuple[str, float, float, str]]:
    """Return (class, x, y, title) of every point of the projection."""
    found = []
    for i, one in enumerate(page.elements):
        if one.tag == "path" and "transform" in one.attributes:
            x, y = re.findall(r"[-\d.]+", one.attributes["transform"])[:2]
            found.append((one.styles[1], float(x), float(y), page.elements[i + 1].text))
    return found


# --- what it says -------------------------------------------------------------------------------


def test_the_page_says_what_the_record_and_the_files_say(
    script: Script, place: Place, embed: Embed, small_model: Path
) -> None:
    folder = embed("--set", "input.max_residues=100")
    page, rows = page_of(script, place), read_run(folder)
    shown = script("history", "--run", "1", "--json").json
    facts = page.facts
    assert facts["status"] == shown["status"] == "finished"
    assert facts["input"] == str(SOME_PROTEINS)
    assert facts["output"] == str(folder)
    assert facts["name"] == "esm2_small"
    assert facts["SHA-256"] == file_sha256(small_model)
    assert facts["input SHA-256"] == file_sha256(SOME_PROTEINS)
    assert (facts["layers"], facts["width of a vector"], facts["attention heads"]) == (
        "2",
        "64",
        "4",
    )
    assert facts["untrained"] == "yes"
    assert facts["read from"] == str(small_model)
    assert facts["long sequences"] == "truncate (more than 100)"
    lengths = [len(sequence) for _, sequence in fasta(SOME_PROTEINS)]
    assert [row["length"] for row in rows.values()] != lengths  # the plan's order is another
    cut = [length for length in lengths if length > 100]
    assert f"15 records: shortest {min(lengths)}, " in page.words[0]
    assert f"longest {max(lengths):,} residues" in page.words[0]
    lost = sum(cut) - 100 * len(cut)
    assert page.words[1] == (
        f"{len(cut)} records truncated to 100 residues: {lost:,} of {sum(lengths):,} residues "
        f"({100 * lost / sum(lengths):.1f} %) are not embedded."
    )
    assert page.warnings == [
        "Untrained weights: the vectors mean nothing.",
        f"{len(cut)} of 15 records truncated to 100 residues.",
    ]
    assert "(untrained)" in page.all("title")[0].text
    assert "(untrained)" in page.all("bdi")[0].text


def test_the_bars_are_as_high_as_there_are_records(
    script: Script, place: Place, embed: Embed
) -> None:
    embed("--set", "input.max_residues=100")
    page = page_of(script, place)
    lengths = np.array([len(sequence) for _, sequence in fasta(SOME_PROTEINS)])
    boxes = [one for one in page.all("rect") if "x" in one.attributes]
    whole = [one for one in boxes if "whole" in one.styles]
    truncated = [one for one in boxes if "truncated" in one.styles]
    assert truncated
    # Bars of lengths and of norms are `whole`; those of lengths stand before the truncated.
    whole = whole[: len(whole) - page.figure("Norms of the vectors").count("<rect")]
    unit = min(one.number("height") for one in whole + truncated)
    for bars, expected in ((whole, lengths <= 100), (truncated, lengths > 100)):
        assert sum(round(one.number("height") / unit) for one in bars) == expected.sum()


def test_the_points_are_the_principal_components(
    script: Script, place: Place, embed: Embed
) -> None:
    folder = embed("--set", "input.max_residues=300")
    page = page_of(script, place)
    from sklearn.decomposition import PCA  # with scipy, a second that only this test needs

    expected = PCA(2).fit_transform(vectors(folder).astype(np.float64))
    titles = [
        f"{header.split()[0]}, {len(sequence):,} residues"
        for header, sequence in fasta(SOME_PROTEINS)
    ]
    drawn = marks(page)
    assert Counter(title for *_, title in drawn) == Counter(titles)
    by_title = {title: np.array([x, -y]) for _, x, y, title in drawn}
    found = np.stack([by_title[title] for title in titles])
    found -= found.mean(axis=0)
    # One unit for both axes; the signs of components are free.
    unit = np.ptp(found[:, 0]) / np.ptp(expected[:, 0])
    for axis in (0, 1):
        sign = np.sign(found[:, axis] @ expected[:, axis])
        # Places are written to a tenth of a unit of the drawing.
        assert np.abs(found[:, axis] - sign * unit * expected[:, axis]).max() < 0.3
    assert "All 15 records: mean_2 on its first two principal components" in "".join(page.words)


def test_a_class_of_length_has_a_mark_of_its_own(
    script: Script, place: Place, embed: Embed
) -> None:
    embed("--set", "input.max_residues=200")
    page = page_of(script, place)
    shapes: dict[str, set[str]] = {}
    lengths: dict[str, list[int]] = {}
    for one in page.all("path", "point"):
        shapes.setdefault(one.styles[1], set()).add(one.attributes["d"])
    for style, *_, title in marks(page):
        lengths.setdefault(style, []).append(int(title.split()[-2].replace(",", "")))
    assert all(len(found) == 1 for found in shapes.values())
    assert len({min(found) for found in shapes.values()}) == len(shapes) == 5
    ordered = [sorted(lengths[f"length{i}"]) for i in range(5)]
    assert list(chain(*ordered)) == sorted(len(sequence) for _, sequence in fasta(SOME_PROTEINS))
    assert min(ordered[4]) > 200 >= max(ordered[3])
    legend = [one.text.strip() for one in page.all("li") if "figure" in one.inside][2:]
    assert legend == [
        f"{group[0]:,} to {group[-1]:,} residues{', truncated' if i == 4 else ''} ({len(group)})"
        for i, group in enumerate(ordered)
    ]


def test_shades_can_be_told_apart_without_colour() -> None:
    style = (ROOT / "lib" / "pages" / "report.html").read_text()

    def lightness(name: str) -> float:
        """Return relative luminance (WCAG 2.2) of a class's fill, 0 black to 1 white."""
        (code,) = re.findall(rf"^\.{name} {{ fill: #(\w+)", style, re.MULTILINE)
        parts = [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        light, dark = sorted([lightness(one), lightness(other)], reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for i in range(3):
        assert lightness(f"length{i}") > lightness(f"length{i + 1}")
        assert contrast(f"length{i}", f"length{i + 1}") > 1.5
    assert contrast("whole", "truncated") > 3
    assert contrast("shade0", "shade1") > 1.2


def test_the_norms_are_those_of_the_vectors(script: Script, place: Place, embed: Embed) -> None:
    norms = np.linalg.norm(vectors(embed()).astype(np.float64), axis=1)
    page = page_of(script, place)
    assert (
        f"Euclidean norm of mean_2: smallest {norms.min():.4g}, median {np.median(norms):.4g}, "
        f"largest {norms.max():.4g}." in page.words
    )
    cells = {"record": list[str](), "id": list[str]()}
    for cell, shown in pairwise(page.elements):
        if cell.attributes.get("data-name") in cells:
            cells[cell.attributes["data-name"]].append(shown.text)
    order = np.argsort(norms, kind="stable").tolist()
    extremes = [*order[:3], *order[:-4:-1]]
    assert cells["record"] == [str(record) for record in extremes]
    ids = [header.split()[0] for header, _ in fasta(SOME_PROTEINS)]
    assert cells["id"] == [ids[record] for record in extremes]


def test_a_large_run_is_sampled_and_says_so(
    script: Script, place: Place, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.pages.survey.SAMPLE_RECORDS", 6)
    folder = embed("--set", "output.checkpoint_records=2", "--set", "compute.tokens_per_pack=300")
    assert len(list(folder.glob("*.parquet"))) > 2
    page = page_of(script, place)
    ids = [header.split()[0] for header, _ in fasta(SOME_PROTEINS)]
    assert sorted(title.split(",")[0] for *_, title in marks(page)) == sorted(ids[::3])
    assert "5 of 15 records, evenly spaced: mean_2" in "".join(page.words)
    assert "15 records: shortest" in page.words[0]


def test_a_survey_stands_in_the_order_of_the_fasta(
    place: Place, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.sequences.inventory.WINDOW_RECORDS", 5)
    monkeypatch.setattr("lib.pages.survey.SAMPLE_RECORDS", 8)
    folder = embed(
        "--set", "input.max_residues=300", "--set", "output.checkpoint_records=2",
        "--set", "compute.tokens_per_pack=300", "--include", "bos", "mean",
        "--repr-layers", "0", "2",
    )  # fmt: skip
    assert len(list(folder.glob("*.parquet"))) > 4
    found, expected, rows = survey(open_run(place.database, 1)), vectors(folder), read_run(folder)
    assert found.column == "mean_2"
    assert found.lengths.tolist() == [len(sequence) for _, sequence in fasta(SOME_PROTEINS)]
    assert found.embedded.tolist() == [min(length, 300) for length in found.lengths.tolist()]
    assert np.allclose(found.norms, np.linalg.norm(expected.astype(np.float64), axis=1), rtol=1e-12)
    assert found.sample.tolist() == list(range(0, 15, 2))
    assert found.sample_ids == [rows[record]["id"] for record in range(0, 15, 2)]
    assert found.sample_vectors.tobytes() == expected[::2].tobytes()
    order = np.argsort(found.norms).tolist()
    assert [one.record for one in found.smallest] == order[:3]
    assert [one.record for one in found.largest] == order[:-4:-1]
    assert found.largest[0].id == rows[order[-1]]["id"]


@pytest.mark.parametrize(
    ("include", "told", "points"),
    [
        ("bos", "Euclidean norm of bos_2", 15),
        ("per_tok", "The run keeps neither mean nor bos: there is no vector per record.", 0),
    ],
)
def test_a_run_without_means(
    script: Script, place: Place, embed: Embed, include: str, told: str, points: int
) -> None:
    embed("--include", include)
    page = page_of(script, place)
    assert told in "".join(page.words)
    assert len(marks(page)) == points


def test_one_record(script: Script, place: Place, embed: Embed) -> None:
    embed(entries=[("lonely", "M")])
    page = page_of(script, place)
    assert "1 record: shortest 1, median 1, mean 1, longest 1 residues." in page.words
    assert "Fewer than three different vectors: nothing to project." in page.words
    assert len(page.all("svg", "chart")) == 3


def test_same_sequences_have_nothing_to_project(script: Script, place: Place, embed: Embed) -> None:
    embed(entries=[(f"p{i}", "MKVLA") for i in range(5)])
    page = page_of(script, place)
    assert "Fewer than three different vectors: nothing to project." in page.words
    assert "4 records with the sequence of an earlier one, and so its vector." in page.warnings


def test_every_warning(script: Script, place: Place, embed: Embed) -> None:
    place.set("input", "duplicate_ids", "keep")
    place.set("input", "unknown_residues", "x")
    entries = [("a", "MK*VJ"), ("a", "MKV"), ("b", "MKV"), ("a", "MKVL")]
    embed(entries=[*entries, ("c", "ACG-T"), ("d", "ACGT"), ("e", "MK.A")])
    change(
        place,
        "UPDATE models SET untrained = 0",
        "INSERT INTO attempts (run_id, host, pid, weights_path, device, device_name, threads,"
        " tokens_per_pack, versions, started_at, heartbeat_at) SELECT run_id, host, pid,"
        " weights_path, device, 'Another CPU', threads, tokens_per_pack, '{\"torch\": \"9.9\"}',"
        " started_at, heartbeat_at FROM attempts",
        "UPDATE checkpoints SET esm2_config = NULL",
    )
    page = page_of(script, place)
    assert page.warnings[1:-2] == [
        "Letters unknown to ESM-2 and read as X: 2.",
        "Only letters of ACGTUN, as nucleotides have: 2 records.",
        "Gaps (- or .), as an alignment has: 2 records.",
        "2 records with the id of an earlier one.",
        "1 record with the sequence of an earlier one, and so its vector.",
        "Checkpoints with a problem: 1; no model metadata (NULL).",
    ]
    devices, versions = page.warnings[-2:]
    assert devices.startswith("Attempts differ in devices: ")
    assert devices.endswith("; Another CPU.")
    assert re.fullmatch(
        r"Attempts differ in library versions: python \S+, torch .*; torch 9\.9\.", versions
    )
    assert script("report", "--run", "1", "--json").json["warnings"] == page.warnings


def test_nothing_to_warn_of(script: Script, place: Place, small_model: Path) -> None:
    """Weights that nothing marks as untrained, as released ones are."""
    weights = torch.load(small_model, weights_only=False)
    del weights["cfg"]["model"].untrained
    torch.save(weights, place.folder / "plain.pt")
    answer = script("embed", "--esm-model", place.folder / "plain.pt", "--input", SOME_PROTEINS)
    assert answer.status == 0, answer.err
    page = page_of(script, place)
    assert page.warnings == []
    assert "Nothing was truncated, mapped, repeated or left undone." in page.source
    assert page.facts["untrained"] == "no"
    assert "(untrained)" not in page.source


# --- runs that are not finished -----------------------------------------------------------------


def test_an_unfinished_run_is_shown_as_far_as_it_is(
    script: Script, place: Place, embed: Embed
) -> None:
    embed("--set", "output.checkpoint_records=2", "--set", "compute.tokens_per_pack=300")
    change(
        place,
        "UPDATE runs SET status = 'interrupted', finished_at = NULL",
        "DELETE FROM checkpoints WHERE first_position > 3",
    )
    page = page_of(script, place)
    (left,) = re.findall(r"Status interrupted: (\d+) of 15 records embedded\.", page.warnings[1])
    assert 0 < int(left) < 15
    assert f"{left} records: shortest" in page.words[0]
    assert len(marks(page)) == int(left)
    assert page.all("span", "status")[0].text == "interrupted"


def test_a_run_without_a_checkpoint(script: Script, place: Place, embed: Embed) -> None:
    embed()
    change(place, "UPDATE runs SET status = 'failed'", "DELETE FROM checkpoints")
    page = page_of(script, place)
    assert "Status failed: 0 of 15 records embedded." in page.warnings
    assert page.words.count("No record is embedded yet.") == 3
    assert "No checkpoint has been computed." in page.words
    assert not page.all("svg", "chart")


def test_a_run_whose_process_died(script: Script, place: Place, embed: Embed) -> None:
    embed()
    change(place, "UPDATE runs SET status = 'running', finished_at = NULL")
    assert "Status killed: 15 of 15 records embedded." in page_of(script, place).warnings


def test_a_pruned_run_is_shown_from_its_record(script: Script, place: Place, embed: Embed) -> None:
    embed("--set", "output.checkpoint_records=5", "--set", "compute.tokens_per_pack=300")
    before = page_of(script, place)
    earlier = (place.folder / "reports" / "run-000001.html").read_bytes()
    assert script("prune", "--run", "1").status == 0
    for _ in range(2):
        answer = script("report", "--run", "1")
        assert answer.status == 0, answer.err
    path = place.folder / "reports" / "run-000001-pruned.html"
    assert answer.out.startswith(f"run 1 pruned: report in {path}\n")
    page = Page(path)
    assert page.all("span", "status")[0].text == "pruned"
    assert re.fullmatch(
        r"Its files were pruned on 20\S+ \S+ UTC: no vector is left\. "
        r"15 of 15 records were embedded \(finished\)\.",
        page.warnings[0],
    )
    assert page.warnings[1:] == before.warnings
    other = {"status", "on disk", "pruned (UTC)"}
    assert {*page.facts.items()} ^ {*before.facts.items()} == {
        (name, facts[name]) for facts in (page.facts, before.facts) for name in other & {*facts}
    }
    for title in ("Length of the sequences", "The vectors on a plane", "Norms of the vectors"):
        assert "The files of this run were pruned: nothing is left to draw." in page.figure(title)
    assert page.figure("Throughput") == before.figure("Throughput")
    assert [one.text for one in page.all("td")] == [one.text for one in before.all("td")][-10:]
    # What shows the vectors stays, and is not replaced by --to either; the row for MultiQC is.
    original = place.folder / "reports" / "run-000001.html"
    assert original.read_bytes() == earlier
    answer = script("report", "--run", "1", "--to", original)
    assert (answer.status, answer.error) == (2, f"{original}: exists already")
    (row,) = json.loads((original.parent / "run-000001_mqc.json").read_text())["data"].values()
    assert (row["status"], row["records"]) == ("pruned", 15)
    change(place, "UPDATE runs SET esm2_config = NULL")
    assert script("report", "--run", "1").error == "run 1: no model metadata (NULL)"


def test_rows_without_model_metadata_are_refused(
    script: Script, place: Place, embed: Embed
) -> None:
    embed()
    change(place, "DELETE FROM checkpoints")
    for snapshot, fact in (("NULL", "no model metadata (NULL)"), ("'{}'", "model metadata lacks ")):
        change(place, f"UPDATE runs SET status = 'failed', esm2_config = {snapshot}")
        answer = script("report", "--run", "1")
        assert answer.status == 3
        assert answer.error.startswith(f"run 1: {fact}")
    assert not (place.folder / "reports" / "run-000001.html").exists()


def test_rows_of_other_types_are_one_line(script: Script, place: Place, embed: Embed) -> None:
    embed()
    kept = place.database.read_bytes()
    for statement, kind in {
        "UPDATE runs SET max_residues = 'many'": "TypeError",
        "UPDATE attempts SET versions = '[[1, 2]]'": "AttributeError",
        "UPDATE checkpoints SET seconds = 'long'": "TypeError",
        "UPDATE runs SET precision = x'00ff'": "TypeError",
    }.items():
        change(place, statement)
        answer = script("report", "--run", "1")
        assert answer.status == 4, statement
        assert answer.error.startswith(f"database {place.database}: malformed rows: {kind}: ")
        place.database.write_bytes(kept)
    assert script("report", "--run", "1").status == 0


def test_the_newest_of_many_attempts_are_shown(script: Script, place: Place, embed: Embed) -> None:
    embed()
    columns = (
        "run_id, host, pid, weights_path, device, device_name, threads, tokens_per_pack, "
        "versions, started_at, heartbeat_at"
    )
    copy = f"INSERT INTO attempts ({columns}) SELECT {columns} FROM attempts WHERE id = 1"
    change(place, *[copy] * 25)
    page = page_of(script, place)
    shown = [
        value.text
        for cell, value in pairwise(page.elements)
        if cell.attributes.get("data-name") == "attempt"
    ]
    assert shown == [str(number) for number in range(7, 27)]
    assert "Earlier attempts, not shown: 6." in page.source


# --- throughput ---------------------------------------------------------------------------------


def test_throughput_is_drawn_by_attempt() -> None:
    work = [Work(3, 100, 10.0), Work(3, 300, 10.0), Work(5, 0, 0.0), Work(7, 200, 40.0)]
    figure = throughput_figure(work)
    assert "600 residues in 1 min 0 s of computing, 10 per second on average" in figure.words[0]
    boxes = re.findall(
        r'<rect class="(\w+)" x="(\S+)" y="\S+" width="(\S+)" height="(\S+)"', figure.svg
    )
    assert [style for style, *_ in boxes] == ["shade0", "shade0", "shade1"]
    heights = [float(height) for *_, height in boxes]
    widths = [float(width) for _, _, width, _ in boxes]
    assert heights[1] / heights[0] == pytest.approx(3, rel=0.01)
    assert heights[2] / heights[0] == pytest.approx(0.5, rel=0.01)
    assert widths[2] / widths[0] == pytest.approx(4, rel=0.01)
    assert re.findall(r"attempt \d", figure.svg) == ["attempt 3", "attempt 7"]
    assert "time computing, seconds" in figure.svg


def test_throughput_of_many_checkpoints_is_merged_within_attempts() -> None:
    work = [Work(1 + i // 4000, 10 + i % 7, 60.0) for i in range(10_000)]
    figure = throughput_figure(work)
    boxes = re.findall(r'<rect class="(\w+)"', figure.svg)
    assert len(boxes) == 200
    assert [style for i, style in enumerate(boxes) if i in (0, 79, 80, 159, 160, 199)] == [
        "shade0", "shade0", "shade1", "shade1", "shade0", "shade0",
    ]  # fmt: skip
    residues = sum(one.residues for one in work)
    assert f"{residues:,} residues in 6 d 22 h of computing" in figure.words[0]
    assert "time computing, days" in figure.svg


def test_parts_of_a_bar_stand_upon_each_other() -> None:
    parts = [Bars("whole", np.array([2, 0, 3])), Bars("truncated", np.array([1, 4, 0]))]
    svg = histogram("", Axis("", 0, 30), "", np.array([0.0, 10, 20, 30]), parts)
    found = re.findall(
        r'class="(whole|truncated)" x="(\S+)" y="(\S+)" width="\S+" height="(\S+)"', svg
    )
    boxes = {(style, float(x)): (float(y), float(height)) for style, x, y, height in found}
    first, second, third = sorted({x for _, x in boxes})
    assert set(boxes) == {
        ("whole", first), ("whole", third), ("truncated", first), ("truncated", second),
    }  # fmt: skip
    unit, floor = boxes["truncated", first][1], sum(boxes["whole", first])
    assert sum(boxes["truncated", first]) == pytest.approx(boxes["whole", first][0], abs=0.11)
    assert sum(boxes["truncated", second]) == pytest.approx(floor, abs=0.11)
    heights = [boxes[key][1] / unit for key in (("whole", first), ("truncated", second))]
    assert heights == pytest.approx([2, 4], rel=0.01)


# --- numbers of all sizes -----------------------------------------------------------------------


@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(1e-3, 1e9),
    whole=st.booleans(),
)
def test_ticks_are_few_and_on_the_axis(low: float, span: float, whole: bool) -> None:
    axis = Axis("", low, low + span, whole=whole)
    ticks = axis.ticks()
    assert len(ticks) <= 8
    assert whole or len(ticks) >= 2
    assert ticks == sorted(set(ticks))
    for value in ticks:
        assert -1e-6 <= axis.place(value) <= 1 + 1e-6
        assert not whole or value == round(value)


@given(low=st.integers(1, 100_000), factor=st.floats(8, 1e5))
def test_ticks_of_a_logarithmic_axis(low: int, factor: float) -> None:
    axis = Axis("", low, low * factor, logarithmic=True)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert all(0 <= axis.place(value) <= 1 + 1e-9 for value in ticks)


@given(
    norm=st.floats(0, 1e20, allow_subnormal=False),
    records=st.integers(1, 60),
    spread=st.sampled_from([0.0, 1e-15, 1e-7, 1.0]),
)
def test_norms_of_any_size_are_drawn(norm: float, records: int, spread: float) -> None:
    found = norm * (1 + spread * np.linspace(0, 1, records))
    nothing = np.zeros(0, np.int32)
    seen = Survey(
        "mean_2", nothing, nothing, found, [Extreme(0, 0, "")], [], nothing.astype(np.int64), [],
        np.zeros((0, 2), np.float32), 0,
    )  # fmt: skip
    svg = norms_figure(seen).svg
    assert "nan" not in svg
    assert "inf" not in svg
    boxes = re.findall(r' height="([\d.]+)"', svg)
    assert 1 <= len(boxes) <= records


@pytest.mark.parametrize("width", [2, 3, 100])
def test_a_projection_keeps_what_lies_on_a_plane(width: int) -> None:
    generator = np.random.default_rng(0)
    plane = generator.normal(size=(50, 2)) * [5, 1]
    axes, _ = np.linalg.qr(generator.normal(size=(width, 2)))
    vectors = (1000 + plane @ axes.T).astype(np.float32)
    projection = project(vectors)
    assert projection is not None
    assert projection.shares.sum() == pytest.approx(1, abs=1e-6)
    distances = [
        np.linalg.norm(points[:, None] - points[None], axis=2)
        for points in (plane, projection.points)
    ]
    assert np.abs(distances[0] - distances[1]).max() < 1e-3
    again = project(vectors[::-1].copy())
    assert again is not None
    assert np.allclose(again.points[::-1], projection.points)


# --- strangers' text ----------------------------------------------------------------------------


def test_what_strangers_wrote_is_text(
    script: Script, place: Place, embed: Embed, small_model: Path
) -> None:
    folder = place.folder / '<b>"&amp;" {{7}}'
    folder.mkdir()
    shutil.copy(small_model, folder / "<i>model.pt")
    source = write_fasta(
        folder / "<u>.fasta", [(one, "MKV" * (i + 1)) for i, one in enumerate(STRANGE)]
    )
    flags = ["--esm-model", folder / "<i>model.pt", "--input", source]
    assert script("embed", *flags).status == 0
    page = page_of(script, place)
    assert {one.tag for one in page.elements} == {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "span", "bdi",
        "section", "ul", "li", "div", "dl", "dt", "dd", "figure", "figcaption", "svg", "path",
        "rect", "text", "table", "thead", "tbody", "tr", "th", "td", "footer",
    }  # fmt: skip
    assert page.facts["input"] == str(source)
    titles = {title for *_, title in marks(page)}
    shown = [one.replace("\u202e", "\ufffd").replace("\u2066", "\ufffd") for one in STRANGE[:4]]
    assert titles == {
        *(f"{one}, {3 * (i + 1)} residues" for i, one in enumerate(shown)),
        f"{'a' * 59}…, 15 residues",
    }
    assert len(page.source) < 60_000
    assert not {"\u202e", "\u2066", "\0"} & set(page.source)


def test_the_page_needs_nothing_but_itself(script: Script, place: Place, embed: Embed) -> None:
    embed()
    page = page_of(script, place)
    assert page.source.lstrip().startswith("<!doctype html>")
    for one in page.elements:
        assert one.tag not in ("script", "link", "img", "iframe", "object", "a", "base", "form")
        assert not {"src", "href", "style", "srcset", "action"} & one.attributes.keys()
        assert not any(name.startswith("on") for name in one.attributes)
    assert "url(" not in page.source
    assert "@import" not in page.source
    (policy,) = [one for one in page.all("meta") if "http-equiv" in one.attributes]
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'"


# --- the file -----------------------------------------------------------------------------------


def test_an_earlier_report_is_replaced_and_nothing_else(
    script: Script, place: Place, embed: Embed
) -> None:
    embed()
    to = place.folder / "reports" / "run-000001.html"
    page_of(script, place)
    first = to.read_bytes()
    change(place, "UPDATE runs SET status = 'failed'")
    page_of(script, place)
    assert b"Status failed" in to.read_bytes()
    assert {path.name for path in to.parent.iterdir()} == {to.name, "run-000001_mqc.json"}
    for other in (first.replace(b"Run", b"My run"), first + b"mine", b"", b"my own"):
        to.write_bytes(other)
        answer = script("report", "--run", "1")
        assert (answer.status, answer.error) == (2, f"{to}: exists already")
        assert to.read_bytes() == other


def test_another_runs_report_a_link_and_a_folder_are_not_replaced(
    script: Script, place: Place, embed: Embed
) -> None:
    embed()
    embed()
    to = place.folder / "one.html"
    assert script("report", "--run", "1", "--to", to).status == 0
    before = to.read_bytes()
    link = place.folder / "link.html"
    link.symlink_to(to)
    for run, path in (("2", to), ("1", link), ("1", place.output)):
        answer = script("report", "--run", run, "--to", path)
        assert (answer.status, answer.error) == (2, f"{path}: exists already")
    assert to.read_bytes() == before
    assert link.is_symlink()


def test_refusals(script: Script, place: Place, embed: Embed) -> None:
    folder = embed()
    answer = script("report", "--run", "9")
    assert (answer.status, answer.error) == (
        2, f"run 9: not in database {place.database}",
    )  # fmt: skip
    nowhere = place.folder / "nowhere" / "run.html"
    answer = script("report", "--run", "1", "--to", nowhere)
    assert (answer.status, answer.error) == (2, f"{nowhere.parent}: no such folder")
    (place.folder / "reports").write_text("mine")
    assert script("report", "--run", "1").status == 4
    (file,) = folder.glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-1])
    answer = script("report", "--run", "1", "--to", place.folder / "run.html")
    assert answer.status == 3
    assert answer.error.startswith(f"run 1: {file}: ")
    assert not (place.folder / "run.html").exists()


def test_a_vector_that_is_not_finite_is_refused(script: Script, place: Place, embed: Embed) -> None:
    folder = embed()
    (file,) = folder.glob("*.parquet")
    table = pq.read_table(file)
    rows = np.stack(table["mean_2"].to_numpy())
    rows[4, 7] = np.inf
    broken = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    field = table.schema.field("mean_2")
    changed = table.set_column(table.column_names.index("mean_2"), field, broken.cast(field.type))
    footer = {FOOTER_KEY: pq.read_metadata(file).metadata[FOOTER_KEY]}
    pq.write_table(changed.replace_schema_metadata(footer), file)
    change(
        place,
        f"UPDATE checkpoints SET bytes = {file.stat().st_size}, sha256 = '{file_sha256(file)}'",
    )
    answer = script("report", "--run", "1")
    record = table["record"][4].as_py()
    assert (answer.status, answer.error) == (3, f"run 1: record {record}: mean_2 is not finite")


def test_a_full_disk_leaves_the_earlier_report(script: Script, place: Place, embed: Embed) -> None:
    """The file-size limit refuses writes as a full disk does, with another errno."""
    embed()
    to = place.folder / "run.html"
    assert script("report", "--run", "1", "--to", to).status == 0
    before, files = to.read_bytes(), place.files()
    flags = ["--run", "1", "--to", to, "--config", place.config]
    with place.read_by_another():
        done = processes.run("report", *flags, prepare=partial(processes.limit_files, 9000))
    assert done.status == 4
    assert done.err == f"error: {to}: File too large\n"
    assert to.read_bytes() == before
    assert place.files() == files


def test_make_hands_everything_on(place: Place, embed: Embed) -> None:
    embed()
    to = place.folder / "it's 50% $new.html"
    done = make("report", variables={"RUN": "1", "TO": str(to), "CONFIG": str(place.config)})
    assert done.returncode == 0, done.stderr
    assert Page(to).facts["run"] == "1"


def test_a_report_imports_no_torch() -> None:
    code = "import sys, scripts.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- in a browser -------------------------------------------------------------------------------


def test_the_number_of_a_tick_at_the_right_end_stays_within_the_drawing() -> None:
    for high in (0.04, 20_000.0):
        drawn = steps("speed", Axis("time", 0, high), "residues", [Step(0, high, 1.0, "a")])
        places = re.findall(r'class="number middle" x="([\d.]+)" y="[\d.]+">([^<]+)<', drawn)
        last, words = max((float(place), words) for place, words in places)
        assert last > 340
        assert last + 6.5 * len(words) / 2 <= 380


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# What sticks out of the window, of its section, or, of a drawing's words, out of the drawing.
MEASURE = """
const inside = (box, room) => box.left >= room.left - 1 && box.right <= room.right + 1;
function measured(page) {
  const out = [];
  for (const one of page.querySelectorAll('main *')) {
    const box = one.getBoundingClientRect();
    const drawing = one.closest('.chart'), section = one.closest('section');
    const room = (drawing || section || page.body).getBoundingClientRect();
    if (box.width && !inside(box, room)) out.push(one.tagName + ' ' + one.textContent.slice(0, 40));
  }
  return {
    width: page.defaultView.innerWidth, scrolled: page.documentElement.scrollWidth, out,
    name: page.title, sections: page.querySelectorAll('section').length,
    shown: [...page.querySelectorAll('.chart')].map(one => one.getBoundingClientRect().width),
  };
}
const pages = [...document.querySelectorAll('iframe')].map(one => one.contentDocument);
document.title = JSON.stringify(pages.map(measured));
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_nothing_sticks_out_at_any_width(
    script: Script, place: Place, embed: Embed, tmp_path: Path
) -> None:
    place.set("input", "unknown_residues", "x")
    entries = fasta(SOME_PROTEINS) + [(one, "MKV*") for one in STRANGE]
    embed(
        "--set", "input.max_residues=200", "--set", "output.checkpoint_records=2",
        "--set", "compute.tokens_per_pack=300", entries=entries,
    )  # fmt: skip
    change(
        place,
        f"UPDATE runs SET input_path = '/{'long' * 60}/{'name' * 50}.fasta'",
        f"UPDATE attempts SET host = '{'h' * 64}', device_name = '{'d' * 80}',"
        f" outcome = 'interrupted', error = '{'e' * 300}'",
        f"UPDATE models SET name = '{'m' * 120}'",
    )
    page_of(script, place)
    widths = (320, 390, 820, 1000, 1280)
    every = measured(place.folder / "reports" / "run-000001.html", widths, tmp_path)
    for width, found in zip(widths, every, strict=True):
        assert found["width"] == width
        assert (found["scrolled"], found["out"]) == (width, [])
        assert found["name"].startswith("Run 1: mmm")
        assert found["sections"] == 8
        assert len(found["shown"]) == 4
        assert min(found["shown"]) > 0.6 * min(width, 540)


def measured(page: Path, widths: Iterable[int], folder: Path) -> Any:  # noqa: ANN401
    """Open a page in frames of some widths, as no window of chromium is as narrow as a phone."""
    frame = folder / "frame.html"
    source = html.escape(page.read_text())
    frames = [
        f'<iframe srcdoc="{source}" width="{width}" height="900" style="border:0"></iframe>'
        for width in widths
    ]
    script = f"<script>onload = () => {{{MEASURE}}}</script>"
    frame.write_text(f"<!doctype html>{''.join(frames)}{script}")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--hide-scrollbars", f"--user-data-dir={folder / 'chromium'}",
            "--window-size=1400,1000", "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout.partition("<iframe")[0])
    return json.loads(html.unescape(title))


def test_a_target_without_a_name_is_refused(
    script: Script, place: Place, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed()
    monkeypatch.chdir(place.folder)
    for to in (".", "/"):
        answer = script("report", "--run", "1", "--to", to)
        assert answer.status == 2
        assert answer.error.endswith(": exists already")
