"""Make the checkpoints of this folder with Lightning itself.

    pip install lightning==2.6.6 transformers==5.23.0 fair-esm==2.0.0
    PYTHONPATH=. python tests/data/saved_by_lightning/make.py

The weights are untrained: `lib.models.untrained` draws them (seed 11), and the one step of training
has a learning rate of 0, so that the checkpoints hold these very numbers.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import esm
import lightning
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint

from lib.models.tensor_names import hugging_face_name
from lib.models.untrained import make_model

HERE = Path(__file__).parent
LAYERS, WIDTH, HEADS, SEED = 2, 16, 4, 11


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    """A network of ESM-2 and a head, as people train it."""

    def __init__(self, kind: str, rate: float, labels: list[str]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = network(kind)
        self.head = torch.nn.Linear(WIDTH, len(labels))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        if self.hparams["kind"] == "fair-esm":
            hidden = self.model(batch[0], repr_layers=[LAYERS])["representations"][LAYERS]
        else:
            hidden = self.model(batch[0], output_hidden_states=True).hidden_states[-1]
        loss: torch.Tensor = self.head(hidden).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        adam = torch.optim.AdamW(self.parameters(), lr=self.hparams["rate"])
        steps = torch.optim.lr_scheduler.StepLR(adam, 1)
        return {"optimizer": adam, "lr_scheduler": steps}


def network(kind: str) -> torch.nn.Module:
    """Return fair-esm's or transformers' network with the drawn weights."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(path := Path(folder) / "esm2.pt", LAYERS, WIDTH, HEADS, seed=SEED)
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, weights_only=True)["model"]
    state = {
        name.removeprefix("encoder.").removeprefix("sentence_encoder."): tensor
        for name, tensor in stored.items()
    }
    model: torch.nn.Module
    if kind == "fair-esm":
        alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
        model = esm.model.esm2.ESM2(LAYERS, WIDTH, HEADS, alphabet, token_dropout=True)
    else:
        config = transformers.EsmConfig(
            vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=WIDTH,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
            layer_norm_eps=1e-5, position_embedding_type="rotary", token_dropout=True,
        )  # fmt: skip
        model = transformers.EsmForMaskedLM(config)
        state = {hugging_face_name(name): tensor for name, tensor in state.items()}
    told = model.load_state_dict(state, strict=False)
    assert not [name for name in told.missing_keys if "contact_head" not in name], told
    return model


def main() -> None:
    """Train each for a step and keep what Lightning writes."""
    warnings.simplefilter("ignore")
    for kind in ("fair-esm", "transformers"):
        with tempfile.TemporaryDirectory() as folder:
            best = ModelCheckpoint(folder, kind, monitor="loss", save_on_train_epoch_end=True)
            trainer = lightning.Trainer(
                max_steps=1,
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                default_root_dir=folder,
                callbacks=[best],
            )
            one = torch.utils.data.TensorDataset(torch.randint(4, 24, (1, 8)))
            loader = torch.utils.data.DataLoader(one)
            trainer.fit(Classifier(kind, 0.0, ["phage", "host"]), loader)
            (HERE / f"{kind}.ckpt").write_bytes((Path(folder) / f"{kind}.ckpt").read_bytes())


if __name__ == "__main__":
    main()
