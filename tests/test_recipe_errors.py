"""Every wrong recipe gives one message: file, line, column, excerpt, cause, remedy. All of them are golden."""

import re
from pathlib import Path

import pytest

from compiler.cli import main

FOLDER = Path(__file__).parent / "golden" / "errors"
RECIPES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_message(recipe, golden, capsys):
    assert main(["plan", str(recipe)]) == 1
    output = capsys.readouterr()
    assert not output.out
    golden(recipe.with_suffix(".txt"), output.err.replace(f"{FOLDER}/", ""))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_message_is_complete(recipe):
    lines = recipe.with_suffix(".txt").read_text().splitlines()
    assert lines[0].startswith("error[")
    assert re.fullmatch(r" --> \S+\.yaml:\d+:\d+", lines[1])
    assert any(set(line.partition("|")[2].strip()) == {"^"} for line in lines), "no caret"
    assert lines[-1].startswith("help: ")


def test_there_are_enough():
    assert len(RECIPES) >= 60
