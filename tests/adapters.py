"""Made-up LoRA adapters, as PEFT saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

QUERY = "esm.encoder.layer.0.attention.self.query"
FC1 = "esm.encoder.layer.1.intermediate.dense"


def factors(module: str, out: int, inner: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """A and B of a module, as PEFT names them."""
    generator = torch.Generator().manual_seed(len(module) + rank)
    stem = f"base_model.model.{module}"
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, inner, generator=generator),
        f"{stem}.lora_B.weight": torch.randn(out, rank, generator=generator) / 8,
    }


def save_adapter(
    folder: Path, base: Path | str | None, tensors: dict[str, torch.Tensor], **changes: object
) -> Path:
    """Write an adapter as PEFT saves it."""
    config: dict[str, object] = {
        "peft_type": "LORA",
        "base_model_name_or_path": None if base is None else str(base),
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["query", "intermediate.dense"],
        "bias": "none",
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


TENSORS = factors(QUERY, 64, 64) | factors(FC1, 256, 64)
