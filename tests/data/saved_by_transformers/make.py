"""Make this folder: small untrained models as transformers and PEFT save them.

Nothing here was trained. README.md beside this file lists what came out and from which versions.
The script runs once per version of transformers, each installed in a folder of its own, all with
one torch (CPU):

    python3 -m venv /tmp/tf/venv
    /tmp/tf/venv/bin/pip install torch==2.13.0 numpy==2.4.6 pyarrow==26.0.1
    for version in 4.57.6 5.0.0 5.5.4 5.6.2 5.23.0 5.24.0; do
        /tmp/tf/venv/bin/pip install --target /tmp/tf/$version transformers==$version numpy==2.4.6
    done
    /tmp/tf/venv/bin/pip install --no-deps --target /tmp/tf/peft \\
        peft==0.21.2 accelerate==1.15.0 psutil fair-esm==2.0.0

    make() {  # VERSION COMMAND [ARGUMENT]
        PYTHONPATH=$PWD:/tmp/tf/$1:/tmp/tf/peft OMP_NUM_THREADS=1 \\
            /tmp/tf/venv/bin/python tests/data/saved_by_transformers/make.py ${@:2}
    }
    for version in 4.57.6 5.5.4 5.6.2 5.23.0 5.24.0; do make $version models; done
    make 4.57.6 resave 5.23.0
    for version in 5.5.4 5.6.2 5.23.0 5.24.0; do make $version resave 4.57.6; done
    for version in 4.57.6 5.0.0 5.5.4 5.6.2 5.23.0 5.24.0; do make $version evidence; done
    make 5.23.0 adapters
    make 5.24.0 tables
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from lib.models.untrained import make_folder, make_model
from lib.sequences.alphabet import tokenise

HERE = Path(__file__).parent
VERSION: str = transformers.__version__
LAYERS, WIDTH, HEADS, SEED = 2, 16, 4, 11
SEQUENCES = (
    b"M",
    b"MKTAYIAKQ",
    b"GSHMLEDPVRXQWACNTFIYKBUZ",
    b"MALWMRLLPLLALLALWGPDPAAAFVNQHLCGSHLVEALY",
)
# The first three, where hidden states of all would add up.
FEW = SEQUENCES[:3]
CLASSES = ("EsmModel", "EsmForMaskedLM", "EsmForSequenceClassification")
FORMATS = ("single", "sharded", "bin")
# Each version saves every class, and every pair of class and format is saved by some version.
MADE = ("4.57.6", "5.5.4", "5.6.2", "5.23.0", "5.24.0")
CONFIG: dict[str, Any] = {
    "vocab_size": 33,
    "mask_token_id": 32,
    "pad_token_id": 1,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-5,
    "position_embedding_type": "rotary",
    "emb_layer_norm_before": False,
    "token_dropout": True,
}
State = dict[str, torch.Tensor]
Hidden = list[np.ndarray[Any, np.dtype[np.float32]]]

# ---- Weights


def sharpened(state: Mapping[str, torch.Tensor]) -> State:
    """Make mistakes show: large scores for rotary positions, small embeddings for the epsilon."""
    changed = dict(state)
    for name, tensor in state.items():
        query_or_key = any(part in name for part in (".query.", ".key.", ".q_proj.", ".k_proj."))
        if query_or_key and name.endswith(".weight"):
            # Outlier channels leave little of the others to the second layer's norm.
            changed[name] = tensor * (2 if re.search(r"layers?\.0\.", name) else 30)
        elif name.endswith(("word_embeddings.weight", "embed_tokens.weight", "lm_head.weight")):
            changed[name] = tensor * 0.05
    return changed


def drawn() -> State:
    """Return the weights of every model here, by the names of transformers 4."""
    with tempfile.TemporaryDirectory() as scratch:
        state = load_file(make_folder(Path(scratch) / "drawn", LAYERS, WIDTH, HEADS, seed=SEED))
    return sharpened(state)


def built(kind: str, inv_freq: bool = True, **changes: Any) -> Any:  # noqa: ANN401
    """Build a model from a configuration, and give it the drawn weights; heads stay at random.

    inv_freq: whether the drawn rotary frequencies, of base 10000, are given as well.
    """
    torch.manual_seed(SEED)
    model = getattr(transformers, kind)(transformers.EsmConfig(**CONFIG | changes))
    prefix = "" if kind == "EsmModel" else "esm."
    given = drawn() if inv_freq else without_frequencies(drawn())
    state = {name.replace("esm.", prefix, 1): tensor for name, tensor in given.items()}
    told = model.load_state_dict(state, strict=False)
    heads = ("classifier.", "lm_head.", "pooler.")
    left = [name for name in told.missing_keys if not name.startswith(heads)]
    left = [name for name in left if inv_freq or "inv_freq" not in name]
    assert not left, left
    return model.eval()


def hidden_states(model: torch.nn.Module, sequences: Iterable[bytes] = SEQUENCES) -> Hidden:
    """Return (layers + 1, residues + 2, width) float32 of each sequence, computed alone."""
    trunk = getattr(model, "esm", model)
    found = []
    for sequence in sequences:
        tokens = torch.from_numpy(tokenise([sequence])).long()[None]
        with torch.inference_mode():
            answer = trunk(tokens, torch.ones_like(tokens), output_hidden_states=True)
        assert len(answer.hidden_states) == LAYERS + 1
        layers = [*answer.hidden_states[:-1], answer.last_hidden_state]
        found.append(torch.cat(layers).float().numpy())
    return found


def store(path: Path, hidden: Hidden) -> None:
    """Write hidden states; arr_0 is the first sequence's."""
    np.savez_compressed(path, *hidden)


