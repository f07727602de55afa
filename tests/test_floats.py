"""Number systems of floats: laws, equality with compressed-tensors' own functions, and that transformers loads them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from backends.safetensors import Refusal, propose, stored_tensors
from backends.safetensors.formats import format_of, scheme_of
from backends.torch_module.packing import packed
from compiler.errors import OpError, PassError
from compiler.ir.execute import run
from compiler.pipeline import Pipeline
from compiler.plan import bytes_in_file
from compiler.weights.evaluate import evaluate
from compiler.weights.ops import take
from compiler.weights.ops.blockfloat import BlockFloat
from compiler.weights.ops.fp8 import Fp8
from compiler.weights.ops.minifloat import E2M1_VALUES, E2M3, E3M2, e2m1_codes, e2m1_values, to_e2m1
from compiler.weights.ops.mx import Mx
from compiler.weights.ops.nvfp4 import Nvfp4
from passes.quantize import Quantize
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, Job
from tests.families import FAMILIES
from tests.test_codecs import FLOATS, by_group, matrix
from tests.test_generated import error, tolerance, written
from tests.test_packing import bound, weights

CODECS: dict[str, BlockFloat] = {
    "fp8 per row": Fp8(torch.bfloat16),
    "fp8 per tensor": Fp8(torch.bfloat16, rows=0),
    "fp8 in blocks": Fp8(torch.bfloat16, rows=16, group=24),
    "mxfp4": Mx(torch.bfloat16),
    "mxfp6": Mx(torch.bfloat16, of="e2m3"),
    "mxfp8": Mx(torch.bfloat16, of="e4m3"),
    "nvfp4": Nvfp4(torch.bfloat16),
}
NAMES = pytest.mark.parametrize("name", CODECS)


def codec_of(name: str, dtype: torch.dtype, search: bool = True) -> BlockFloat:
    codec = CODECS[name]
    return type(codec)(**{**codec.layout, "dtype": dtype, "search": search})


def values_of(weight: torch.Tensor, codec: BlockFloat) -> torch.Tensor:
    (expr,), sources = bound(w=weight)
    return evaluate([codec.nearest(expr)], sources)[0]


def squared_error(weight: torch.Tensor, codec: BlockFloat) -> float:
    return float((values_of(weight, codec).double() - weight.double()).square().sum())


# --- against the owner's writer and reader -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@NAMES
def test_codes_and_values_equal_the_library(name, dtype):
    """On our scales compressed-tensors computes our codes and our bytes, and from our bytes our values."""
    weight = matrix(dtype, rows=40, columns=96)
    (expr,), sources = bound(w=weight)
    value = codec_of(name, dtype).nearest(expr)
    scheme = scheme_of(value)
    storage = format_of(scheme)
    parts = storage.parts(value)
    dense, *tensors = evaluate([value, *parts.values()], sources)
    ours = dict(zip(parts, tensors, strict=True))
    theirs = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme.weights_config()))
    compressor = BaseCompressor.get_value_from_registry(storage.name)
    scale = ours["weight_scale"]
    floats = {"weight_scale": torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()}
    rest = {key: tensor for key, tensor in ours.items() if key.endswith("global_scale")}
    compressed = compressor.compress({"weight": weight.float(), **floats, **rest}, theirs)
    assert set(compressed) == set(ours)
    for key in set(ours) - {"weight_scale"}:
        assert compressed[key].dtype == ours[key].dtype
        assert torch.equal(compressed[key].view(torch.uint8), ours[key].view(torch.uint8))
    assert torch.equal(compressed["weight_scale"].float(), scale.float())
    assert torch.equal(compressor.decompress(ours, theirs)["weight"].to(dtype), dense)


def family(name: str) -> dict[str, int]:
    return {"hidden_size": 64, "intermediate_size": 96} if name.startswith("mx") else {}


PASSES = {
    "fp8 per row": [Quantize(type="fp8")],
    "fp8 per tensor": [Quantize(type="fp8", per="tensor")],
    "fp8 in blocks": [Quantize(type="fp8", per="block")],
    "fp8 and int4": [Quantize(where="mlp", bits=4, group=16), Quantize(type="fp8")],
    "fp8, embedding": [Quantize(where="embedding", type="fp8")],
    "mxfp4": [Quantize(type="mxfp4")],
    "mxfp6": [Quantize(type="mxfp6-e2m3")],
    "mxfp8": [Quantize(type="mxfp8")],
    "mxfp4 and mxfp8": [Quantize(where="mlp", type="mxfp4"), Quantize(type="mxfp8")],
    "nvfp4": [Quantize(type="nvfp4")],
    "nvfp4 and fp8": [Quantize(where="mlp", type="nvfp4"), Quantize(type="fp8")],
}
FORMATS = {"fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized",
           "mxfp6-e2m3": "mxfp6-pack-quantized",
           "nvfp4": "nvfp4-pack-quantized"}  # fmt: skip


IN_FLOAT32 = ("fp8 per row", "mxfp4", "mxfp6", "nvfp4")
CASES = [*((name, torch.bfloat16) for name in PASSES), *((name, torch.float32) for name in IN_FLOAT32)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_transformers_computes_with_what_was_written(name, dtype, tmp_path):
    job = Job("llama", tmp_path, PASSES[name], dtype, **family(name))
    emission = job.emit()
    assert job.reload_error() <= TOLERANCE
    stored = load_file(job.out / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == emission.nbytes == job.report.after.stored_bytes
    config = json.loads((job.out / "config.json").read_text())["quantization_config"]
    last = PASSES[name][-1].type
    assert FORMATS[last] in {group["format"] for group in config["config_groups"].values()}


OTHERS = {
    "mixtral, fp8": ("mixtral", Quantize(type="fp8")),
    "mixtral, fp8 per tensor": ("mixtral", Quantize(type="fp8", per="tensor")),
    "mixtral, mxfp4": ("mixtral", Quantize(type="mxfp4")),
    "phi3, fp8": ("phi3", Quantize(type="fp8")),
    "phi3, nvfp4": ("phi3", Quantize(type="nvfp4")),
    "bert, fp8": ("bert", Quantize(type="fp8")),
    "vit, nvfp4": ("vit", Quantize(type="nvfp4")),
    "t5, fp8": ("t5", Quantize(type="fp8")),
}


@pytest.mark.parametrize(("name", "step"), OTHERS.values(), ids=OTHERS.keys())
def test_other_families(name, step, tmp_path):
    """Experts, fused projections, encoders, images."""
    job = Job(name, tmp_path, [step], torch.bfloat16, **family(step.type))
    emission = job.emit()
    assert job.reload_error() <= TOLERANCE
    assert emission.nbytes <= job.report.after.stored_bytes


# --- laws --------------------------------------------------------------------------------------------------------


@given(weights(), st.sampled_from(list(CODECS)))
@settings(max_examples=80, deadline=None)
def test_searching_never_increases_the_error(made, name):
    weight = made[0].repeat(1, 32)
    plain, searched = (squared_error(weight, codec_of(name, weight.dtype, search)) for search in (False, True))
    assert searched <= plain * (1 + 1e-3) + 1e-10 * float(weight.double().square().sum())


@given(weights(dtype=st.sampled_from([torch.float32, torch.bfloat16])))
@settings(max_examples=60, deadline=None)
def test_more_bits_are_never_worse(made):
    """Of either kind of six."""
    weight = made[0].repeat(1, 32)
    kinds = [("e2m1",), ("e2m3", "e3m2"), ("e4m3",)]
    errors = [[squared_error(weight, Mx(weight.dtype, of=kind)) for kind in each] for each in kinds]
    for fewer, more in pairwise(errors):
        assert max(more) <= min(fewer) * (1 + 1e-5)


def test_e2m1_rounds_to_the_nearest_of_its_values():
    """Ties go to even codes, larger numbers to the largest; codes stand for what rounding gives."""
    x = torch.linspace(-8, 8, 1025)
    rounded = to_e2m1(x)
    table = torch.tensor(sorted({*E2M1_VALUES, *(-value for value in E2M1_VALUES)}))
    nearest = (x[:, None] - table).abs().amin(1)
    assert torch.equal((x - rounded).abs(), nearest)
    assert torch.equal(e2m1_values(e2m1_codes(x)), rounded)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert torch.equal(to_e2m1(ties), torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]))


@pytest.mark.parametrize(("element", "digits", "biased"), [(E2M3, 3, 1), (E3M2, 2, 3)], ids=["e2m3", "e3m2"])
def test_six_bits_have_the_values_of_the_specification(element, digits, biased):
    """Sign, exponent and mantissa of all 64 codes; rounding is to the nearest, ties to even, and saturates."""
    values = [_specified(code, digits, biased) for code in range(64)]
    assert element.decode(torch.arange(64, dtype=torch.uint8)).tolist() == values
    assert element.largest == max(values) == {3: 7.5, 2: 28.0}[digits]
    x = torch.linspace(-36, 36, 2305)
    rounded = element.round(x)
    assert torch.equal((x - rounded).abs(), (x[:, None] - torch.tensor(values)).abs().amin(1))
    assert torch.equal(element.decode(element.encode(x)), rounded)
    middles = torch.tensor(values[:32]).unfold(0, 2, 1).mean(1)
    assert (element.encode(middles) % 2 == 0).all()


def _specified(code: int, digits: int, biased: int) -> float:
    exponent, mantissa = code % 32 >> digits, code % 2**digits / 2**digits
    magnitude = (1 + mantissa) * 2.0 ** (exponent - biased) if exponent else mantissa * 2.0 ** (1 - biased)
    return -magnitude if code >= 32 else magnitude


GRIDS = {
    "fp8 per row": torch.tensor([0.0, 448.0, -448.0, 1.0, 1.125, -13.0, 2.0**-9, 2.0**-6, 240.0]),
    "mxfp8": torch.tensor([0.0, 448.0, -448.0, 1.0, 1.125, -13.0, 2.0**-9, 2.0**-6, 240.0]),
    "mxfp4": torch.tensor([*E2M1_VALUES, -6.0]),
    "mxfp6": E2M3.decode(torch.arange(64)),
    "nvfp4": torch.tensor([*E2M1_VALUES, -6.0]),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", GRIDS)
def test_what_can_be_said_is_said_exactly(name, dtype):
    """Numbers of the element type times a power of two a row, in any order, though not all of them occur."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(GRIDS[name]), (24, 96), generator=generator)
    weight = (GRIDS[name][places] * torch.exp2(torch.arange(-8.0, 4.0).repeat(2))[:, None]).to(dtype)
    assert torch.equal(values_of(weight, codec_of(name, dtype)), weight)


