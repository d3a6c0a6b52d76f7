"""Vectors read back and exported. Nothing here imports torch until a format needs it."""

from lib.embeddings.reading import RunEmbeddings, open_run

__all__ = ["RunEmbeddings", "open_run"]
