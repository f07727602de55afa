"""A real model from end to end: SmolLM2-135M-Instruct out of its GGUF (``make test`` fetches it)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compiler import Recipe, capture, compress
from compiler.evaluate import cache_size, load_model, load_tokenizer
from compiler.evaluate.decode import greedy, prompt_ids
from compiler.evaluate.texts import TextData
from compiler.ir.execute import run
from compiler.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ROOT / "benchmarks/data/persuasion.txt"
NEW_TOKENS = 64

pytestmark = pytest.mark.real
DEMO = pytest.mark.xdist_group("demo")  # one process makes it, while another tests the rest
LATENT = pytest.mark.xdist_group("latent")


@pytest.fixture(scope="module")
def original():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def windows(tokenizer):
    return TextData(TEXT, samples=2, length=128).windows(tokenizer)


@pytest.fixture(scope="module")
def expected(original, windows):
    with torch.no_grad():
        return original(windows).logits


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(MODEL), "passes": ["gqa-to-mla"]}))
    compress(Recipe.load(recipe), folder / "out")
    return load_model(folder / "out")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The recipe of ``make demo``, through the command, as a user runs it."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "compiler.cli", str(ROOT / "recipes/demo.yaml"), "-o", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@LATENT
def test_the_captured_graph_is_bit_equal_to_transformers(windows, expected):
    (logits,) = run(capture(MODEL), {"input_ids": windows}).values()
    assert torch.equal(logits, expected)


@LATENT
def test_latent_attention_computes_the_same_function(latent, windows, expected):
    assert type(latent).__module__ == "transformers.models.deepseek_v3.modeling_deepseek_v3"
    with torch.no_grad():
        logits = latent(windows).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@LATENT
def test_latent_attention_writes_the_same_words(latent, original, tokenizer):
    ids = prompt_ids(tokenizer, "Tell me a story about a fox and a crow.", chat=True)
    ours, theirs = (list(greedy(each, ids, NEW_TOKENS, stop=False)) for each in (latent, original))
    assert len(theirs) == NEW_TOKENS
    assert ours == theirs


@LATENT
def test_latent_attention_has_the_same_live_cache(latent, original):
    assert cache_size(latent) == cache_size(original) is not None


@DEMO
def test_the_demo_shows_what_it_cost(demo):
    out, printed = demo
    report = json.loads((out / "compress/report.json").read_text())
    found, before = report["evaluation"]["metrics"], report["evaluation"]["reference"]
    assert found["kl"]["value"] < 0.05
    assert found["agreement"]["value"] > 0.9
    assert found["perplexity"]["value"] == pytest.approx(before["perplexity"]["value"], rel=0.03)
    assert report["evaluation"]["cache"] == report["evaluation"]["reference_cache"]
    assert "perplexity" in printed


@DEMO
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


@DEMO
def test_the_demo_answers_with_nothing_but_transformers(demo):
    out, _ = demo
    command = [sys.executable, str(ROOT / "benchmarks/answer.py"), str(out), "What is the capital of France?"]
    # Run elsewhere, so that nothing of this project can be imported.
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deepseek_v3" in done.stdout
    assert "Paris" in done.stdout
