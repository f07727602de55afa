"""The text of generated modules: short, formatted, typed, the same in every process; and what cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from backends.torch_module.code import wrapped
from backends.torch_module.emitters import EMITTERS
from compiler.errors import TargetError
from compiler.frontend.capture import capture
from compiler.ir.ops import operations, tokens
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
