"""Naming: what a model on disk is called; its digest alone says which model it is."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["model_name"]

_SUFFIX = re.compile(r"\.(pt|pth|ckpt|bin|safetensors)$")
# How transformers' Trainer numbers what it saves, and what save_pretrained calls its file: every
# training has these.
_NUMBERED = re.compile(r"checkpoint-\d+")
_OF_EVERY_FOLDER = ("model", "pytorch_model")


def model_name(path: Path) -> str:
    """Return the name of the model at a path: that of the file or folder, where it tells anything.

    A snapshot in the Hugging Face Hub's cache has its repository's name, without the owner. The
    folder's name stands before that of a numbered checkpoint, and instead of that of its file.
    """
    name, parent = _SUFFIX.sub("", path.name), path.parent
    if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
        return parent.parent.name.rpartition("--")[2]
    if _NUMBERED.fullmatch(name) and parent.name:
        return f"{model_name(parent)}/{name}"
    if name in _OF_EVERY_FOLDER and path.suffix and parent.name:
        return model_name(parent)
    return name
