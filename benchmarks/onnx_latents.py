"""One token's attention in ONNX Runtime: latents of half the cache beside the grouped attention they stand for.

    python benchmarks/onnx_latents.py [--lengths 256 1024 4096 8192] [--threads 1] [--layers 12]

Shapes are those of SmolLM2-135M: 9 heads of 64 on 3 groups, latents of 128 with a rotary key of 64. Both are as
`backends/onnx` writes them, with caches in place; projections are left out. Layers have caches of their own, so that
they come from memory, as in a model. Shown are medians of processor time for a layer, over rounds in turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from compiler.console import table

HEADS, GROUPS, WIDTH, LATENT = 9, 3, 64, 192
FLOAT, INT8 = TensorProto.FLOAT, TensorProto.INT8
Made = tuple[list[Any], dict[str, Any], dict[str, str]]


def grouped(layer: int, length: int, kind: int) -> Made:
    """A GroupQueryAttention over keys and values of ``kind``: nodes, cached inputs, and outputs in the same places."""
    names = [f"{layer}.key", f"{layer}.value"]
    scales = ["", "scale", "scale"] if kind == INT8 else []
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": GROUPS, "scale": 0.125}
    if kind == INT8:
        attributes |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
    given = ["packed", "", "", *names, "last", "total", "", "", "", "mask", *scales]
    outputs = [f"{layer}.out", *(f"{name}.new" for name in names)]
    node = helper.make_node("GroupQueryAttention", given, outputs, domain="com.microsoft", **attributes)
    cache = (np.random.default_rng(layer).standard_normal((1, GROUPS, length, WIDTH)) * 30).astype(np.int8)
    cache = cache if kind == INT8 else cache.astype(np.float32)
    return [node], dict.fromkeys(names, cache), {name: f"{name}.new" for name in names}


def latent(layer: int, length: int, _: int) -> Made:
    """Two products and a softmax over one vector a token."""
    name, nodes = f"{layer}.latent", list[Any]()

    def node(op: str, *inputs: str, domain: str = "", to: str = "", **attributes: Any) -> str:
        made = to or f"{layer}.{op}"
        nodes.append(helper.make_node(op, inputs, [made], domain=domain, **attributes))
        return made

    held = node("TensorScatter", name, "new", "place", to=f"{name}.new", axis=2)
    scores = node("FusedMatMul", "query", held, domain="com.microsoft", transB=1, alpha=0.125)
    node("MatMul", node("Softmax", node("Add", scores, "mask"), axis=-1), held, to=f"{layer}.out")
    cache = np.random.default_rng(layer).standard_normal((1, 1, length, LATENT)).astype(np.float32)
    return nodes, {name: cache}, {name: f"{name}.new"}


def shared(length: int) -> dict[str, Any]:
    """What all layers read."""
    made = np.random.default_rng(0)
    return {
        "packed": made.standard_normal((1, 1, (HEADS + 2 * GROUPS) * WIDTH)).astype(np.float32),
        "query": made.standard_normal((1, 1, HEADS, LATENT)).astype(np.float32),
        "new": made.standard_normal((1, 1, 1, LATENT)).astype(np.float32),
        "mask": np.zeros((1, 1, 1, length), np.float32),
        "last": np.array([length - 1], np.int32),
        "total": np.array([length], np.int32),
        "place": np.array([length - 1]),
        "scale": np.array([0.02], np.float32),
    }


class Step:
    """One token through all layers."""

    def __init__(
        self, layer: Callable[[int, int, int], Made], kind: int, length: int, options: argparse.Namespace
    ) -> None:
        made = [layer(number, length, kind) for number in range(options.layers)]
        nodes = [node for part in made for node in part[0]]
        values = {name: array for part in made for name, array in part[1].items()}
        values |= {name: array for name, array in shared(length).items() if any(name in node.input for node in nodes)}
        written = {name: new for part in made for name, new in part[2].items()}
        outputs = [f"{number}.out" for number in range(options.layers)]
        settings = ort.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = options.threads, 3
        settings.enable_mem_pattern = False
        model = serialised(nodes, values, written, outputs)
        self._session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._held = {name: ort.OrtValue.ortvalue_from_numpy(array.copy()) for name, array in values.items()}
        for name, value in self._held.items():
            self._binding.bind_ortvalue_input(name, value)
            if name in written:
                self._binding.bind_ortvalue_output(written[name], value)
        for name in outputs:
            self._binding.bind_output(name)

    def seconds(self) -> float:
        """The processor time of one run."""
        started = time.process_time()
        self._session.run_with_iobinding(self._binding)
        return time.process_time() - started


def serialised(
    nodes: Sequence[Any], values: Mapping[str, Any], written: Mapping[str, str], outputs: Sequence[str]
) -> bytes:
    """The model of ``nodes`` with inputs of ``values``; some are ``written`` again under other names."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in values.items()}
    inputs = [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in values.items()]
    results = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs]
    results += [helper.make_tensor_value_info(new, kinds[name], values[name].shape) for name, new in written.items()]
    versions = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "token", inputs, results)
    return helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()


def measure(options: argparse.Namespace) -> Sequence[tuple[str, ...]]:
    kinds = {"keys and values": (grouped, FLOAT), "in int8": (grouped, INT8), "latents of half": (latent, FLOAT)}
    rows = [("tokens", *(f"{name}, us a layer" for name in kinds))]
    for length in options.lengths:
        steps = {name: Step(layer, kind, length, options) for name, (layer, kind) in kinds.items()}
        found: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(options.rounds):
            for name in random.sample(list(steps), len(steps)):
                found[name].append(steps[name].seconds() / options.layers * 1e6)
        rows.append((str(length), *(f"{statistics.median(each[1:]):.0f}" for each in found.values())))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=16)
    print(table(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
