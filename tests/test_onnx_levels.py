"""Which products take their inputs as they are is decided by what rounding them changes, measured."""

from __future__ import annotations

import json

import onnx
import pytest
import torch

from backends.onnx import emit, measured, propose
from backends.onnx.levels import Levels, require_products
from compiler.errors import TargetError
from compiler.ir.types import TensorType
from compiler.job import compress
from compiler.pipeline import Pipeline
from compiler.recipe import Recipe
from passes import Quantize
from tests.captures import graph_of, plan_of
from tests.families import FAMILIES
from tests.small import write_folder, write_recipe
from tests.test_onnx_quantised import computed, one_product


def levels(file) -> dict[str, int]:
    """The accuracy level of each product with codes."""
    nodes = [node for node in onnx.load(file, load_external_data=False).graph.node if node.op_type == "MatMulNBits"]
    found = {node.input[1].removesuffix(".codes"): {each.name: each.i for each in node.attribute} for node in nodes}
    return {name: attributes["accuracy_level"] for name, attributes in found.items()}


def test_what_is_measured_is_what_rounding_changes(tmp_path):
    """A bound on either side of the error decides; tensors stay as they were."""
    graph = one_product(128, 4, 32, True)
    inputs = {"x": torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1))}
    for name in ("rounded", "exact"):
        (tmp_path / name).mkdir()
    rounded, emission = computed(graph, tmp_path / "rounded", inputs, accuracy=4)
    exact, _ = computed(graph, tmp_path / "exact", inputs, accuracy=0)
    error = float((rounded - exact).norm() / exact.norm())
    for bound, level in ((error * 1.01, 4), (error * 0.99, 0)):
        found = measured(emission, tmp_path / "rounded", [inputs], bound)
        assert found.levels is not None
        assert found.levels.errors == {"part.weight": pytest.approx(error, rel=1e-3)}
        assert levels(tmp_path / "rounded" / "model.onnx") == {"part.weight": level}
    assert sorted(file.name for file in (tmp_path / "rounded").glob(".*")) == []


def test_products_that_share_a_weight_are_measured_together(tmp_path):
    """As one product of what each of them reads."""
    x = torch.randn(4, 3, 128, generator=torch.Generator().manual_seed(1))
    x[2:, :, 0] *= 40  # the second's inputs are rounded coarser
    found = []
    for name, given in (("one", {"x": x}), ("two", {"x": x[:2], "again": x[2:]})):
        graph = one_product(128, 4, 32, True)
        if "again" in given:
            read = graph.add_input("again", TensorType(torch.float32, ("B", "T", 128)))
            weight, bias = graph.params["part.weight"], graph.params["part.bias"]
            graph.outputs["z"] = graph.op("linear", [read, weight, bias], scope="part")
        emission = propose(graph)
        (tmp_path / name).mkdir()
        emit(emission, graph.sources, tmp_path / name)
        levelled = measured(emission, tmp_path / name, [given], 1.0).levels
        assert levelled is not None
        found.append(levelled.errors)
    assert found[1] == {"part.weight": pytest.approx(found[0]["part.weight"], rel=1e-5)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_product_of_a_model_is_measured(family, tmp_path):
    graph = graph_of(family, 0)
    Pipeline([Quantize(bits=4, group=16, tied="copy")]).run(graph)
    emission = propose(graph)
    emit(emission, graph.sources, tmp_path)
    found = measured(emission, tmp_path, [FAMILIES[family].inputs(seed=1)], 1.0)
    assert found.levels is not None and found.levels.errors.keys() == levels(tmp_path / "model.onnx").keys()
    assert all(0 < error < 0.05 for error in found.levels.errors.values())
    middle = sorted(found.levels.errors.values())[len(found.levels.errors) // 2]
    mixed = measured(emission, tmp_path, [FAMILIES[family].inputs(seed=1)], middle)
    chosen = levels(tmp_path / "model.onnx")
    assert mixed.levels is not None and 0 in chosen.values() and 4 in chosen.values()
    assert chosen == {name: 0 if error > middle else 4 for name, error in mixed.levels.errors.items()}


def test_a_job_reports_what_it_measured(tmp_path):
    folder = write_folder(tmp_path)
    data = "calibration: {data: text.txt, samples: 2, length: 32}\n"
    rest = data + "emit: [onnx: {input-error: 0.0001}]\n"
    result = compress(Recipe.load(write_recipe(folder, "[quantize: {bits: 4, group: 32}]", rest)), folder / "out")
    report = json.loads((result.path / "compress" / "report.json").read_text())["onnx"] or {}
    chosen = levels(result.path / "onnx" / "model.onnx")
    assert set(chosen.values()) == {0} and report["input_errors"].keys() == chosen.keys()
    assert any(f"{len(chosen)} of {len(chosen)} products" in line for line in report["loads_in"])


@pytest.mark.parametrize("passes", ["[]", "[quantize: {bits: 4, group: 32}]"], ids=["no codes", "no data"])
def test_what_cannot_be_measured_is_refused(tmp_path, passes):
    folder = write_folder(tmp_path)
    recipe = Recipe.load(write_recipe(folder, passes, "emit: [onnx: {input-error: 0.01}]\n"))
    with pytest.raises(TargetError, match="`input-error`"):
        compress(recipe, folder / "out")


def test_a_pair_of_models_is_not_measured():
    with pytest.raises(TargetError, match="an encoder-decoder is two"):
        require_products(propose(graph_of("t5", 0)))


@pytest.mark.parametrize(
    ("target", "prompts", "message"), [("ort-cuda", "same", "float32"), ("ort-cpu", "int8", "`prompts: int8`")]
)
def test_products_that_a_twin_does_not_stand_for_are_not_measured(target, prompts, message):
    graph = plan_of("llama")
    Pipeline([Quantize(bits=4, group=16, tied="copy")]).run(graph, planned=True)
    with pytest.raises(TargetError, match=message):
        require_products(propose(graph, target, prompts=prompts))


def test_a_pruned_vocabulary_is_not_that_of_calibration_data():
    graph = plan_of("llama")
    Pipeline([Quantize(bits=4, group=16, tied="copy")]).run(graph, planned=True)
    graph.tokens = (0, 1)
    with pytest.raises(TargetError, match="smaller vocabulary"):
        require_products(propose(graph))


def test_a_note_names_the_error_of_the_others_only_where_there_are_others():
    assert "the others are moved by at most 0.001;" in Levels({"a": 0.1, "b": 0.001}, 0.01).note()
    assert "the others" not in Levels({"a": 0.1}, 0.01).note()
