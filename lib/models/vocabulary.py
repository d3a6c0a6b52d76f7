"""The vocabulary beside weights: the numbers that a tokenizer gives to the tokens of sequences.

transformers' EsmTokenizer reads vocab.txt, and added tokens in tokenizer_config.json or
added_tokens.json instead of what that says; its general tokenizer reads tokenizer.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.errors import WeightsError
from lib.models.held_file import HeldFile
from lib.models.weights import read_json
from schema.esm2_config import ALPHABET

__all__ = ["OF_SEQUENCES", "refuse_other_numbers"]

# The tokens that a sequence is made of, by their numbers.
OF_SEQUENCES = {
    number: token
    for number, token in enumerate(ALPHABET)
    if token in ("<cls>", "<eos>") or len(token) == 1
}
# Whether every token is there.
_FILES = {
    "vocab.txt": True,
    "tokenizer.json": True,
    "tokenizer_config.json": False,
    "added_tokens.json": False,
}


def refuse_other_numbers(folder: Path) -> None:
    """Raise WeightsError if a file of a tokenizer gives a token another number than ESM-2 does.

    Tokens that sequences do not hold may have any number. So if a sequence gets other tokens before
    or after it.
    """
    _refuse_other_frame(folder)
    for name, whole in _FILES.items():
        path = folder / name
        if not path.is_file():
            continue
        numbers = _numbers_in(HeldFile(path))
        for number, token in OF_SEQUENCES.items():
            if whole and token not in numbers:
                raise WeightsError(f"{path}: has no token {token!r}: not ESM-2's alphabet")
            said = numbers.get(token, number)
            if said != number:
                raise WeightsError(
                    f"{path}: token {token!r} has the number {said!r:.20}, in ESM-2 {number}"
                )


def _refuse_other_frame(folder: Path) -> None:
    """Raise WeightsError if a tokenizer has other tokens than ESM-2 before or after a sequence."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        content = read_json(HeldFile(path))
        for key, token in (("cls_token", "<cls>"), ("eos_token", "<eos>")):
            said = content.get(key, token)
            said = said.get("content") if isinstance(said, dict) else said
            if said != token:
                raise WeightsError(f"{path}: {key} is {said!r:.20}, in ESM-2 {token!r}")


def _numbers_in(file: HeldFile) -> dict[str, Any]:
    """Return the numbers of tokens as transformers reads them, by token."""
    name = file.path.name
    try:
        if name == "vocab.txt":
            lines = file.open_path.read_text(encoding="utf-8").splitlines()
            return {line.strip(): number for number, line in enumerate(lines)}
        content = read_json(file)
        if name == "tokenizer.json":
            added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
            return {**content["model"]["vocab"], **added}
        if name == "tokenizer_config.json":
            tokens = content.get("added_tokens_decoder") or {}
            return {token["content"]: int(number) for number, token in tokens.items()}
    except OSError as error:
        raise WeightsError(f"{file.path}: {error.strerror or error}") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise WeightsError(f"{file.path}: not the tokens and numbers of a tokenizer") from None
    return content
