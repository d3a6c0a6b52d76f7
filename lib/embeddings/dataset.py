"""A dataset for the Hugging Face Hub: Parquet files and the dataset card that describes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lib.arrow import arrow_array, retyped
from lib.embeddings.provenance import facts_text, facts_to_publish
from lib.embeddings.reading import RunEmbeddings
from lib.embeddings.selection import Selection, ordered_vectors
from lib.files import new_path
from lib.parts import bounded_parts
from lib.units import count, printable, records
from schema.parquet import EXPORT_KEY, VectorColumn

__all__ = ["write_dataset"]

# As the Hub recommends: files that a client fetches in one go, row groups that its viewer reads.
_SHARD_BYTES = 500_000_000
_GROUP_BYTES = 64_000_000
_DESCRIBING = ("id", "description", "length", "embedded_length")
# The classes of size that the Hub knows, by their upper ends.
_SIZES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
    10**8: "10M<n<100M",
    10**9: "100M<n<1B",
}
_LARGER = "1B<n<10B"


def write_dataset(run: RunEmbeddings, to: Path, selection: Selection) -> None:
    """Write a folder: train-*.parquet with a row per record in FASTA order, and README.md.

    The vector of a row is a list of hidden_dim numbers; for per_tok it is a list of such lists, one
    per residue. The facts stand in the card and in every Parquet footer, with the name of the input
    instead of its path: the folder is made to be published.
    """
    column = run.column(selection.kind, selection.layer)
    facts = facts_to_publish(run, [column])
    described = run.table(*_DESCRIBING).add_column(
        0, "record", arrow_array(run.records, pa.int64())
    )
    if "inputs" in facts:
        described = described.append_column("input_file", _input_files(run))
    with (
        new_path(to, folder=True) as folder,
        ordered_vectors(run, column, to) as vectors,
    ):
        sizes = np.array([vector.nbytes for vector in vectors], np.int64)
        # Without a record there is one file without rows.
        shards = [*bounded_parts(sizes, _SHARD_BYTES)] or [range(0)]
        schema = _schema(described, column, run).with_metadata({EXPORT_KEY: facts_text(facts)})
        for number, shard in enumerate(shards):
            path = folder / f"train-{number:05d}-of-{len(shards):05d}.parquet"
            with pq.ParquetWriter(path, schema, compression="zstd", write_page_index=True) as file:
                for part in bounded_parts(sizes[shard.start : shard.stop], _GROUP_BYTES):
                    rows = shard[part.start : part.stop]
                    texts = described.slice(rows.start, len(rows))
                    here = _lists(vectors[rows.start : rows.stop], run.hidden_dim, column)
                    file.write_table(pa.table([*texts.columns, here], schema=schema))
        (folder / "README.md").write_text(_card(facts, run.hidden_dim), encoding="utf-8")


def _input_files(run: RunEmbeddings) -> pa.DictionaryArray:
    names = [PurePath(path).name for path in run.input_files]
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    places = arrow_array([number_of[name] for name in names], pa.int32())
    return pa.DictionaryArray.from_arrays(places, arrow_array([*number_of], pa.string()))


def _schema(described: pa.Table, column: VectorColumn, run: RunEmbeddings) -> pa.Schema:
    half = not column.is_pooled and run.facts["per_tok_dtype"] == "float16"
    vector = pa.list_(pa.float16() if half else pa.float32(), run.hidden_dim)
    kind = vector if column.is_pooled else pa.list_(vector)
    # A row group has few enough texts for Arrow's string, which every reader knows.
    fields = retyped(described.schema, pa.large_string(), pa.string())
    return pa.schema([*fields, pa.field(str(column), kind)])


def _lists(vectors: Sequence[npt.NDArray[Any]], width: int, column: VectorColumn) -> pa.Array:
    flat = np.concatenate([vector.reshape(-1) for vector in vectors])
    made = pa.FixedSizeListArray.from_arrays(
        arrow_array(flat, pa.from_numpy_dtype(flat.dtype)), width
    )
    if column.is_pooled:
        return made
    ends = np.cumsum([0, *(len(vector) for vector in vectors)])
    return pa.ListArray.from_arrays(arrow_array(ends, pa.int32()), made)


# ---- The card


def _card(facts: Mapping[str, Any], width: int) -> str:
    # Imported here, because it takes longer than anything else of an export.
    from huggingface_hub import DatasetCardData

    title = f"ESM-2 embeddings of {printable(_input(facts))}"
    files = {"split": "train", "path": "train-*.parquet"}
    header = DatasetCardData(
        pretty_name=title,
        task_categories=["feature-extraction"],
        tags=["biology", "protein", "embeddings", "esm-2"],
        size_categories=[_size(facts["records"])],
        configs=[{"config_name": "default", "data_files": [files]}],
    ).to_yaml()
    lines = [f"# {title}", "", f"Written by {facts['written_by']}.", ""]
    if facts["untrained"]:
        lines += ["**Untrained weights: the vectors mean nothing.**", ""]
    lines += ["| | |", "|---|---|", *(_row(*fact) for fact in _shown(facts, width)), ""]
    return f"---\n{header}\n---\n\n" + "\n".join([*lines, *_usage(facts, width)])


def _shown(facts: Mapping[str, Any], width: int) -> Iterator[tuple[str, str]]:
    config = facts["model_config"]
    released = {True: "yes, by its SHA-256", False: "no"}.get(config.get("released"), "not known")
    yield "model", facts["model"]
    yield "SHA-256 of its weights", facts["model_sha256"]
    yield "is a released ESM-2 model", released
    if "base_name" in config:
        yield "adapter of", f"{config['base_name']} (SHA-256 {config['base_sha256']})"
    yield "layer", f"{facts['layer']} of {config['num_layers']} (0 is the embedding)"
    yield "pooling", _POOLINGS[facts["pooling"]]
    yield "numbers per vector", str(width)
    yield "precision of matrix products", facts["precision"]
    yield "long sequences", _long_sequences(facts)
    if facts["unknown_residues"] == "x":
        yield "letters read as X", count(facts["residues_mapped"])
    yield "records", f"{count(facts['records'])} of {count(facts['records_total'])}"
    yield "input", ", ".join(facts.get("inputs", {}).get("path", [facts["input"]]))
    yield "SHA-256 of the input", facts["input_sha256"]
    yield "run", facts["run_uuid"]
    yield "computed with", ", ".join(f"{k} {v}" for k, v in facts["computed_with"].items())


_POOLINGS = {
    "mean": "mean over the embedded residues, without `<cls>` and `<eos>`",
    "bos": "the vector of `<cls>`",
    "none": "none: a vector for each embedded residue",
}


def _long_sequences(facts: Mapping[str, Any]) -> str:
    limit = f"more than {count(facts['max_residues'])} residues"
    if facts["long_sequences"] == "truncate":
        cut = records(facts["records_truncated"])
        return f"{limit}: the first {count(facts['max_residues'])} are embedded ({cut})"
    return f"{limit}: " + {"whole": "embedded whole", "error": "refused"}[facts["long_sequences"]]


def _usage(facts: Mapping[str, Any], width: int) -> list[str]:
    (column,) = facts["columns"]
    shape = f"{width} numbers" if facts["pooling"] != "none" else f"residues x {width} numbers"
    several = ["| `input_file` | the FASTA file it is from |"] if "inputs" in facts else []
    return [
        "| column | what |",
        "|---|---|",
        "| `record` | position in the FASTA file, from 0 |",
        "| `id`, `description` | first word of the header, and the rest |",
        "| `length`, `embedded_length` | residues in the file, residues embedded |",
        *several,
        f"| `{column}` | {shape} |",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'dataset = load_dataset("this folder, or its name on the Hub", split="train")',
        f'print(dataset.with_format("numpy")[0]["{column}"].shape)',
        "```",
        "",
    ]


def _input(facts: Mapping[str, Any]) -> str:
    more = len(facts["inputs"]["path"]) - 1 if "inputs" in facts else 0
    return f"{facts['input']} and {more} more" if more else str(facts["input"])


def _row(name: str, value: str) -> str:
    return f"| {name} | {printable(value).replace('|', '&#124;')} |"


def _size(number: int) -> str:
    return next((name for most, name in _SIZES.items() if number < most), _LARGER)
