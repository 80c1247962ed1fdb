"""Networks that judge images: Inception, the zoo's classifier, CLIP and DINO, and LPIPS' AlexNet.

All but the zoo's are given by path, since none may be shipped here. Weights are read without running code from them.
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
from stepquant.workspace import tensors_digest

SPATIAL_CHANNELS = 7
"""Of the 17 x 17 map that sFID looks at (arXiv 2103.03841): 2,023 dimensions, about as many as FID's 2,048."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, or of a ``.pth`` that holds nothing but tensors.

    Raises:
        StepquantError: if there is no such file, or it holds anything else.
    """
    if not path.is_file():
        raise StepquantError(f"there are no weights at {path}: download them and give the file's path.")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # damaged files and forbidden pickles come in many classes
        raise StepquantError(f"weights {path} cannot be read: {first_line(error)}.") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise StepquantError(f"weights {path} cannot be read: expected a dictionary of tensors.")
    return tensors


class InceptionExtractor:
    """Inception v3 as FID was defined with, by torch-fidelity: ``pool`` [N, 2048], ``spatial`` [N, 2023] (sFID),
    ``logits`` [N, 1008] (without bias, as the Inception score wants them).

    Args:
        weights: torch-fidelity's file ``weights-inception-2015-12-05-6726825d.pth``; None downloads it.

    Raises:
        StepquantError: if torch-fidelity or torchvision is missing, or the weights are.
    """

    def __init__(self, weights: Path | None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise StepquantError(
                "Inception features need torch-fidelity and torchvision: pip install 'stepquant[inception]'."
            ) from None
        if weights is not None:
            read_weights(weights)  # torch-fidelity would unpickle anything: what holds more than tensors ends here
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
            pool, logits = self.model(_codes(images))
        finally:
            handle.remove()
        return {"pool": pool, "spatial": spatial[0][:, :SPATIAL_CHANNELS].flatten(1), "logits": logits}


class ClassifierExtractor:
    """The zoo's classifier: ``pool`` [N, 64], ``logits`` [N, 10]. A proxy: its figures are no FID, KID or IS."""

    def __init__(self, proxy: ClassifierProxy) -> None:
        self.classifier = proxy.classifier
        self.key = f"classifier-{tensors_digest(dict(self.classifier.state_dict()))}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features = self.classifier.features(images.mean(dim=1, keepdim=True))
        return {"pool": features, "logits": self.classifier.head(features)}


class EmbeddingExtractor:
    """A vision model of transformers from a local folder, DINO or CLIP: ``embedding`` [N, D], of unit length.

    CLIP's projected embedding; else the class token of the last layer.

    Raises:
        StepquantError: if the folder holds no such model.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoModel

        if not (folder / "config.json").is_file():
            raise StepquantError(f"{folder} holds no vision model: expected a folder of transformers, as CLIP or DINO.")
        self.folder = folder
        try:
            self.model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, use_fast=False)
        except Exception as error:  # from_pretrained documents none of what a damaged folder makes it raise
            raise StepquantError(f"vision model {folder} cannot be loaded: {first_line(error)}.") from None
        self.key = f"embedding-{tensors_digest(dict(self.model.state_dict()))}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        codes = list(_codes(images).permute(0, 2, 3, 1).numpy())
        pixels = self.processor(images=codes, return_tensors="pt")["pixel_values"]
        if hasattr(self.model, "visual_projection"):
            embedding = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        else:
            embedding = self.model(pixel_values=pixels).last_hidden_state[:, 0]
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
        """CLIP's embedding of each prompt, [N, D], of unit length; prompts longer than the model takes are cut off.

        Raises:
            StepquantError: for a model that knows no text.
        """
        if not hasattr(self.model, "text_projection"):
            raise StepquantError(f"{self.folder} knows no text: a CLIP score needs a CLIP model.")
        length = self.model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return F.normalize(self.model.text_projection(self.model.text_model(**tokens).pooler_output), dim=1)


def _codes(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W]: what a saved image holds."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


class Lpips(nn.Module):
    """Learned perceptual distance with AlexNet (LPIPS v0.1, arXiv 1801.03924).

    Args:
        weights: of AlexNet, as torchvision names them (``alexnet-owt-7be5be79.pth``). The linear layers come with
            torchmetrics.

    Raises:
        StepquantError: if the weights are missing or of something else.
    """

    TAPS = (1, 4, 7, 9, 11)
    """Indices of the ReLUs whose outputs are compared."""
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
            raise StepquantError(f"weights {weights} are not AlexNet's, as torchvision names them.") from None
        linear = read_weights(Path(torchmetrics_image.__file__).parent / "lpips_models" / "alex.pth")
        self.linear = [linear[f"lin{index}.model.1.weight"] for index in range(len(self.TAPS))]
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distance of each pair, float32 [N]; both float [N, C, H, W] in [-1, 1], at least 32 x 32.

        Traps: trained on patches of 64 x 64: on smaller images it is rough, and it ignores noise that people see.
        """
        if min(images.shape[-2:]) < 32:
            raise StepquantError(f"LPIPS needs images of 32 x 32 or more, given {list(images.shape[-2:])}.")
        total = torch.zeros(len(images))
        for ours, theirs, linear in zip(self._taps(images), self._taps(reference), self.linear, strict=True):
            difference = (_unit(ours) - _unit(theirs)).square()
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
    """AlexNet's convolutions (arXiv 1404.5997) up to the last ReLU that LPIPS looks at."""
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
