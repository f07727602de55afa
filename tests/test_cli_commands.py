"""The commands beside the main one, called as a shell would: plan, show, eval, run, diff, passes and schema."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3Config, ViTConfig, ViTModel

from compiler.errors import CheckpointError
from compiler.evaluate.loading import load_tokenizer
from tests.commands import FOUR_BITS, caller, finished_folder, tensor_bytes
from tests.small import write_folder, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return finished_folder(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def run(capsys):
    return caller(capsys)


def test_plan_reads_as_a_table(folder, run):
    code, out, err = run("plan", folder / "recipe.yaml")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[2].split() == ["parameters", "stored", "FLOPs/token", "cache/token"]
    assert [line.split("  ")[0] for line in lines[4:8]] == ["the model", "1. gqa-to-mla", "2. quantize", "change"]
    assert any(line.startswith("writes   DeepseekV3ForCausalLM") for line in lines)


@pytest.mark.parametrize("passes", ["[]", "[gqa-to-mla]", FOUR_BITS, "[quantize: {bits: 3, symmetric: false}]"])
def test_plan_is_exact_to_the_byte(folder, run, tmp_path, passes):
    recipe = write_recipe(folder, passes, name="exact.yaml")
    plan = json.loads(run("plan", recipe, "--json")[1])
    assert run(recipe, "-o", tmp_path / "out")[0] == 0
    written = tensor_bytes(tmp_path / "out")
    assert sum(plan["output"]["files"].values()) == written
    assert (plan["report"]["passes"] or [{"after": plan["report"]["before"]}])[-1]["after"]["stored_bytes"] == written
    assert plan["report"]["before"]["stored_bytes"] == tensor_bytes(folder / "tiny")


def test_plan_needs_a_config_alone(folder, run, tmp_path):
    (tmp_path / "tiny").mkdir()
    shutil.copy(folder / "tiny" / "config.json", tmp_path / "tiny")
    code, out, _ = run("plan", write_recipe(tmp_path, FOUR_BITS))
    with_weights = run("plan", folder / "recipe.yaml")[1]
    assert code == 0
    assert out.splitlines()[1:8] == with_weights.splitlines()[1:8]


def test_plan_says_what_cannot_be_written(run, tmp_path):
    write_folder(tmp_path, head_dim=16)
    recipe = write_recipe(tmp_path, "[drop-tokens: {keep: 50%}]", "emit: [gguf]\n")
    code, out, err = run("plan", recipe, "--html", tmp_path / "plan.html")
    assert code == 1
    assert "1. drop-tokens" in out and "writes   nothing" in out
    error = err[err.index("error[target]: ") :]
    assert "\nhelp: leave `gguf` out of `emit`" in error
    assert not (tmp_path / "plan.html").exists()
    assert error == run(recipe, "-o", tmp_path / "out", "--quiet")[2]


def test_graphs_are_dumped(folder, run, tmp_path):
    assert run("plan", folder / "recipe.yaml", "--dump-graphs", tmp_path / "graphs")[0] == 0
    names = sorted(path.name for path in (tmp_path / "graphs").iterdir())
    assert names == ["000_captured.mir", "001_gqa-to-mla.mir", "002_quantize.mir"]


def test_show(folder, run):
    code, out, err = run("show", folder / "tiny")
    assert (code, err) == (0, "")
    assert out.startswith("graph LlamaForCausalLM(") and " attention(" in out
    one = run("show", folder / "tiny", "--layer", 1, "--weights")[1]
    assert "at model.layers.1" in one and "load(" in one
    assert run("show", folder / "tiny", "--layer", 7)[0] != 0


def test_show_what_a_recipe_makes(folder, run):
    assert "latent_attention(" in run("show", folder / "recipe.yaml")[1]
    after = run("show", folder / "recipe.yaml", "--after", "gqa-to-mla", "--weights")[1]
    assert "latent_attention(" in after and "dequantize(" not in after
    assert "dequantize(" in run("show", folder / "recipe.yaml", "--weights")[1]


def test_show_of_an_output_that_is_not_read_again_says_what_shows_it(folder, run):
    code, _, err = run("show", folder / "out")
    assert code == 1 and "this is an output of compress-model, which is not read again: " in err
    assert "`compress-model show RECIPE`" in err


def test_show_after_needs_a_recipe_and_a_pass_of_it(folder, run):
    assert "this is no recipe" in run("show", folder / "tiny", "--after", "quantize")[2]
    code, _, err = run("show", folder / "recipe.yaml", "--after", "quantise")
    assert code == 1 and "did you mean `quantize`?" in err


def test_eval(folder, run):
    code, out, _ = run(
        "eval",
        folder / "out",
        "--against",
        folder / "tiny",
        "--data",
        folder / "text.txt",
        "--samples",
        2,
        "--length",
        16,
    )
    assert code == 0
    for row in ("perplexity", "KL to the original", "cached values a token, live", "2 windows of 16 tokens"):
        assert row in out
    alone = json.loads(run("eval", folder / "tiny", "--samples", 1, "--length", 8, "--json")[1])
    assert alone["cache"]["values_per_token"] == 128


@pytest.mark.parametrize("command", [("eval",), ("run", "beer")])
def test_a_model_that_is_not_there_is_not_looked_for_elsewhere(run, tmp_path, command):
    name, *rest = command
    code, _, err = run(name, tmp_path / "nothing", *rest)
    assert code == 1 and err.startswith("error[checkpoint]: there is no checkpoint at ")


def test_data_that_is_not_there(folder, run):
    code, _, err = run("eval", folder / "tiny", "--data", "nothing.txt")
    assert code == 1 and err.startswith("error[data]: there is no such file or directory\n --> nothing.txt")


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
def test_a_model_without_tokenizer(config, tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_eval_speed_needs_two_models(folder, run):
    assert run("eval", folder / "tiny", "--speed")[0] == 1


@pytest.mark.parametrize(
    "option",
    ["--seed=-1", "--seed=9223372036854775808", "--samples=0", "--length=1", "--length=x", "--image=0"],
)
def test_numbers_that_measure_nothing_are_wrong_usage(folder, run, option):
    code, out, err = run("eval", folder / "tiny", option)
    assert code == 1 and not out
    assert err.startswith("error[usage]: ") and option.partition("=")[0] in err


@pytest.mark.parametrize("data", [(), ("--data", "text.txt")])
def test_a_model_of_text_is_given_no_size_of_pictures(folder, run, data):
    given = [folder / each if each.endswith(".txt") else each for each in data]
    code, out, err = run("eval", folder / "tiny", *given, "--image=8", "--length=16")
    assert code == 1 and not out
    assert "error[data]: a LlamaForCausalLM takes no pictures" in err and "help: leave out the size of pictures" in err


def test_a_model_that_writes_nothing_has_no_speed(run, tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    ViTModel(ViTConfig(**small, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    code, _, err = run("eval", tmp_path, "--against", tmp_path, "--speed")
    assert code == 1 and "a ViTModel does not continue a text" in err


def test_run(folder, run):
    code, out, _ = run("run", folder / "out", "beer", "--max-new-tokens", 4, "--tokens-per-second")
    assert code == 0
    assert out.splitlines()[-1].endswith("tokens/s")


def test_diff_of_equals(folder, run):
    code, out, _ = run("diff", folder / "tiny", folder / "tiny")
    assert code == 0
    assert [line for line in out.splitlines() if "the same" in line] == [
        "config.json: the same",
        "made by: the same",
        "what passes did, and the error it made: the same",
        "tensors: the same",
        "values of the tensors that both have: the same",
    ]


def test_diff_of_values(folder, run, tmp_path):
    shutil.copytree(folder / "tiny", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    assert "~ model.norm.weight: relative difference 1\n" in run("diff", folder / "tiny", tmp_path / "other")[1]
    assert "model.norm.weight" not in run("diff", folder / "tiny", tmp_path / "other", "--headers-only")[1]


def test_diff_of_before_and_after(folder, run):
    out = run("diff", folder / "tiny", folder / "out")[1]
    assert "~ model_type: llama -> deepseek_v3" in out
    assert "made by: B is an output of compress-model" in out
    assert "- model.layers.0.self_attn.k_proj.weight: bf16[32,64]" in out


def test_passes(run):
    assert "gqa-to-mla" in run("passes")[1]
    out = run("passes", "quantize")[1]
    assert "  a whole number\n" in out and "one of `search`, `minmax`" in out
    assert "Exact: never." in out and "``" not in out and "or one of" not in out
    code, _, err = run("passes", "quantise")
    assert code == 1 and "did you mean `quantize`?" in err


def test_schema(run):
    assert json.loads(run("schema")[1])["properties"]["passes"]
