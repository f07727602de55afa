"""The published methods that the docs list run, on models of twelve layers, and drop what they say."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from torch import Tensor
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph, Value
from compiler.ir.layers import copy_of
from compiler.pipeline import Pipeline
from compiler.recipe import Recipe
from passes.drop_tokens import DropTokens
from tests.captures import graph_of
from tests.families import FAMILIES
from tests.vision_language import PICTURE, TOWERS, with_crops

PAGE = Path(__file__).parent.parent / "docs" / "passes" / "drop-tokens.md"
ROWS = dict(re.findall(r"^\| ([^|]+) \| `(\{.+\})` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
ENCODERS = {"ToMe": "dinov2", "EViT": "vit", "PoWER-BERT": "bert", "LTP, top k": "bert", "visual word tokens": "vit"}
DEPTH = 12


@cache
def llava() -> Graph:
    vision, strategy = TOWERS["clip"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**sizes, num_hidden_layers=DEPTH, vocab_size=64),
        image_token_index=PICTURE,
        vision_feature_select_strategy=strategy,
    )
    return capture(LlavaForConditionalGeneration(config).eval(), inputs=with_crops(2, 60, 5))


def multiplied(graph: Graph, given: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """How often numbers are multiplied in products with weights, and the outputs."""
    counts: list[int] = []

    def count(value: Value, result: Tensor) -> None:
        if value.node is not None and value.node.op.name == "linear":
            counts.append(result.numel() * int(value.node.input(1).shape[1]))

    outputs = run(graph, given, observe=count)
    return sum(counts), outputs


@pytest.mark.parametrize("method", ROWS)
def test_a_published_method_runs(method, tmp_path):
    pictures = "stack" in ROWS[method]
    name = ENCODERS.get(method, "llama")
    graph = llava() if pictures else graph_of(name, layers=DEPTH)
    given = with_crops(2, 50, 5) if pictures else FAMILIES[name].inputs(batch=2, tokens=40)
    recipe = "model: owner/name\ncalibration: {data: text.txt}\npasses:\n"
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "recipe.yaml").write_text(f"{recipe}  - drop-tokens: {ROWS[method]}\n")
    (step,) = Recipe.load(tmp_path / "recipe.yaml").passes
    assert isinstance(step, DropTokens) and len(yaml.safe_load(ROWS[method])) > 1
    reduced = copy_of(graph)
    reduced.sources = dict(graph.sources)
    Pipeline([step]).run(reduced, planned=True, calibration=lambda _: [])
    less, found = multiplied(reduced, given)
    assert all(value.isfinite().all() for value in found.values())
    assert less < multiplied(graph, given)[0]


def test_the_page_lists_methods():
    assert len(ROWS) >= 12
