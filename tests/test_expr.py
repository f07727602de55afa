"""Weight expressions: types agree with values, a part equals the same part of the whole, work is shared."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.errors import CheckpointError, OpError
from compiler.ir.types import TensorType
from compiler.weights.evaluate import evaluate, reads, working_set
from compiler.weights.expr import apply, load, loads
from compiler.weights.ops import basic, sparse, take
from compiler.weights.ops.quant import pack_bits, quantise
from compiler.weights.source import MemorySource

TENSORS = {
    "a": torch.arange(-12.0, 12.0).reshape(6, 4),
    "b": torch.arange(24.0).flip(0).reshape(6, 4),
    "c": torch.arange(-30.0, 30.0).reshape(3, 4, 5),
    "d": torch.arange(6.0),
    "e": torch.arange(-8, 8, dtype=torch.int8).reshape(4, 4),
    "f": torch.full((), 2.0),
}
SOURCES = {"model": MemorySource(TENSORS)}


def leaf(name):
    return load("model", name, TensorType(TENSORS[name].dtype, tuple(TENSORS[name].shape)))


class CountingSource(MemorySource):
    """Counts what is read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.log = []

    def read(self, key):
        self.log.append(key)
        return super().read(key)

    def read_rows(self, key, start, stop):
        self.log.append((key, start, stop))
        return super().read_rows(key, start, stop)


@st.composite
def axis_and_range(draw, shape):
    axis = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[axis]))
    return axis, start, draw(st.integers(start, shape[axis]))


