import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.core.packing import pack, packed_bytes, unpack
from stepquant.errors import StepquantError


@given(st.integers(2, 8), st.lists(st.integers(0, 7), min_size=0, max_size=3), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_round_trip(bits, shape, random):
    count = int(torch.Size(shape).numel())
    codes = torch.tensor([random.randrange(1 << bits) for _ in range(count)], dtype=torch.uint8).reshape(shape)
    packed = pack(codes, bits)
    assert packed.numel() == packed_bytes(count, bits)
    assert torch.equal(unpack(packed, shape, bits), codes)


def test_four_bit_layout_is_low_nibble_first():
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]


@pytest.mark.parametrize("packed", [torch.zeros(3, dtype=torch.uint8), torch.zeros(2), torch.zeros(1, 2).byte()])
def test_wrong_size_or_dtype_is_refused(packed):
    with pytest.raises(StepquantError, match="damaged"):
        unpack(packed, (2, 2), 4)


def test_code_with_too_many_bits_is_refused():
    with pytest.raises(StepquantError, match="exceeds 6 bits"):
        unpack(torch.tensor([63, 64], dtype=torch.uint8), (2,), 6)
