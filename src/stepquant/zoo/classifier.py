"""The Fashion-MNIST classifier whose features stand in for Inception's where there is no network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class FashionClassifier(nn.Module):
    """A small residual-free CNN; pictures are float32 [B, 1, 32, 32] in [-1, 1].

    Args:
        width: channels of the first stage; the features have ``2 * width`` dimensions.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width

        def stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 3, stride, 1), nn.GroupNorm(8, channels_out), nn.SiLU()
            )

        self.body = nn.Sequential(
            stage(1, width, 1),
            stage(width, 2 * width, 2),
            stage(2 * width, 2 * width, 1),
            stage(2 * width, 4 * width, 2),
            stage(4 * width, 4 * width, 1),
        )
        self.project = nn.Linear(4 * width, 2 * width)
        self.head = nn.Linear(2 * width, 10)

    def features(self, pictures: Tensor) -> Tensor:
        """Penultimate features, float [B, 2 * width]."""
        return torch.nn.functional.silu(self.project(self.body(pictures).mean(dim=(2, 3))))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits of the ten classes, float [B, 10]."""
        return self.head(self.features(pictures))

    def save_pretrained(self, folder: Path) -> None:
        """Write ``config.json`` and fp16 ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"width": self.width}) + "\n")
        save_file(
            {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()},
            folder / "model.safetensors",
        )

    @classmethod
    def from_pretrained(cls, folder: Path) -> FashionClassifier:
        """Read what `save_pretrained` wrote, in float32."""
        model = cls(**json.loads((folder / "config.json").read_text()))
        model.load_state_dict(
            {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        )
        return model.eval()