def load(folder: Path, kind: str = "EsmModel") -> Any:  # noqa: ANN401
    """Load a folder by this version, in float32."""
    dtype = {"torch_dtype" if VERSION.startswith("4.") else "dtype": torch.float32}
    torch.manual_seed(SEED)
    return getattr(transformers, kind).from_pretrained(folder, **dtype).eval()


def distance(one: Hidden, other: Hidden) -> float:
    """Return the relative L2 difference of the residue that differs most."""
    worst = 0.0
    for x, y in zip(one, other, strict=True):
        norm = np.linalg.norm(y.astype(np.float64), axis=-1)
        worst = max(worst, float((np.linalg.norm(x.astype(np.float64) - y, axis=-1) / norm).max()))
    return worst


# ---- models and resave


def save(model: Any, folder: Path, form: str) -> None:  # noqa: ANN401
    """Save by the version's own save_pretrained; .bin by torch.save where it has none."""
    shutil.rmtree(folder, ignore_errors=True)
    if form != "bin":
        model.save_pretrained(folder, max_shard_size="20kB" if form == "sharded" else "1GB")
    elif VERSION.startswith("4."):
        model.save_pretrained(folder, safe_serialization=False)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for path in folder.iterdir():
        if path.name != "config.json" and not path.name.startswith(("model", "pytorch_model")):
            path.unlink()


def models() -> None:
    """Save every class built from a configuration, and the hidden states of one."""
    place = HERE / VERSION
    for number, kind in enumerate(CLASSES):
        form = FORMATS[(number + MADE.index(VERSION)) % len(FORMATS)]
        save(built(kind), place / f"{kind}-{form}", form)
    if VERSION in (MADE[0], MADE[-1]):
        save(built("EsmModel").half(), place / "EsmModel-float16", "single")
        store(place / "float16.npz", hidden_states(load(place / "EsmModel-float16"), FEW))
    if MADE[-1] == VERSION:
        model = built("EsmModel", inv_freq=False, rope_theta=500.0)
        save(model, place / "EsmModel-rope-theta-500", "single")
        store(place / "rope_theta_500.npz", hidden_states(model, FEW))
    store(place / "hidden_states.npz", hidden_states(built("EsmModel")))


def resave(other: str) -> None:
    """Load the masked language model that another version saved, and save it again."""
    (saved,) = (HERE / other).glob("EsmForMaskedLM-[!r]*")
    model = load(saved, "EsmForMaskedLM")
    assert distance(hidden_states(model), hidden_states(built("EsmModel"))) < 1e-5
    save(model, HERE / VERSION / f"EsmForMaskedLM-resaved-from-{other}", "single")


# ---- evidence: what this version makes of a changed config.json, and of tensors stored otherwise


def folder_of(
    folder: Path, state: Mapping[str, torch.Tensor], changes: Mapping[str, object] | None = None
) -> Path:
    """Write an EsmModel folder by hand; a change to ABSENT removes the key."""
    folder.mkdir()
    config = {"model_type": "esm", "architectures": ["EsmModel"], **CONFIG}
    config |= changes or {}
    config = {key: value for key, value in config.items() if value != ABSENT}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without_frequencies(state: Mapping[str, torch.Tensor]) -> State:
    return {name: tensor for name, tensor in state.items() if "inv_freq" not in name}


