"""GGUF block formats: bytes mean to graphs what their owner's reader makes of them; rounding loses less than theirs."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.errors import PassError
from compiler.ir.execute import read_param
from compiler.pipeline import Pipeline
from compiler.weights.evaluate import evaluate
from compiler.weights.ops import take
from compiler.weights.ops.gguf.blocks import Blocks, values_of
from compiler.weights.ops.gguf.layout import Layout
from compiler.weights.ops.gguf.layouts import LAYOUTS
from compiler.weights.rows import as_dequantize
from passes import Quantize
from passes.quantize.solve import nearest, solve
from tests.captures import graph_of
from tests.graphs import tiny_llama
from tests.test_packing import bound
from tests.test_quantize_calibrated import problem
from tests.test_sparsify import batches

NAMES = sorted(LAYOUTS)
PYTHON = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0")  # which gguf-py quantises too


def kind(layout: Layout) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(layout.number)


def theirs(data: torch.Tensor, layout: Layout) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind(layout)))


def laplace(rows: int = 8, columns: int = 512, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator)


def loss(values: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor | float = 1.0) -> float:
    return float(((values - wanted).square() * weights).sum(dtype=torch.float64))


def test_layouts_are_those_of_gguf():
    for layout in LAYOUTS.values():
        assert kind(layout).name.lower() == layout.name
        assert gguf.GGML_QUANT_SIZES[kind(layout)] == (layout.size, layout.nbytes)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_bytes_mean_what_gguf_reads(name, data):
    """Whatever bytes a block has, but for scales that are no numbers."""
    layout = LAYOUTS[name]
    drawn = data.draw(st.binary(min_size=layout.nbytes, max_size=layout.nbytes))
    raw = torch.frombuffer(bytearray(drawn), dtype=torch.uint8)[None]
    with np.errstate(invalid="ignore"):
        ours, owners = values_of(raw, layout), theirs(raw, layout)
    finite = ours.isfinite()
    assert torch.equal(ours[finite], owners[finite]) and torch.equal(finite, owners.isfinite())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_rounded_decodes_alike_everywhere(name):
    layout, weight = LAYOUTS[name], laplace()
    (expr,), sources = bound(w=weight)
    value = Blocks(name).nearest(expr)
    blocks, values = evaluate([value.args[0], value], sources)
    assert torch.equal(values, theirs(blocks, layout))
    codec = Blocks(name).for_matrix(weight)
    parts = weight.unflatten(-1, (-1, codec.group))
    parameters = codec.fit(parts)
    codes = codec.encode(parts, parameters)
    assert torch.equal(codec.decode(codes, parameters).flatten(1), values)
    assert torch.equal(codec.stored(codes.flatten(1), parameters)[0], blocks)


@pytest.mark.parametrize("name", NAMES)
def test_values_of_the_format_are_kept(name):
    """A matrix that a file of the format held is rounded to itself, nearly: the grid is found again."""
    layout = LAYOUTS[name]
    held = values_of(Blocks(name).rounded(laplace()), layout)
    again = values_of(Blocks(name).rounded(held), layout)
    assert loss(again, held) <= 2e-3 * loss(torch.zeros_like(held), held)
    if layout.parts == 1 and layout.bits < 8:
        assert torch.allclose(again, held, rtol=1e-3, atol=1e-3 * float(held.abs().max()))


@pytest.mark.parametrize("name", PYTHON)
def test_rounding_loses_less_than_the_owners(name):
    layout, weight = LAYOUTS[name], laplace()
    reference = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind(layout)))
    assert loss(values_of(Blocks(name).rounded(weight), layout), weight) < loss(theirs(reference, layout), weight)


@pytest.mark.parametrize("name", NAMES)
def test_energies_are_heeded(name):
    layout, weight = LAYOUTS[name], laplace()
    energy = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)).pow(6) + 1e-3
    codec = Blocks(name).for_matrix(weight, energy)
    parts = weight.unflatten(-1, (-1, codec.group))
    parameters = codec.fit(parts, energy.reshape(parts.shape[1:]))
    heeding = codec.decode(codec.encode(parts, parameters), parameters).flatten(1)
    plain = values_of(Blocks(name).rounded(weight), layout)
    assert loss(heeding, weight, energy) < loss(plain, weight, energy)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e8])
def test_zeros_and_extremes_stay_finite(name, scale):
    """Scales are float16: what they cannot reach is clamped, never infinite."""
    values = values_of(Blocks(name).rounded(laplace() * scale), LAYOUTS[name])
    assert values.isfinite().all()
    assert scale or not values.any()


def test_rows_are_taken_without_the_others():
    (expr,), sources = bound(w=laplace(12))
    value = Blocks("q3_k").nearest(expr)
    part = take(value, 0, 3, 7)
    (whole, own) = evaluate([value, part], sources)
    assert torch.equal(own, whole[3:7])
    moved = as_dequantize(part)
    assert moved is not None and moved.op == "dequantize_gguf"


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q6_k", "tq2_0"])
def test_solvers_only_gain(name):
    """Columns that make up for one another lose no more than rounding, and refining no more than that."""
    one = problem(3, 256, seed=3)
    codec = Blocks(name).for_matrix(one.wanted, one.second.diagonal())
    plain = min(one.cost(nearest(one, codec, weighted=weighted).values) for weighted in (True, False))
    solved = solve(one, codec, refine=False)
    better = solve(one, codec, refine=True)
    assert one.cost(better.values) <= one.cost(solved.values) <= plain
    packed = values_of(codec.stored(better.codes, better.parameters)[0], codec.layout)
    assert torch.equal(packed, better.values)


def test_a_width_that_blocks_do_not_divide_is_an_error():
    with pytest.raises(PassError, match="q4_k has groups of 256, which do not divide 16"):
        Pipeline([Quantize(type="q4_k")]).run(tiny_llama(1))


@pytest.mark.parametrize("options", [{}, {"scale": "weighted"}, {"method": "gptq"}], ids=str)
def test_the_pass_keeps_blocks(options, tmp_path):
    graph = graph_of("llama", hidden_size=64, intermediate_size=96)
    pipeline = Pipeline([Quantize(type="q4_1", **options)])
    (report,) = pipeline.run(graph, workdir=tmp_path, calibration=lambda _: batches("llama", 2)).passes
    changed = [graph.params[name] for name in graph.params if graph.params[name].expr.op == "dequantize_gguf"]
    assert len(changed) == len(report.rewritten) > 0
    for param in changed:
        (blocks,) = evaluate([param.expr.args[0]], graph.sources)
        assert torch.equal(read_param(graph, param), theirs(blocks, LAYOUTS["q4_1"]))
