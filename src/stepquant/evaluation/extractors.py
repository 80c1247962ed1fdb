"""Networks for metrics: Inception, the zoo's classifier, CLIP, DINO, and the AlexNet of LPIPS.

The user gives the path of all but the zoo's classifier, since their licenses forbid shipping them. Weight files are
read without running code from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from stepquant.errors import StepquantError, first_line
from stepquant.evaluation.proxy import ClassifierProxy
from stepquant.files import tensors_digest

SPATIAL_CHANNELS = 7
"""Channels of the 17 x 17 map that sFID uses (arXiv 2103.03841): 2,023 dimensions, about as many as FID's 2,048."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file, or of a ``.pth`` file that contains only tensors.

    Raises:
        StepquantError: if there is no such file, or it contains anything else.
    """
    if not path.is_file():
        raise StepquantError(f"weights {path} do not exist; expected a file. Download it and pass its path.")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # damaged files and forbidden pickles come in many classes
        raise StepquantError(f"weights {path} cannot be read: {first_line(error)}.") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise StepquantError(f"weights {path} cannot be read; expected a dictionary of tensors.")
    return tensors


class InceptionExtractor:
    """The Inception v3 of FID, from torch-fidelity: ``pool`` [N, 2048], ``spatial`` [N, 2023] (sFID), ``logits``
    [N, 1008] (without bias, as the Inception score requires).

    Args:
        weights: torch-fidelity's file ``weights-inception-2015-12-05-6726825d.pth``; None downloads it.

    Raises:
        StepquantError: if torch-fidelity, torchvision or the weights are missing.
    """

    def __init__(self, weights: Path | None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise StepquantError(
                "Inception features need torch-fidelity and torchvision. Run pip install 'stepquant[inception]'."
            ) from None
        if weights is not None:
            read_weights(weights)  # torch-fidelity unpickles anything: refuse a file with more than tensors
        layers = ["2048", "logits_unbiased"]
        try:
            self.model = FeatureExtractorInceptionV3("inception", layers, None if weights is None else str(weights))
        except Exception as error:  # network and shape errors come in many classes
            raise StepquantError(f"the Inception weights cannot be used: {first_line(error)}.") from None
        self.key = f"inception-{tensors_digest(dict(self.model.state_dict()))}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        spatial: list[Tensor] = []
        layer = self.model.Mixed_6d.branch1x1.conv  # TensorFlow's mixed_6/conv
        handle = layer.register_forward_hook(lambda _module, _inputs, output: spatial.append(output))
        try:
            pool, logits = self.model(_pixels(images))
        finally:
            handle.remove()
        return {"pool": pool, "spatial": spatial[0][:, :SPATIAL_CHANNELS].flatten(1), "logits": logits}


class ClassifierExtractor:
    """The zoo's classifier: ``pool`` [N, 64], ``logits`` [N, 10]. A proxy: its values are not FID, KID or IS."""

    def __init__(self, proxy: ClassifierProxy) -> None:
        self.classifier = proxy.classifier
        self.key = f"classifier-{tensors_digest(dict(self.classifier.state_dict()))}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features = self.classifier.features(images.mean(dim=1, keepdim=True))
        return {"pool": features, "logits": self.classifier.head(features)}