def frequencies(theta: float) -> torch.Tensor:
    head_dim = WIDTH // HEADS
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))


def by_layer(theta: float) -> State:
    return {f"esm.{LAYER.format(i)}": frequencies(theta) for i in range(LAYERS)}


def extra(name: str, rows: int | None = None) -> torch.Tensor:
    """Draw a tensor that ESM-2 does not have."""
    generator = torch.Generator().manual_seed(len(name))
    if rows is None:
        return 1 + 0.3 * torch.randn(WIDTH, generator=generator)
    return 0.05 * torch.randn(rows, WIDTH, generator=generator)


LAYER = "encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
ABSENT = "(absent)"
THETA: dict[str, object] = {"rope_theta": 500.0}
PARAMETERS: dict[str, object] = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
# What is tried in config.json. Keys that EsmConfig has and nothing here names are tried as well.
CONFIG_TRIALS: dict[str, list[dict[str, object]]] = {
    "rope_theta": [THETA],
    "rope_parameters": [PARAMETERS],
    "rope_scaling": [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, **THETA},
    ],
    "partial_rotary_factor": [{"partial_rotary_factor": 0.5}],
    "head_dim": [{"head_dim": 3}, {"head_dim": 8}],
    "is_decoder": [{"is_decoder": True}],
    "is_causal": [{"is_causal": False}, {"is_causal": False, "is_decoder": True}],
    "add_cross_attention": [
        {"add_cross_attention": True},
        {"add_cross_attention": True, "is_decoder": True},
    ],
    "use_cache": [{"use_cache": False}],
    "sliding_window": [{"sliding_window": 4}],
    "attention_chunk_size": [{"attention_chunk_size": 4}],
    "per_layer_config": [{"per_layer_config": {"0": {"layer_norm_eps": 1e-2}}}],
    "mask_token_id": [
        {"mask_token_id": 4},
        {"mask_token_id": 0},
        {"mask_token_id": 31},
        {"mask_token_id": ABSENT},
        {"mask_token_id": ABSENT, "token_dropout": False},
    ],
    "pad_token_id": [{"pad_token_id": 5}, {"pad_token_id": ABSENT}],
    "bos_token_id": [{"bos_token_id": 0}],
    "eos_token_id": [{"eos_token_id": 4}],
    "sep_token_id": [{"sep_token_id": 4}],
    "cls_token_id": [{"cls_token_id": 4}],
    "layer_norm_eps": [{"layer_norm_eps": ABSENT}, {"layer_norm_eps": 1e-3}],
    "token_dropout": [{"token_dropout": False}, {"token_dropout": ABSENT}],
    "emb_layer_norm_before": [
        {"emb_layer_norm_before": True},
        {"emb_layer_norm_before": ABSENT},
        {"emb_layer_norm_before": None},
    ],
    "hidden_act": [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}],
    "position_embedding_type": [
        {"position_embedding_type": "absolute"},
        {"position_embedding_type": "relative_key"},
        {"position_embedding_type": ABSENT},
    ],
    "max_position_embeddings": [{"max_position_embeddings": 8}],
    "hidden_dropout_prob": [{"hidden_dropout_prob": 0.5}],
    "attention_probs_dropout_prob": [{"attention_probs_dropout_prob": 0.5}],
    "initializer_range": [{"initializer_range": 3.0}],
    "attn_implementation": [{"attn_implementation": "eager"}],
    "_attn_implementation": [{"_attn_implementation": "eager"}],
    "chunk_size_feed_forward": [{"chunk_size_feed_forward": 2}],
    "tie_word_embeddings": [{"tie_word_embeddings": False}],
    "pruned_heads": [{"pruned_heads": {"0": [1]}}],
    "num_attention_heads": [{"num_attention_heads": 2}, {"num_attention_heads": ABSENT}],
    "num_hidden_layers": [{"num_hidden_layers": 1}],
    "intermediate_size": [{"intermediate_size": 32}],
    "hidden_size": [{"hidden_size": 8}],
    "vocab_size": [{"vocab_size": 64}],
    "embedding_size": [{"embedding_size": 8}],
    "dtype": [{"dtype": "float16"}],
    "torch_dtype": [{"torch_dtype": "float16"}],
    "is_folding_model": [{"is_folding_model": True}],
    "quantization_config": [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    ],
    "layerdrop": [{"layerdrop": 0.9}],
    "scale_embedding": [{"scale_embedding": True}],
    "embedding_scale": [{"embedding_scale": 2.0}],
    "architectures": [{"architectures": ["EsmForMaskedLM"]}],
}
# Variants whose hidden states are kept: config.json, and tensors beside the plain ones.
KEPT: dict[str, tuple[dict[str, object], Callable[[State], State]]] = {
    "rope_theta_500": (dict(THETA), without_frequencies),
    "rope_parameters_500": (dict(PARAMETERS), without_frequencies),
    "is_decoder": ({"is_decoder": True}, dict),
    "mask_token_id_4": ({"mask_token_id": 4}, dict),
    "layer_norm_eps_absent": ({"layer_norm_eps": ABSENT}, dict),
    "layer_norm_eps_1e-3": ({"layer_norm_eps": 1e-3}, dict),
    "token_dropout_false": ({"token_dropout": False}, dict),
    "emb_layer_norm_before": (
        {"emb_layer_norm_before": True},
        lambda state: (
            state
            | {f"esm.embeddings.layer_norm.{part}": extra(part) for part in ("weight", "bias")}
        ),
    ),
    "position_embedding_type_absolute": (
        {"position_embedding_type": "absolute"},
        lambda state: (
            without_frequencies(state)
            | {"esm.embeddings.position_embeddings.weight": extra("positions", 64)}
        ),
    ),
    "hidden_act_relu": ({"hidden_act": "relu"}, dict),
    "pad_token_id_5": ({"pad_token_id": 5}, dict),
    "inv_freq_500_by_layer": ({}, lambda state: without_frequencies(state) | by_layer(500)),
    "inv_freq_500_of_the_model": (
        {},
        lambda state: (
            without_frequencies(state) | {"esm.rotary_embeddings.inv_freq": frequencies(500)}
        ),
    ),
    "rope_theta_500_inv_freq_10000_by_layer": (dict(THETA), dict),
    "inv_freq_500_of_a_starred_layer": (
        {},
        lambda state: without_frequencies(state) | {f"esm.{LAYER.format('*')}": frequencies(500)},
    ),
    "inv_freq_500_of_the_first_layer_only": (
        {},
        lambda state: state | {f"esm.{LAYER.format(0)}": frequencies(500)},
    ),
    "inv_freq_500_of_the_second_layer_only": (
        {},
        lambda state: state | {f"esm.{LAYER.format(1)}": frequencies(500)},
    ),
    "inv_freq_500_by_layer_and_10000_of_the_model": (
        {},
        lambda state: (
            state | by_layer(500) | {"esm.rotary_embeddings.inv_freq": frequencies(10000)}
        ),
    ),
    "rope_theta_500_inv_freq_10000_of_a_starred_layer": (
        dict(THETA),
        lambda state: without_frequencies(state) | {f"esm.{LAYER.format('*')}": frequencies(10000)},
    ),
}


