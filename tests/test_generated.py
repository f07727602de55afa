"""Generated modules: what is written from a graph computes what the graph computes, in plain transformers."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from backends.safetensors import emit
from compiler.evaluate import load_model
from compiler.frontend.capture import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.layers import segments
from compiler.target import emission_of
from tests.families import FAMILIES
from tests.latent import latent_graph

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "generated"
CAUSAL = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "granite", "cohere2",
    "smollm3", "gpt2", "gpt_neox", "opt", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3",
]  # fmt: skip
NEW_TOKENS = 8


def tolerance(graph: Graph) -> float:
    """Rounding of float32 sums in another order, adding up over the layers; relative to the largest output."""
    return 16 * torch.finfo(torch.float32).eps * max(1, len(segments(graph)))


def written(graph: Graph, directory: Path):
    """``graph`` as a generated module, loaded again by transformers."""
    directory.mkdir(parents=True)
    emit(emission_of(graph, "generated"), graph.sources, directory)
    return load_model(directory, trust_remote_code=True)


def error(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).abs().max() / ours.abs().max())


def greedy(graph: Graph, ids: Tensor, count: int = NEW_TOKENS) -> Tensor:
    """Greedy tokens by a whole forward of the graph for each."""
    for _ in range(count):
        ids = torch.cat((ids, run(graph, {"input_ids": ids})["logits"][:, -1:].argmax(-1)), 1)
    return ids


def generated(model, ids: Tensor, **options) -> Tensor:
    return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


def check_language_model(graph: Graph, model, given: dict[str, Tensor]) -> None:
    """Forward, padding on the left, and greedy continuation are the graph's."""
    logits = run(graph, given)["logits"]
    with torch.no_grad():
        assert error(model(**given).logits, logits) <= tolerance(graph)
    expected = greedy(graph, given["input_ids"])
    assert torch.equal(generated(model, given["input_ids"]), expected)
    ids = torch.cat((torch.zeros(2, 3, dtype=torch.long), given["input_ids"]), 1)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits[:, 3:]
    assert error(padded, logits) <= tolerance(graph)
    assert torch.equal(generated(model, ids, attention_mask=mask)[:, 3:], expected)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_generated_language_model_computes_and_continues_as_its_graph(name, tmp_path):
    family = FAMILIES[name]
    graph = capture(family.build(3, layers=3))
    model = written(graph, tmp_path / name)
    check_language_model(graph, model, family.inputs(batch=2, tokens=9))


LATENT = {
    "one table": ("llama", (16, 16, 16), (4, 4, 4), True),
    "sizes by layer": ("llama", (16, 11, 7), (4, 2, 3), False),
    "some layers": ("qwen2", (16, -1, 12), (4, 0, 2), False),
    "norms of heads": ("qwen3", (16, 11, 16), (3, 3, 2), False),
    "windows": ("gemma3", (16, 12, 9), (3, 2, 3), True),
    "caps": ("gemma2", (20, 20, 20), (4, 4, 4), False),
    "no rotation": ("opt", (12, 10, 8), (0, 0, 0), False),
    "some rotation": ("smollm3", (12, 10, 8), (3, 0, 2), False),
    "windows and a cap without rotation": ("gemma2", (20, 9, 20), (0, 0, 4), False),
}


@pytest.mark.parametrize("kind", LATENT)
def test_generated_latent_attention_computes_and_continues_as_its_graph(kind, tmp_path):
    name, ranks, pairs, normed = LATENT[kind]
    family = FAMILIES[name]
    graph = latent_graph(capture(family.build(3, layers=3)), ranks, pairs, normed=normed)
    model = written(graph, tmp_path / kind.replace(" ", "_"))
    check_language_model(graph, model, family.inputs(batch=2, tokens=9))


CLEAN = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
directory, again = sys.argv[1:]
assert not any(name.split(".")[0] in ("compiler", "passes", "backends") for name in sys.modules)
ids = torch.tensor([[5, 9, 23, 42, 7, 11, 30]])
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(ids).logits
    hidden = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()(ids).last_hidden_state
    head = model.get_output_embeddings()(hidden)
continued = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
beams = model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0)
model.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
with torch.no_grad():
    same = torch.equal(reloaded(ids).logits, logits)
