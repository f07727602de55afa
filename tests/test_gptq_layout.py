"""The layout of GPTQ checkpoints: unpacked as it is described, by nothing of ours, it is what the graph runs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTQConfig, LlamaConfig, LlamaForCausalLM

from backends.safetensors import Refusal, emit, propose, require
from compiler import Recipe, compress
from compiler.errors import OutputError, RecipeError
from compiler.ir.execute import read_param
from compiler.pipeline import Pipeline
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import apply, load
from compiler.weights.ops.basic import concat, full, slice
from compiler.weights.ops.quant import pack_bits
from compiler.weights.source import MemorySource
from passes.quantize import Quantize
from tests.emitted import Job
from tests.families import FAMILIES
from tests.small import write_folder, write_recipe
from tests.test_packing import bound

WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}


def bits_of(words: torch.Tensor) -> torch.Tensor:
    """int32 words [n, columns] as their bits [32 n, columns], the least significant first."""
    places = torch.arange(32)[None, :, None]
    return ((words[:, None, :].long() >> places) & 1).reshape(-1, words.shape[1])


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of ``bits`` bits packed along axis 0, one behind the other, over the borders of words."""
    planes = bits_of(words).unflatten(0, (-1, bits))
    return (planes << torch.arange(bits)[None, :, None]).sum(1)


def dequantised(tensors: dict[str, torch.Tensor], name: str, bits: int, version: str) -> torch.Tensor:
    """scales[g] * (q - zero[g]) for g = g_idx, transposed to [out, in]."""
    codes = unpacked(tensors[f"{name}.qweight"], bits)
    zeros = unpacked(tensors[f"{name}.qzeros"].T.contiguous(), bits).T + (version == "gptq")
    groups = tensors[f"{name}.g_idx"].long()
    scales = tensors[f"{name}.scales"]
    assert scales.dtype == torch.float16 and tensors[f"{name}.qweight"].dtype == torch.int32
    return ((codes - zeros[groups]).to(scales.dtype) * scales[groups]).T


def written(tmp_path, step: Quantize, version: str, dtype=torch.float16, **changes):
    job = Job("llama", tmp_path, [step], dtype, **{**WIDE, **changes})
    emission = require(job.graph, version)
    job.out.mkdir()
    emit(emission, job.graph.sources, job.out)
    return job, emission, load_file(job.out / "model.safetensors")


CASES = [
    (2, 16, False, "gptq-v2"),
    (3, 0, True, "gptq"),
    (3, 32, False, "gptq-v2"),
    (4, 32, True, "gptq"),
    (8, 0, True, "gptq-v2"),
]


@pytest.mark.parametrize(("bits", "group", "symmetric", "version"), CASES)
def test_files_hold_what_the_graph_runs(bits, group, symmetric, version, tmp_path):
    step = Quantize(where="mlp", bits=bits, group=group, symmetric=symmetric)
    job, emission, tensors = written(tmp_path, step, version)
    for layer in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            module = f"model.layers.{layer}.mlp.{name}"
            param = job.graph.params[f"{module}.weight"]
            theirs = dequantised(tensors, module, bits, version)
            assert torch.equal(theirs.float(), read_param(job.graph, param).float())
            assert f"{module}.weight" not in tensors
    assert sum(tensor.nbytes for tensor in tensors.values()) == emission.nbytes


def test_three_bits_straddle_words_as_described():
    """Ten codes, one over the border with two bits and one, ten, one with one bit and two, ten: 32 in three words."""
    codes = torch.arange(32).remainder(8) - 4
    q = [int(code) + 4 for code in codes]
    words = [
        sum(q[i] << 3 * i for i in range(10)) | (q[10] & 3) << 30,
        q[10] >> 2 | sum(q[11 + i] << 3 * i + 1 for i in range(10)) | (q[21] & 1) << 31,
        q[21] >> 1 | sum(q[22 + i] << 3 * i + 2 for i in range(10)),
    ]
    (expr,), sources = bound(c=codes.to(torch.int8)[:, None].contiguous())
    packed = evaluate([pack_bits(expr, 3, axis=-2)], sources)[0]
    assert [int(word) & 0xFFFFFFFF for word in packed.flatten()] == words