class EmbeddingExtractor:
    """A local DINO or CLIP model of transformers: ``embedding`` [N, D] of unit length.

    The projected embedding of CLIP; otherwise the class token of the last layer.

    Raises:
        StepquantError: if the folder does not contain such a model.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoModel

        if not (folder / "config.json").is_file():
            raise StepquantError(
                f"{folder} is not a vision model; expected a folder of transformers with CLIP or DINO."
            )
        self.folder = folder
        try:
            self.model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, use_fast=False)
        except Exception as error:  # from_pretrained raises undocumented classes for a damaged folder
            raise StepquantError(f"vision model {folder} cannot be loaded: {first_line(error)}.") from None
        self.key = f"embedding-{tensors_digest(dict(self.model.state_dict()))}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        pixels = list(_pixels(images).permute(0, 2, 3, 1).numpy())
        inputs = self.processor(images=pixels, return_tensors="pt")["pixel_values"]
        if hasattr(self.model, "visual_projection"):
            embedding = self.model.visual_projection(self.model.vision_model(pixel_values=inputs).pooler_output)
        else:
            embedding = self.model(pixel_values=inputs).last_hidden_state[:, 0]
        return {"embedding": F.normalize(embedding, dim=1)}

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:
            raise StepquantError(f"{self.folder} has no tokenizer: {first_line(error)}.") from None

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """CLIP embedding of each prompt, [N, D] of unit length; prompts that are too long for the model are truncated.

        Raises:
            StepquantError: for a model without a text encoder.
        """
        if not hasattr(self.model, "text_projection"):
            raise StepquantError(f"{self.folder} has no text encoder; expected a CLIP model for a CLIP score.")
        length = self.model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return F.normalize(self.model.text_projection(self.model.text_model(**tokens).pooler_output), dim=1)


def _pixels(images: Tensor) -> Tensor:
    """Pixels of the saved images, uint8 [N, 3, H, W]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


class Lpips(nn.Module):
    """Learned perceptual distance with AlexNet (LPIPS v0.1, arXiv 1801.03924).

    torchmetrics takes AlexNet from torchvision, which downloads its weights; this class reads a file and needs neither.

    Args:
        weights: file with torchvision's AlexNet (``alexnet-owt-7be5be79.pth``). The linear layers come with
            torchmetrics.

    Raises:
        StepquantError: if the weights are missing or belong to another network.
    """

    TAPS = (1, 4, 7, 9, 11)
    """Indices of the compared ReLUs."""
    SHIFT = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    SCALE = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]

    def __init__(self, weights: Path) -> None:
        super().__init__()
        import torchmetrics.functional.image as torchmetrics_image

        tensors = read_weights(weights)
        features = {name.removeprefix("features."): value for name, value in tensors.items() if "features." in name}
        self.features = alexnet_features()
        try:
            self.features.load_state_dict(features)
        except RuntimeError:
            raise StepquantError(f"weights {weights} are not AlexNet's; expected torchvision's file.") from None
        linear = read_weights(Path(torchmetrics_image.__file__).parent / "lpips_models" / "alex.pth")
        self.linear = [linear[f"lin{index}.model.1.weight"] for index in range(len(self.TAPS))]
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distance of each pair of images float [N, C, H, W] in [-1, 1], at least 32 x 32; float32 [N].

        Trained on patches of 64 x 64, it is rough on smaller images, and it ignores noise that people notice.
        """
        if min(images.shape[-2:]) < 32:
            raise StepquantError(f"images are {list(images.shape[-2:])} pixels; expected 32 x 32 or more for LPIPS.")
        total = torch.zeros(len(images))
        for a, b, linear in zip(self._taps(images), self._taps(reference), self.linear, strict=True):
            difference = (_unit(a) - _unit(b)).square()
            total += F.conv2d(difference, linear).mean(dim=(1, 2, 3))
        return total

    def _taps(self, images: Tensor) -> list[Tensor]:
        hidden = (images.expand(-1, 3, -1, -1) - self.SHIFT) / self.SCALE
        taps = []
        for index, layer in enumerate(self.features):
            hidden = layer(hidden)
            if index in self.TAPS:
                taps.append(hidden)
        return taps


def alexnet_features() -> nn.Sequential:
    """The convolutions of AlexNet (arXiv 1404.5997) up to the last ReLU that LPIPS uses."""
    relu, pool = nn.ReLU, nn.MaxPool2d
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), relu(), pool(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), relu(), pool(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), relu()),
        *(nn.Conv2d(384, 256, 3, padding=1), relu()),
        *(nn.Conv2d(256, 256, 3, padding=1), relu()),
    )


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
