"""The public training data of the reference models; ``training/README.md`` names its sources."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

COLOURS = {
    "white": (255, 255, 255),
    "red": (214, 62, 62),
    "orange": (240, 150, 60),
    "yellow": (246, 222, 96),
    "green": (96, 178, 92),
    "teal": (64, 172, 172),
    "blue": (76, 122, 216),
    "purple": (148, 98, 204),
    "pink": (242, 158, 196),
    "brown": (140, 100, 72),
    "grey": (150, 150, 150),
    "black": (24, 24, 24),
}
"""Background colours by their names in prompts."""

EMOJI_GROUPS = ("Animals & Nature", "Food & Drink", "Activities")

FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def fashion_mnist(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST padded to 32x32: uint8 [N, 1, 32, 32] and labels int64 [N]; `split` is ``train`` or ``t10k``."""

    def read(kind: str, header: int) -> np.ndarray:
        raw = gzip.decompress((data / "fashion-mnist" / f"{split}-{kind}-ubyte.gz").read_bytes())
        return np.frombuffer(raw, dtype=np.uint8, offset=header)

    images = torch.from_numpy(read("images-idx3", 16).reshape(-1, 1, 28, 28).copy())
    labels = torch.from_numpy(read("labels-idx1", 8).astype(np.int64))
    return torch.nn.functional.pad(images, (2, 2, 2, 2)), labels


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


@dataclass(frozen=True)
class Emoji:
    """Emoji with their names: rgba uint8 [N, 4, 64, 64]."""

    rgba: Tensor
    names: list[str]


def emoji(data: Path, groups: tuple[str, ...] = EMOJI_GROUPS) -> Emoji:
    """The Fluent emoji of `groups`."""
    folder = data / "fluent-emoji"
    rgba = np.load(folder / "fluent_3d_64.npz", allow_pickle=False)["rgba"]
    with (folder / "captions.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    chosen = [index for index, row in enumerate(rows) if row["group"] in groups]
    images = torch.from_numpy(rgba[chosen].copy()).permute(0, 3, 1, 2).contiguous()
    return Emoji(images, [rows[index]["name"].lower() for index in chosen])


def on_colour(rgba: Tensor, colour: str) -> Tensor:
    """Blend images uint8 [N, 4, 64, 64] with a background colour: float32 [N, 3, 64, 64] in [-1, 1]."""
    alpha = rgba[:, 3:].float() / 255
    background = torch.tensor(COLOURS[colour], dtype=torch.float32).view(1, 3, 1, 1)
    return (rgba[:, :3].float() * alpha + background * (1 - alpha)) / 127.5 - 1


def captioned(data: Emoji) -> tuple[Tensor, list[str]]:
    """Every pair of emoji and color that is not held out: float32 [N, 3, 64, 64] in [-1, 1], and its prompt."""
    pairs = [
        (index, colour) for index in range(len(data.names)) for colour in COLOURS if not is_held_out(index, colour)
    ]
    images = torch.cat([on_colour(data.rgba[index : index + 1], colour) for index, colour in pairs])
    return images, [prompt(data.names[index], colour) for index, colour in pairs]


def prompt(name: str, colour: str) -> str:
    """The caption of an emoji on a background; white is not mentioned."""
    return name if colour == "white" else f"{name} on {colour}"


def is_held_out(index: int, colour: str) -> bool:
    """Whether a pair of emoji and colour is excluded from training: about one in eight, never white."""
    return colour != "white" and (index * 7 + list(COLOURS).index(colour)) % 8 == 0
