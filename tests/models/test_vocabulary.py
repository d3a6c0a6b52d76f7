"""Vocabularies beside weights: if these fail, a model trained with its own order of tokens gets
every letter as another one, and its vectors mean nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lib.models.untrained import make_folder
from schema.esm2_config import ALPHABET
from tests.adapters import TENSORS, save_adapter
from tests.models.test_huggingface import refusal_of_file
from tests.models.test_weights import found

SWAPPED = [{"L": "A", "A": "L"}.get(token, token) for token in ALPHABET]
NUMBERS = {token: number for number, token in enumerate(ALPHABET)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "hf"
    make_folder(folder, 2, 64, 4)
    return folder


@pytest.fixture
def folder(tmp_path: Path, weights: Path) -> Path:
    """A Hugging Face folder without a tokenizer, to write one into."""
    (tmp_path / "hf").mkdir()
    for file in weights.iterdir():
        (tmp_path / "hf" / file.name).symlink_to(file)
    return tmp_path / "hf"


def fast(numbers: dict[str, int], *added: dict[str, object]) -> str:
    return json.dumps({"model": {"type": "WordLevel", "vocab": numbers}, "added_tokens": added})


def added(number: int, token: object) -> str:
    return json.dumps({"added_tokens_decoder": {str(number): {"content": token}}})


REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "two letters swapped": (
        "vocab.txt",
        "\n".join(SWAPPED),
        "token 'L' has the number 5, in ESM-2 4",
    ),
    "no <cls>": (
        "vocab.txt",
        "\n".join(ALPHABET[1:]),
        "has no token '<cls>': not ESM-2's alphabet",
    ),
    "another <eos>": (
        "vocab.txt",
        "\n".join(["<cls>", "<eos>", "<pad>", *ALPHABET[3:]]),
        "token '<eos>' has the number 1, in ESM-2 2",
    ),
    "a letter twice, of which the last counts": (
        "vocab.txt",
        "\n".join([*ALPHABET, "V"]),
        "token 'V' has the number 33, in ESM-2 7",
    ),
    "a general tokenizer": (
        "tokenizer.json",
        fast(NUMBERS | {"-": 31}),
        "token '-' has the number 31, in ESM-2 30",
    ),
    "a general tokenizer with added tokens": (
        "tokenizer.json",
        fast(NUMBERS, {"id": 40, "content": "K"}),
        "token 'K' has the number 40, in ESM-2 15",
    ),
    "an added token": (
        "tokenizer_config.json",
        added(33, "L"),
        "token 'L' has the number 33, in ESM-2 4",
    ),
    "an added token of older versions": (
        "added_tokens.json",
        '{"B": 33}',
        "token 'B' has the number 33, in ESM-2 25",
    ),
    "another token before a sequence": (
        "special_tokens_map.json",
        '{"cls_token": "<null_1>", "eos_token": "<eos>"}',
        "cls_token is '<null_1>', in ESM-2 '<cls>'",
    ),
    "no token after a sequence": (
        "tokenizer_config.json",
        '{"eos_token": null}',
        "eos_token is None, in ESM-2 '<eos>'",
    ),
    "another token after a sequence": (
        "tokenizer_config.json",
        '{"eos_token": {"content": "<pad>"}}',
        "eos_token is '<pad>', in ESM-2 '<eos>'",
    ),
    "no text": ("vocab.txt", b"\xff\n", "not the tokens and numbers of a tokenizer"),
    "no vocabulary": ("tokenizer.json", "{}", "not the tokens and numbers of a tokenizer"),
    "no token": (
        "tokenizer_config.json",
        added(33, ["L"]),
        "not the tokens and numbers of a tokenizer",
    ),
    "no JSON": ("added_tokens.json", "B", "not JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_number_of_a_token_of_sequences_is_refused_with_the_token(
    folder: Path, case: str
) -> None:
    """Before, no file of a tokenizer was looked at."""
    name, content, fact = REFUSED[case]
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal_of_file(folder, name) == fact


def test_the_tokenizer_of_an_adapter_counts_too(tmp_path: Path, small_model: Path) -> None:
    lora = save_adapter(tmp_path / "lora", small_model, TENSORS)
    (lora / "vocab.txt").write_text("\n".join(ALPHABET))
    assert found(lora).weights
    (lora / "vocab.txt").write_text("\n".join(SWAPPED))
    assert refusal_of_file(lora, "vocab.txt") == "token 'L' has the number 5, in ESM-2 4"


@pytest.mark.xdist_group("transformers")  # imported by one process
@pytest.mark.filterwarnings("ignore")
def test_what_transformers_saves_of_esm2_s_tokenizer_is_accepted(
    tmp_path: Path, folder: Path
) -> None:
    import transformers

    (tmp_path / "vocab.txt").write_text("\n".join(ALPHABET))
    kind: Any = transformers.EsmTokenizer
    tokenizer = kind(str(tmp_path / "vocab.txt"))
    tokenizer.add_tokens(["<domain>"])
    tokenizer.save_pretrained(folder)
    assert (folder / "vocab.txt").is_file()
    assert found(folder).weights


@pytest.mark.xdist_group("transformers")  # imported by one process
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.txt", "\n".join(SWAPPED)),
        ("tokenizer_config.json", added(33, "L")),
        ("added_tokens.json", '{"L": 33}'),
    ],
)
def test_transformers_reads_the_other_number_as_well(
    tmp_path: Path, name: str, content: str
) -> None:
    from transformers import EsmTokenizer

    (tmp_path / "config.json").write_text('{"model_type": "esm"}')
    (tmp_path / "vocab.txt").write_text("\n".join(ALPHABET))
    assert EsmTokenizer.from_pretrained(tmp_path)("L")["input_ids"] == [0, 4, 2]
    (tmp_path / name).write_text(content)
    assert EsmTokenizer.from_pretrained(tmp_path)("L")["input_ids"] != [0, 4, 2]
