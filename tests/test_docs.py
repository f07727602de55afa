"""The documentation is right: its pass runs, its options exist, its links lead somewhere. Examples: test_examples."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

import passes
from compiler import cli
from compiler.cli import main
from tests import matrix
from tests.families import FAMILIES
from tests.small import write_folder

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(page, language):
    """(name, text) of the fenced blocks of a page; the name follows the language, if there is one."""
    found = re.findall(rf"^```{language}(?: (\S+))?\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.fixture
def store_as(tmp_path, monkeypatch):
    """The pass of the page, in a folder of its own that is searched for passes."""
    named = {name: text for name, text in blocks("write-a-pass.md", "python") if name}
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "store_as.py").write_text(named["passes/store_as.py"])
    monkeypatch.setattr(passes, "__path__", [*passes.__path__, str(tmp_path / "more")])
    yield named
    sys.modules.pop("passes.store_as", None)


def test_the_pass_of_the_page_passes_its_test(store_as):
    names = {}
    exec(compile(store_as["tests/test_store_as.py"], "test_store_as.py", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_pass_of_the_page_runs(store_as, tmp_path, capsys):
    write_folder(tmp_path)
    ((_, recipe),) = blocks("write-a-pass.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 0
    assert "store-as (not exact): 14 rewritten" in capsys.readouterr().out
    assert main([str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert main(["passes", "store-as"]) == 0
    assert "Exact when dtype: float32." in capsys.readouterr().out


def test_the_pass_of_the_page_is_clean(store_as, tmp_path):
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml")]
    result = subprocess.run([*ruff, str(tmp_path / "more" / "store_as.py")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_rows_of_the_matrix_are_true(family):
    written = matrix.PAGE.read_text().splitlines()
    assert matrix.table({family: matrix.row_of(family)}).splitlines()[-1] in written


def test_the_matrix_has_all_passes_and_families():
    text = matrix.PAGE.read_text()
    assert all(f"| {family} |" in text for family in FAMILIES)
    assert set(passes.pass_names()) - {"heal"} == {title.split()[0] for title in list(matrix.PASSES)[1:]}


def test_links_between_pages_lead_somewhere():
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md"]:
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)


def options_of(command):
    """The option strings of a command's parser, --help aside."""
    fill = cli.COMMANDS[command][0] if command else cli._compress_options
    parser = argparse.ArgumentParser(add_help=False)
    fill(parser)
    return {option for action in parser._actions for option in action.option_strings}


def test_every_option_is_documented():
    sections = re.split(r"^## compress-model ", (DOCS / "commands.md").read_text(), flags=re.MULTILINE)
    text = {section.split()[0]: section for section in sections[1:]}
    text |= {"": text["RECIPE"], "passes": "", "schema": ""}
    for command in ["", *cli.COMMANDS]:
        for option in options_of(command):
            assert f"`{option}" in text[command] or f"/`{option}" in text[command], (command, option)


def test_every_documented_option_exists():
    existing = {"--quiet", "--debug"}.union(*(options_of(command) for command in ["", *cli.COMMANDS]))
    named = set(re.findall(r"`(--[a-z-]+)", (DOCS / "commands.md").read_text()))
    assert named <= existing