def told(error: Exception) -> str:
    """One line of what this version raises."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def difference(plain: Hidden, folder: Path, kind: str = "EsmModel") -> float | str:
    """Return how far a folder's hidden states are from the plain ones, or what is raised."""
    try:
        return float(f"{distance(hidden_states(load(folder, kind), FEW), plain):.2g}")
    except Exception as error:
        return told(error)


def keys_tried() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield every key with each change that is tried."""
    known = set(transformers.EsmConfig().to_dict()) - {"model_type", "transformers_version"}
    for key in sorted(known | set(CONFIG_TRIALS)):
        default = transformers.EsmConfig().to_dict().get(key)
        other = {bool: not default, int: 3, float: 0.5, type(None): 3}.get(type(default), default)
        for changes in CONFIG_TRIALS.get(key, [{key: other}]):
            yield key, changes


def evidence() -> None:
    """Write what config keys and stored tensors do to this version's vectors."""
    state = drawn()
    found: dict[str, Any] = {"transformers": VERSION, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        plain = hidden_states(load(folder_of(scratch / "plain", state)), FEW)
        bare = without_frequencies(state)
        rows = {}
        for number, (key, changes) in enumerate(keys_tried()):
            kept = next((tensors for other, tensors in KEPT.values() if other == changes), dict)
            folder = folder_of(scratch / str(number), kept(bare), changes)
            said = json.dumps(changes, sort_keys=True)
            rows[said] = {"key": key, "difference": difference(plain, folder)}
        found["config_keys"] = rows
        found["variants"] = {}
        for variant, (changes, tensors) in KEPT.items():
            folder = folder_of(scratch / variant, tensors(state), changes)
            found["variants"][variant] = difference(plain, folder)
            if VERSION in (MADE[0], MADE[-1]) and not isinstance(found["variants"][variant], str):
                (HERE / "variants" / VERSION).mkdir(parents=True, exist_ok=True)
                kept_states = hidden_states(load(folder), FEW)
                store(HERE / "variants" / VERSION / f"{variant}.npz", kept_states)
        if MADE[-1] == VERSION:
            describe_variants(state)
        found["reads"] = what_is_read(scratch, state, plain)
        found["reads"] |= what_is_tied(scratch, state)
        found["tensors"] = stored_names(scratch)
        found["dtype of float32 tensors where config.json says float16"] = str(
            transformers.EsmModel.from_pretrained(
                folder_of(scratch / "half", state, {"dtype": "float16", "torch_dtype": "float16"})
            ).dtype
        )
        found["defaults"] = {
            key: value
            for key, value in transformers.EsmConfig().to_dict().items()
            if key != "transformers_version"
        }
    path = HERE / "evidence" / f"{VERSION}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def describe_variants(state: State) -> None:
    """Write what each variant changes, a line each; the large position table is left out."""
    lines = {}
    for name, (changes, tensors) in KEPT.items():
        varied = tensors(state)
        added = {
            key: tensor.tolist()
            for key, tensor in varied.items()
            if tensor.numel() <= WIDTH and not (key in state and torch.equal(tensor, state[key]))
        }
        removed = sorted(state.keys() - varied.keys())
        lines[name] = json.dumps({"config": changes, "removed": removed, "tensors": added})
    rows = ",\n".join(f' "{name}": {line}' for name, line in lines.items())
    (HERE / "variants" / "variants.json").write_text(f"{{\n{rows}\n}}\n")


def what_is_read(scratch: Path, state: State, plain: Hidden) -> dict[str, str]:
    """Return which of two files this version reads, by names of a folder's files.

    Each file holds other weights, so that the vectors tell.
    """
    wholes = ("model.safetensors", "pytorch_model.bin")
    files = [name for whole in wholes for name in (whole, f"{whole}.index.json")]
    answers = {}
    for i, one in enumerate(files):
        for other in files[i + 1 :]:
            folder = folder_of(scratch / f"both-{i}-{other}", state)
            (folder / "model.safetensors").unlink()
            write_weights(folder, one, state)
            name = "esm.encoder.emb_layer_norm_after.bias"
            write_weights(folder, other, state | {name: state[name] + 1})
            moved = difference(plain, folder)
            read = moved if isinstance(moved, str) else one if moved < 1e-6 else other
            answers[f"{one} and {other}"] = read
    return answers


def what_is_tied(scratch: Path, state: State) -> dict[str, str]:
    """Return what a masked language model takes as its embedding, from lm_head's or none."""
    name, tied = "esm.embeddings.word_embeddings.weight", "lm_head.decoder.weight"
    plain = hidden_states(load(folder_of(scratch / "tied", state), "EsmForMaskedLM"), FEW)
    stored = {
        f"{tied} alone": {tied: state[name]},
        f"{tied} that differs from the embedding": {name: state[name], tied: 2 * state[name]},
    }
    rest = {key: tensor for key, tensor in state.items() if key != name}
    answers = {}
    for number, (said, tensors) in enumerate(stored.items()):
        folder = folder_of(scratch / f"tied-{number}", rest | tensors)
        moved = difference(plain, folder, "EsmForMaskedLM")
        answers[said] = "vectors of the plain model" if moved == 0 else f"not them: {moved}"
    return answers


def write_weights(folder: Path, name: str, state: State) -> None:
    """Write weights as the file `name` says: whole, or one shard and its index."""
    whole = name.removesuffix(".index.json")
    if whole != name:
        stem, _, suffix = whole.rpartition(".")
        whole = f"{stem}-00001-of-00001.{suffix}"
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, whole)}
        (folder / name).write_text(json.dumps(index))
    if whole.endswith(".bin"):
        torch.save(state, folder / whole)
    else:
        save_file(state, folder / whole, metadata={"format": "pt"})


