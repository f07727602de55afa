import pytest
import torch

from backends.kernels import codebook_linear
from backends.kernels.codebook_linear import Tile
from tests.kernels.law import DEVICE, DTYPES, holds, random


def weight(books, rows, columns, sets, entries, vector, dtype=torch.float32, kind=torch.uint8):
    """Indices, codebooks and scales."""
    generator = torch.Generator().manual_seed(rows + columns)
    indices = torch.randint(0, entries, (books, rows, columns), generator=generator).to(kind).to(DEVICE)
    return indices, random(sets, books, entries, vector, dtype=dtype), random(rows, dtype=dtype)


FORMS = [
    # C, N, K / v, B, entries, v
    (1, 37, 100, 1, 16, 1),
    (2, 20, 26, 1, 256, 8),
    (1, 24, 33, 3, 8, 2),
    (3, 8, 9, 2, 40, 4),
]


def test_the_weight_is_what_the_indices_say():
    indices, codebooks, scales = weight(2, 6, 5, 3, 7, 4)
    y = codebook_linear.reference(torch.eye(20, device=DEVICE), indices, codebooks, scales)
    for n, k in [(0, 0), (3, 7), (5, 19)]:
        entries = [codebooks[n // 2, c, int(indices[c, n, k // 4]), k % 4] for c in range(2)]
        torch.testing.assert_close(y[k, n], sum(entries) * scales[n])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "splits"), [(1, 1), (19, 3)])
def test_kernel_equals_reference(form, dtype, tokens, splits, monkeypatch):
    monkeypatch.setattr(codebook_linear, "TILES", {1 << 62: Tile(16, 16, 32, 4, 2, splits)})
    indices, codebooks, scales = weight(*form, dtype)
    width = indices.shape[2] * codebooks.shape[3]
    x = random(tokens, width, dtype=dtype)
    given = None if form[0] == 3 else scales
    holds(codebook_linear, x, indices, codebooks, given, length=width * form[0], rounded=True)


def test_indices_of_16_bits_are_unsigned():
    indices, codebooks, scales = weight(1, 5, 8, 1, 40000, 2, kind=torch.int16)
    assert (indices < 0).any()
    holds(codebook_linear, random(2, 16), indices, codebooks, scales, length=16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operation_equals_reference(form, dtype):
    indices, codebooks, scales = weight(*form, dtype)
    width = indices.shape[2] * codebooks.shape[3]
    for shape in [(width,), (3, width), (2, 4, width), (0, width)]:
        x = random(*shape, dtype=dtype)
        expected = codebook_linear.reference(x.float(), indices, codebooks, scales)
        actual = codebook_linear.codebook_linear(x, indices, codebooks, scales)
        assert actual.dtype == dtype and actual.shape == expected.shape
        largest = expected.abs().max().item() if expected.numel() else 0.0
        summed = 4 * torch.finfo(torch.float32).eps * (width * form[0]) ** 0.5
        torch.testing.assert_close(
            actual.float(), expected, rtol=0, atol=(2 * torch.finfo(dtype).eps + summed) * largest
        )


def test_what_is_outside_says_why():
    indices, codebooks, scales = weight(1, 4, 4, 1, 8, 3)
    assert "vectors of 3" in codebook_linear.outside(random(1, 12), indices, codebooks, scales)
