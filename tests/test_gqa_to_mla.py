"""Exact latent attention: every shape of attention it accepts, what it refuses, and what it tells."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import pytest
import torch

from compiler.errors import PassError
from compiler.ir.execute import run
from compiler.ir.facts import kv_cache_values
from compiler.ir.graph import Graph, Value
from compiler.ir.types import TensorType
from compiler.pipeline import Pipeline, Report
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import load, loads
from compiler.weights.ops.basic import full, literal
from compiler.weights.source import MemorySource
from passes.gqa_to_mla import GqaToMla
from passes.gqa_to_mla.weights import NORM_EPS, SHRINK, norm_constants

WIDTH, VOCABULARY, TOKENS = 32, 50, 40


class Decoder:
    """Two layers of attention by hand, of any shape. ``bias`` names the projections that have one."""

    def __init__(
        self,
        dtype=torch.float32,
        heads=4,
        groups=2,
        head_dim=16,
        value_dim=None,
        pairs=None,
        bias="",
        layout="half",
        scale=None,
        table_scale=1.0,
        fused=False,
        **attention,
    ):
        torch.manual_seed(0)
        self.dtype, self.tensors, self.graph = dtype, {}, Graph("decoder")
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        self.value_dim, self.pairs = value_dim or head_dim, pairs or head_dim // 2
        self.bias, self.layout, self.fused = bias, layout, fused
        self.attention = {"scale": scale or head_dim**-0.5, "causal": True, **attention}
        self.build(table_scale)

    def weight(self, name, *shape, spread=0.3):
        self.tensors[name] = (torch.randn(*shape) * spread).to(self.dtype)
        return self.graph.add_param(name, load("model", name, TensorType(self.dtype, shape)))

    def op(self, name, *inputs, scope="", **attrs) -> Value:
        return self.graph.op(name, list(inputs), attrs, scope=scope)

    def build(self, table_scale):
        ids = self.graph.add_input("input_ids", TensorType(torch.int64, ("B", "T")))
        x = self.op("embedding", self.weight("embedding", VOCABULARY, WIDTH, spread=1.0), ids)
        positions = self.op("reshape", self.op("arange", stop="T"), shape=(1, "T"))
        frequencies = literal([10000.0 ** (-i / self.pairs) for i in range(self.pairs)])
        frequencies = self.graph.add_param("frequencies", frequencies, persistent=False)
        table = self.graph.append("rope_table", [positions, frequencies], {"scale": table_scale}).outputs
        for layer in range(2):
            x = self.op("add", x, self.layer(x, f"layers.{layer}.attention", table), scope=f"layers.{layer}")
        self.graph.outputs["out"] = x
        self.graph.sources["model"] = MemorySource(self.tensors)

    def layer(self, x, scope, table):
        x = self.op("rms_norm", x, self.weight(f"{scope}.norm", WIDTH), eps=1e-5, scope=scope)
        query, key, value = self.projections(x, scope)
        query, key = (self.op("rope", part, *table, layout=self.layout, scope=scope) for part in (query, key))
        heads = self.op("attention", query, key, value, scope=scope, **self.attention)
        return self.linear(self.op("merge_heads", heads, scope=scope), "o", WIDTH, scope)

    def projections(self, x, scope):
        rows = [self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.value_dim]
        if self.fused:
            whole = self.linear(x, "qkv", sum(rows), scope)
            ends = pairwise(accumulate(rows, initial=0))
            parts = [self.op("slice", whole, axis=2, start=a, stop=b, scope=scope) for a, b in ends]
        else:
            parts = [self.linear(x, name, count, scope) for name, count in zip("qkv", rows, strict=True)]
        counts = zip(parts, (self.heads, self.groups, self.groups), strict=True)
        return [self.op("split_heads", part, heads=count, scope=scope) for part, count in counts]

    def linear(self, x, name, rows, scope):
        bias = self.weight(f"{scope}.{name}.bias", rows, spread=1.0) if name in self.bias.split() else None
        return self.op("linear", x, self.weight(f"{scope}.{name}.weight", rows, x.shape[-1]), bias, scope=scope)

    def outputs(self, seed=1) -> torch.Tensor:
        ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
        return run(self.graph, {"input_ids": ids})["out"]

    def convert(self, **options) -> Report:
        return Pipeline([GqaToMla(**options)]).run(self.graph)


SHAPES = {
    "grouped": {},
    "multi-head": {"groups": 4},
    "multi-query": {"groups": 1},
    "narrow values": {"value_dim": 8},
    "wide heads": {"head_dim": 24},
    "partly rotated": {"pairs": 3},
    "interleaved": {"layout": "interleaved"},
    "interleaved to half": {"layout": "interleaved-to-half", "pairs": 5},
    "scaled scores": {"scale": 0.37},
    "scaled table": {"table_scale": 1.3, "pairs": 4},
    "all biases": {"bias": "q k v o"},
    "key bias": {"bias": "k"},
    "value bias": {"bias": "v"},
    "query bias": {"bias": "q", "pairs": 4},
    "output bias": {"bias": "o"},
    "fused": {"fused": True, "bias": "qkv"},
    "everything": {"value_dim": 8, "pairs": 6, "bias": "q k v", "scale": 0.5, "layout": "interleaved", "groups": 1},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_computes_the_same(shape):
    decoder = Decoder(**shape)
    before = decoder.outputs()
    report = decoder.convert()
    assert not decoder.graph.nodes_named("attention")
    assert (decoder.outputs() - before).abs().max() <= 1e-5 * before.abs().max()
    assert report.after.cache_bytes_per_token == report.before.cache_bytes_per_token


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_bfloat16_weights_lose_nothing_but_the_rounding_of_one_constant(shape):
    """Of all weights only the pair of constants around the latent norm is no rearrangement by powers of two."""
    decoder = Decoder(dtype=torch.bfloat16, **shape)
    before = decoder.outputs()
    decoder.convert()
    constants = norm_constants(torch.bfloat16)
    off = abs(constants.weight * constants.factor * SHRINK / NORM_EPS**0.5 - 1)
    assert off < 1e-4
    assert (decoder.outputs() - before).abs().max() <= 20 * off * before.abs().max()


@pytest.mark.parametrize("gain", [1.0, 0.5, math.sqrt(3) / 2, 1.7])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-4)])
def test_the_constants_undo_the_norm(dtype, allowed, gain):
    constants = norm_constants(dtype, gain)
    for number in (constants.weight, constants.factor):
        assert float(torch.tensor(number, dtype=torch.float64).to(dtype)) == number
    product = constants.weight * constants.factor * SHRINK / NORM_EPS**0.5
    assert abs(product / gain - 1) < allowed


def test_every_weight_that_is_written_has_its_storage_dtype():
    decoder = Decoder(dtype=torch.bfloat16, bias="q k v", pairs=4)
    decoder.convert()
    wrong = {p.name for p in decoder.graph.params.values() if p.persistent and p.expr.dtype != torch.bfloat16}
    assert not wrong


def test_no_weight_is_read():
    decoder = Decoder()
    decoder.graph.sources.clear()
    report = decoder.convert()
    assert not report.read_weights
    down = decoder.graph.params["layers.0.attention.kv_down.weight"]
    assert {expr.attr("key") for expr in loads([down.expr])} == {
        "layers.0.attention.k.weight", "layers.0.attention.v.weight",
    }  # fmt: skip


def test_the_latent_of_several_groups_of_heads_is_the_values_side_by_side():
    decoder = Decoder()
    value = decoder.tensors["layers.0.attention.v.weight"]
    decoder.convert()
    down = evaluate([decoder.graph.params["layers.0.attention.kv_down.weight"].expr], decoder.graph.sources)[0]
    assert torch.equal(down[: len(value)], value * SHRINK)


def test_the_report_has_caches_and_the_growth_of_queries():
    report = Decoder().convert()
    (entry,) = report.passes
    assert entry.exact and len(entry.rewritten) == 2
    first = entry.rewritten[0]
    assert first.scope == "layers.0.attention"
    assert first.what == "a latent of 32 and a rotary key of 32 for 2 groups"
    assert first.numbers == {
        "cache_values_before": 64, "cache_values_after": 64, "query_rows_before": 64, "query_rows_after": 128,
    }  # fmt: skip


PLAIN = {
    "window": {"window": 7},
    "soft cap": {"softcap": 30.0},
    "float16": {"dtype": torch.float16},
    "bfloat16, a window": {"dtype": torch.bfloat16, "window": 7},
}


@pytest.mark.parametrize("shape", PLAIN.values(), ids=PLAIN.keys())
def test_what_no_published_latent_attention_holds_is_converted_as_plainly_as_can_be(shape):
    """Weights are only sorted, so that none is rounded, whatever they are stored as; nothing is calibrated."""
    decoder = Decoder(**shape)
    before, cached = decoder.outputs(), kv_cache_values(decoder.graph)
    entry = decoder.convert().passes[0]
    assert entry.exact and len(entry.rewritten) == 2
    assert kv_cache_values(decoder.graph) == cached
    assert (decoder.outputs() - before).abs().max() <= 1e-5 * before.abs().max()


def test_it_refuses_with_a_reason():
    with pytest.raises(PassError) as raised:
        Decoder(causal=False).convert()
    assert raised.value.cause == (
        "the attention in layers.0.attention has no latent form: it is not causal (1 more layer has none either)"
    )


def changed_second_layer(sinks: bool = False, **attrs: object) -> Decoder:
    decoder = Decoder()
    last = decoder.graph.nodes_named("attention")[1]
    operands = [*last.inputs, *[None] * (6 - len(last.inputs))]
    if sinks:
        ones = full((int(last.input(0).shape[1]),), 1.0, torch.float32)
        operands[5] = decoder.graph.add_param("layers.1.attention.sinks", ones)
    changed = decoder.graph.op("attention", operands, {**last.attrs, **attrs}, scope=last.scope, before=last)
    decoder.graph.replace(last.output, changed)
    decoder.graph.erase(last)
    return decoder


def test_one_layer_that_cannot_stops_the_pass():
    with pytest.raises(PassError, match=r"layers\.1\.attention has no latent form: it has attention sinks") as raised:
        changed_second_layer(sinks=True).convert()
    assert raised.value.remedy == "`layers: possible` converts the other 1, for which no stock class exists"


def test_attention_that_is_not_causal_is_left_alone_beside_such_that_is():
    decoder = changed_second_layer(causal=False)
    before = decoder.outputs()
    (skip,) = decoder.convert().passes[0].skipped
    assert (skip.scope, skip.reason) == ("layers.1.attention", "it is not causal")
    assert [node.scope for node in decoder.graph.nodes_named("latent_attention")] == ["layers.0.attention"]
    assert (decoder.outputs() - before).abs().max() <= 1e-5 * before.abs().max()


def test_the_layers_that_can_are_converted_on_request():
    decoder = changed_second_layer(sinks=True)
    before = decoder.outputs()
    report = decoder.convert(layers="possible")
    (skip,) = report.passes[0].skipped
    assert skip.scope == "layers.1.attention"
    assert [node.scope for node in decoder.graph.nodes_named("latent_attention")] == ["layers.0.attention"]
    assert (decoder.outputs() - before).abs().max() <= 1e-5 * before.abs().max()


def test_a_model_without_attention_is_an_error():
    graph = Graph("none")
    graph.outputs["out"] = graph.op("neg", [graph.add_input("x", TensorType(torch.float32, ("B", 3)))])
    with pytest.raises(PassError, match="the model has no attention"):
        Pipeline([GqaToMla()]).run(graph)


def test_only_full_widths_are_exact():
    """Numbers that are the full widths are exact too, without calibration data; other widths need them."""
    assert len(Decoder().convert(rank=32, rope_dim=32).passes[0].rewritten) == 2
    for options in ({"rank": 16}, {"rope_dim": 8}, {"cache": 0.5}):
        assert not GqaToMla(**options).exact
        with pytest.raises(PassError, match="this needs calibration data"):
            Decoder().convert(**options)