@st.composite
def factorisation(draw, count):
    """A shape of ``count`` elements."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    first = draw(st.sampled_from(divisors))
    second = draw(st.sampled_from([n for n in divisors if (count // first) % n == 0]))
    return (first, second, count // first // second)


def unary(draw, x):
    """One random layout or arithmetic step on ``x``."""
    axis = draw(st.integers(0, x.type.rank - 1))
    size = x.shape[axis]
    kinds = ["reshape", "transpose", "slice", "index", "pad", "repeat", "expand", "tile", "cast", "double", "self"]
    kind = draw(st.sampled_from(kinds + ["blocks"] * (x.type.rank == 3)))
    steps = {
        "reshape": lambda: basic.reshape(x, draw(factorisation(x.type.numel))) if x.type.numel else x,
        "transpose": lambda: basic.transpose(x, draw(st.permutations(range(x.type.rank)))),
        "slice": lambda: basic.slice(x, *draw(axis_and_range(x.shape))),
        "index": lambda: basic.index(x, axis, draw(st.lists(st.integers(0, size - 1), max_size=5))) if size else x,
        "pad": lambda: basic.pad(x, axis, draw(st.integers(0, 2)), draw(st.integers(0, 2)), 1.0),
        "repeat": lambda: basic.repeat(x, axis, draw(st.integers(1, 3))),
        "expand": lambda: basic.expand(x, (2, *x.shape)) if x.type.rank < 3 else x,
        "tile": lambda: basic.tile(x, axis, 2),
        "cast": lambda: basic.cast(basic.cast(x, torch.float64), torch.float32),
        "double": lambda: basic.scale(x, 2.0),
        "self": lambda: draw(st.sampled_from([basic.add, basic.sub, basic.mul]))(x, x),
        "blocks": lambda: basic.head_blocks(x, draw(st.sampled_from([g for g in (1, 2, 3) if x.shape[0] % g == 0]))),
    }
    return steps[kind]()


@st.composite
def expressions(draw):
    """An expression over integers small enough that float32 arithmetic on them is exact."""
    x = draw(st.sampled_from([leaf("a"), leaf("b"), leaf("c"), leaf("d"), basic.full((2, 3), 3.0), basic.eye(4)]))
    for _ in range(draw(st.integers(0, 5))):
        if x.type.numel > 500:
            break
        combine = draw(st.sampled_from(["none", "concat", "broadcast", "matmul"]))
        if combine == "concat":
            x = basic.concat([x, basic.scale(x, -1.0)], draw(st.integers(0, x.type.rank - 1)))
        elif combine == "broadcast":
            x = basic.add(x, basic.full(x.shape[-1:], 1.0))
        elif combine == "matmul" and x.type.rank >= 2:
            x = basic.matmul(basic.scale(x, 0.125), basic.transpose(x))
        else:
            x = unary(draw, x)
    return x


@given(expressions(), st.data())
@settings(max_examples=400, deadline=None)
def test_a_part_equals_the_same_part_of_the_whole(expr, data):
    axis, start, stop = data.draw(axis_and_range(expr.shape))
    (whole,) = evaluate([expr], SOURCES)
    assert (tuple(whole.shape), whole.dtype) == (expr.shape, expr.dtype)
    narrowed = take(expr, axis, start, stop)
    (part,) = evaluate([narrowed], SOURCES)
    assert narrowed.shape == tuple(part.shape)
    torch.testing.assert_close(part, whole.narrow(axis, start, stop - start), rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@given(rows=st.integers(1, 9), cut=st.data())
@settings(max_examples=20, deadline=None)
def test_rows_of_a_quantised_weight_equal_those_of_the_whole(symmetric, rows, cut):
    weight = torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows))
    sources = {"model": MemorySource({"w": weight})}
    expr = quantise(
        load("model", "w", TensorType(torch.float32, (rows, 16))), 4, 8, symmetric=symmetric, scale_dtype=torch.float32
    )
    start = cut.draw(st.integers(0, rows - 1))
    stop = cut.draw(st.integers(start + 1, rows))
    for part in (expr, *expr.args, pack_bits(expr.args[0], 4)):
        whole, narrowed = evaluate([part, take(part, 0, start, stop)], sources)
        assert torch.equal(narrowed, whole[start:stop])


def test_rows_are_read_without_the_rest():
    source = CountingSource(TENSORS)
    expr = take(basic.matmul(basic.transpose(leaf("a")), leaf("b")), 1, 1, 3)
    assert evaluate([expr], {"model": source})[0].shape == (4, 2)
    source.log.clear()
    evaluate([take(basic.scale(basic.concat([leaf("a"), leaf("b")], 0), 2.0), 0, 4, 8)], {"model": source})
    assert source.log == [("a", 4, 6), ("b", 0, 2)]


def test_slices_sink_to_the_reads():
    stacked = basic.stack([leaf("a"), leaf("b")], 0)
    assert basic.reshape(basic.slice(stacked, 0, 1, 2), (6, 4)) == leaf("b")
    fused = basic.slice(basic.slice(leaf("c"), 1, 0, 2), 0, 2, 3)
    assert [read.attr("start") for read in reads([fused])] == [2]


def test_shared_parts_are_computed_once():
    source = CountingSource(TENSORS)
    twice = basic.scale(leaf("a"), 2.0)
    first, second, third = evaluate([basic.add(twice, leaf("b")), twice, twice], {"model": source})
    assert source.log == ["a", "b"]
    assert torch.equal(first, 2 * TENSORS["a"] + TENSORS["b"])
    assert torch.equal(second, third)
    assert [read.attr("key") for read in loads([basic.add(twice, leaf("b"))])] == ["a", "b"]


def test_values_are_freed_at_their_last_use():
    chain = leaf("a")
    for _ in range(50):
        chain = basic.scale(chain, 0.5)
    assert working_set([chain]) == 2 * chain.type.nbytes
    wide = basic.add(chain, basic.scale(leaf("b"), 3.0))
    assert working_set([wide]) == 3 * chain.type.nbytes


def test_computation_happens_in_the_dtype_of_the_type():
    low = basic.cast(leaf("d"), torch.bfloat16)
    (value,) = evaluate([basic.add(low, basic.full((6,), 1 / 256, torch.bfloat16))], SOURCES)
    assert value.dtype == torch.bfloat16
    assert value[5] == 5.0  # 5 + 1/256 is not a bfloat16
    with pytest.raises(OpError, match="dtypes differ"):
        basic.add(low, leaf("d"))


def test_constants():
    values = evaluate([basic.literal([1, 2, 3, 4], (2, 2), torch.int64), basic.full((2,), 7, torch.int8)], {})
    assert values[0].tolist() == [[1, 2], [3, 4]]
    assert values[1].tolist() == [7, 7]


def test_head_blocks_places_each_head_in_its_group():
    (value,) = evaluate([basic.head_blocks(basic.full((4, 1, 2), 1.0), 2)], {})
    assert value[:, :, 0].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_repeat_and_tile_follow_numpy():
    x = basic.literal([1, 2])
    repeated, tiled = evaluate([basic.repeat(x, 0, 2), basic.tile(x, 0, 2)], {})
    assert repeated.tolist() == [1, 1, 2, 2]
    assert tiled.tolist() == [1, 2, 1, 2]


def test_keys_are_equal_for_equal_expressions():
    one, other = basic.scale(leaf("a"), 2.0), basic.scale(leaf("a"), 2.0)
    assert one == other
    assert hash(one) == hash(other)
    assert one != basic.scale(leaf("a"), 3.0)


WRONG = [
    (lambda: basic.reshape(leaf("a"), (5, 5)), "number of elements"),
    (lambda: basic.transpose(leaf("a"), (0, 0)), "does not permute"),
    (lambda: basic.slice(leaf("a"), 0, 2, 9), "not within axis"),
    (lambda: basic.slice(leaf("a"), 0, 4, 2), "not within axis"),
    (lambda: basic.index(leaf("a"), 1, [4]), "not within axis"),
    (lambda: basic.concat([leaf("a"), leaf("c")], 0), "do not fit together"),
    (lambda: basic.concat([leaf("a"), basic.cast(leaf("a"), torch.float16)], 0), "do not fit together"),
    (lambda: basic.add(leaf("a"), leaf("d")), "do not broadcast"),
    (lambda: basic.matmul(leaf("a"), leaf("b")), "inner axes"),
    (lambda: basic.matmul(leaf("c"), leaf("b")), "leading axes"),
    (lambda: basic.div(leaf("e"), leaf("e")), "floating"),
    (lambda: basic.scale(leaf("e"), 2.0), "floating"),
    (lambda: basic.pad(leaf("a"), 0, -1, 0), "negative"),
    (lambda: basic.head_blocks(leaf("c"), 2), "do not divide"),
    (lambda: basic.literal([1, 2], (3,)), "number of values"),
    (lambda: apply("frobnicate", [leaf("a")]), "unknown weight operation"),
]


@pytest.mark.parametrize("build, reason", WRONG, ids=[reason for _, reason in WRONG])
def test_what_does_not_fit_is_an_error(build, reason):
    with pytest.raises(OpError, match=reason):
        build()


@pytest.mark.parametrize(
    "expr, reason",
    [
        (load("model", "z", TensorType(torch.float32, (1,))), "tensor z is missing"),
        (load("model", "a", TensorType(torch.float32, (4, 6))), r"tensor a is f32\[6,4\], not f32\[4,6\]"),
        (load("spill", "a", TensorType(torch.float32, (6, 4))), "no weights are bound for `spill`"),
    ],
)
def test_reads_are_checked_against_the_source(expr, reason):
    with pytest.raises(CheckpointError, match=reason):
        evaluate([expr], SOURCES)


SPARSE_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", SPARSE_DTYPES, ids=str)
@given(lead=st.integers(0, 2), columns=st.integers(1, 20), kept=st.integers(0, 20), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_sparse_weights_unpack_to_the_last_bit_also_in_parts(dtype, lead, columns, kept, seed):
    """``lead``: the number of leading axes along which as many elements remain everywhere."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, columns)
    parts = torch.rand(shape, generator=generator).flatten(lead)
    mask = torch.zeros(parts.shape, dtype=torch.bool)
    count = min(kept, parts.shape[-1])
    mask.scatter_(-1, parts.argsort(-1)[..., :count], True)
    dense = torch.randn(shape, generator=generator).mul(mask.view(shape)).to(dtype)
    flat = dense.float().view_as(mask)[mask]  # torch picks no float8
    values = flat.to(dtype).view(*parts.shape[:lead], count)
    tensors = {"mask": sparse.packed(mask.view(shape)), "values": values}
    leaves = [load("model", name, TensorType(t.dtype, tuple(t.shape))) for name, t in tensors.items()]
    expr = sparse.scatter(*leaves, columns)
    sources = {"model": MemorySource(tensors)}
    (whole,) = evaluate([expr], sources)
    assert expr.type == TensorType(dtype, shape) == TensorType(whole.dtype, tuple(whole.shape))
    assert torch.equal(whole.float(), dense.float())
    for axis, size in enumerate(shape):
        (part,) = evaluate([take(expr, axis, size // 2, size)], sources)
        assert torch.equal(part.float(), dense.float().narrow(axis, size // 2, size - size // 2))


def test_a_mask_that_does_not_go_with_its_values_is_an_error():
    mask, values = basic.full((2, 3, 1), 0, torch.uint8), basic.full((3, 4), 0.0)
    with pytest.raises(OpError, match="leading axes"):
        sparse.scatter(mask, values, 8)
    with pytest.raises(OpError, match="9 columns"):
        sparse.scatter(mask, basic.full((4,), 0.0), 9)