def stored_names(scratch: Path) -> dict[str, list[str]]:
    """Return the names that this version stores, of layers the first one's, by class and way."""
    names = {}
    for kind in CLASSES:
        built(kind).save_pretrained(scratch / kind)
        names[f"{kind}, built from a config"] = names_in(scratch / kind)
    load(folder_of(scratch / "old", drawn())).save_pretrained(scratch / "again")
    names["EsmModel, loaded with the old names"] = names_in(scratch / "again")
    model = built("EsmModel")
    names["EsmModel, state_dict()"] = [
        name for name in model.state_dict() if ".layer.1." not in name
    ]
    return names


def names_in(folder: Path) -> list[str]:
    return sorted(
        name for name in load_file(folder / "model.safetensors") if ".layer.1." not in name
    )


def tables() -> None:
    """Write KEYS.md: what every trial did, by version, from the evidence."""
    paths = sorted((HERE / "evidence").glob("*.json"), key=lambda path: version_of(path.stem))
    by_version = {path.stem: json.loads(path.read_text()) for path in paths}
    lines = ["# What config.json and stored tensors do to vectors, by version of transformers", ""]
    lines += ["Made by `make.py tables` from `evidence/`. A number is the relative L2 difference"]
    lines += ["of the residue that differs most from the plain model; 0 means the same vectors."]
    lines += ["A key in brackets is not one of EsmConfig's. `-` means not tried."]
    for part, title in (("config_keys", "Keys of config.json, where no inv_freq is stored"),
                        ("variants", "Variants whose hidden states are kept"),
                        ("reads", "Which file is read, and what is tied")):  # fmt: skip
        lines += ["", f"## {title}", "", "| | " + " | ".join(by_version) + " |"]
        lines += ["| --- " * (len(by_version) + 1) + "|"]
        for trial in dict.fromkeys(t for found in by_version.values() for t in found[part]):
            answers = [said_of(found[part].get(trial)) for found in by_version.values()]
            known = any(json_key(trial) in found["defaults"] for found in by_version.values())
            name = trial if known or part != "config_keys" else f"({trial})"
            lines.append(f"| {name} | " + " | ".join(answers) + " |")
    (HERE / "KEYS.md").write_text("\n".join(lines) + "\n")