@pytest.mark.parametrize("dtype", FLOATS)
@NAMES
def test_zeros_are_exact(name, dtype):
    weight = torch.zeros(32, 96, dtype=dtype)
    weight[5, 40:] = 1.5
    value = values_of(weight, codec_of(name, dtype))
    assert torch.equal(value[weight == 0], weight[weight == 0])


@pytest.mark.parametrize("name", ["fp8 per row", "fp8 per tensor", "fp8 in blocks"])
def test_one_repeated_value_is_exact(name):
    weight = torch.full((32, 96), 0.3).to(torch.bfloat16)
    assert torch.equal(values_of(weight, codec_of(name, torch.bfloat16)), weight)


@NAMES
def test_a_range_of_rows_is_computed_from_those_rows(name):
    (expr, stack), sources = bound(
        w=matrix(torch.float32, rows=40, columns=96), s=matrix(torch.float32).expand(3, 24, 64)
    )
    codec = codec_of(name, torch.float32)
    value, experts = codec.nearest(expr), codec.nearest(stack)
    for whole, start, stop in ((value, 8, 24), (value.args[0], 8, 24), (experts, 1, 3), (experts.args[1], 1, 3)):
        part = evaluate([take(whole, 0, start, stop)], sources)[0].float()
        assert torch.equal(part, evaluate([whole], sources)[0].float()[start:stop])


