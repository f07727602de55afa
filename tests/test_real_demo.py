"""What ``make demo`` makes of a real model, a file of its own: while one process makes it, another tests the rest."""

import json
import subprocess
import sys

import pytest

from compiler import Recipe
from compiler.plan import make_plan
from tests.test_real import ROOT

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The recipe of ``make demo``, through the command, as a user runs it."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "compiler.cli", str(ROOT / "recipes/demo.yaml"), "-o", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_demo_shows_what_it_cost(demo):
    out, printed = demo
    report = json.loads((out / "compress/report.json").read_text())
    found, before = report["evaluation"]["metrics"], report["evaluation"]["reference"]
    assert found["kl"]["value"] < 0.05
    assert found["agreement"]["value"] > 0.9
    assert found["perplexity"]["value"] == pytest.approx(before["perplexity"]["value"], rel=0.03)
    assert report["evaluation"]["cache"] == report["evaluation"]["reference_cache"]
    assert "perplexity" in printed


def test_the_plan_knew_every_byte(demo):
    out, _ = demo
    plan = make_plan(Recipe.load(ROOT / "recipes/demo.yaml"))
    written = json.loads((out / "compress/report.json").read_text())["output"]["tensor_bytes"]
    on_disk = sum(tensor_bytes(path) for path in out.glob("*.safetensors"))
    assert plan.output.tensor_bytes == written == on_disk


def tensor_bytes(path):
    """Bytes of tensors in a safetensors file: all but its header and the header's length."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - header - 8


def test_the_demo_answers_with_nothing_but_transformers(demo):
    out, _ = demo
    command = [sys.executable, str(ROOT / "benchmarks/answer.py"), str(out), "What is the capital of France?"]
    # Run elsewhere, so that nothing of this project can be imported.
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deepseek_v3" in done.stdout
    assert "Paris" in done.stdout
