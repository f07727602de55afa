"""Metrics and data that do not fit a model are refused before anything is computed, and the recipe's place is shown."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from compiler.errors import DataError
from compiler.evaluate.metrics import METRICS
from compiler.ir.execute import run
from compiler.ir.positions import longest
from compiler.job import compress
from compiler.plan import make_plan
from compiler.recipe import Recipe
from tests.captures import graph_of
from tests.small import write_folder, write_recipe
from tests.tiny import byte_tokenizer, write_text


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = BertConfig(vocab_size=256, num_hidden_layers=1, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    write_text(folder)
    return folder


def recipe_of(folder, options) -> Recipe:
    return Recipe.load(write_recipe(folder, "[quantize]", f"evaluate: {{data: text.txt, samples: 2, {options}}}\n"))


def test_calibration_is_no_longer_than_the_table_of_positions(classifier, tmp_path):
    text = "calibration: {data: text.txt, samples: 2, length: 128}\n"
    with pytest.raises(DataError, match="128 tokens are longer than the 64") as caught:
        compress(
            Recipe.load(write_recipe(classifier, "[quantize: {bits: 4, group: 16, method: gptq}]", text)),
            tmp_path / "out",
        )
    assert caught.value.span is not None and caught.value.remedy == "`length` can be 64 at most"


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "clip_text", "siglip_text"])
def test_texts_are_as_long_as_tables_of_positions_and_no_longer(name):
    """Whether positions are counted, come behind an offset, or count the tokens that are no padding."""
    graph = graph_of(name)
    ids = torch.randint(3, 40, (1, 400), generator=torch.Generator().manual_seed(0))
    limit = longest(graph, "input_ids", ids)
    assert limit < 400 and longest(graph, "input_ids", ids[:, :limit]) == limit
    assert all(value.isfinite().all() for value in run(graph, {"input_ids": ids[:, :limit]}).values())
    with pytest.raises((IndexError, RuntimeError)):
        run(graph, {"input_ids": ids[:, : limit + 1]})


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rotary_positions_have_no_table(name):
    ids = torch.randint(3, 40, (1, 400), generator=torch.Generator().manual_seed(0))
    assert longest(graph_of(name), "input_ids", ids) == 400


def test_without_metrics_those_that_fit_are_measured(classifier, tmp_path):
    made = compress(recipe_of(classifier, "length: 16"), tmp_path / "out").document
    assert {"cosine", "relative-error"} == set(made["evaluation"]["metrics"])


@pytest.mark.parametrize(
    "metric", [name for name, each in METRICS.items() if each.of in ("causal", "images", "speech")]
)
def test_a_metric_of_other_models_is_refused_by_a_plan(classifier, metric):
    with pytest.raises(DataError, match="this is a BertForSequenceClassification") as caught:
        make_plan(recipe_of(classifier, f"length: 16, metrics: [{metric}]"))
    assert caught.value.span is not None and caught.value.remedy


@pytest.mark.parametrize("options, cause", [("length: 65", "longer than the 64"), ("samples: 9000", "too short")])
def test_windows_that_a_model_or_text_does_not_have_are_refused_before_any_work(classifier, tmp_path, options, cause):
    rest = f"evaluate: {{data: text.txt, length: 60, {options}}}\n".replace("length: 60, length", "length")
    recipe = Recipe.load(write_recipe(classifier, "[quantize]", rest))
    with pytest.raises(DataError, match=cause) as caught:
        compress(recipe, tmp_path / "out")
    span = caught.value.span
    assert span is not None and caught.value.remedy
    assert span.text[span.column - 1 :].startswith(options.partition(": ")[2])
    assert not list(tmp_path.iterdir())


def test_questions_are_asked_for_by_a_plan(tmp_path):
    with pytest.raises(DataError, match="`choices` needs items") as caught:
        make_plan(recipe_of(write_folder(tmp_path), "length: 16, metrics: [choices]"))
    assert caught.value.span is not None and caught.value.remedy
