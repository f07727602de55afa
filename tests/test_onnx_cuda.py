"""The target `ort-cuda`: half precision, and grouped attention that derives all from how many tokens there are.

Without a GPU, ONNX Runtime runs it on the CPU, which widens what it has no half-precision kernels for."""

from __future__ import annotations

import onnx
import pytest
import torch

from backends.onnx import emit, propose, verify
from compiler.pipeline import Pipeline
from passes import Quantize
from tests.captures import graph_of

HALF_EPS = torch.finfo(torch.float16).eps
MODELS = {
    "mistral": {"head_dim": 16},
    "gpt_oss": {"head_dim": 16},
    "deepseek_v3": {},
    "t5": {},
}
"""In windows, with sinks and experts, with latents, in two models."""


def half(graph, directory):
    """The error of the written model on the CPU, whole, token by token, and with padding on the right."""
    emission = propose(graph, "ort-cuda")
    emit(emission, graph.sources, directory)
    for name, model in emission.models.items():
        onnx.checker.check_model(directory / name, full_check=True)
        kinds = {value.dtype.name for value in model.inputs if value.name.endswith((".key", ".value", ".latent"))}
        assert kinds <= {"FLOAT16", "FLOAT"}  # what crosses from an encoder is a graph's own input
    return emission, verify(emission, directory)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_half_precision_is_its_graph(name, tmp_path):
    emission, found = half(graph_of(name, 3, **MODELS[name]), tmp_path)
    assert found.error <= 8 * HALF_EPS
    attends = [n for m in emission.models.values() for n in m.nodes if n.op_type == "GroupQueryAttention"]
    assert all(node.inputs[9] is None and node.inputs[10] is None for node in attends if len(node.inputs) > 10)


def test_quantised_products_have_scales_in_half_precision(tmp_path):
    graph = graph_of("llama", head_dim=16, hidden_size=64, intermediate_size=96)
    Pipeline([Quantize(bits=4, group=16, tied="copy")]).run(graph)
    emission, found = half(graph, tmp_path)
    stored = emission.models["model.onnx"].stored
    scales = {stored[name].dtype.name for name in stored if name.endswith(".scale")}
    assert scales == {"FLOAT16"} and found.rounded is not None and found.rounded <= found.bound
