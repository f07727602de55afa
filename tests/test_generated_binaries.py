"""Checkpoints with compiled kernels: what is compiled is what their modules launch, and they load where nothing is."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import partial

import pytest
import torch
from transformers import DynamicCache, StaticCache

from backends.binaries.package import unique, with_imports
from backends.kernels import table_linear
from backends.kernels.binary import specialised
from backends.kernels.launch import Gpu, planned_for
from backends.safetensors import emit
from backends.torch_module import kernel_calls
from backends.torch_module.calls import CALLS, Reach
from backends.torch_module.packing import TableScheme
from compiler import Recipe, binaries, compress
from compiler.binaries import launches_of
from compiler.errors import RecipeError, TargetError
from compiler.evaluate import load_model
from compiler.frontend.capture import capture
from compiler.pipeline import Pipeline
from compiler.plan import make_plan
from compiler.target import emission_of
from passes import LowRank, Quantize
from tests.families import FAMILIES
from tests.latent import latent_graph

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
INT4 = Quantize(bits=4, group=32, where="linear")
KINDS = {
    "packed, zero points": ("llama", [Quantize(bits=3, group=0, symmetric=False, where="mlp")], (), 0),
    "experts": ("qwen3_moe", [Quantize(bits=4, group=32, where="experts")], (), 0),
    "tables": ("llama", [Quantize(type="codebook", bits=3, group=0, where="linear")], (), 0),
    "experts' tables": ("qwen3_moe", [Quantize(type="bit-serial", bits=2, group=0, where="experts")], (), 0),
    "pairs": ("qwen2", [LowRank(where="mlp", form="pair", keep=0.7, ranks="uniform")], (), 0),
    "latents": ("llama", [], ((16, 11), (4, 2)), 0),
    "latents of bytes": ("llama", [INT4], ((32, 64), (4, 4)), 8),
    "keys and values of bytes": ("gpt_oss", [], (), 8),
    "caps and windows": ("gemma2", [], (), 4),
}
KERNELS = ("packed_linear", "packed_dense", "table_linear", "low_rank_linear", "latent_decode", "cached_decode")


def graph_of(kind):
    name, passes, (ranks, pairs), bits = (*KINDS[kind][:2], KINDS[kind][2] or ((), ()), KINDS[kind][3])
    changes = WIDE if name in ("llama", "qwen2") else {"hidden_size": 64}
    changes = changes | ({"moe_intermediate_size": 32} if name == "qwen3_moe" else {})
    graph = capture(FAMILIES[name].build(3, layers=2, **changes))
    graph = latent_graph(graph, ranks, pairs) if ranks else graph
    given = [FAMILIES[name].inputs(batch=2, tokens=24, seed=seed) for seed in range(3)]
    Pipeline(passes).run(graph, calibration=lambda _: given)
    return name, graph, bits


def noting(kernel, seen, *inputs, **named):
    """``kernel`` on a CPU; what it would launch on a GPU is added to ``seen``."""
    file = importlib.import_module(f"backends.kernels.{kernel}")
    if file.outside(*inputs, **named) is None:
        seen |= {(kernel, specialised(launch).key) for launch in file.plan(*inputs, **named).compiled}
    return getattr(file, kernel)(*inputs, **named)


@pytest.mark.parametrize("kind", KINDS)
def test_binaries_are_of_all_that_a_model_launches_and_of_nothing_else(kind, tmp_path, monkeypatch):
    """Whatever the batch, the padding, the cache and its length; a processor of 132 multiprocessors is an H100."""
    name, graph, bits = graph_of(kind)
    emit(emission_of(graph, "generated", bits or None), graph.sources, tmp_path)
    model = load_model(tmp_path, trust_remote_code=True)
    for weight in model.parameters():  # which lie in a file at any address, and on a GPU at even ones
        weight.data = weight.data.clone()
    calls = kernel_calls(graph, torch.float32, bits)
    compiled = {(call.kernel, key) for call in calls for key in unique(launches_of([call], "sm_90"))}
    module, seen = sys.modules[type(model).__module__], set()
    for kernel in KERNELS:
        monkeypatch.setattr(module, kernel, partial(noting, kernel, seen), raising=False)
    monkeypatch.setattr(module, "decodes", lambda query: query.shape[2] == 1, raising=False)
    for batch, length, static, padding in [(1, 1, False, 0), (2, 63, False, 1), (4, 15, True, 0), (1, 31, True, 2)]:
        ids = FAMILIES[name].inputs(batch=batch, tokens=length)["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        cache = StaticCache(config=model.config, max_cache_len=48) if static else DynamicCache(config=model.config)
        with torch.no_grad():
            for _ in range(3):
                model(ids, attention_mask=mask if padding else None, past_key_values=cache)
                ids, mask = ids[:, -1:], torch.cat((mask, mask[:, -1:]), 1)
    assert seen <= compiled
    assert {kernel for kernel, _ in seen} == {call.kernel for call in calls} == {kernel for kernel, _ in compiled}


def test_maps_with_tables_launch_for_any_number_of_tokens_what_was_listed():
    """Sums are split among programs while there are few blocks of tokens."""
    calls = [*CALLS["tables"](Reach(torch.float16, 0, 1 << 17), (300, 400), TableScheme(3, 0, 8))]
    with planned_for(Gpu(8, True)):
        listed = unique(launch for call in calls for launch in table_linear.plan(*call.inputs).compiled)
        _, *weight = calls[0].inputs
        given = (torch.empty(tokens, 400, dtype=torch.float16, device="meta") for tokens in range(1, 700))
        made = unique(launch for x in given for launch in table_linear.plan(x, *weight).compiled)
    assert listed.keys() == made.keys()
    assert {launch.constants.get("SPLITS") for launch in made.values()} == {None, 2, 4}


def projected():
    """Two linear maps one after another that are no pair: what comes out of the last layer is narrowed for the head."""
    changes = {"word_embed_proj_dim": 16, "hidden_size": 32, "do_layer_norm_before": False}
    graph = capture(FAMILIES["opt"].build(3, layers=2, **changes))
    Pipeline([Quantize(bits=4, group=16, where="mlp")]).run(graph)
    return graph


def half_looked_up():
    """Pairs whose second factor is looked up in tables, beside packed maps."""
    graph = capture(FAMILIES["qwen2"].build(3, layers=2, **WIDE))
    given = [FAMILIES["qwen2"].inputs(batch=2, tokens=24)]
    pairs = LowRank(where="mlp", form="pair", keep=0.7, ranks="uniform")
    passes = [pairs, Quantize(bits=4, group=32, where="attention")]
    Pipeline(passes).run(graph, calibration=lambda _: given)
    maps = [node for node in graph.nodes_named("linear") if node.input(0).node is not None]
    second = [node.input(1).name for node in maps if node.input(0).node.op.name == "linear"]
    Pipeline([Quantize(type="codebook", bits=3, group=0, where=name) for name in second]).run(graph)
    return graph


@pytest.mark.parametrize("build", [projected, half_looked_up])
def test_kernels_that_there_are_binaries_of_lie_beside_the_code(build):
    """Else the manifest names a file that is not there, and the loader takes it for one that was changed."""
    graph = build()
    files = emission_of(graph, "generated", binaries=True).files
    kernels = {call.kernel for call in kernel_calls(graph, torch.float32)}
    assert "packed_linear" in kernels
    assert {f"{file}.py" for file in with_imports(kernels)} <= set(files)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe's job with compiled kernels: of a map of low rank, for which few binaries do."""
    folder = tmp_path_factory.mktemp("binaries")
    FAMILIES["llama"].build(3, layers=2, **WIDE).save_pretrained(folder / "source")
    compress(recipe_in(folder, "binaries: [sm_80, gfx942]"), folder / "out")
    return folder