def test_the_config_is_one_of_transformers_and_names_what_stays_dense(tmp_path):
    job, _, tensors = written(tmp_path, Quantize(where="linear", skip=("head",), bits=4, group=32), "gptq")
    stored = json.loads((job.out / "config.json").read_text())["quantization_config"]
    config = GPTQConfig.from_dict(dict(stored))
    assert (config.bits, config.group_size, config.sym, config.desc_act, config.format) == (4, 32, True, False, "gptq")
    assert stored["dynamic"] == {"-:^lm_head$": {}} and not stored["lm_head"]
    assert tensors["lm_head.weight"].dtype == torch.float16


def test_bfloat16_scales_are_those_of_the_graph(tmp_path):
    job, _, tensors = written(tmp_path, Quantize(where="mlp", bits=4, group=32), "gptq", torch.bfloat16)
    param = job.graph.params["model.layers.0.mlp.up_proj.weight"]
    exact = dequantised(tensors, "model.layers.0.mlp.up_proj", 4, "gptq").float()
    assert torch.equal(exact.to(torch.bfloat16), read_param(job.graph, param).to(torch.bfloat16))


@pytest.mark.parametrize("scale", [1e5, 1e-6, 2.0**-30])
def test_scales_that_float16_does_not_hold_are_an_error(scale, tmp_path):
    """Too large, of too few digits, and zero."""
    job = Job("llama", tmp_path, [Quantize(where="mlp", bits=4, group=32)], torch.bfloat16, **WIDE)
    param = job.graph.params["model.layers.0.mlp.up_proj.weight"]
    codes, own = param.expr.args
    param.expr = apply("dequantize", [codes, full(own.shape, scale, torch.bfloat16)], dict(param.expr.attrs))
    job.out.mkdir()
    with pytest.raises(
        OutputError, match=r"scales of .*up_proj\.weight hold .*, which torch.float16 does not"
    ) as raised:
        emit(require(job.graph, "gptq"), job.graph.sources, job.out)
    assert "compressed-tensors keeps" in raised.value.remedy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_are_tiny_or_zero_are_what_the_graph_runs(dtype, tmp_path):
    """As small as scales can be: 2^-17 is the least that both dtypes hold in full."""
    job = Job("llama", tmp_path, [], dtype, **WIDE)
    param = job.graph.params["model.layers.0.mlp.up_proj.weight"]
    size = 2.0**-14 if dtype == torch.float16 else 2.0**-17
    values = torch.randint(-7, 8, param.type.static_shape).to(dtype) * size
    values[:, :32] = 0
    job.graph.sources = {**job.graph.sources, "tiny": MemorySource({"w": values})}
    param.expr = load("tiny", "w", param.expr.type)
    Pipeline([Quantize(where="mlp", bits=4, group=32)]).run(job.graph)
    job.out.mkdir()
    emit(require(job.graph, "gptq"), job.graph.sources, job.out)
    theirs = dequantised(load_file(job.out / "model.safetensors"), param.name.removesuffix(".weight"), 4, "gptq")
    assert torch.equal(theirs.float(), values.float())


def test_a_group_that_is_next_to_nothing_is_rounded_as_float16_rounds_others(tmp_path):
    job = Job("llama", tmp_path, [Quantize(where="mlp", bits=4, group=32)], torch.bfloat16, **WIDE)
    param = job.graph.params["model.layers.0.mlp.up_proj.weight"]
    codes, own = param.expr.args
    scale = full(own.shape, 0.01, torch.bfloat16)
    dead = full((own.shape[0], 1), 2.0**-32, torch.bfloat16)
    scale = concat([slice(scale, 1, 0, own.shape[1] - 1), dead], 1)
    param.expr = apply("dequantize", [codes, scale], dict(param.expr.attrs))
    job.out.mkdir()
    emit(require(job.graph, "gptq"), job.graph.sources, job.out)
    stored = load_file(job.out / "model.safetensors")["model.layers.0.mlp.up_proj.scales"]
    assert (stored[-1] == 0).all() and (stored[:-1] == torch.tensor(0.01, dtype=torch.bfloat16)).all()


