"""Facts: sites, roles, costs and coupling groups, on hand-built graphs and on every family."""

from __future__ import annotations

import pytest
import torch

from compiler.ir.execute import run
from compiler.ir.facts import (
    attention_sites,
    coupling_groups,
    expert_sites,
    flops_per_token,
    kv_cache_values,
    latent_sites,
    mlp_sites,
    parameter_count,
)
from compiler.ir.graph import Graph
from compiler.ir.roles import ROLES, has_role, roles
from compiler.ir.types import TensorType
from compiler.weights.expr import load
from compiler.weights.ops.basic import index
from compiler.weights.source import MemorySource
from tests.families import FAMILIES
from tests.graphs import GROUPS, HEAD, HEADS, INNER, VOCABULARY, WIDTH, tiny_llama, tokens

LATENT = ("deepseek_v2", "deepseek_v3")
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")


def test_attention_site_of_a_llama_layer():
    site = attention_sites(tiny_llama(window=5))[1]
    scopes = [
        node and node.scope.removeprefix("model.layers.1.self_attn.")
        for node in (site.query, site.key, site.value, site.output)
    ]
    assert scopes == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (site.heads, site.groups, site.head_dim, site.value_dim) == (HEADS, GROUPS, HEAD, HEAD)
    assert (site.scale, site.causal, site.window, site.softcap) == (0.5, True, 5, 0.0)
    assert (site.mask, site.bias, site.sinks, site.query_norm) == (None, None, None, None)
    assert site.query_rope is not site.key_rope
    assert site.attends_itself
    assert site.layer == "model.layers.1"


def test_attention_whose_key_is_no_linear_map_has_no_key():
    graph = tiny_llama(layers=1)
    (site,) = attention_sites(graph)
    rope = site.key_rope
    assert rope is not None
    bent = graph.op("exp", [rope.input(0)], before=rope)
    graph.set_input(rope, 0, bent)
    (site,) = attention_sites(graph)
    assert site.key is None
    assert site.query is not None


def test_mlp_site_tells_gate_from_up():
    site = mlp_sites(tiny_llama(layers=2))[1]
    assert site.gate is not None
    assert site.gate.scope == "model.layers.1.mlp.gate_proj"
    assert site.up.scope == "model.layers.1.mlp.up_proj"
    assert site.down.scope == "model.layers.1.mlp.down_proj"
    assert site.layer == "model.layers.1"


def test_costs_of_a_llama():
    graph = tiny_llama(layers=3)
    attention = WIDTH * HEAD * (2 * HEADS + 2 * GROUPS)
    layer = attention + 3 * WIDTH * INNER
    assert parameter_count(graph) == VOCABULARY * WIDTH + 3 * (layer + 2 * WIDTH) + WIDTH
    assert flops_per_token(graph) == 2 * (3 * layer + VOCABULARY * WIDTH)
    assert kv_cache_values(graph) == kv_cache_values(tiny_llama(layers=3, window=4)) == 3 * 2 * GROUPS * HEAD


def test_a_tied_weight_has_the_roles_of_all_its_uses():
    found = roles(tiny_llama())
    table = next(param for param in found if param.name == "model.embed_tokens.weight")
    assert found[table] == {"embedding", "head", "linear"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_and_mlp_of_every_family_is_understood(captured, name):
    graph = captured(name)
    sites = attention_sites(graph)
    assert sites or latent_sites(graph)
    for site in sites:
        assert None not in (site.query, site.key, site.value, site.output), site.scope
    for latent in latent_sites(graph):
        assert None not in (latent.query_up, latent.kv_down, latent.rotary_key, latent.output), latent.scope
    found = roles(graph)
    assert {role for names in found.values() for role in names} <= set(ROLES)
    inside = [node for node in graph.nodes_named("linear") if "layer" in node.scope or "block" in node.scope]
    for node in inside:
        names = found[node.input(1)]
        assert any(has_role(names, part) for part in ("attention", "mlp", "router", "head")), node.scope
    experts = expert_sites(graph)
    assert bool(experts) == (name in (*LATENT, *EXPERTS))
    assert all(site.router is not None for site in experts)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama", lambda c: 2 * c.num_key_value_heads * c.head_dim),
        ("mistral", lambda c: 2 * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)),
        ("gpt2", lambda c: 2 * c.n_embd),
        ("gemma3", lambda c: 2 * c.num_key_value_heads * c.head_dim),
        ("bert", lambda c: 0),
        ("deepseek_v3", lambda c: c.kv_lora_rank + c.qk_rope_head_dim),
        ("whisper", lambda c: 2 * c.d_model),
    ],
)
def test_cached_values_per_token(captured, name, values):
    config = FAMILIES[name].config()
    assert kv_cache_values(captured(name)) == 2 * values(config)


def test_experts_cost_what_a_token_visits(captured):
    graph, config = captured("mixtral"), FAMILIES["mixtral"].config()
    (first, _) = expert_sites(graph)
    assert (first.count, first.active) == (config.num_local_experts, config.num_experts_per_tok)
    dense = sum(2 * node.input(1).type.numel for node in graph.nodes_named("linear"))
    expert = 3 * config.hidden_size * config.intermediate_size
    assert flops_per_token(graph) == dense + 2 * 2 * config.num_experts_per_tok * expert