PAIR = "low-rank: {where: mlp.down, form: pair, keep: 50%, ranks: uniform, metric: plain, update: false, bias: false}"


def recipe_in(folder, emit, passes=PAIR):
    text = f"model: {folder / 'source'}\npasses: [{passes}]\nemit: [safetensors: {{{emit}}}]\n"
    (folder / "recipe.yaml").write_text(text)
    return Recipe.load(folder / "recipe.yaml")


def test_a_recipe_writes_binaries_that_its_code_names(folder):
    out = folder / "out"
    manifest = out / "kernels" / "aot" / "manifest.json"
    entries = json.loads(manifest.read_text())["binaries"]
    assert {entry["target"] for entry in entries} == {"sm_80", "gfx942"}
    assert all((manifest.parent / entry["file"]).read_bytes().startswith(b"\x7fELF") for entry in entries)
    assert hashlib.sha256(manifest.read_bytes()).hexdigest() in (out / "aot.py").read_text()
    assert (out / "kernels" / "build" / "torch-cpu" / "low_rank_linear.py").exists()


CLEAN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

name, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
module = sys.modules[type(model).__module__]
ids = torch.tensor([[5, 9, 23, 42, 7, 11, 30]])
with torch.no_grad():
    logits = model(ids).logits
model.save_pretrained(again)
copy = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
with torch.no_grad():
    same = torch.equal(copy(ids).logits, logits)
paths = [module.kernel_binary(place, "manifest.json") for place in (name, again)]
alone = not any(name.split(".")[0] in ("compiler", "passes", "backends") for name in sys.modules)
print(json.dumps({"logits": logits.tolist(), "same": same, "alone": alone, "paths": paths}))
"""
COMMIT = "0123456789" * 4


@pytest.mark.parametrize("hub", [False, True])
def test_binaries_are_found_beside_the_weights_in_directories_and_repositories(hub, folder, tmp_path):
    """In a process without this project; what ``save_pretrained`` writes has none, and computes the same."""
    place = tmp_path / "hub" / "models--somebody--small"
    shutil.copytree(folder / "out", place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    directory = place / "snapshots" / COMMIT if hub else folder / "out"
    name = "somebody/small" if hub else str(directory)
    packages = sysconfig.get_paths()["purelib"]
    code = f"import sys; sys.path[:] = [p for p in sys.path if 'lib/python' in p] + [{packages!r}]\n{CLEAN}"
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", code, name, str(tmp_path / "again")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"] and found["alone"]
    assert found["paths"] == [str(directory / "kernels" / "aot" / "manifest.json"), None]
    with torch.no_grad():
        logits = load_model(folder / "out", trust_remote_code=True)(torch.tensor([[5, 9, 23, 42, 7, 11, 30]])).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), logits)


def test_what_cannot_have_binaries_is_refused(folder, monkeypatch):
    with pytest.raises(RecipeError, match="sm_70"):
        recipe_in(folder, "binaries: [sm_70]")
    with pytest.raises(RecipeError, match="no stock class calls kernels"):
        recipe_in(folder, "binaries: [sm_80], class: stock")
    grouped = "quantize: {type: codebook, bits: 3, group: 16, where: linear}"
    for passes in ("", grouped):
        assert "no kernel computes anything" in make_plan(recipe_in(folder, "binaries: [sm_80]", passes)).refusal
    monkeypatch.setattr(binaries, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match="`binaries` needs Triton"):
        compress(recipe_in(folder, "binaries: [sm_80]"), folder / "without")
