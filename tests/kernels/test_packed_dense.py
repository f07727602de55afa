import pytest

from backends.kernels import packed_dense
from tests.kernels.law import DTYPES, holds, random
from tests.kernels.test_packed_linear import packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_equals_reference(bits, symmetric, dtype):
    words, scales, zeros, _ = packed(random(37, 160), bits, 32, symmetric, dtype)
    holds(packed_dense, words, scales, zeros, bits, 160, length=1)


def test_what_is_outside_says_why():
    words, scales, zeros, _ = packed(random(9, 80), 4, 40, True)
    assert "not of a multiple of 32" in packed_dense.outside(words, scales, zeros, 4, 80)