# --- coupling groups -----------------------------------------------------------------------------------------


def _free(graph: Graph, part: str):
    return [g for g in coupling_groups(graph) if not g.frozen and any(part in m.param.name for m in g.members)]


def test_groups_of_a_llama_layer():
    graph = tiny_llama(layers=1)
    shown = {
        (group.size, bool(group.frozen)): {(m.param.name.split(".")[-2], m.axis, m.stride) for m in group.members}
        for group in coupling_groups(graph)
        if any(".self_attn." in m.param.name or ".mlp." in m.param.name for m in group.members)
        and not any("layernorm" in m.param.name for m in group.members)
    }
    assert shown[INNER, False] == {("gate_proj", 0, 1), ("up_proj", 0, 1), ("down_proj", 1, 1)}
    assert shown[HEAD, True] == {("q_proj", 0, 1), ("k_proj", 0, 1)}
    assert shown[HEAD, False] == {("v_proj", 0, 1), ("o_proj", 1, 1)}
    heads = [{(m.param.name.split(".")[-2], m.axis, m.stride) for m in g.members} for g in _free(graph, "q_proj")]
    assert {("q_proj", 0, HEAD), ("o_proj", 1, HEAD)} in heads
    assert {("q_proj", 0, 2 * HEAD), ("k_proj", 0, HEAD), ("v_proj", 0, HEAD), ("o_proj", 1, 2 * HEAD)} in heads


def _kept(size: int, stride: int, group: int, dropped: int) -> list[int]:
    return [p for p in range(size) if (p // stride) % group != dropped]


@pytest.mark.parametrize("part", ["mlp.up_proj", "self_attn.v_proj", "self_attn.q_proj"])
def test_removing_an_index_of_a_group_equals_zeroing_it(part):
    """Law: a pruned group computes what the original computes with the group's weights at zero."""
    for number in range(len([g for g in _free(tiny_llama(layers=1), part) if g.size != WIDTH])):
        pruned, zeroed = tiny_llama(layers=1), tiny_llama(layers=1)
        for graph in (pruned, zeroed):
            group = [g for g in _free(graph, part) if g.size != WIDTH][number]
            for member in group.members:
                size = member.param.type.static_shape[member.axis]
                kept = _kept(size, member.stride, group.size, 1)
                if graph is pruned:
                    member.param.expr = index(member.param.expr, member.axis, kept)
                    member.param.type = member.param.type.with_shape(member.param.expr.shape)
                else:
                    member.param.expr = _zeroed(graph, member.param, member.axis, kept)
            if graph is pruned:
                _reinfer(graph, group)
        torch.testing.assert_close(run(pruned, tokens())["logits"], run(zeroed, tokens())["logits"], rtol=0, atol=1e-5)


def _zeroed(graph: Graph, param, axis: int, kept: list[int]):
    (tensor,) = [graph.sources["model"].read(param.expr.attr("key"))]
    mask = torch.zeros(tensor.shape[axis], dtype=tensor.dtype)
    mask[kept] = 1
    shape = [1] * tensor.dim()
    shape[axis] = -1
    source = MemorySource({"zeroed": tensor * mask.view(shape)})
    graph.sources[param.name] = source
    return load(param.name, "zeroed", source.types["zeroed"])


def _reinfer(graph: Graph, group) -> None:
    members = {member.param: member for member in group.members}
    for node in graph.nodes:
        if node.op.name == "split_heads":
            member = members.get(node.input(0).node.input(1))
            if member is not None and member.stride > 1:
                node.attrs["heads"] = node.attrs["heads"] * (group.size - 1) // group.size
        types = node.op.infer_types([v and v.type for v in node.inputs], node.attrs)
        for value, type in zip(node.outputs, types, strict=True):
            value.type = type


def test_a_group_along_which_positions_have_a_meaning_is_frozen():
    graph = tiny_llama(layers=1)
    down = graph.nodes_named("linear")[6]
    running = graph.op("cumsum", [down.input(0)], scope="model.layers.0.mlp", before=down)
    graph.set_input(down, 0, running)
    frozen = {
        g.frozen
        for g in coupling_groups(graph)
        if any("up_proj" in m.param.name for m in g.members) and g.size == INNER
    }
    assert frozen == {"`cumsum` in `model.layers.0.mlp` gives meaning to positions along this axis"}


def test_axes_cut_in_ways_that_do_not_nest_are_frozen():
    graph = Graph("cuts")
    x = graph.add_input("x", TensorType(torch.float32, ("B", "T", 5)))
    weight = graph.add_param("w", load("model", "w", TensorType(torch.float32, (12, 5))))
    projected = graph.op("linear", [x, weight])
    for heads, name in ((2, "halves"), (3, "thirds")):
        graph.outputs[name] = graph.op("exp", [graph.op("split_heads", [projected], {"heads": heads})])
    rows = [g for g in coupling_groups(graph) if any(m.axis == 0 for m in g.members)]
    assert rows
    assert all(group.frozen for group in rows)
