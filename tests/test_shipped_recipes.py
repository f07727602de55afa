"""Every recipe that ships is short, says what it is for, and runs on a tiny model into something that loads."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from compiler import Recipe, compress
from passes import DropTokens
from passes.heal import Heal
from tests.captures import saved
from tests.llama_cpp import gpt2_tokenizer
from tests.small import write_model

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
LONGEST = 20
OTHERS = {"tome-dinov2": "dinov2", "fewer-tokens-minilm": "bert"}
"""Recipes whose results no class of transformers holds, and the family of a tiny model of four layers for each."""
BLOCKS = 256  # of a matrix whose rows have blocks of llama.cpp


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    sizes = {"intermediate_size": BLOCKS, "max_position_embeddings": 512}
    return write_model(tmp_path_factory.mktemp("model") / "tiny", tie_word_embeddings=True, **sizes)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_explains_itself(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST
    assert lines[0].startswith("# ")


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_for_onnx_alone_runs_in_onnx_runtime(name, tmp_path):
    recipe = Recipe.load(RECIPES[0].parent / f"{name}.yaml", model=str(saved(OTHERS[name], num_hidden_layers=4)[0]))
    verification = compress(recipe, tmp_path / "out").document["onnx"]["verification"]
    assert verification["performed"] and (tmp_path / "out" / "onnx" / "model.onnx").exists()


def test_a_recipe_for_llama_cpp_alone_runs(tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "tiny")
    gpt2_tokenizer(256).save_pretrained(model)
    result = compress(Recipe.load(RECIPES[0].parent / "gguf-q4k.yaml", model=str(model)), tmp_path / "out")
    assert result.document["gguf"]["verification"]["performed"]
    assert (result.path / "gguf" / "model.gguf").exists()


CHECKPOINTS = [path for path in RECIPES if path.stem not in {*OTHERS, "gguf-q4k"}]


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
def test_a_recipe_runs_and_loads_in_transformers(path, tiny, tmp_path):
    result = compress(shortened(Recipe.load(path, model=str(tiny))), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(result.path, trust_remote_code=True)
    assert type(loaded).__name__ == result.document["output"]["architecture"]
    assert result.document["verification"]["performed"]


def shortened(recipe):
    """``recipe`` with two steps of training where it has thousands, and behind the layers that a tiny model has."""
    return replace(recipe, passes=tuple(_shortened(step) for step in recipe.passes))


def _shortened(step):
    match step:
        case Heal():
            return replace(step, layer_tokens=2048, tokens=2048)
        case DropTokens():
            return replace(step, layers="0,1")
        case _:
            return step
