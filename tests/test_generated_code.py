"""The text of generated modules: short, formatted, typed, the same in every process; and what cannot be written."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from backends.torch_module.code import Code, wrapped
from backends.torch_module.emitters import EMITTERS
from compiler.errors import TargetError
from compiler.frontend.capture import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.ops import operations, tokens
from compiler.ir.types import TensorType
from compiler.target import emission_of
from tests.emitted import written_for
from tests.families import FAMILIES
from tests.latent import latent_graph
from tests.test_generated import GOLDEN, LATENT, ROOT

KERNELS = ROOT / "backends" / "kernels"
SHOWN = {"sizes by layer": None, "windows": None, "caps": 4, "some layers": None, "norms of heads": 8}
"""What golden files show, and the bits of its cache."""


@pytest.mark.parametrize("kind", SHOWN)
def test_the_code_of_thirty_layers_is_short(kind, golden):
    name, ranks, pairs, normed = LATENT[kind]
    graph = capture(FAMILIES[name].config(30), architecture=FAMILIES[name].architecture)
    emission = emission_of(latent_graph(graph, ranks * 10, pairs * 10, normed=normed), "auto", SHOWN[kind])
    written = written_for(emission)
    for file, text in written.items():
        golden(GOLDEN / kind.replace(" ", "_") / file, text)
    assert max(len(text.splitlines()) for text in written.values()) < 600
    carried = emission.files.keys() - written.keys()
    assert {"latent_decode.py", "launch.py"} <= carried
    assert all(emission.files[file] == (KERNELS / file).read_text() for file in carried)


@pytest.mark.parametrize(
    "command", [("ruff", "check"), ("ruff", "format", "--check"), ("pyright", "--pythonpath", sys.executable)]
)
def test_the_code_is_formatted_and_typed(command, tmp_path):
    """With the project's own rules, and types as pyright checks them by default."""
    copy = tmp_path / "generated"
    shutil.copytree(GOLDEN, copy)
    kernels = list(KERNELS.glob("*.py"))  # whose own tests hold their style
    for folder, file in product(copy.iterdir(), kernels if command[0] == "pyright" else ()):
        shutil.copy(file, folder)
    settings = {"typeCheckingMode": "basic", "ignore": [f"**/{file.name}" for file in kernels]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tool = Path(sys.executable).with_name(command[0])
    done = subprocess.run([tool, *command[1:], "generated"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_cannot_be_generated_is_refused_by_name():
    graph = capture(FAMILIES["llama"].config(), architecture="LlamaForCausalLM")
    graph.origin = replace(graph.origin, architecture="LlamaForTokenClassification")
    graph.outputs["more"] = graph.outputs["logits"]
    with pytest.raises(TargetError, match="LlamaForTokenClassification has outputs that no generated module has"):
        emission_of(graph, "generated")


LONG = (
    "self.map = nn.Parameter(torch.empty(config.one_size, config.another_size, config.first[layer_idx] + "
    "config.second_size))",
    "x = some_rather_long_name + another_rather_long_name * self.weight(the_first_argument, the_second_argument, "
    "third, fourth)",
    "return self.first_projection(hidden_states) / self.second_projection(hidden_states).sum(dim=-1) * 2.5 + "
    "another_offset",
    "self.layers = nn.ModuleList(CompressedModelLayer(config, layer_idx) for layer_idx in "
    "range(config.number_of_layers))",
)


@pytest.mark.parametrize("line", LONG)
def test_long_lines_are_laid_out_as_ruff_does(line, tmp_path):
    line = f"        {line}"
    pieces = wrapped(line)
    assert max(map(len, pieces)) <= 120 < len(line)
    text = f"class A:\n    def f(self) -> None:\n{chr(10).join(pieces)}\n"
    command = [Path(sys.executable).with_name("ruff"), "format", "--config", ROOT / "pyproject.toml", "-q", "-"]
    assert subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout == text


@pytest.mark.parametrize("op, attrs", [("layer_norm", {}), ("rms_norm", {}), ("rms_norm", {"offset": 1.0})])
def test_a_norm_by_vectors_that_are_computed_is_by_these(op, attrs):
    names = ("x", "weight", "bias")[: 3 if op == "layer_norm" else 2]
    given = {name: torch.randn(5) for name in names}
    graph = Graph("norm")
    vectors = [graph.add_input(name, TensorType(torch.float32, (5,))) for name in names]
    graph.outputs["y"] = graph.op(op, vectors, {"eps": 1e-5, **attrs})
    site: Any = SimpleNamespace(node=graph.outputs["y"].node, args=[Code(name) for name in names], leaf=lambda: None)
    found = eval(EMITTERS[op](site).text, {"F": torch.nn.functional, **given})
    torch.testing.assert_close(found, run(graph, given)["y"])


@pytest.mark.parametrize("kind", ["xlm-roberta", "bert"])
def test_any_name_of_a_family_makes_code_that_python_reads(kind):
    """Files, classes and the model type are named after the family, whose name may hold what a module's cannot."""
    sizes = FAMILIES["bert"].options
    config = AutoConfig.for_model(kind, num_hidden_layers=1, **sizes)
    graph = capture(config, architecture="BertForMaskedLM" if kind == "bert" else "XLMRobertaForMaskedLM")
    emission = emission_of(graph, "generated")
    modules = {file.removesuffix(".py"): text for file, text in emission.files.items() if file.endswith(".py")}
    assert all(ast.parse(text) and name.isidentifier() for name, text in modules.items())


def test_every_operation_has_code():
    without = {op.name for op in tokens.OPS}  # what chooses tokens is written in ONNX only
    assert set(EMITTERS) == set(operations()) - without


SAME = """
import sys
from compiler.frontend.capture import capture
from compiler.target import emission_of
from tests.families import FAMILIES
for name in ("gemma3", "modernbert"):
    graph = capture(FAMILIES[name].config(3), architecture=FAMILIES[name].architecture)
    emission = emission_of(graph, "generated")
    print(sorted(emission.files.items()), sorted(emission.config.items()), list(emission.tensors))
"""


def test_the_code_does_not_depend_on_the_order_of_sets():
    """These families make their rotary tables in the order of a set of strings, which each process shuffles."""
    made = set()
    for seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SAME]
        made.add(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(made) == 1
