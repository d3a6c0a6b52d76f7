"""Vectors read back and exported. Only the formats that need torch import it."""

from lib.embeddings.reading import RunEmbeddings, open_run

__all__ = ["RunEmbeddings", "open_run"]
