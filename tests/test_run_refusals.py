"""`compress-model run`: prompts, numbers and files beside a model that cannot be used are errors of the user's."""

from __future__ import annotations

import shutil

import pytest

from compiler.cli import main
from compiler.job import compress
from compiler.recipe import Recipe
from tests.small import write_folder, write_recipe

DAMAGES = {
    "config.json": ["{", "[]", '{"eos_token_id": {"id": 1}}', "\udcff"],
    "generation_config.json": ["[]", '{"eos_token_id": [[1]]}'],
    "tokenizer_config.json": ["3", '{"chat_template": "{{ 1 + messages }}"}'],
    "chat_template.jinja": ["{% for %}", "{{ raise_exception('no') }}", "\udcff"],
    "tokenizer.json": ["{}", "", "\udcff"],
}
"""What is written in the place of a file beside an ONNX model; a surrogate stands for a byte that is no UTF-8."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint and the ONNX model of it."""
    folder = write_folder(tmp_path_factory.mktemp("run"))
    compress(Recipe.load(write_recipe(folder, "[]", "emit: [onnx]\n")), folder / "out")
    return folder


def refused(capsys, model, *options) -> str:
    """What `run` says when it fails for a mistake of the user's."""
    assert main(["run", str(model), *options]) == 1
    told = capsys.readouterr().err
    assert "error" in told and "error[internal]" not in told
    return told


@pytest.mark.parametrize("file, text", [(file, text) for file, texts in DAMAGES.items() for text in texts])
def test_a_damaged_file_beside_an_onnx_model_is_named(folder, tmp_path, capsys, file, text):
    shutil.copytree(folder / "out" / "onnx", tmp_path / "onnx")
    (tmp_path / "onnx" / file).write_bytes(text.encode(errors="surrogateescape"))
    told = refused(capsys, tmp_path / "onnx" / "model.onnx", "Hello")
    assert "error[checkpoint]" in told and str(tmp_path) in told


@pytest.mark.parametrize("model", ["out/onnx/model.onnx", "tiny"])
def test_a_prompt_without_tokens_is_refused(folder, capsys, model):
    assert "the prompt has no tokens" in refused(capsys, folder / model, "")


@pytest.mark.parametrize("model", ["out/onnx/model.onnx", "tiny"])
def test_a_prompt_that_is_no_text_is_refused(folder, capsys, model):
    """What Python makes of an argument with the byte 0xff."""
    assert "PROMPT is no UTF-8: character 3" in refused(capsys, folder / model, "ab\udcff")


def test_a_prompt_longer_than_the_model_is_refused(folder, capsys):
    told = refused(capsys, folder / "out" / "onnx" / "model.onnx", "x" * 300)
    assert "error[data]" in told and "a prompt of 300" in told


@pytest.mark.parametrize("option", ["--max-new-tokens", "--threads"])
@pytest.mark.parametrize("number", ["-3", "9" * 19, "many"])
def test_a_number_out_of_range_is_refused(folder, capsys, option, number):
    assert option in refused(capsys, folder / "out" / "onnx" / "model.onnx", "Hello", option, number)
