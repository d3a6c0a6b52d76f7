"""The six released ESM-2 models: shapes, and sizes and digests of their published files."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from schema.esm2_config import ModelShape

__all__ = [
    "LIKE_RELEASED",
    "RELEASED",
    "HubFiles",
    "PublishedFile",
    "ReleasedModel",
    "hub_name",
    "named_on_hub",
    "shown_name",
]


@dataclass(frozen=True)
class PublishedFile:
    """A published file; `bytes` is None if its size is not known.

    `algorithm` says what `digest` is, in hexadecimal: sha256, or md5 for the one file for which no
    SHA-256 is known.
    """

    name: str
    bytes: int | None
    digest: str
    algorithm: str = "sha256"


@dataclass(frozen=True)
class HubFiles:
    """Files of weights in a Hugging Face repository, at one commit.

    `others` are read beside the weights; their digests are not known.
    """

    repository: str
    revision: str
    weights: tuple[PublishedFile, ...]
    others: tuple[str, ...] = ("config.json",)


@dataclass(frozen=True)
class ReleasedModel:
    """A released model; `repr_layers` are the layers to keep when the settings name none.

    `file` and `regression` are fair-esm's, `hub` is the same model on the Hugging Face Hub. None:
    no digest is known.
    """

    shape: ModelShape
    repr_layers: tuple[int, ...]
    file: PublishedFile
    regression: PublishedFile | None
    hub: HubFiles | None


def shown_name(name: str, released: bool | None) -> str:
    """Return the name of weights; if it is like a released model's and they are not, it says so.

    The views in schema/views.sql name models in the same way.
    """
    is_like = fnmatchcase(name, LIKE_RELEASED)
    return f"{name} (not the released file)" if is_like and released is False else name


def named_on_hub(name: str) -> str | None:
    """Return the released name that the Hub's name of a model ends in; None for any other text."""
    owner, _, released = name.partition("/")
    return released if owner == _HUB_OWNER and released in RELEASED else None


def hub_name(released: str) -> str:
    """Return the Hub's name of a released model, which `named_on_hub` takes."""
    return f"{_HUB_OWNER}/{released}"


