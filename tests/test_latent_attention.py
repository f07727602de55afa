"""Latent attention is grouped attention over keys and values that are expanded from the latent."""

from __future__ import annotations

import pytest
import torch

from compiler.errors import OpError
from compiler.ir.coupling import coupling_groups
from compiler.ir.execute import run
from compiler.ir.facts import kv_cache_values, latent_sites
from compiler.ir.graph import Graph
from compiler.ir.ops import op_named
from compiler.ir.text import difference, parse_graph, print_graph
from compiler.ir.types import TensorType
from compiler.ir.verify import verify

HEADS, UNROTATED, VALUE, RANK = 3, 4, 5, 6
EXACT = {"rtol": 0, "atol": 0}


def latent_graph(rotated: int, **attrs) -> Graph:
    graph = Graph("latent")
    shapes = {
        "query": ("B", HEADS, "T", UNROTATED + rotated),
        "latent": ("B", "S", RANK),
        "rotary": ("B", "S", rotated),
    }
    if not rotated:
        del shapes["rotary"]
    values = {name: graph.add_input(name, TensorType(torch.float32, shape)) for name, shape in shapes.items()}
    up = graph.add_input("up", TensorType(torch.float32, (HEADS * (UNROTATED + VALUE), RANK)))
    inputs = [values["query"], values["latent"], values.get("rotary"), up]
    graph.outputs["y"] = graph.op("latent_attention", inputs, {"scale": 0.3, "causal": True, **attrs}, scope="attn")
    return graph


@pytest.mark.parametrize("rotated", [0, 2])
@pytest.mark.parametrize("attrs", [{}, {"window": 3}, {"softcap": 2.0}, {"window": 4, "softcap": 1.5}])
def test_it_is_attention_over_expanded_keys_and_values(rotated, attrs):
    graph = latent_graph(rotated, **attrs)
    verify(graph)
    sizes = {"B": 2, "T": 7, "S": 7}
    generator = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn([sizes.get(dim, dim) for dim in value.shape], generator=generator)
        for name, value in graph.inputs.items()
    }
    expanded = torch.einsum("bsr,hxr->bhsx", given["latent"], given["up"].view(HEADS, -1, RANK))
    key, value = expanded.split([UNROTATED, VALUE], -1)
    if rotated:
        key = torch.cat((key, given["rotary"][:, None].expand(-1, HEADS, -1, -1)), -1)
    options = {"scale": 0.3, "causal": True, "window": 0, "softcap": 0.0, **attrs}
    expected = op_named("attention").eval(given["query"], key, value, None, None, None, **options)
    torch.testing.assert_close(run(graph, given)["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rotated", [0, 2])
def test_sites_costs_text_and_groups_know_a_missing_rotary_key(rotated):
    graph = latent_graph(rotated, window=3, softcap=2.0)
    (site,) = latent_sites(graph)
    assert (site.rotary_dim, site.unrotated_dim, site.value_dim, site.rank) == (rotated, UNROTATED, VALUE, RANK)
    assert (site.window, site.softcap, site.mask, site.rotary_key) == (3, 2.0, None, None)
    assert kv_cache_values(graph) == RANK + rotated
    assert coupling_groups(graph) == []
    text = print_graph(graph)
    assert ("none" in text) == (not rotated)
    assert difference(parse_graph(text), graph) is None


def test_values_need_rows_of_their_own():
    graph = latent_graph(0)
    up = graph.add_input("narrow", TensorType(torch.float32, (HEADS * UNROTATED, RANK)))
    with pytest.raises(OpError, match="no value beside their key"):
        graph.op("latent_attention", [graph.inputs["query"], graph.inputs["latent"], None, up], {"scale": 1.0})
