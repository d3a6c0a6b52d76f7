"""Who is measured: fair-esm's own loop, transformers, OpenVINO, and this project, on one model.

Each contender takes a list of sequences and returns (sequences, hidden_dim) float32: the mean
over residues at the last layer, in the order given.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lib.models.detection import Detection
from lib.models.tensor_names import fair_esm_name
from lib.network.device import packs_at_once
from lib.network.elementwise import Elementwise
from lib.network.esm2 import load_network
from lib.network.pipeline import computed
from lib.sequences.alphabet import tokenise
from lib.sequences.plan import Pack, plan_packs
from lib.sequences.records import Owner
from lib.sequences.windows import Sequence as FastaSequence
from schema.parquet import VectorColumn

__all__ = ["Embed", "fair_esm", "openvino", "ours", "transformers_sdpa"]

Embed = Callable[[Sequence[bytes]], npt.NDArray[np.float32]]

_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32_768}
_PAD = 1


def fair_esm(detection: Detection, device: torch.device) -> Embed:
    """fair-esm's extract loop as it ships: float32, batches of 4,096 tokens by its own planner."""
    import esm

    path = detection.require_weights().path
    with torch.serialization.safe_globals([argparse.Namespace]):
        model, alphabet = esm.pretrained.load_model_and_alphabet_local(str(path))
    model = model.eval().to(device)
    layer = detection.shape.num_layers

    def embed(sequences: Sequence[bytes]) -> npt.NDArray[np.float32]:
        texts = [sequence.decode() for sequence in sequences]
        dataset = esm.FastaBatchedDataset(list(range(len(texts))), texts)
        batches = dataset.get_batch_indices(_TOKENS_PER_BATCH["cpu"], extra_toks_per_seq=1)
        loader = torch.utils.data.DataLoader(
            dataset, collate_fn=alphabet.get_batch_converter(), batch_sampler=batches
        )
        found: dict[int, Any] = {}
        with torch.no_grad():
            for labels, strings, tokens in loader:
                hidden = model(tokens.to(device), repr_layers=[layer])["representations"][layer]
                for i, label in enumerate(labels):
                    found[label] = hidden[i, 1 : len(strings[i]) + 1].mean(0).cpu().numpy()
        return np.stack([found[i] for i in range(len(texts))])

    return embed


def transformers_sdpa(
    detection: Detection, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> Embed:
    """transformers' EsmModel with SDPA: length-sorted batches, padded.

    They have 4,096 tokens on a CPU, and on a GPU as many as a pack. attention: another of
    transformers' kernels.
    """
    model = _esm_model(detection, attention, device).to(device, dtype)

    def hidden_of(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.to(device)
        with torch.inference_mode():
            hidden: torch.Tensor = model(tokens, attention_mask=tokens != _PAD).last_hidden_state
        return hidden

    return _in_padded_batches(hidden_of, _TOKENS_PER_BATCH[device.type])


def openvino(detection: Detection, dtype: torch.dtype) -> Embed:
    """OpenVINO on a CPU: transformers' EsmModel, converted; batches as `transformers_sdpa` has."""
    # Without the package, its client leaves out the messages that it would send to its makers.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino as ov

    model = _esm_model(detection, "eager", torch.device("cpu"))
    tokens = torch.full((2, 8), _PAD)
    tokens[:, :6] = torch.tensor([0, 20, 6, 15, 17, 2])
    example = {"input_ids": tokens, "attention_mask": (tokens != _PAD).long()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: the lengths differ, and the vectors agree
        converted = ov.convert_model(model, example_input=example)
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(converted, "CPU", hints)

    def hidden_of(tokens: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": tokens.numpy(), "attention_mask": (tokens != _PAD).long().numpy()}
        return torch.from_numpy(compiled(inputs)[0])

    return _in_padded_batches(hidden_of, _TOKENS_PER_BATCH["cpu"])


def _esm_model(detection: Detection, attention: str, device: torch.device) -> Any:  # noqa: ANN401
    """Return transformers' EsmModel with the weights, in float32, made and filled on a device."""
    from transformers import EsmConfig, EsmModel

    shape = detection.shape
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=_PAD, hidden_size=shape.hidden_dim,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.attention_heads,
        intermediate_size=4 * shape.hidden_dim, position_embedding_type="rotary",
        token_dropout=shape.token_dropout,
        emb_layer_norm_before=False, layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=1026,
    )  # fmt: skip
    config._attn_implementation = attention
    with device:
        model: Any = EsmModel(config, add_pooling_layer=False)
    names = {fair_esm_name(name): name for name in model.state_dict()}
    weights = detection.require_weights()
    wanted = [name for name in weights.tensors if name in names]
    state = {names[name]: tensor for name, tensor in weights.read(wanted)}
    _missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    return model.eval()


def _in_padded_batches(hidden_of: Callable[[torch.Tensor], torch.Tensor], most: int) -> Embed:
    """Return an `Embed` that pads length-sorted batches.

    hidden_of: gives (batch, tokens, hidden_dim) for (batch, tokens) int64; most: tokens of a batch.
    """

    def embed(sequences: Sequence[bytes]) -> npt.NDArray[np.float32]:
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        found: dict[int, Any] = {}
        for batch in _padded_batches([len(sequences[i]) + 2 for i in order], most):
            numbers = [order[i] for i in batch]
            longest = max(len(sequences[i]) for i in numbers) + 2
            tokens = torch.full((len(numbers), longest), _PAD)
            for row, i in enumerate(numbers):
                tokens[row, : len(sequences[i]) + 2] = torch.from_numpy(tokenise([sequences[i]]))
            hidden = hidden_of(tokens)
            for row, i in enumerate(numbers):
                residues = hidden[row, 1 : len(sequences[i]) + 1]
                found[i] = residues.float().mean(0).cpu().numpy()
        return np.stack([found[i] for i in range(len(sequences))])

    return embed


def ours(
    detection: Detection,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    elementwise: Elementwise | None = None,
) -> Embed:
    """This project's network, packs and pooling, without files and database."""
    network = load_network(detection, device, dtype)
    network.elementwise = elementwise
    column = VectorColumn("mean", network.shape.num_layers)

    def embed(sequences: Sequence[bytes]) -> npt.NDArray[np.float32]:
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        planned = [FastaSequence(sequences[i], [Owner(i, "", "", 0, "")]) for i in order]
        lengths = [len(sequence.residues) for sequence in planned]
        result = np.empty((len(planned), network.shape.hidden_dim), np.float32)
        packs = [
            Pack(pack, planned[pack.start : pack.stop])
            for pack in plan_packs(lengths, tokens, packs_at_once(device))
        ]
        for pack, kept in computed(network, packs, [column], "float32"):
            result[order[pack.positions.start : pack.positions.stop]] = kept.columns[column]
        return result

    return embed


def _padded_batches(tokens: list[int], most: int) -> list[range]:
    """Cut a descending list of lengths into batches of at most `most` tokens, padding counted."""
    batches, start = [], 0
    for i in range(len(tokens)):
        if i > start and (i + 1 - start) * tokens[start] > most:
            batches.append(range(start, i))
            start = i
    return [*batches, range(start, len(tokens))]