@pytest.mark.parametrize("dtype", FLOATS)
@NAMES
def test_groups_by_column_are_those_of_the_whole(name, dtype):
    """What a solver fits, encodes and decodes is what the expression of the whole makes."""
    weight = matrix(dtype, rows=40, columns=96)
    codec = codec_of(name, dtype)
    (expr,), sources = bound(w=weight)
    value = codec.nearest(expr)
    parts = by_group(codec, weight)
    for ours, whole in zip(parts, evaluate(list(value.args), sources), strict=True):
        assert ours.dtype == whole.dtype and torch.equal(ours.float(), whole.float())
    exprs, stored = bound(**{f"p{index}": part for index, part in enumerate(parts)})
    assert torch.equal(evaluate([codec.expression(exprs)], stored)[0], evaluate([value], sources)[0])
    bound_codec = codec.for_matrix(weight)
    columns = weight.float()[:, : codec.group or None]
    parameters = bound_codec.fit(columns)
    decoded = bound_codec.decode(bound_codec.encode(columns, parameters), parameters)
    assert torch.equal(decoded, evaluate([value], sources)[0].float()[:, : codec.group or None])


@NAMES
def test_rescaled_parameters_can_be_stored(name):
    """Factors near one half and two give half and twice the values where nothing saturates."""
    weight = matrix(torch.bfloat16, rows=32, columns=96).float()
    codec = codec_of(name, torch.bfloat16).for_matrix(weight)
    parameters = codec.fit(weight[:, : codec.group or None])
    codes = codec.encode(weight[:, : codec.group or None], parameters)
    for factor in (0.5, 2.0):
        scaled = codec.rescaled(parameters, torch.full((32,), factor * 1.001))
        assert scaled[0].dtype == parameters[0].dtype
        wanted = codec.decode(codes, parameters) * (factor if codec.rows == 1 else 1.0)
        saturated = scaled[0].float() * 2 >= 448
        assert ((codec.decode(codes, scaled) == wanted).all(1) | saturated).all() or name.startswith("fp8")
        assert (codec.decode(codes, scaled) - wanted).abs().max() <= 0.01 * wanted.abs().max() or name == "nvfp4"