found = {"logits": logits, "head": head, "continued": continued, "beams": beams, "same": same}
torch.save(found, directory + "/found.pt")
for name in ("compiler", "passes", "backends"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} can be imported")
"""
"""What somebody does who has torch and transformers and nothing of this project."""


@pytest.mark.parametrize("kind", ["sizes by layer", "windows"])
def test_it_loads_where_this_project_is_not_installed(kind, tmp_path):
    name, ranks, pairs, normed = LATENT[kind]
    graph = latent_graph(capture(FAMILIES[name].build(3, layers=3)), ranks, pairs, normed=normed)
    directory = tmp_path / "out"
    directory.mkdir()
    emit(emission_of(graph), graph.sources, directory)
    check_clean_run(graph, directory, tmp_path)


def check_clean_run(graph: Graph, directory: Path, tmp_path: Path) -> None:
    """A process without this project loads what is in ``directory`` and computes and continues as ``graph``."""
    packages = sysconfig.get_paths()["purelib"]
    code = f"import sys; sys.path[:] = [p for p in sys.path if 'lib/python' in p] + [{packages!r}]\n{CLEAN}"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", code, str(directory), str(tmp_path / "again")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(directory / "found.pt")
    ids = torch.tensor([[5, 9, 23, 42, 7, 11, 30]])
    assert error(found["logits"], run(graph, {"input_ids": ids})["logits"]) <= tolerance(graph)
    assert torch.equal(found["continued"], greedy(graph, ids))
    assert found["same"] and found["beams"].shape == (1, 11)


def test_caches_hold_latents_and_rotary_keys_and_windows_alone(tmp_path):
    ranks, pairs = (12, 9, -1), (3, 2, 0)
    graph = latent_graph(capture(FAMILIES["gemma3"].build(3, layers=3)), ranks, pairs)
    model = written(graph, tmp_path / "held")
    ids = FAMILIES["gemma3"].inputs(batch=2, tokens=9)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache = model(input_ids=ids[:, :1], past_key_values=cache).past_key_values
    shapes = [[tuple(tensor.shape) for tensor in (layer.keys, layer.values)] for layer in cache.layers]
    window = 5 - 1  # what the next token will still see of those before it
    assert shapes == [
        [(2, 1, window, 12), (2, 1, window, 6)],
        [(2, 1, 10, 9), (2, 1, 10, 4)],
        [(2, 2, window, 16), (2, 2, window, 16)],
    ]
    assert cache.get_seq_length() == 10


def test_decoding_never_expands_keys_and_values(tmp_path):
    graph = latent_graph(capture(FAMILIES["llama"].build(3, layers=2)), (12, 12), (3, 3))
    model = written(graph, tmp_path / "absorbed")
    ids = FAMILIES["llama"].inputs(batch=2, tokens=40)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        with Sizes(model) as seen:
            model(input_ids=ids[:, :1], past_key_values=cache)
    expanded = 2 * 4 * 41 * 8  # batch, heads, tokens, the narrower of a head's keys and values
    assert max(seen.made) < expanded


class Sizes(TorchDispatchMode):
    """The sizes of all tensors that are made, besides views of weights."""

    def __init__(self, model):
        super().__init__()
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.made += [x.numel() for x in tensors if x.untyped_storage().data_ptr() not in self.weights]
        return result


@pytest.mark.parametrize("length", [1, 2, 3, 9, 40])
def test_absorbed_and_expanded_attention_agree(length, tmp_path):
    """Continuing a cache by any number of tokens gives what one forward over all of them gives."""
    graph = latent_graph(capture(FAMILIES["gemma2"].build(3, layers=2)), (30, 5), (3, 2))
    model = written(graph, tmp_path / "both")
    ids = FAMILIES["gemma2"].inputs(batch=2, tokens=12 + length)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :12]).past_key_values
        found = model(input_ids=ids[:, 12:], past_key_values=cache).logits
    assert error(found, run(graph, {"input_ids": ids})["logits"][:, 12:]) <= tolerance(graph)


def test_every_weight_learns_also_with_checkpoints_of_activations(tmp_path):
    graph = latent_graph(capture(FAMILIES["llama"].build(3, layers=2)), (12, 9), (3, 2))
    model = written(graph, tmp_path / "trained").train()
    ids = FAMILIES["llama"].inputs(batch=2, tokens=9)["input_ids"]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for plain, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, kept, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_loads_in_any_dtype_and_onto_a_device(dtype, tmp_path):
    graph = latent_graph(capture(FAMILIES["gemma3"].build(3, layers=3)), (12, 9, -1), (3, 2, 0))
    reference = written(graph, tmp_path / "typed")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "typed", trust_remote_code=True, dtype=dtype, device_map="cpu"
    ).eval()
    ids = FAMILIES["gemma3"].inputs(batch=2, tokens=9)["input_ids"]
    with torch.no_grad():
        found, expected = model(input_ids=ids), reference(input_ids=ids).logits
    assert found.logits.dtype == dtype and found.past_key_values.layers[1].keys.dtype == dtype
    assert error(found.logits.float(), expected) < 32 * torch.finfo(dtype).eps
    assert model.model.layers[1].self_attn.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    graph = latent_graph(capture(FAMILIES["gemma2"].build(3, layers=2)), (12, 12), (3, 3))
    model = written(graph, tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(tmp_path / "tied" / "model.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" in file.keys() and "lm_head.weight" not in file.keys()  # noqa: SIM118
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", trust_remote_code=True)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["sizes by layer", "windows"])
def test_it_compiles_without_graph_breaks(kind, tmp_path):
    """Reading, reading with padding, and decoding: each is one graph."""
    name, ranks, pairs, _ = LATENT[kind]
    model = written(latent_graph(capture(FAMILIES[name].build(3, layers=3)), ranks, pairs), tmp_path / "compiled")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = FAMILIES[name].inputs(batch=2, tokens=9)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
        padded = {"input_ids": ids, "attention_mask": mask}
        torch.testing.assert_close(compiled(**padded).logits, model(**padded).logits)
        caches = [model(input_ids=ids).past_key_values for _ in range(2)]
        step = compiled(input_ids=ids[:, :1], past_key_values=caches[0]).logits
        torch.testing.assert_close(step, model(input_ids=ids[:, :1], past_key_values=caches[1]).logits)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "deepseek_v2"])
def test_vectors_can_be_given_and_those_of_each_layer_are_handed_out(name, tmp_path):
    """As the stock class does: what enters each layer, and the last with the norm after it."""
    source = FAMILIES[name].build(3, layers=3)
    model = written(capture(source), tmp_path / name)
    given = FAMILIES[name].inputs(batch=2, tokens=9)
    vectors = model.get_input_embeddings()(given["input_ids"])
    with torch.no_grad():
        found = model(**given, output_hidden_states=True)
        assert torch.equal(model(inputs_embeds=vectors).logits, found.logits)
        expected = source(**given, output_hidden_states=True).hidden_states
    assert len(found.hidden_states) == len(expected) == 4
    assert all(error(ours, theirs) <= 1e-5 for ours, theirs in zip(found.hidden_states, expected, strict=True))
    continued = model.generate(inputs_embeds=vectors, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(continued, generated(model, given["input_ids"])[:, 9:13])
