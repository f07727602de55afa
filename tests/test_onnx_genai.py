"""The target `genai`: a model that scores each sample's last token, with the config that onnxruntime-genai reads."""

from __future__ import annotations

import json

import pytest
import torch

from backends.onnx import emit, propose, verify
from backends.onnx.check import empty_cache, session
from compiler.errors import TargetError
from compiler.ir.execute import run
from tests.captures import graph_of, plan_of
from tests.families import FAMILIES

REFUSED = {"bert": "this is none", "t5": "this is none", "deepseek_v3": "this model `0.latent`"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_keeps_anything_else_is_refused_with_the_reason(name):
    with pytest.raises(TargetError, match=REFUSED[name]) as refused:
        propose(plan_of(name), "genai")
    assert refused.value.remedy == "write `target: ort-cpu`"


@pytest.mark.parametrize(("name", "changes"), [("llama", {"head_dim": 16}), ("gpt2", {})])
def test_the_config_names_what_the_model_has(name, changes, tmp_path):
    graph = graph_of(name, 3, **changes)
    emission = propose(graph, "genai")
    emit(emission, graph.sources, tmp_path)
    assert verify(emission, tmp_path).holds
    config = json.loads((tmp_path / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    model = session(tmp_path / decoder["filename"])
    layers = range(decoder["num_hidden_layers"])
    kept = [decoder["inputs"][f"past_{what}_names"] % layer for layer in layers for what in ("key", "value")]
    left = [decoder["outputs"][f"present_{what}_names"] % layer for layer in layers for what in ("key", "value")]
    assert [value.name for value in model.get_inputs()] == ["input_ids", "attention_mask", *kept]
    assert [value.name for value in model.get_outputs()] == ["logits", *left]
    past = model.get_inputs()[2].shape
    assert (past[1], past[3]) == (decoder["num_key_value_heads"], decoder["head_size"])
    assert decoder["hidden_size"] == decoder["num_attention_heads"] * decoder["head_size"]
    assert model.get_outputs()[0].shape[-1] == config["model"]["vocab_size"]
    assert config["search"]["past_present_share_buffer"] == emission.models["model.onnx"].in_place


def test_the_last_token_of_each_sample_is_scored_wherever_padding_lies(tmp_path):
    graph = graph_of("llama", 3, head_dim=16)
    emit(propose(graph, "genai"), graph.sources, tmp_path)
    model, ids = session(tmp_path / "model.onnx"), FAMILIES["llama"].inputs(batch=3, tokens=6)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 4:], mask[1, :2] = 0, 0
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **empty_cache(model, 3)}
    found = torch.from_numpy(model.run(["logits"], feeds)[0])
    for row, alone in enumerate((ids[:1, :4], ids[1:2, 2:], ids[2:])):
        expected = run(graph, {"input_ids": alone})["logits"][0, -1]
        assert torch.allclose(found[row, 0], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
