import pytest
import torch

from backends.kernels import table_linear
from compiler.weights.evaluate import evaluate
from compiler.weights.ops.quant import pack_bits
from tests.kernels.law import DEVICE, DTYPES, RUNS, ULPS, random
from tests.test_packing import bound

FORMS = [(2, 24, 64, 1, 4), (3, 17, 96, 1, 8), (4, 8, 40, 5, 16), (3, 9, 64, 2, 4), (2, 16, 32, 1, 3)]
"""Bits, rows, columns, groups, numbers of a table: 2^bits of them, or bits + 1."""


def weight(bits, rows, columns, groups, numbers, dtype=torch.float32):
    """Codes int8 about 0, their words, and tables."""
    codes = torch.randint(
        -(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=torch.Generator().manual_seed(1)
    )
    (expr,), sources = bound(codes=codes.to(torch.int8))
    (words,) = evaluate([pack_bits(expr, bits)], sources)
    return codes, words.to(DEVICE), random(rows, groups, numbers, dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
def test_the_weight_is_what_codes_and_tables_say(form):
    bits, rows, columns, groups, numbers = form
    codes, words, table = weight(*form)
    found = table_linear.dense(words, table, bits, columns)
    for n, k in [(0, 0), (rows - 1, columns - 1), (rows // 2, 7)]:
        place, own = int(codes[n, k]) + 2 ** (bits - 1), table[n, k * groups // columns].tolist()
        sums = own[0] + sum(number for bit, number in enumerate(own[1:]) if place >> bit & 1)
        assert float(found[n, k]) == pytest.approx(own[place] if numbers == 2**bits else sums, rel=1e-6)


@pytest.mark.skipif(not RUNS, reason="there is neither a GPU nor the interpreter")
@pytest.mark.parametrize("form", [form for form in FORMS if form[3] == 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plan_equals_reference(form, dtype):
    _, words, table = weight(*form, dtype)
    given = random(3, form[2], dtype=dtype), words, table, form[0]
    assert table_linear.outside(*given) is None
    expected = table_linear.reference(given[0].float(), *given[1:])
    coarse = 4 * ULPS * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(table_linear.plan(*given).run().float(), expected, rtol=0, atol=coarse)


@pytest.mark.parametrize("form", FORMS)
def test_operation_equals_reference(form):
    _, words, table = weight(*form)
    for shape in [(form[2],), (2, 4, form[2]), (0, form[2])]:
        x = random(*shape)
        expected = table_linear.reference(x, words, table, form[0])
        actual = table_linear.table_linear(x, words, table, form[0])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_more_tables_a_row_are_outside():
    _, words, table = weight(*FORMS[2])
    assert "5 tables a row" in table_linear.outside(random(1, 40), words, table, 4)
