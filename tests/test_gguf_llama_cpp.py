"""llama.cpp loads what is written and computes what the graph computes; the main job writes it."""

from __future__ import annotations

import shutil

import gguf
import pytest
import torch
from transformers import BertConfig, BertModel

from backends.gguf import emit
from benchmarks.gguf_blocks import by_llama_cpp
from compiler.frontend import capture
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
from tests.llama_cpp import embedding, gpt2_tokenizer, log_probabilities, word_pieces
from tests.test_gguf_blocks import laplace, loss
from tests.test_gguf_written import FAMILY_OPTIONS, LINEAR, LLAMA3, LONG, WIDTHS, YARN

TOKENS = [3, 17, 40, 22, 9, 31, 5, 12]
LIKELIEST = 8
FLASH = 0.01  # nats; llama.cpp's attention rounds to float16
GELU = 0.02  # its GELU is the one by tanh, read from a table of float16
ROUNDED = 0.25  # it rounds what quantised weights multiply to 8 bits
OTHERS = {"mixtral": {}, "phi3": {"sliding_window": None}, "olmo2": {}, "granite": {}, "gemma": {}, "gpt2": {}}
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


@pytest.mark.parametrize("rotary", [LINEAR, LLAMA3, YARN], ids=lambda rotary: rotary["rope_type"])
def test_scaled_rotary_embedding_is_computed_alike(rotary, tmp_path):
    assert farthest("llama", tmp_path, rope_parameters=rotary, **LONG) < FLASH


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_blocks_are_computed_alike(kind, tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 256, "layers": 1}
    assert farthest("llama", tmp_path, [Quantize(type=kind)], **wide) < ROUNDED


def test_weights_that_checkpoints_hold_transposed_keep_their_blocks(tmp_path):
    assert farthest("gpt2", tmp_path, [Quantize(where="linear", type="q4_0", tied="share")]) < ROUNDED
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert {kinds[f"blk.0.{name}.weight"] for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")} == {"Q4_0"}


@pytest.mark.parametrize("kind, types", [("", 2), ("", 1), ("", 3), ("q8_0", 2)])
def test_an_encoder_of_sentences_gives_the_same_vectors(kind, types, tmp_path):
    torch.manual_seed(0)
    tokenizer, text = word_pieces(), "The inn, a Thing; the café's ending."
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 64, "type_vocab_size": types}
    config = BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "1_Pooling").mkdir()
    (tmp_path / "bert" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    graph = capture(tmp_path / "bert")
    Pipeline([Quantize(type=kind)] if kind else []).run(graph)
    emit(gguf_emission(graph), graph.sources, tmp_path)
    ours = run(graph, {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])})["last_hidden_state"][0].mean(0)
    theirs = embedding(tmp_path / "model.gguf", text)
    assert (theirs - ours).norm() < GELU * ours.norm()


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
