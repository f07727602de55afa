"""The main command, called as a shell would: what it prints, what it writes, and how it ends."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compiler import __version__, cli
from compiler.cli import main
from tests.commands import EVALUATE, FOUR_BITS, caller, finished_folder
from tests.small import write_folder, write_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return finished_folder(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def run(capsys):
    return caller(capsys)


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


@pytest.mark.parametrize(("word", "remedy"), [("plann", "did you mean `plan`?"), ("help", "it can be: plan, show, ")])
def test_a_word_that_is_no_command(run, word, remedy):
    code, _, err = run(word, "recipe.yaml")
    assert code == 1
    assert err.startswith(f"error[usage]: there is no command and no recipe `{word}`\nhelp: {remedy}")


@pytest.mark.parametrize("arguments", [["x" * 300], ["y" * 300 + ".yaml"], ["plan", "z" * 300]])
def test_a_path_that_is_too_long(run, arguments):
    code, _, err = run(*arguments)
    assert code == 1
    assert err.startswith("error[usage]: a path is longer than this system allows") and "a shorter one" in err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"compress-model {__version__}\n"


def test_a_lock_file_is_no_recipe(folder, run):
    code, _, err = run("plan", folder / "out" / "compress" / "recipe.lock.yaml")
    assert code == 1 and "help: this is a lock file" in err


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
