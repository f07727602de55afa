"""The whole job with a result that no stock class holds: planned, written, verified, reported and loaded again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from backends.safetensors import emit
from compiler import Recipe, compress
from compiler.errors import TargetError
from compiler.evaluate import cache_size, evaluate_model, load_model
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.pipeline import Pipeline
from compiler.plan import make_plan
from compiler.target import emission_of
from passes import GqaToMla
from tests.families import FAMILIES
from tests.tiny import byte_tokenizer, write_text

MIXED = "passes: [gqa-to-mla]"
"""Latent attention of two kinds of layers, those that rotate and those that do not: no class is so."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    model = FAMILIES["smollm3"].build(3, layers=3, vocab_size=256, pad_token_id=0)
    model.save_pretrained(folder / "source")
    byte_tokenizer().save_pretrained(folder / "source")
    write_text(folder)
    return folder


def recipe_in(folder, emit: str = "", rest: str = "") -> Recipe:
    text = f"model: {folder / 'source'}\n{MIXED}\nemit:\n  - safetensors: {{{emit}}}\n{rest}"
    (folder / "recipe.yaml").write_text(text)
    return Recipe.load(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def made(folder):
    rest = "evaluate: {data: text.txt, samples: 2, length: 32, metrics: [perplexity, kl]}"
    return compress(recipe_in(folder, rest=rest), folder / "out")


def test_a_plan_says_which_class_and_why(folder):
    plan = make_plan(recipe_in(folder))
    assert plan.output.architecture == "CompressedSmolLM3ForCausalLM"
    assert "with its own code (trust_remote_code=True)" in plan.output.loads_in[0]
    assert plan.output.loads_in[1].startswith("no stock class: same family: ")


def test_the_job_verifies_measures_and_reports_generated_code(made):
    output = made.document["output"]
    assert (output["target"], output["auto_class"]) == ("generated", "AutoModelForCausalLM")
    assert {"modeling_compressed_smollm3.py", "configuration_compressed_smollm3.py"} <= set(output["other_files"])
    verification = made.document["verification"]
    assert verification["performed"] and verification["error"] <= verification["tolerance"]
    assert made.document["evaluation"]["metrics"]["kl"]["value"] < 1e-6
    card = (made.path / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/directory", trust_remote_code=True)' in card
    assert "no stock class: " in card


def test_the_output_is_a_checkpoint_for_commands_that_are_told_to_trust_it(made, folder):
    measured = evaluate_model(made.path, samples=1, length=16, trust_remote_code=True)
    assert measured.cache is not None and measured.cache.values_per_token > 0
    config = json.loads((made.path / "config.json").read_text())
    assert config["qk_rope_head_dim"][1] == 0 and config["qk_rope_head_dim"][0] == config["qk_rope_head_dim"][2] > 0


def test_a_stock_class_can_be_demanded(folder):
    with pytest.raises(TargetError, match="no stock model class computes this") as raised:
        compress(recipe_in(folder, "class: stock"), folder / "stock")
    assert "`class: auto`" in raised.value.remedy
    assert make_plan(recipe_in(folder, "class: stock")).output is None


def test_generated_code_can_be_demanded(folder):
    (folder / "plain.yaml").write_text(
        f"model: {folder / 'source'}\nemit: [safetensors: {{class: generated}}]\n", encoding="utf-8"
    )
    result = compress(Recipe.load(folder / "plain.yaml"), folder / "forced")
    assert result.document["output"]["target"] == "generated"
    theirs, ours = load_model(folder / "source"), load_model(folder / "forced", trust_remote_code=True)
    ids = torch.tensor([[5, 17, 200, 31]])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_recipe_asks_for_a_cache_of_few_bits(folder, made):
    result = compress(recipe_in(folder, "cache-bits: 8"), folder / "bits")
    assert result.document["verification"]["performed"]
    full, rounded = (cache_size(load_model(path, trust_remote_code=True)) for path in (made.path, folder / "bits"))
    assert rounded.bytes_per_token < full.bytes_per_token
    assert result.document["ledger"]["after"]["cache_bytes_per_token"] == rounded.bytes_per_token
    plan = make_plan(recipe_in(folder, "cache-bits: 8"))
    assert "no stock class: none caches in 8 bits" in plan.text()
    assert plan.report.after.cache_bytes_per_token == rounded.bytes_per_token


def test_generated_code_holds_integers_of_several_schemes_and_floats_of_one(folder):
    recipes = {}
    integers, floats = ("bits: 8, group: 16", "bits: 4, group: 0, symmetric: false"), ("type: fp8", "type: nvfp4")
    for name, kinds in (("mixed", integers), ("floats", floats)):
        steps = zip(kinds, ("mlp", "attention.output"), strict=True)
        passes = "".join(f"- quantize: {{{kind}, where: {where}}}\n" for kind, where in steps)
        path = folder / f"{name}.yaml"
        path.write_text(f"model: {folder / 'source'}\npasses:\n- gqa-to-mla\n{passes}")
        recipes[name] = Recipe.load(path)
    result = compress(recipes["mixed"], folder / "mixed")
    assert result.document["verification"]["performed"]
    plan, output = make_plan(recipes["mixed"]).output, result.document["output"]
    assert plan.tensor_bytes == output["tensor_bytes"] == tensor_bytes(folder / "mixed")
    assert "quantization_config" not in json.loads((folder / "mixed" / "config.json").read_text())
    assert {"packed_linear.py", "launch.py"} <= set(output["other_files"])
    assert "one scheme for all weights" in make_plan(recipes["floats"]).refusal


def tensor_bytes(directory) -> int:
    tensors = [load_file(file).values() for file in directory.glob("*.safetensors")]
    return sum(tensor.nbytes for found in tensors for tensor in found)


def test_two_checkpoints_of_other_code_live_in_one_process(tmp_path):
    """Equal names, equal sizes, other code: transformers must not take the first's class for the second."""
    ids = {"input_ids": torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(1))}
    codes = []
    for number, dtype in enumerate((torch.bfloat16, torch.float16)):  # with a normed latent, and without
        folder = tmp_path / str(number)
        FAMILIES["llama"].build(3).to(dtype).save_pretrained(folder / "source")
        graph = capture(folder / "source")
        Pipeline([GqaToMla(cache=0.5)]).run(graph, calibration=lambda _: [ids])
        emission = emission_of(graph, "generated")
        codes.append(emission.files)
        (folder / "out").mkdir()
        emit(emission, graph.sources, folder / "out")
        with torch.no_grad():
            found = load_model(folder / "out", trust_remote_code=True)(**ids).logits
        torch.testing.assert_close(found, run(graph, ids)["logits"], rtol=0, atol=1e-5)
    assert codes[0].keys() == codes[1].keys()
    assert codes[0] != codes[1]