def json_key(trial: str) -> str:
    """Return the first key of a trial that is written as JSON."""
    return next(iter(json.loads(trial)), "") if trial.startswith("{") else trial


def version_of(text: str) -> list[int]:
    return [int(number) for number in text.split(".")]


def said_of(answer: Any) -> str:  # noqa: ANN401
    """Write a difference as 0 or with two digits, and an error by its class."""
    value = answer["difference"] if isinstance(answer, dict) else answer
    if isinstance(value, float):
        return "0" if value < 1e-6 else f"{value:.2g}"
    return "-" if value is None else re.sub(r"^(not them: )?(\w+Error):.*", r"\2", value)


# ---- adapters, by PEFT

PLAIN = {"target_modules": ["query", "value", "intermediate.dense"], "r": 2, "lora_alpha": 6}
OF_FAIR_ESM = PLAIN | {"target_modules": ["q_proj", "v_proj", "fc1"]}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("EsmModel", PLAIN),
    "bias_lora_only": ("EsmModel", PLAIN | {"bias": "lora_only"}),
    "bias_all": ("EsmModel", PLAIN | {"bias": "all"}),
    "rslora": ("EsmModel", PLAIN | {"use_rslora": True}),
    "rank_pattern": (
        "EsmModel",
        PLAIN | {"rank_pattern": {"value": 3}, "alpha_pattern": {"intermediate.dense": 5}},
    ),
    "saves_the_classifier": (
        "EsmForSequenceClassification",
        PLAIN | {"task_type": "SEQ_CLS"},
    ),
    "saves_the_lm_head": ("EsmForMaskedLM", PLAIN | {"modules_to_save": ["lm_head"]}),
    "saves_emb_layer_norm_after": (
        "EsmModel",
        PLAIN | {"modules_to_save": ["emb_layer_norm_after"]},
    ),
    "saves_word_embeddings": ("EsmModel", PLAIN | {"modules_to_save": ["word_embeddings"]}),
    "saves_layer_norms": ("EsmModel", PLAIN | {"modules_to_save": ["LayerNorm"]}),
    "fair_esm_plain": ("fair-esm", OF_FAIR_ESM),
    "fair_esm_bias_all": ("fair-esm", OF_FAIR_ESM | {"bias": "all"}),
    "fair_esm_saves_the_lm_head": ("fair-esm", OF_FAIR_ESM | {"modules_to_save": ["lm_head"]}),
    "fair_esm_saves_emb_layer_norm_after": (
        "fair-esm",
        OF_FAIR_ESM | {"modules_to_save": ["emb_layer_norm_after"]},
    ),
    "fair_esm_saves_embed_tokens": (
        "fair-esm",
        OF_FAIR_ESM | {"modules_to_save": ["embed_tokens"]},
    ),
    "fair_esm_saves_layer_norms": (
        "fair-esm",
        OF_FAIR_ESM | {"modules_to_save": ["final_layer_norm"]},
    ),
}
# Those whose merged model is kept as well.
MERGED = ("bias_all", "saves_emb_layer_norm_after")


