"""ONNX models as the main job writes them: by themselves, beside a checkpoint, checked again by their own script."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from backends.onnx import Runner
from compiler.errors import CheckpointError, ParityError, RecipeError
from compiler.evaluate.parity import verify_onnx
from compiler.ir.execute import run
from compiler.job import compress
from compiler.pipeline import Pipeline
from compiler.plan import make_plan, open_recipe_model
from compiler.recipe import Recipe
from compiler.target import onnx_for
from passes import Quantize
from tests.small import write_folder, write_recipe

QUANTIZED = "[quantize: {bits: 4, group: 32}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose heads ONNX Runtime's own attention takes."""
    return write_folder(tmp_path_factory.mktemp("onnx"))


def made(folder, passes, rest, name):
    recipe = Recipe.load(write_recipe(folder, passes, rest, f"{name}.yaml"))
    return recipe, compress(recipe, folder / name)


def test_an_onnx_model_alone(folder):
    recipe, result = made(folder, QUANTIZED, "emit: [onnx]\n", "alone")
    names = {path.name for path in (result.path / "onnx").iterdir()}
    assert {"model.onnx", "model.safetensors", "tokenizer.json", "config.json", "check.py", "parity.npz"} <= names
    assert not list(result.path.glob("*.safetensors"))
    document = json.loads((result.path / "compress" / "report.json").read_text())
    assert document["output"]["target"] == "onnx: ort-cpu" and document["verification"]["performed"]
    assert document["verification"]["error"] <= document["verification"]["tolerance"]
    assert set(document["output"]["files"]) == {"onnx/model.safetensors"}
    assert "Reloaded by ONNX Runtime" in result.summary()
    card = (result.path / "README.md").read_text()
    assert "library_name: onnx\n" in card and 'InferenceSession("path/to/this/directory/onnx/model.onnx")' in card
    assert "from_pretrained" not in card
    assert compress(recipe, result.path).document == document
    assert make_plan(recipe).output.tensor_bytes == document["output"]["tensor_bytes"]


def test_an_onnx_model_beside_a_checkpoint(folder):
    _, result = made(folder, "[]", "emit: [safetensors, onnx: {target: onnx}]\n", "beside")
    assert (result.path / "model.safetensors").is_file() and (result.path / "onnx" / "model.onnx").is_file()
    assert "Reloaded by plain transformers" in result.summary() and "Reloaded by ONNX Runtime" in result.summary()
    assert "\n- onnx/: ONNX Runtime" in (result.path / "README.md").read_text()
    assert result.document["onnx"]["target"] == "onnx: onnx" and result.document["output"]["target"] == "same family"


def test_the_script_beside_a_model_checks_it(folder):
    _, result = made(folder, "[]", "emit: [onnx]\n", "checked")
    script = result.path / "onnx" / "check.py"
    assert subprocess.run([sys.executable, script], capture_output=True, check=False).returncode == 0
    vectors = dict(np.load(script.parent / "parity.npz"))
    vectors["out.logits"] = vectors["out.logits"] + 1
    np.savez(script.parent / "parity.npz", **vectors)
    assert subprocess.run([sys.executable, script], capture_output=True, check=False).returncode == 1


def test_what_differs_from_the_graph_is_an_error(folder):
    recipe, result = made(folder, "[]", "emit: [onnx]\n", "damaged")
    emission = onnx_for(open_recipe_model(recipe), recipe)
    file = result.path / "onnx" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    with pytest.raises(ParityError, match="the ONNX model differs from the graph"):
        verify_onnx(emission, result.path / "onnx", memory=1 << 30)


def test_evaluation_needs_a_checkpoint(folder):
    path = write_recipe(folder, "[]", "emit: [onnx]\nevaluate: {data: text.txt}\n", "evaluated.yaml")
    with pytest.raises(RecipeError, match="`evaluate` measures a checkpoint, and none is written"):
        Recipe.load(path)


def test_running_needs_onnxruntime_and_a_tokenizer_alone(folder, capsys):
    """The same tokens as the graph's likeliest ones, one by one; neither torch nor transformers is imported."""
    recipe, result = made(folder, QUANTIZED, "emit: [onnx: {accuracy-level: 0}]\n", "running")
    graph = onnx_for(open_recipe_model(recipe), recipe).graph
    Pipeline([Quantize(bits=4, group=32)]).run(graph)
    ids, path = [[5, 9, 60, 31]], result.path / "onnx" / "model.onnx"
    for _ in range(6):
        ids[0].append(int(run(graph, {"input_ids": torch.tensor(ids)})["logits"][0, -1].argmax()))
    assert [token for token, _ in Runner(path, threads=1).greedy(ids[0][:4], 6)] == ids[0][4:]
    code = (
        "import sys; from compiler.cli import main; "
        f"assert main(['run', {str(path)!r}, 'Hello', '--max-new-tokens', '4', '--tokens-per-second']) == 0; "
        "assert not {'torch', 'transformers', 'onnx_ir'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "tokens/s" in found.stdout


def test_what_cannot_be_run_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="ONNX Runtime cannot load it"):
        Runner(tmp_path / "none.onnx")
