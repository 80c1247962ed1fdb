"""A Fashion-MNIST classifier whose features replace Inception's where there is no network access."""

from __future__ import annotations

import json
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepquant.errors import StepquantError


class FashionClassifier(nn.Module):
    """A small residual CNN; images are float32 [B, 1, 32, 32] in [-1, 1].

    Args:
        width: channels of the first stage; the features have ``2 * width`` dimensions.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.stem = _convolution(1, width, kernel=5, stride=2)
        self.stages = nn.ModuleList(
            [_Stage(width, width), _Stage(width, 2 * width), _Stage(2 * width, 4 * width)],
        )
        self.project = nn.Linear(4 * width, 2 * width)
        self.head = nn.Linear(2 * width, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate features, float [B, 2 * width], not negative."""
        hidden = F.relu(self.stem(images))
        for index, stage in enumerate(self.stages):
            hidden = stage(F.max_pool2d(hidden, 2) if index else hidden)
        return F.relu(self.project(hidden.mean(dim=(2, 3))))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the ten classes, float [B, 10]."""
        return self.head(self.features(images))

    def save_pretrained(self, folder: Path) -> None:
        """Write ``config.json`` and fp16 ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"width": self.width}) + "\n", encoding="utf-8")
        tensors = {name: tensor for name, tensor in self.state_dict().items() if tensor.is_floating_point()}
        save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> FashionClassifier:
        """Load what `save_pretrained` wrote, in float32 and evaluation mode.

        Raises:
            StepquantError: if `folder` does not contain a classifier.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise StepquantError(
                f"{folder} does not contain a classifier; expected config.json and model.safetensors. Pass the folder "
                "of the zoo model fashion-classifier."
            )
        model = cls(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        model.load_state_dict(tensors)  # the batch count of batch normalization is not stored
        return model.eval()


class _Stage(nn.Module):
    """A convolution that changes the channels, then a residual one; float [B, C, H, W], same height and width."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.widen = _convolution(channels_in, channels_out)
        self.refine = _convolution(channels_out, channels_out)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = F.relu(self.widen(hidden))
        return F.relu(hidden + self.refine(hidden))


def _convolution(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out))