def adapters() -> None:
    """Save adapters of a base that transformers saved, and of fair-esm's module."""
    import peft

    place = HERE / "adapters"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    write_fair_esm_base(place / "base_fair_esm.pt")
    (saved,) = (HERE / VERSION).glob("EsmModel-[!f]*")
    base_folder = Path("../..") / VERSION / saved.name
    for number, (name, (kind, options)) in enumerate(ADAPTERS.items()):
        with inside(place / name):  # so that the base's name in the adapter is relative
            base = fair_esm_base() if kind == "fair-esm" else load(base_folder, kind)
            torch.manual_seed(number)
            adapted: Any = peft.get_peft_model(base, peft.LoraConfig(lora_dropout=0.0, **options))
            disturb(adapted)
            adapted.save_pretrained(".")
            Path("README.md").unlink(missing_ok=True)
            hidden = hidden_of_fair_esm if kind == "fair-esm" else hidden_states
            theirs = hidden(adapted.base_model.model.eval())
            store(Path("hidden_states.npz"), theirs[: len(FEW)])
            base = fair_esm_base() if kind == "fair-esm" else load(base_folder, kind)
            again: Any = peft.PeftModel.from_pretrained(base, ".")
            assert distance(hidden(again.base_model.model.eval()), theirs) < 1e-6
            if name in MERGED:
                merged = adapted.merge_and_unload()
                assert distance(hidden(merged), theirs) < 1e-5
                save(merged, place / f"{name}_merged", "single")


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a new folder."""
    before = Path.cwd()
    folder.mkdir()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def disturb(adapted: torch.nn.Module) -> None:
    """Move what would be trained, as training does; B begins as zeros."""
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                size = 0.3 if ".lora_" in name else 0.1 * float(parameter.std().nan_to_num(0.1))
                parameter.add_(torch.randn_like(parameter) * max(size, 0.01))


def write_fair_esm_base(path: Path) -> None:
    """Write the drawn weights as a file of fair-esm's, without a contact regression."""
    make_model(path, LAYERS, WIDTH, HEADS, seed=SEED).unlink()
    archive = archive_of(path)
    state = sharpened(archive["model"])
    state["encoder.lm_head.weight"] = state["encoder.sentence_encoder.embed_tokens.weight"]
    torch.save(archive | {"model": state}, path)


def fair_esm_base() -> Any:  # noqa: ANN401
    """Load the file by fair-esm's own loader."""
    import esm

    archive = archive_of(Path("../base_fair_esm.pt"))
    return esm.pretrained.load_model_and_alphabet_core("esm2_untrained", archive)[0].eval()


def archive_of(path: Path) -> Any:  # noqa: ANN401
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def hidden_of_fair_esm(model: Any) -> Hidden:  # noqa: ANN401
    """As hidden_states, of fair-esm's module."""
    found = []
    for sequence in SEQUENCES:
        tokens = torch.from_numpy(tokenise([sequence])).long()[None]
        with torch.inference_mode():
            layers = model(tokens, repr_layers=range(LAYERS + 1))["representations"]
        found.append(torch.cat([layers[i] for i in range(LAYERS + 1)]).numpy())
    return found


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    commands: dict[str, Callable[..., None]] = {
        "models": models,
        "resave": resave,
        "evidence": evidence,
        "adapters": adapters,
        "tables": tables,
    }
    commands[command](*arguments)