def test_weights_of_one_input_share_what_divides_their_scales(tmp_path):
    job = Job("llama", tmp_path, [Quantize(type="nvfp4")])
    job.emit()
    stored = load_file(job.out / "model.safetensors")
    divisors = {name: tensor for name, tensor in stored.items() if name.endswith("weight_global_scale")}
    layer = "model.layers.0"
    for names in ([f"self_attn.{x}_proj" for x in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]):
        assert len({float(divisors[f"{layer}.{name}.weight_global_scale"]) for name in names}) == 1


@NAMES
def test_groups_that_do_not_divide_are_an_error_where_none_may_be_shorter(name):
    (expr,), _ = bound(w=torch.zeros(4, 40))
    if name.startswith("fp8"):
        assert CODECS[name].nearest(expr).shape == (4, 40)
    else:
        with pytest.raises(OpError, match=f"groups of {CODECS[name].group} do not divide 40 inputs"):
            CODECS[name].nearest(expr)


# --- the pass ----------------------------------------------------------------------------------------------------

WRONG = {
    "bits": (Quantize(type="fp8", bits=4), "fp8 has 8 bits"),
    "symmetric": (Quantize(type="nvfp4", symmetric=False), "nvfp4 has no zero points"),
    "group": (Quantize(type="mxfp4", group=16), "mxfp4 has groups of 32"),
    "per": (Quantize(type="nvfp4", per="block"), "`per` is an option of fp8, not of nvfp4"),
    "type": (Quantize(type="mxfp4"), "mxfp4 has groups of 32, which do not divide 48, the input width of "
             "model.layers.0.self_attn.q_proj.weight (nor that of 14 more weights)"),
}  # fmt: skip


