"""Generated modules: what is written from a graph computes what the graph computes, in plain transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.safetensors import emit
from backends.torch_module.emitters import EMITTERS
from compiler.errors import TargetError
from compiler.evaluate import load_model
from compiler.frontend.capture import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.layers import segments
from compiler.ir.ops import operations
from compiler.target import emission_of
from tests.families import FAMILIES, VOCABULARY

ROOT = Path(__file__).parent.parent
CAUSAL = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "granite", "cohere2",
    "smollm3", "gpt2", "gpt_neox", "opt", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3",
]  # fmt: skip
NEW_TOKENS = 8


def tolerance(graph: Graph) -> float:
    """Rounding of float32 sums in another order, adding up over the layers; relative to the largest output."""
    return 16 * torch.finfo(torch.float32).eps * max(1, len(segments(graph)))


def written(graph: Graph, directory: Path):
    """``graph`` as a generated module, loaded again by transformers."""
    directory.mkdir(parents=True)
    emit(emission_of(graph, "generated"), graph.sources, directory)
    return load_model(directory, trust_remote_code=True)


def error(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).abs().max() / ours.abs().max())


def greedy(graph: Graph, ids: Tensor, count: int = NEW_TOKENS) -> Tensor:
    """Greedy tokens by a whole forward of the graph for each."""
    for _ in range(count):
        ids = torch.cat((ids, run(graph, {"input_ids": ids})["logits"][:, -1:].argmax(-1)), 1)
    return ids


def generated(model, ids: Tensor, **options) -> Tensor:
    return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


def test_every_operation_has_code():
    assert set(EMITTERS) == set(operations())


@pytest.mark.parametrize("name", CAUSAL)
def test_a_generated_language_model_computes_and_continues_as_its_graph(name, tmp_path):
    family = FAMILIES[name]
    graph = capture(family.build(3, layers=3))
    model = written(graph, tmp_path / name)
    given = family.inputs(batch=2, tokens=9)
    logits = run(graph, given)["logits"]
    with torch.no_grad():
        assert error(model(**given).logits, logits) <= tolerance(graph)
    expected = greedy(graph, given["input_ids"])
    assert torch.equal(generated(model, given["input_ids"]), expected)
    ids = torch.cat((torch.zeros(2, 3, dtype=torch.long), given["input_ids"]), 1)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits[:, 3:]
    assert error(padded, logits) <= tolerance(graph)
    assert torch.equal(generated(model, ids, attention_mask=mask)[:, 3:], expected)