# What the names of all released models are like.
LIKE_RELEASED = "esm2_t*_UR50D"
# Whose models the released ones are on the Hugging Face Hub.
_HUB_OWNER = "facebook"
# Shapes: Lin et al. 2022 (doi:10.1126/science.ade2574), table S1, and the released files.
# Sizes and digests: Meta publishes none. SHA-256 and Hugging Face revisions are from models.toml of
# github.com/Synthyra/FastPLMs, the MD5 of the 15B file from torchdrug/models/esm.py of
# github.com/DeepGraphLearning/torchdrug.
RELEASED = {
    "esm2_t6_8M_UR50D": ReleasedModel(
        ModelShape(6, 320, 20, True),
        (6,),
        PublishedFile(
            "esm2_t6_8M_UR50D.pt",
            30_099_493,
            "46f002a9870c9bdecd0ea887acb1f9a38a6b561e8f8bf8a6990b679b9d31b928",
        ),
        PublishedFile(
            "esm2_t6_8M_UR50D-contact-regression.pt",
            1_511,
            "8f7a4557d57713b97ba0e484303007efb7230d25299c0ac47a0a1b12a87bbb9d",
        ),
        HubFiles(
            "facebook/esm2_t6_8M_UR50D",
            "c731040fcd8d73dceaa04b0a8e6329b345b0f5df",
            (
                PublishedFile(
                    "model.safetensors",
                    31_384_292,
                    "24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189",
                ),
            ),
        ),
    ),
    "esm2_t12_35M_UR50D": ReleasedModel(
        ModelShape(12, 480, 20, True),
        (12,),
        PublishedFile(
            "esm2_t12_35M_UR50D.pt",
            134_095_705,
            "7f21e80e61d16a71735163ef555d3009afb0c98da74c48e29df08606973cc55e",
        ),
        PublishedFile(
            "esm2_t12_35M_UR50D-contact-regression.pt",
            1_959,
            "16641e05d830d0ce863dd152dbb8c2f3ddfa3c3ec2a66080152c8abad01d8585",
        ),
        HubFiles(
            "facebook/esm2_t12_35M_UR50D",
            "6fbf070e65b0b7291e7bbcd451118c216cff79d8",
            (
                PublishedFile(
                    "model.safetensors",
                    136_008_798,
                    "e35647818e0e064351d4531ed480d225a002567b4b2b93ad3a9246d753150fc0",
                ),
            ),
        ),
    ),
    "esm2_t30_150M_UR50D": ReleasedModel(
        ModelShape(30, 640, 20, True),
        (30,),
        PublishedFile(
            "esm2_t30_150M_UR50D.pt",
            592_774_773,
            "881c7176cf198ef8dec26a3c375d40eb58d0c33df95c22562ca6cc6d3f812c62",
        ),
        PublishedFile(
            "esm2_t30_150M_UR50D-contact-regression.pt",
            3_431,
            "6a604b96722ed052eef8a094ad90b275ba2e987d406315dbed0bdc6b3c4238a7",
        ),
        HubFiles(
            "facebook/esm2_t30_150M_UR50D",
            "a695f6045e2e32885fa60af20c13cb35398ce30c",
            (
                PublishedFile(
                    "model.safetensors",
                    595_257_706,
                    "c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566",
                ),
            ),
        ),
    ),
    "esm2_t33_650M_UR50D": ReleasedModel(
        ModelShape(33, 1280, 20, True),
        (33,),
        PublishedFile(
            "esm2_t33_650M_UR50D.pt",
            2_604_537_549,
            "ea9d0522b335a8778dea6535a65301f10208dece28cd5865482b0b1fc446168c",
        ),
        PublishedFile(
            "esm2_t33_650M_UR50D-contact-regression.pt",
            3_687,
            "8ffe6edbd4173dc8d45c2cd5cb27d43aad77ec26b4c768200c58ae1f96693575",
        ),
        HubFiles(
            "facebook/esm2_t33_650M_UR50D",
            "08e4846e537177426273712802403f7ba8261b6c",
            (
                PublishedFile(
                    "model.safetensors",
                    2_609_506_392,
                    "a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0",
                ),
            ),
        ),
    ),
    "esm2_t36_3B_UR50D": ReleasedModel(
        ModelShape(36, 2560, 40, True),
        (36,),
        PublishedFile(
            "esm2_t36_3B_UR50D.pt",
            5_678_116_398,
            "7de8b4082ba15891959ab368b77ce3886697af1efb16d3c9e9e7b0c5d3f07500",
        ),
        PublishedFile(
            "esm2_t36_3B_UR50D-contact-regression.pt",
            6_759,
            "4da500eab246481dc9c8c95bc7b1d02f2803d761c380b0e95186d4a07d0fc84e",
        ),
        HubFiles(
            "facebook/esm2_t36_3B_UR50D",
            "476b639933c8baad5ad09a60ac1a87f987b656fc",
            (
                PublishedFile(
                    "pytorch_model-00001-of-00002.bin",
                    9_976_735_419,
                    "0f971f11c449d21422aa982b791619c10351972992c735f4c3cd43fe09790412",
                ),
                PublishedFile(
                    "pytorch_model-00002-of-00002.bin",
                    1_390_347_055,
                    "7560b46fc383c691fb74b915b7d4bcef40d3df181447f16ba4b298845e308d0c",
                ),
            ),
            ("config.json", "pytorch_model.bin.index.json"),
        ),
    ),
    "esm2_t48_15B_UR50D": ReleasedModel(
        ModelShape(48, 5120, 40, True),
        (48,),
        PublishedFile("esm2_t48_15B_UR50D.pt", None, "af61a9c0b792ae50e244cde443b7f4ac", "md5"),
        None,
        None,
    ),
}
