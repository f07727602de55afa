"""The commands, called as a shell would: what they print, what they write, and how they end."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from compiler import cli
from compiler.cli import main
from compiler.weights.tensorfile import read_header
from tests.small import write_folder, write_recipe

ROOT = Path(__file__).parent.parent
FOUR_BITS = "[gqa-to-mla, quantize: {bits: 4, group: 16, skip: [lm_head]}]"
EVALUATE = "evaluate: {data: text.txt, samples: 2, length: 16}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, a text, a recipe, and the recipe's finished output ``out``."""
    folder = write_folder(tmp_path_factory.mktemp("cli"))
    assert main([str(write_recipe(folder, FOUR_BITS, EVALUATE)), "-o", str(folder / "out"), "--quiet"]) == 0
    return folder


@pytest.fixture
def run(capsys):
    """Runs the command; returns (exit code, standard output, standard error)."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def tensor_bytes(directory):
    headers = [read_header(file) for file in directory.glob("*.safetensors")]
    return sum(stored.type.nbytes for header in headers for stored in header.values())


def contents(directory):
    """The bytes of every file, but for those that say how long things took."""
    files = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "compress/timings.json"}


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom compiler.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print(*{'torch', 'transformers', 'pydantic', 'rich', 'ruamel', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "commands:" in result.stdout
    assert result.stdout.endswith("\n\n")


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"usage: compress-model {command}".rstrip() in capsys.readouterr().out


def test_no_arguments_show_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["plan"], ["recipe.yaml", "--colour"], ["show", "model", "--layer", "first"]])
def test_wrong_usage(run, arguments):
    code, out, err = run(*arguments)
    assert code == 1 and not out
    assert err.startswith("error[usage]: ") and "--help" in err


def test_a_bug_is_no_traceback(run, monkeypatch):
    def broken(options, console):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setitem(cli.COMMANDS, "schema", (lambda parser: None, broken))
    code, _, err = run("schema")
    assert code == 2
    assert err == "error[internal]: ZeroDivisionError: division by zero\nhelp: this is a bug; `--debug` shows where\n"
    with pytest.raises(ZeroDivisionError):
        main(["schema", "--debug"])


def test_interruption_is_130(run, monkeypatch):
    def interrupted(options, console):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "schema", (lambda parser: None, interrupted))
    assert run("schema") == (130, "", "interrupted\n")


def test_a_reader_that_stops_early_is_no_error(folder):
    command = [sys.executable, "-m", "compiler.cli", "show", str(folder / "tiny"), "--weights"]
    shown = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown.stdout.close()
    assert (shown.wait(), shown.stderr.read()) == (0, b"")


def test_output_is_complete(folder):
    names = set(contents(folder / "out"))
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
        "compress/report.json",
        "compress/report.html",
        "compress/recipe.lock.yaml",
    }
    assert not list(folder.glob(".out*"))


def test_transformers_loads_it_alone(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    ids = AutoTokenizer.from_pretrained(folder / "out")("beer", return_tensors="pt")
    with torch.no_grad():
        assert model(**ids).logits.shape == (1, 4, 256)


def test_summary_says_what_changed(run, tmp_path):
    write_folder(tmp_path)
    code, out, err = run(write_recipe(tmp_path, FOUR_BITS, EVALUATE), "-o", tmp_path / "out")
    assert code == 0
    for row in ("parameters", "bytes of weights", "cache bytes a token", "perplexity", "KL to the original"):
        assert row in out
    assert "Reloaded by plain transformers" in out
    assert "write: 100%" in err and "gqa-to-mla: 2 rewritten" in err


def test_quiet_prints_results_only(folder, run, tmp_path):
    code, out, err = run(write_recipe(folder, name="plain.yaml"), "-o", tmp_path / "out", "--quiet")
    assert (code, err) == (0, "")
    assert "bytes of weights" in out


def test_the_same_recipe_twice_gives_the_same_bytes(folder, run, tmp_path):
    assert run(folder / "recipe.yaml", "-o", tmp_path / "again")[0] == 0
    assert contents(tmp_path / "again") == contents(folder / "out")


def test_a_finished_job_is_not_done_again(folder, run):
    before = contents(folder / "out")
    code, out, err = run(folder / "recipe.yaml", "-o", folder / "out")
    assert code == 0
    assert "already finished" in err and "bytes of weights" in out
    assert contents(folder / "out") == before


@pytest.mark.parametrize("damage", ["removed", "cut", "report"])
def test_a_finished_output_that_was_damaged_says_so(folder, run, tmp_path, damage):
    recipe = write_recipe(folder, name="damaged.yaml")
    out = tmp_path / "out"
    assert run(recipe, "-o", out)[0] == 0
    weights = out / "model.safetensors"
    if damage == "removed":
        weights.unlink()
    else:
        spoilt = weights if damage == "cut" else out / "compress" / "report.json"
        spoilt.write_bytes(spoilt.read_bytes()[:-9])
    code, _, err = run(recipe, "-o", out)
    assert code == 2
    assert "the finished output is damaged" in err and "delete it" in err


def test_a_disk_that_fills_up_under_a_report_is_one_error(folder, run, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compiler.job.write_reports", full)
    recipe = write_recipe(folder, name="full.yaml")
    code, _, err = run(recipe, "-o", tmp_path / "out")
    assert code == 2
    assert "error[output]" in err and "free some space" in err


def test_nothing_is_overwritten(folder, run):
    recipe = write_recipe(folder, "[quantize]", name="another.yaml")
    code, _, err = run(recipe, "-o", folder / "out")
    assert code == 2
    assert err.splitlines()[-3].startswith("error[output]: the output exists already")


def test_a_config_alone_cannot_be_compressed(folder, run, tmp_path):
    (tmp_path / "tiny").mkdir()
    shutil.copy(folder / "tiny" / "config.json", tmp_path / "tiny")
    code, _, err = run(write_recipe(tmp_path), "-o", tmp_path / "out")
    assert code == 1 and "has a config but no weights" in err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_goes_on(folder, run, tmp_path, monkeypatch):
    from compiler.weights.make import Maker

    make = Maker.__call__
    done = []

    def interrupt_after_three(self, task):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(task)
        return make(self, task)

    monkeypatch.setattr(Maker, "__call__", interrupt_after_three)
    code, _, err = run(folder / "recipe.yaml", "-o", tmp_path / "out")
    assert code == 130
    assert "run the same command again to go on" in err and err.endswith("interrupted\n")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    code, _, err = run(folder / "recipe.yaml", "-o", tmp_path / "out")
    assert code == 0 and "resuming an interrupted run" in err
    assert contents(tmp_path / "out") == contents(folder / "out")


def test_a_recipe_that_cannot_work_leaves_nothing(folder, run, tmp_path):
    recipe = write_recipe(folder, "[quantize: {where: experts}]", name="wrong.yaml")
    assert run(recipe, "-o", tmp_path / "out")[0] == 1
    assert not list(tmp_path.iterdir())


def test_memory_too_small_to_work_with(folder, run, tmp_path):
    recipe = write_recipe(folder, rest="run: {memory: 10MB}\n", name="small.yaml")
    code, _, err = run(recipe, "-o", tmp_path / "out")
    assert code == 1
    assert "`memory` leaves nothing to work with" in err and "small.yaml:3:" in err


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
    code, out, _ = run("plan", write_recipe(tmp_path, "[drop-tokens: {keep: 50%}]", "emit: [gguf]\n"))
    assert code == 0
    assert "cannot be written: " in out and "writes   " not in out


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
    assert "+ recipe.passes.1.quantize.bits: 4" in out
    assert "- model.layers.0.self_attn.k_proj.weight: bf16[32,64]" in out


def test_passes(run):
    assert "gqa-to-mla" in run("passes")[1]
    out = run("passes", "quantize")[1]
    assert "  a whole number\n" in out and "one of `search`, `minmax`" in out
    assert "Exact: never." in out
    code, _, err = run("passes", "quantise")
    assert code == 1 and "did you mean `quantize`?" in err


def test_schema(run):
    assert json.loads(run("schema")[1])["properties"]["passes"]
