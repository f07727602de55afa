"""Graphs built by hand, with weights in memory, for tests of the graph's own tools."""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.ir.graph import Graph, Param, Value
from compiler.ir.types import TensorType
from compiler.weights.expr import load
from compiler.weights.source import MemorySource

WIDTH, HEADS, GROUPS, HEAD, INNER, VOCABULARY = 16, 4, 2, 4, 24, 32


class Builder:
    """A graph whose weights are drawn from one seed and stored as bfloat16."""

    def __init__(self, name: str = "tiny", seed: int = 0) -> None:
        self.graph = Graph(name)
        self.tensors: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def weight(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Param:
        if name in self.graph.params:
            return self.graph.params[name]
        self.tensors[name] = (torch.randn(shape, generator=self._generator) * shape[-1] ** -0.5).to(dtype)
        return self.graph.add_param(name, load("model", name, TensorType(dtype, shape)))

    def linear(self, x: Value, scope: str, width: int, *, bias: bool = False) -> Value:
        weight = self.weight(f"{scope}.weight", width, int(x.shape[-1]))
        return self.graph.op("linear", [x, weight, self.weight(f"{scope}.bias", width) if bias else None], scope=scope)

    def norm(self, x: Value, scope: str) -> Value:
        return self.graph.op(
            "rms_norm", [x, self.weight(f"{scope}.weight", int(x.shape[-1]))], {"eps": 1e-6}, scope=scope
        )

    def done(self, **outputs: Value) -> Graph:
        self.graph.outputs.update(outputs)
        self.graph.sources["model"] = MemorySource(self.tensors)
        return self.graph


def tiny_llama(layers: int = 3, *, seed: int = 0, bias: bool = False, window: int = 0) -> Graph:
    """A Llama-like decoder: grouped attention with rotary embedding, gated MLPs, a tied head."""
    builder = Builder(seed=seed)
    graph = builder.graph
    ids = graph.add_input("input_ids", TensorType(torch.int64, ("B", "T")))
    table = builder.weight("model.embed_tokens.weight", VOCABULARY, WIDTH)
    table.aliases = ("lm_head.weight",)
    x = graph.op("embedding", [table, ids], scope="model.embed_tokens")
    rotary = _rotary(builder)
    for index in range(layers):
        x = _layer(builder, x, rotary, f"model.layers.{index}", bias, window)
    return builder.done(logits=graph.op("linear", [builder.norm(x, "model.norm"), table], scope="lm_head"))


def _rotary(builder: Builder) -> list[Value]:
    graph = builder.graph
    positions = graph.op("arange", [], {"stop": "T"}, scope="model")
    positions = graph.op("reshape", [positions], {"shape": (1, "T")}, scope="model")
    frequencies = builder.weight("model.rotary_emb.inv_freq", HEAD // 2, dtype=torch.float32)
    frequencies.persistent = False
    return graph.append("rope_table", [positions, frequencies], scope="model.rotary_emb").outputs


def _layer(builder: Builder, x: Value, rotary: list[Value], scope: str, bias: bool, window: int) -> Value:
    graph, attn = builder.graph, f"{scope}.self_attn"
    normed = builder.norm(x, f"{scope}.input_layernorm")
    heads: list[Value] = []
    for name, count in (("q_proj", HEADS), ("k_proj", GROUPS), ("v_proj", GROUPS)):
        projected = builder.linear(normed, f"{attn}.{name}", count * HEAD, bias=bias)
        heads.append(graph.op("split_heads", [projected], {"heads": count}, scope=attn))
    turned = [graph.op("rope", [value, *rotary], scope=attn) for value in heads[:2]]
    attrs = {"scale": HEAD**-0.5, "causal": True, "window": window}
    attended = graph.op("attention", [*turned, heads[2]], attrs, scope=attn)
    merged = graph.op("merge_heads", [attended], scope=attn)
    x = graph.op("add", [x, builder.linear(merged, f"{attn}.o_proj", WIDTH)], scope=scope)
    normed = builder.norm(x, f"{scope}.post_attention_layernorm")
    gate = graph.op("silu", [builder.linear(normed, f"{scope}.mlp.gate_proj", INNER)], scope=f"{scope}.mlp.act_fn")
    inner = graph.op("mul", [gate, builder.linear(normed, f"{scope}.mlp.up_proj", INNER)], scope=f"{scope}.mlp")
    return graph.op("add", [x, builder.linear(inner, f"{scope}.mlp.down_proj", WIDTH)], scope=scope)


def tokens(batch: int = 2, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator)}
