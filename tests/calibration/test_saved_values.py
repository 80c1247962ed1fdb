"""Arguments of a call survive the way through a file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stepquant.calibration.saved_values import load_values, save_values
from stepquant.errors import StepquantError


def test_every_kind_of_argument(tmp_path):
    generator = torch.Generator().manual_seed(0)
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    mask = Image.fromarray(np.eye(4, dtype=np.uint8) * 255, "L")
    tensors = {
        "half": torch.randn(2, 3, generator=generator).bfloat16(),
        "complex": torch.randn(2, dtype=torch.complex64, generator=generator),
        "view": torch.randn(3, 4, generator=generator).t(),
    }
    plain = {"text": "a", "number": 1.5, "none": None, "sizes": [(1, 2, 3)], "dtype": torch.float16, 3: True}
    save_values({**tensors, **plain, "image": [image, mask], "array": np.ones((2, 2))}, tmp_path / "values")
    found = load_values(tmp_path / "values")
    assert {name: found[name] for name in plain} == plain
    for name, expected in tensors.items():
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected)
    for one, expected in zip(found["image"], (image, mask), strict=True):
        assert one.mode == expected.mode and one.tobytes() == expected.tobytes()
    assert isinstance(found["array"], np.ndarray) and (found["array"] == 1).all()


def test_other_kinds_are_refused(tmp_path):
    with pytest.raises(StepquantError, match="an argument of type object, which cannot be stored"):
        save_values({"a": object()}, tmp_path / "values")
    assert not (tmp_path / "values").exists()
