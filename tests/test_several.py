"""Several recipes in one command: the outputs of each alone, whatever becomes of its neighbours."""

import threading
from types import SimpleNamespace

import pytest

from compiler.cli import main
from tests.small import write_folder, write_recipe
from tests.torture.subjects import CALIBRATION, contents, difference

RECIPES = {
    "rounded": ("[quantize: {bits: 4, group: 16}]", ""),
    "solved": ("[quantize: {bits: 3, group: 16, method: gptq}]", CALIBRATION),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, recipes, and what each makes alone in ``alone``."""
    folder = write_folder(tmp_path_factory.mktemp("several"))
    for name, parts in RECIPES.items():
        recipe = write_recipe(folder, *parts, name=f"{name}.yaml")
        assert main([str(recipe), "-o", str(folder / "alone" / name), "-q"]) == 0
    return folder


def recipes(folder):
    return [str(folder / f"{name}.yaml") for name in RECIPES]


@pytest.mark.parametrize(
    "options",
    [(), ("--executor", "local", "--workers", "3"), ("--executor", "processes", "--workers", "2")],
    ids=["in turn", "with threads", "side by side"],
)
def test_each_recipe_gives_what_it_gives_alone(folder, options, tmp_path, capsys):
    assert main([*recipes(folder), "-o", str(tmp_path), "-q", *options]) == 0
    said = capsys.readouterr().out
    for name in RECIPES:
        assert difference(contents(folder / "alone" / name), contents(tmp_path / name)) == ""
        assert f"{name}.yaml -> {tmp_path / name}" in said


def test_the_executor_of_a_recipe_changes_no_byte(folder, tmp_path):
    recipe = write_recipe(folder, *RECIPES["rounded"], name="spread.yaml")
    recipe.write_text(recipe.read_text() + "run: {executor: processes, workers: 2}\n")
    assert main([str(recipe), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert difference(contents(folder / "alone" / "rounded"), contents(tmp_path / "out")) == ""


def test_one_that_fails_does_not_stop_the_others(folder, tmp_path, capsys):
    (tmp_path / "out" / "rounded").mkdir(parents=True)
    assert main([*recipes(folder), "-o", str(tmp_path / "out"), "-q"]) == 2
    said = capsys.readouterr()
    assert "exists already" in said.err and "1 of 2 recipes failed: rounded.yaml" in said.err
    assert (tmp_path / "out" / "solved" / "config.json").exists()


@pytest.mark.parametrize("options", [(), ("--executor", "local", "--workers", "2")])
@pytest.mark.parametrize(
    "error, told", [(KeyError("x"), "error[internal]: KeyError: 'x'"), (MemoryError(), "not enough memory")]
)
def test_one_that_meets_a_bug_does_not_stop_the_others(folder, options, error, told, tmp_path, capsys, monkeypatch):
    threads = []

    def compress(recipe, out, **_):
        threads.append(threading.current_thread())
        if out.name == "rounded":
            raise error
        return SimpleNamespace(summary=lambda: "well done")

    monkeypatch.setattr("compiler.several.compress", compress)
    assert main([*recipes(folder), "-o", str(tmp_path), "-q", *options]) == 2
    said = capsys.readouterr()
    assert told in said.err and "1 of 2 recipes failed: rounded.yaml" in said.err
    assert "well done" in said.out
    assert threads == 2 * [threading.main_thread()]  # in turn: a job sets PyTorch's threads for the whole process


def test_a_wrong_recipe_is_told_before_the_first_is_begun(folder, tmp_path, capsys):
    wrong = write_recipe(folder, "[quantise]", name="wrong.yaml")
    assert main([*recipes(folder), str(wrong), "-o", str(tmp_path / "out"), "-q"]) == 1
    assert "did you mean `quantize`?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_of_one_name_are_refused(folder, capsys):
    assert main([str(folder / "rounded.yaml"), str(folder / "more" / "rounded.yaml"), "-q"]) == 1
    assert "two recipes have one name" in capsys.readouterr().err
