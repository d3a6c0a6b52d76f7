"""transformers' own model, and PEFT around a model; both are imported when they are needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lib.jobs.fair_esm import Answer, fair_esm_tokens
from lib.models.tensor_names import hugging_face_name
from schema.esm2_config import VOCABULARY, ModelShape

__all__ = ["Transformers", "adapt", "from_fair_esm", "load_by_transformers"]

# Modules that no vector passes through.
_HEADS = re.compile(r"\.(classifier|lm_head|pooler|qa_outputs|score)\.")


class Transformers:
    """transformers' EsmModel, eager attention, in float32; alone or within another model."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 (transformers is optional)
        """Compute with a model, or with its part `esm`."""
        self.library = f"transformers {version('transformers')}"
        self._trunk = getattr(model, "esm", model).eval()

    def compute(self, residues: str, layers: Iterable[int], *, contacts: bool) -> Answer:
        """Return what transformers computes from a sequence at `layers`."""
        tokens = fair_esm_tokens(residues)
        there = torch.ones_like(tokens)
        with torch.inference_mode():
            found = self._trunk(tokens, there, output_hidden_states=True)
            maps = self._trunk.predict_contacts(tokens, there)[0].numpy() if contacts else None
        # Only the last state has the final norm in every version.
        states = [*found.hidden_states[:-1], found.last_hidden_state]
        return Answer({layer: states[layer][0].numpy() for layer in layers}, maps)


def load_by_transformers(folder: Path, kind: str = "EsmModel") -> Any:  # noqa: ANN401
    """Load a Hugging Face folder by transformers; `kind`: its class.

    Raises ImportError if transformers is not installed, and what it raises for a folder.
    """
    transformers = import_module("transformers")
    with _quiet(transformers):
        return getattr(transformers, kind).from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            **_without_pooler(kind),
        )


def from_fair_esm(module: torch.nn.Module, shape: ModelShape, kind: str) -> Any:  # noqa: ANN401
    """Give the tensors of fair-esm's module to transformers' model of the class `kind`.

    An adapter that was trained on transformers' model fits no other. Raises ImportError if
    transformers is not installed, ValueError if a tensor of the trunk is missing.
    """
    transformers = import_module("transformers")
    config = transformers.EsmConfig(
        vocab_size=VOCABULARY,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=shape.hidden_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.attention_heads,
        intermediate_size=4 * shape.hidden_dim,
        layer_norm_eps=1e-5,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=shape.token_dropout,
        attn_implementation="eager",
    )
    model = getattr(transformers, kind)(config, **_without_pooler(kind))
    prefix = "" if kind == "EsmModel" else "esm."
    state = {
        hugging_face_name(name).replace("esm.", prefix, 1): tensor
        for name, tensor in module.state_dict().items()
    }
    told = model.load_state_dict(state, strict=False)
    left = [name for name in told.missing_keys if "lm_head." not in name]
    if left:
        raise ValueError(f"no tensor for {left[0]} of transformers' {kind}")
    return model


def adapt(base: Any, folder: Path) -> Any:  # noqa: ANN401
    """Return a model as PEFT changes it by the adapter in a folder.

    Raises ImportError if PEFT is not installed, ValueError if it has no place in the trunk for a
    tensor of the adapter.
    """
    peft = import_module("peft")
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.task_type = None  # the task's wrapper would want its head
    config.inference_mode = True
    config.init_lora_weights = True  # a module without tensors of its own then changes nothing
    adapted = peft.PeftModel(base, config)
    stored = peft.load_peft_weights(str(folder), device="cpu")
    told = peft.set_peft_model_state_dict(adapted, stored)
    left = [name for name in told.unexpected_keys if not _HEADS.search(name)]
    if left:
        raise ValueError(f"PEFT has no place for {left[0]}")
    return adapted.base_model.model


def _without_pooler(kind: str) -> dict[str, bool]:
    return {"add_pooling_layer": False} if kind == "EsmModel" else {}


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:  # noqa: ANN401
    """Keep transformers from telling of heads that are not wanted, and from drawing bars."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