REFUSALS = {
    "zero points of the first version": (
        "llama", Quantize(bits=4, group=32, symmetric=False), "gptq",
        "the first version of the GPTQ layout cannot hold every zero point; `gptq-v2` can",
    ),
    "floats": ("llama", Quantize(type="fp8"), "gptq", "GPTQ checkpoints hold integers of 2, 3, 4, 8 bits"),
    "five bits": ("llama", Quantize(bits=5), "gptq", "GPTQ checkpoints hold integers of 2, 3, 4, 8 bits"),
    "embedding": (
        "llama", Quantize(where="embedding", bits=8), "gptq",
        "GPTQ checkpoints hold the weights of linear modules; skip model.embed_tokens.weight",
    ),
    "a stored transpose": (
        "gpt2", Quantize(bits=4, where="mlp"), "gptq",
        "transformer.h.0.mlp.c_fc.weight is quantised in part, or stored transposed, as no GPTQ checkpoint is; skip it",
    ),
    "activations": ("llama", Quantize(activations="int8"), "gptq", "GPTQ checkpoints have no rounded activations"),
    "float32": (
        "llama", Quantize(), "gptq",
        "q_proj.weight has scales of torch.float32, which float16, that of the layout, does not hold exactly",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("family", "step", "version", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_the_layout_cannot_hold_is_refused(family, step, version, reason, tmp_path):
    dtype = torch.float32 if "float32" in reason else torch.float16
    job = Job(family, tmp_path, [], dtype, **WIDE)
    Pipeline([step]).run(job.graph, planned=True)
    refusal = propose(job.graph, version)
    assert isinstance(refusal, Refusal) and reason in refusal.reason


def compressed(tmp_path, emit: str, more: str = ""):
    torch.manual_seed(0)
    tiny = {**FAMILIES["llama"].options, **WIDE}
    LlamaForCausalLM(LlamaConfig(**tiny, num_hidden_layers=1)).to(torch.bfloat16).save_pretrained(tmp_path / "tiny")
    steps = "[quantize: {where: mlp, bits: 4, group: 32}]"
    (tmp_path / "recipe.yaml").write_text(f"model: tiny\npasses: {steps}\nemit: [safetensors: {emit}]\n{more}")
    return compress(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "out")


def test_a_run_says_that_it_could_not_reload(tmp_path):
    result = compressed(tmp_path, "{quantised-as: gptq}")
    assert "model.layers.0.mlp.up_proj.qweight" in load_file(result.path / "model.safetensors")
    verification = result.document["verification"]
    assert not verification["performed"]
    assert verification["skipped"] == "transformers needs optimum and gptqmodel to load it"


def test_a_run_evaluates_what_it_wrote_without_the_packages_that_load_it(tmp_path):
    """As `eval` does: with the weights that its codes stand for."""
    write_folder(tmp_path)
    measured = "evaluate: {data: text.txt, samples: 2, length: 16, metrics: [kl]}"
    rest = f"emit: [safetensors: {{quantised-as: gptq}}]\n{measured}\n"
    recipe = write_recipe(tmp_path, "[quantize: {where: mlp, bits: 4, group: 32}]", rest)
    result = compress(Recipe.load(recipe), tmp_path / "out")
    assert 0 < result.document["evaluation"]["metrics"]["kl"]["value"] < 1


def test_generated_classes_do_not_read_it(tmp_path):
    with pytest.raises(RecipeError, match="no generated class loads weights quantised as gptq-v2"):
        compressed(tmp_path, "{quantised-as: gptq-v2, class: generated}")


def test_sizes_that_words_do_not_divide_are_refused(tmp_path):
    assert FAMILIES["llama"].options["hidden_size"] == 48
    job = Job("llama", tmp_path, [Quantize(where="mlp.up")], torch.float16)
    refusal = propose(job.graph, "gptq")
    assert isinstance(refusal, Refusal)
    assert "is 80 x 48, and both must be multiples of 32; skip it" in refusal.reason
