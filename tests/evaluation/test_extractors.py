"""Extractors with random weights, compared with the original implementations."""

from __future__ import annotations

import sys

import pytest
import torch
import torchmetrics.functional.image.lpips as torchmetrics_lpips
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from stepquant.errors import StepquantError
from stepquant.evaluation.extractors import EmbeddingExtractor, InceptionExtractor, Lpips, alexnet_features
from stepquant.evaluation.metrics import clip_scores


class _Code:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (self.path.write_text, ("code of a weights file ran",))


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    torch.manual_seed(0)
    network = alexnet_features().requires_grad_(False)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.safetensors"
    tensors = {f"features.{name}": value for name, value in network.state_dict().items()}
    save_file(tensors | {"classifier.1.bias": torch.zeros(3)}, path)
    return network, path


def test_lpips_agrees_with_torchmetrics(alexnet, images, monkeypatch):
    network, path = alexnet
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: network)
    reference = (images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    theirs = torchmetrics_lpips._NoTrainLpips(net="alex")(images, reference).flatten()
    ours = Lpips(path)(images, reference)
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    assert Lpips(path)(images, images).tolist() == [0, 0]
    assert (ours > 1e-4).all()
    with pytest.raises(StepquantError, match="32 x 32 or more"):
        Lpips(path)(images[..., :16, :16], reference[..., :16, :16])


def test_invalid_weights_are_rejected_and_never_run(tmp_path):
    with pytest.raises(StepquantError, match="do not exist"):
        Lpips(tmp_path / "none.pth")
    save_file({"features.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(StepquantError, match="not AlexNet's"):
        Lpips(tmp_path / "other.safetensors")
    torch.save({"features": _Code(tmp_path / "ran")}, tmp_path / "code.pth")
    with pytest.raises(StepquantError, match="cannot be read"):
        Lpips(tmp_path / "code.pth")
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(StepquantError, match="a dictionary of tensors"):
        Lpips(tmp_path / "list.pth")


@pytest.fixture(scope="module")
def clip_folder(text_pipeline, tmp_path_factory):
    torch.manual_seed(3)
    tokenizer: CLIPTokenizer = text_pipeline.tokenizer
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **small, **ends)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **small)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    folder = tmp_path_factory.mktemp("clip") / "clip"
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _processor(folder, [0.48, 0.46, 0.41], [0.27, 0.26, 0.28])
    return folder


def _processor(folder, mean, std):
    (folder / "preprocessor_config.json").write_text(
        f'{{"image_processor_type": "CLIPImageProcessor", "size": {{"shortest_edge": 32}}, "image_mean": {mean}, '
        f'"crop_size": {{"height": 32, "width": 32}}, "image_std": {std}, "resample": 3}}'
    )


def test_clip_score_is_the_cosine_of_the_embeddings(clip_folder, images):
    extractor = EmbeddingExtractor(clip_folder)
    prompts = ["a b c", "d " * 40]  # the second is too long for the model
    small = images[..., :32, :32]
    scores = clip_scores(extractor(small)["embedding"], extractor.texts(prompts))
    codes = ((small + 1) * 127.5).round() / 255
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
    pixels = (codes - mean[:, None, None]) / std[:, None, None]
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        prompts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        output = CLIPModel.from_pretrained(clip_folder).eval()(pixel_values=pixels, **tokens)
    expected = 100 * (output.image_embeds * output.text_embeds).sum(dim=1)
    assert scores.tolist() == pytest.approx(expected.clamp(min=0).tolist(), abs=1e-4)
    assert clip_scores(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])).tolist() == [0]


def test_dino_returns_the_class_token(tmp_path, images):
    torch.manual_seed(4)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    Dinov2Model(config).save_pretrained(tmp_path)
    _processor(tmp_path, [0.5] * 3, [0.5] * 3)
    embedding = EmbeddingExtractor(tmp_path)(images[..., :32, :32])["embedding"]
    with torch.no_grad():
        token = Dinov2Model.from_pretrained(tmp_path).eval()(images[..., :32, :32]).last_hidden_state[:, 0]
    # They differ by the rounding to 8-bit pixels.
    torch.testing.assert_close(embedding, torch.nn.functional.normalize(token, dim=1), atol=1e-2, rtol=0)
    with pytest.raises(StepquantError, match="has no text encoder"):
        EmbeddingExtractor(tmp_path).texts(["a"])


def test_a_folder_without_a_vision_model(tmp_path):
    with pytest.raises(StepquantError, match="is not a vision model"):
        EmbeddingExtractor(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StepquantError, match="cannot be loaded"):
        EmbeddingExtractor(tmp_path)


def test_inception_names_the_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(StepquantError, match=r"stepquant\[inception\]"):
        InceptionExtractor(None)


def test_inception_by_torch_fidelity(tmp_path, images, monkeypatch):
    """With torch-fidelity and torchvision installed (the extra `inception`), not needed by any other test."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as random_weights:
        random_weights.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        random_weights.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(5)
        model = fidelity.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    torch.save(dict(model.state_dict()), tmp_path / "inception.pth")
    features = InceptionExtractor(tmp_path / "inception.pth")(images)
    codes = ((images + 1) * 127.5).round().to(torch.uint8)
    pool, logits = model(codes)
    torch.testing.assert_close(features["pool"], pool)
    torch.testing.assert_close(features["logits"], logits)
    assert features["spatial"].shape == (2, 7 * 17 * 17)
    with pytest.raises(StepquantError, match="do not exist"):
        InceptionExtractor(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(StepquantError, match="cannot be used"):
        InceptionExtractor(tmp_path / "other.pth")
