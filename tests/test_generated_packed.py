"""Generated modules call kernels: packed weights of any widths stay packed from file to product; pairs are one call."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from backends.torch_module.packing import packed
from compiler.evaluate.parity import verify_by_reload
from compiler.frontend.capture import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph, Param
from compiler.ir.layers import copy_of
from compiler.pipeline import Pipeline
from compiler.target import emission_of
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import load
from compiler.weights.ops.quant import quantise
from compiler.weights.source import MemorySource
from passes import LowRank, Quantize
from passes.quantize.places import MATRIX_OPERANDS
from tests.captures import graph_of
from tests.families import FAMILIES
from tests.latent import latent_graph
from tests.test_generated import CAUSAL, GOLDEN, check_clean_run, check_language_model, error, tolerance, written

SCHEMES = ((4, 0, True), (3, 0, False), (8, 0, True), (5, 0, False), (2, 0, True))
"""Bits, group and symmetry, which weights get in turn."""


def mixed(graph: Graph) -> Graph:
    """``graph`` with all its matrices quantised, tied tables too; neighbours differ in widths and in zero points."""
    for index, param in enumerate(matrices_of(graph)):
        bits, group, symmetric = SCHEMES[index % len(SCHEMES)]
        group = group or (8 if param.type.shape[-1] % 8 == 0 and index % 2 else 0)
        param.expr = quantise(param.expr, bits, group, symmetric=symmetric, scale_dtype=param.storage)
    return graph


def matrices_of(graph: Graph) -> list[Param]:
    return [param for param in graph.params.values() if param.type.rank > 1 and _is_matrix(param)]


def _is_matrix(param: Param) -> bool:
    operands = {(node.op.name, i) for node in param.users for i, value in enumerate(node.inputs) if value is param}
    return param.persistent and all(i in MATRIX_OPERANDS.get(name, ()) for name, i in operands)


def dense(graph: Graph) -> Graph:
    """A copy with the values of its packed weights as tensors."""
    graph = copy_of(graph)
    chosen = {name: param for name, param in graph.params.items() if packed(param) is not None}
    values = dict(zip(chosen, evaluate([param.expr for param in chosen.values()], graph.sources), strict=True))
    graph.sources = {**graph.sources, "values": MemorySource(values)}
    for name, param in chosen.items():
        param.expr = load("values", name, param.expr.type)
    return graph


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_weights_of_any_widths_compute_as_their_graph(name, tmp_path):
    """And a saved copy has the same codes, bit by bit."""
    graph, given = mixed(graph_of(name)), FAMILIES[name].inputs(batch=2, tokens=9)
    model = written(graph, tmp_path / name)
    assert sum(packed(param) is not None for param in graph.params.values()) > 10
    with torch.no_grad():
        assert error(model(**given).logits, run(graph, given)["logits"]) <= tolerance(graph)
    model.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())


@pytest.mark.parametrize("name", ["bert", "vit", "whisper"])
def test_packed_encoders_and_pairs_compute_as_their_graph(name, tmp_path):
    graph = mixed(graph_of(name))
    model, given = written(graph, tmp_path / name), FAMILIES[name].inputs()
    given = {key: value for key, value in given.items() if key in graph.inputs}
    with torch.no_grad():
        found = model(**given)
    for key, value in run(graph, given).items():
        assert error(found[key], value) <= tolerance(graph)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_packed_models_continue_with_padding_and_from_a_cache(name, tmp_path):
    graph = mixed(graph_of(name))
    check_language_model(graph, written(graph, tmp_path / name), FAMILIES[name].inputs(batch=2, tokens=9))


def test_latent_attention_multiplies_what_it_unpacks(tmp_path):
    graph = mixed(latent_graph(graph_of("gemma2"), (12, 9), (3, 2)))
    model = written(graph, tmp_path / "latent")
    given = FAMILIES["gemma2"].inputs(batch=2, tokens=9)
    check_language_model(graph, model, given)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits)


def test_packed_weights_load_where_this_project_is_not_installed(tmp_path):
    graph = mixed(graph_of("llama"))
    directory = tmp_path / "out"
    written(graph, directory)
    check_clean_run(graph, directory, tmp_path)


def test_a_tied_table_is_one_set_of_parts(tmp_path):
    graph = mixed(graph_of("gemma2"))
    assert "lm_head.weight" in graph.params["model.embed_tokens.weight"].aliases
    model = written(graph, tmp_path / "tied")
    parts = {name for name in load_file(tmp_path / "tied" / "model.safetensors") if "embed" in name or "head" in name}
    assert parts == {"model.embed_tokens.weight_packed", "model.embed_tokens.weight_scale"}
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed
    assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_follow_the_dtype_and_codes_do_not(dtype, tmp_path):
    graph, given = mixed(graph_of("gemma2")), FAMILIES["gemma2"].inputs(batch=2, tokens=9)
    expected = written(graph, tmp_path / "typed")(**given).logits
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "typed", trust_remote_code=True, dtype=dtype, device_map="cpu"
    )
    held = load_file(tmp_path / "typed" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (dtype if tensor.is_floating_point() else torch.int32)
        assert tensor.is_floating_point() or name not in held or torch.equal(tensor, held[name])
    assert error(model(**given).logits.float(), expected) < 32 * torch.finfo(dtype).eps


def test_gradients_are_those_of_dense_weights(tmp_path):
    """To what is not quantised, to scales, and through packed maps to what is before them."""
    graph, given = mixed(graph_of("qwen2")), FAMILIES["qwen2"].inputs(batch=2, tokens=9)
    ours, plain = (written(g, tmp_path / name).train() for g, name in ((graph, "ours"), (dense(graph), "plain")))
    for model in (ours, plain):
        model(**given, labels=given["input_ids"]).loss.backward()
    expected = {name: weight.grad for name, weight in plain.named_parameters()}
    found = {name: weight.grad for name, weight in ours.named_parameters() if weight.is_floating_point()}
    assert all(gradient is not None for gradient in found.values())
    same = found.keys() & expected.keys()
    assert len(same) >= 5  # norms and biases of queries, keys and values
    for name in same:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)


def test_packed_modules_compile_without_graph_breaks(tmp_path):
    graph, ids = mixed(graph_of("gemma2")), FAMILIES["gemma2"].inputs(batch=2, tokens=9)["input_ids"]
    model = written(graph, tmp_path / "compiled")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
        caches = [model(input_ids=ids).past_key_values for _ in range(2)]
        step = compiled(input_ids=ids[:, :1], past_key_values=caches[0]).logits
        torch.testing.assert_close(step, model(input_ids=ids[:, :1], past_key_values=caches[1]).logits)


def test_scales_of_two_bytes_are_not_rounded_again(tmp_path):
    """The graph's weights are rounded to the dtype of their scales; generated code's, in float32, are not."""
    FAMILIES["llama"].build(3, layers=2).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    graph = mixed(capture(tmp_path / "source"))
    written(graph, tmp_path / "out")
    assert verify_by_reload(graph, tmp_path / "out", memory=10**9, own_code=True).performed


def test_the_body_alone_loads(tmp_path):
    graph, given = mixed(graph_of("llama")), FAMILIES["llama"].inputs(batch=2, tokens=9)
    model = written(graph, tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(model.lm_head(body(**given).last_hidden_state), model(**given).logits)


@pytest.fixture(scope="module")
def pairs():
    """A graph of which linear maps are pairs of factors."""
    graph = graph_of("qwen2")
    given = [FAMILIES["qwen2"].inputs(batch=2, tokens=24, seed=seed) for seed in range(3)]
    Pipeline([LowRank(where="mlp", form="pair", keep=0.7, ranks="uniform")]).run(graph, calibration=lambda _: given)
    return graph


def test_a_pair_of_factors_is_one_call(pairs, tmp_path, golden):
    given = FAMILIES["qwen2"].inputs(batch=2, tokens=9)
    model = written(pairs, tmp_path / "pairs")
    check_language_model(pairs, model, given)
    calls = torch.fx.experimental.proxy_tensor.make_fx(lambda ids: model(input_ids=ids, use_cache=False).logits)
    with torch.no_grad():
        nodes = [str(node.target) for node in calls(given["input_ids"]).graph.nodes]
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
    assert sum("low_rank_linear" in node for node in nodes) == 2 * 3  # of two layers
    for file in (tmp_path / "pairs").glob("*_compressed_qwen2.py"):
        golden(GOLDEN / "pairs" / file.name, file.read_text())


def test_what_replaces_a_factor_is_not_passed_over(pairs, tmp_path):
    """An adapter in the place of a linear map, and gradients to both factors."""
    model, given = written(pairs, tmp_path / "pairs"), FAMILIES["qwen2"].inputs(batch=2, tokens=9)
    model(**given, labels=given["input_ids"]).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    factors = model.model.layers[0].mlp.down_proj
    factors.up = torch.nn.Sequential(factors.up, torch.nn.ReLU())
    with torch.no_grad():
        x = torch.randn(1, 3, factors.down.in_features)
        assert (factors(x) >= 0).all()


SHOWN = {"packed": "llama", "packed_experts": "qwen3_moe"}


@pytest.mark.parametrize("kind", SHOWN)
def test_the_code_of_thirty_packed_layers_is_short(kind, golden):
    name = SHOWN[kind]
    graph = capture(FAMILIES[name].config(30), architecture=FAMILIES[name].architecture)
    rest = "mlp" if kind == "packed" else "experts"
    steps = [Quantize(bits=4, group=16, where="attention"), Quantize(bits=3, group=0, symmetric=False, where=rest)]
    Pipeline(steps).run(graph, planned=True)
    emission = emission_of(graph, "generated")
    for file in (f"modeling_compressed_{name}.py", f"configuration_compressed_{name}.py"):
        golden(GOLDEN / kind / file, emission.files[file])
        assert len(emission.files[file].splitlines()) < 600
