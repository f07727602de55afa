"""Generated encoders of tokens and of images: outputs, padding, classes that learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import BertForSequenceClassification

from compiler.evaluate import load_model
from compiler.frontend.capture import capture
from compiler.ir.execute import run
from tests.families import FAMILIES
from tests.test_generated import GOLDEN, error, tolerance, written

ENCODERS = [
    "bert", "roberta", "modernbert", "vit", "deit", "dinov2", "clip_vision", "clip_text", "siglip_vision",
    "siglip_text",
]  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_a_generated_encoder_computes_what_its_graph_computes(name, tmp_path, golden):
    family = FAMILIES[name]
    graph = capture(family.build(3, layers=3))
    model = written(graph, tmp_path / name)
    if name in ("modernbert", "vit"):
        for file in (tmp_path / name).glob("*.py"):
            golden(GOLDEN / name / file.name, file.read_text())
    given = {key: value for key, value in family.inputs().items() if key in graph.inputs}
    with torch.no_grad():
        found = model(**given)
    for key, value in run(graph, given).items():
        assert error(found[key], value) <= tolerance(graph)
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(**given)[0], found[0])


WITHOUT_HEADS = {
    "ModernBertModel": ("modernbert", {}),
    "MistralModel": ("mistral", {"sliding_window": 4}),
    "Gemma3TextModel": ("gemma3", {"sliding_window": 4}),
    "LlamaForSequenceClassification": ("llama", {"pad_token_id": 0}),
}


@pytest.mark.parametrize("architecture", WITHOUT_HEADS)
def test_models_without_a_head_for_tokens_see_what_they_saw(architecture, tmp_path):
    """Of texts longer than the windows of their attention, which may be causal and differ from layer to layer."""
    name, options = WITHOUT_HEADS[architecture]
    family = replace(FAMILIES[name], architecture=architecture)
    source = family.build(3, layers=3, **options)
    given = family.inputs(batch=2, tokens=13)
    graph = capture(source)
    model = written(graph, tmp_path / name)
    with torch.no_grad():
        found, wanted = model(**given)[0], source(**given)[0]
    assert error(found, wanted) <= tolerance(graph)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_padding_of_encoders_is_not_seen(name, tmp_path):
    family = FAMILIES[name]
    model = written(capture(family.build(3, layers=3)), tmp_path / name)
    ids = family.inputs(batch=2, tokens=9)["input_ids"]
    mask = torch.cat((torch.ones(2, 9), torch.zeros(2, 4)), 1).long()
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        padded = model(input_ids=torch.cat((ids, ids[:, :4]), 1), attention_mask=mask, labels=ids[:, [0] * 13])
    assert error(padded.logits[:, :9], alone) <= 1e-5
    assert padded.loss > 0


def test_image_classes_learn(tmp_path):
    family = FAMILIES["vit"]
    model = written(capture(family.build(3, layers=2)), tmp_path / "vit").train()
    model(**family.inputs(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_sequences_are_classified_and_classes_learn(tmp_path):
    config = FAMILIES["bert"].config(layers=2)
    config.num_labels, config.architectures = 3, ["BertForSequenceClassification"]
    torch.manual_seed(0)
    source = BertForSequenceClassification(config).eval()
    graph = capture(source)
    model = written(graph, tmp_path / "classes")
    given = FAMILIES["bert"].inputs(batch=3)
    with torch.no_grad():
        assert error(model(**given).logits, source(**given).logits) <= tolerance(graph)
    model.train()(**given, labels=torch.tensor([0, 2, 1])).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert model.config.num_labels == 3
