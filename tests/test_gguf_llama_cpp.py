"""llama.cpp loads what is written and computes what the graph computes; the main job writes it."""

from __future__ import annotations

import shutil

import pytest
import torch

from backends.gguf import emit
from benchmarks.gguf_blocks import by_llama_cpp
from compiler.ir.execute import run
from compiler.job import compress
from compiler.pipeline import Pipeline
from compiler.plan import make_plan
from compiler.recipe import Recipe
from compiler.target import gguf_emission
from compiler.weights.checkpoint import open_checkpoint
from compiler.weights.ops.gguf.blocks import Blocks
from compiler.weights.ops.gguf.layouts import LAYOUTS
from passes import Quantize
from tests.captures import saved
from tests.llama_cpp import gpt2_tokenizer, log_probabilities
from tests.test_gguf_blocks import laplace, loss
from tests.test_gguf_written import FAMILY_OPTIONS, WIDTHS

TOKENS = [3, 17, 40, 22, 9, 31, 5, 12]
LIKELIEST = 8
FLASH = 0.01  # nats; llama.cpp's attention rounds to float16
ROUNDED = 0.25  # it rounds what quantised weights multiply to 8 bits
OTHERS = {"mixtral": {}, "phi3": {"sliding_window": None}, "olmo2": {}, "granite": {}, "gemma": {}}
FAMILIES = {**FAMILY_OPTIONS, **OTHERS}


def farthest(name, directory, passes=(), **changes):
    """The largest difference of a log probability between llama.cpp and the graph, of a family's tiny model."""
    source, graph = saved(name, **{**WIDTHS, **changes})
    model = directory / "source"
    shutil.copytree(source, model)
    gpt2_tokenizer(graph.origin.config["vocab_size"]).save_pretrained(model)
    graph.sources["model"] = open_checkpoint(model)
    Pipeline(passes).run(graph)
    emit(gguf_emission(graph), graph.sources, directory)
    theirs = log_probabilities(directory / "model.gguf", TOKENS, LIKELIEST)
    ours = run(graph, {"input_ids": torch.tensor([TOKENS])})["logits"][0, -1].log_softmax(-1)
    assert len(theirs) == LIKELIEST
    return max(abs(float(ours[token]) - value) for token, value in theirs.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_computed_alike(name, tmp_path):
    assert farthest(name, tmp_path, **FAMILIES[name]) < FLASH


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_blocks_are_computed_alike(kind, tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 256, "layers": 1}
    assert farthest("llama", tmp_path, [Quantize(type=kind)], **wide) < ROUNDED


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_rounding_loses_less_than_llama_cpp_does(kind, weighted):
    """On the same bytes, with an importance matrix and without."""
    weight, energy = laplace(16, 1024), torch.ones(1024)
    if weighted:
        energy = torch.rand(1024, generator=torch.Generator().manual_seed(1)).pow(4) + 1e-3
    codec = Blocks(kind).for_matrix(weight, energy)
    parts = weight.unflatten(-1, (-1, codec.group))
    parameters = codec.fit(parts, energy.reshape(parts.shape[1:]))
    ours = codec.decode(codec.encode(parts, parameters), parameters).flatten(1)
    assert loss(ours, weight, energy) < loss(by_llama_cpp(kind, weight, energy if weighted else None), weight, energy)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint with a tokenizer that llama.cpp knows, and a text."""
    directory = tmp_path_factory.mktemp("gguf")
    source, graph = saved("llama", **WIDTHS)
    shutil.copytree(source, directory / "tiny")
    gpt2_tokenizer(graph.origin.config["vocab_size"]).save_pretrained(directory / "tiny")
    (directory / "text.txt").write_text("the inn and a thin thing. " * 200)
    return directory


def test_the_job_writes_reloads_and_measures_it(folder):
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "model: tiny\npasses: [quantize: {type: q4_0, tied: share}]\nemit: [gguf]\n"
        "evaluate: {data: text.txt, samples: 2, length: 16}\n"
    )
    result = compress(Recipe.load(recipe), folder / "out")
    document = result.document
    assert (result.path / "gguf" / "model.gguf").is_file() and not list(result.path.glob("*.safetensors"))
    assert document["output"]["target"] == "gguf: llama" and set(document["output"]["files"]) == {"gguf/model.gguf"}
    assert document["verification"]["error"] <= document["verification"]["tolerance"]
    assert document["evaluation"]["metrics"]["kl"]["value"] > 0
    assert "llama.cpp (architecture llama)" in result.summary()
    assert 'directory/gguf", gguf_file="model.gguf")' in (result.path / "README.md").read_text()
    assert make_plan(Recipe.load(recipe)).output.tensor_bytes == document["output"]["tensor_bytes"]
    assert compress(Recipe.load(recipe), folder / "out").document == document
    assert len(log_probabilities(result.path / "gguf" / "model.gguf", TOKENS, LIKELIEST)) == LIKELIEST