@pytest.mark.parametrize(("option", "found"), WRONG.items(), ids=WRONG.keys())
def test_options_that_do_not_apply_are_errors(option, found):
    with pytest.raises(PassError) as raised:
        Pipeline([found[0]]).run(plan_of("llama"))
    assert raised.value.cause == found[1] and raised.value.option == option


def test_what_is_quantised_already_stays_as_it_is(tmp_path):
    job = Job("llama", tmp_path, [Quantize(where="mlp.up", type="nvfp4"), Quantize(where="mlp", bits=8)])
    reasons = {skip.scope: skip.reason for entry in job.report.passes for skip in entry.skipped}
    assert reasons == {f"model.layers.{i}.mlp.up_proj.weight": "is quantised already, to 4 bits" for i in range(2)}


def test_tensors_are_counted_as_they_are_stored():
    graph = plan_of("llama")
    Pipeline([Quantize(type="nvfp4")]).run(graph, planned=True)
    param = graph.params["model.layers.0.mlp.up_proj.weight"]
    rows, columns = param.type.static_shape
    parts = stored_tensors(param)
    assert sum(part.type.nbytes for part in parts) == rows * columns // 2 + rows * columns // 16 + 4


@pytest.mark.parametrize("type", ["mxfp6-e2m3", "mxfp6-e3m2"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "bert"])
def test_generated_code_holds_six_bits_packed(name, type, tmp_path):
    """Linear maps, tables of tokens and experts, in the bytes that were counted."""
    given = FAMILIES[name]
    graph = graph_of(name, hidden_size=64, intermediate_size=96)
    step = Quantize(where=("linear", "embedding"), type=type, tied="share")
    Pipeline([step]).run(graph)
    model = written(graph, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    counted = sum(map(bytes_in_file(), (param for param in graph.params.values() if packed(param) is not None)))
    assert counted == sum(part.nbytes for key, part in held.items() if key.endswith(("weight_packed", "weight_scale")))
    inputs = {key: value for key, value in given.inputs().items() if key in graph.inputs}
    with torch.no_grad():
        found = model(**inputs)
    for key, value in run(graph, inputs).items():
        assert error(found[key], value) <= tolerance(graph)


REFUSALS = {
    "experts in blocks": (
        [Quantize(where="experts.down", type="fp8", per="block"), Quantize(type="fp8")],
        "transformers reads experts of fp8 with one scale a row",
    ),
    "experts of mxfp6": ([Quantize(type="mxfp6-e2m3")], "transformers reads no experts of mxfp6"),
    "e3m2": ([Quantize(type="mxfp6-e3m2")], "compressed-tensors has no e3m2 floats (only e2m3)"),
    "experts of mxfp8": ([Quantize(type="mxfp8")], "transformers reads no experts of mxfp8"),
    "experts of nvfp4": ([Quantize(type="nvfp4")], "transformers reads no experts of nvfp4"),
}


@pytest.mark.parametrize(("passes", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_transformers_could_not_load_is_refused(passes, reason):
    wide = {"hidden_size": 64, "intermediate_size": 96}
    graph = plan_of("mixtral", **wide)
    Pipeline(passes).run(graph, planned=True)
    refusal = propose(graph)
    assert isinstance(refusal, Refusal) and f"same family: {reason}" in refusal.reason


def test_bfloat16_weights_in_a_model_of_float32_are_refused():
    """With several schemes transformers dequantises late, and then makes bfloat16 of four-bit floats."""
    graph = plan_of("llama")
    Pipeline([Quantize(where="mlp", type="nvfp4"), Quantize(type="fp8")]).run(graph, planned=True)
    refusal = propose(graph)
    assert isinstance(refusal, Refusal)
    assert "transformers makes bfloat16 of model.layers.0.mlp.gate_proj.weight" in refusal.reason
