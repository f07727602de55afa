"""Proof by reloading: what was written, in ONNX Runtime, gives what the graph gives; and vectors to prove it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.onnx.builder import exactly
from backends.onnx.check import PROMPT, largest_error
from backends.onnx.emission import OnnxEmission
from backends.onnx.lower import is_causal
from backends.onnx.write import SHARD_BYTES, save_twin
from compiler.ir.execute import run
from compiler.ir.graph import Graph, Value
from compiler.ir.layers import copy_of, segments
from compiler.ir.rounded import other_codes, rounds_activations, widest, without_rounding
from compiler.ir.stages import after_prompt

VECTORS, EXACT = "parity.npz", ".exact."
BATCH, LENGTH, SIZE = 2, 6, 32


@dataclass(frozen=True)
class Reloaded:
    """How far the written model's outputs are from the graph's, over the largest output, and what rounding allows.

    ``rounded`` is the same, and ``bound`` what it may be, where products round their inputs or the graph its
    activations to codes; ``error`` is then that of a twin which rounds none.
    """

    error: float
    tolerance: float
    rounded: float | None = None
    bound: float | None = None

    @property
    def holds(self) -> bool:
        """Whether both are within what is allowed; a NaN never is."""
        return self.error <= self.tolerance and (self.rounded is None or self.rounded <= (self.bound or 0.0))


def verify(emission: OnnxEmission, directory: Path, *, shard_bytes: int = SHARD_BYTES) -> Reloaded:
    """Run the model in ``directory`` and compare it with the graph on random inputs, which stay there as vectors."""
    graph = _with_exact_products(emission.graph)
    inputs = random_inputs(graph)
    outputs = run(graph, inputs)
    rounds = rounds_activations(graph)
    exact = run(without_rounding(graph), inputs) if rounds else outputs
    tolerance = 16 * torch.finfo(emission.runtime.real).eps * max(1, len(segments(graph)))
    bound = None
    if emission.rounds_inputs:
        bound = widest(graph)  # products round their inputs in a way of their own
    elif rounds:
        bound = other_codes(graph, outputs, exact)
    vectors = _vectors(inputs, outputs, bound or tolerance) | _later(graph, inputs)
    np.savez(directory / VECTORS, allow_pickle=False, **vectors)
    names = [name for name in (emission.main, PROMPT) if name in emission.models]
    written = float(np.max([largest_error(directory / name, vectors) for name in names]))  # keeps a NaN
    if bound is None:
        return Reloaded(written, tolerance)
    plain = _vectors(inputs, exact, tolerance) | _later(without_rounding(graph), inputs)
    twin = _exact_error(emission, directory, plain, shard_bytes)
    return Reloaded(twin, tolerance, written, bound)


def _later(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a causal model that drops tokens of prompts gives when only a start is the prompt."""
    if not is_causal(graph) or not graph.nodes_named("token_select"):
        return {}
    start = inputs["input_ids"].shape[1] // 2
    return {"decoded.logits": run(after_prompt(graph, start), inputs)["logits"].numpy()}


def _exact_error(emission: OnnxEmission, directory: Path, vectors: Mapping[str, Any], shard_bytes: int) -> float:
    """The error of a model over the same tensors that rounds nothing it computes to codes."""
    exact = emission.exact()
    names = {name: f"{EXACT}{name}" for name in exact.models}
    save_twin(exact, emission, directory, shard_bytes, names)
    try:
        return largest_error(directory / names[emission.main], vectors)
    finally:
        for name in names.values():
            (directory / name).unlink()


def _with_exact_products(graph: Graph) -> Graph:
    """``graph`` with the products of codes and scales not rounded to the dtype of the scales: as kernels compute."""
    copy = copy_of(graph)
    for param in copy.params.values():
        if param.expr.op == "dequantize":
            param.expr = exactly(param.expr)
    return copy


def random_inputs(graph: Graph) -> dict[str, Tensor]:
    """Inputs of the graph's types; tokens are any that there are."""
    generator = torch.Generator().manual_seed(0)
    sizes = {dim: BATCH if axis == 0 else LENGTH for v in graph.inputs.values() for axis, dim in _symbols(v)}
    for node in graph.nodes_named("conv"):
        channels = node.input(0).shape[1]
        if isinstance(channels, str):
            sizes[channels] = node.input(1).type.static_shape[1] * node.attr("groups")
    return {name: _random(graph, value, sizes, generator) for name, value in graph.inputs.items()}


def _symbols(value: Value) -> list[tuple[int, str]]:
    return [(axis, dim) for axis, dim in enumerate(value.shape) if isinstance(dim, str)]


def _random(graph: Graph, value: Value, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = [dim if isinstance(dim, int) else sizes[dim] for dim in value.shape]
    if value.type.dtype.is_floating_point:
        return torch.randn(shape, generator=generator)
    tables = [user.input(0).shape[0] for user in value.users if user.op.name == "embedding"]
    count = min((int(rows) for rows in tables), default=SIZE)
    return torch.randint(min(3, count - 1), count, shape, generator=generator)


def _vectors(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], tolerance: float) -> dict[str, Any]:
    given = {f"in.{name}": value.numpy() for name, value in inputs.items()}
    if "input_ids" in inputs:
        given["in.attention_mask"] = np.ones(tuple(inputs["input_ids"].shape), np.int64)
    found = {f"out.{name}": value.numpy() for name, value in outputs.items()}
    return {**given, **found, "tolerance": np.float64(tolerance)}
