"""Checkpoints in the layouts of GPTQ and AutoAWQ as sources: their weights are scale * (code - zero point)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from compiler.errors import CheckpointError
from compiler.evaluate.loading import load_model
from compiler.frontend import capture
from compiler.ir.execute import read_param, run
from compiler.weights.checkpoint import open_checkpoint
from passes.quantize import Quantize
from tests.families import FAMILIES
from tests.test_checkpoint import make_directory
from tests.test_gptq_layout import WIDE, written

GROUPS, ROWS, COLUMNS = 3, 32, 96
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def gptq(bits=4, version="gptq"):
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version, "sym": False}


def matrix(bits: int, seed: int = 0):
    """Codes [out, in], zero points [out, groups], scales [out, groups] and the group of every input."""
    source = torch.Generator().manual_seed(seed)
    codes, zeros = (torch.randint(0, 2**bits, (ROWS, count), generator=source) for count in (COLUMNS, GROUPS))
    scales = torch.rand(ROWS, GROUPS, generator=source).add(0.5).half()
    return codes, zeros, scales, torch.arange(COLUMNS) // 32


def words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers [n, m] as int32 words [n * bits / 32, m], written bit by bit, the least significant first."""
    planes = (numbers[:, None] >> torch.arange(bits)[None, :, None] & 1).flatten(0, 1).unflatten(0, (-1, 32))
    return (planes << torch.arange(32)[None, :, None]).sum(1).to(torch.int64).to(torch.int32)


def gptq_tensors(codes, zeros, scales, group, bits, version):
    """Of the first version, as GPTQModel writes it: ones are taken off whole words (three bits: off each number)."""
    if version == "gptq" and bits == 3:
        zeros = zeros - 1 & 7
    packed = words(zeros, bits).T
    if version == "gptq" and bits != 3:
        packed = packed - sum(1 << place for place in range(0, 32, bits))
    parts = {"qweight": words(codes.T, bits), "qzeros": packed, "scales": scales.T, "g_idx": group.int()}
    return {f"m.{name}": part.contiguous() for name, part in parts.items()}


def awq_words(numbers: torch.Tensor) -> torch.Tensor:
    """[outputs, m] as int32 [m, outputs / 8]: the nibbles of a word are outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    ordered = numbers.unflatten(0, (-1, 8))[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(0, 1)
    return words(ordered, 4).T.contiguous()


def awq_tensors(codes, zeros, scales):
    return {"m.qweight": awq_words(codes), "m.qzeros": awq_words(zeros), "m.scales": scales.T.contiguous()}


def opened(path, tensors, config):
    return open_checkpoint(make_directory(path, [tensors], {"quantization_config": config}))


def check(checkpoint, codes, zeros, scales, group, first=0, last=ROWS):
    type = checkpoint.types["m.weight"]
    assert (type.dtype, type.shape) == (torch.float16, (ROWS, COLUMNS)) and set(checkpoint.types) == {"m.weight"}
    wanted = (codes - zeros[:, group]).half() * scales[:, group]
    assert torch.equal(checkpoint.read("m.weight"), wanted)
    assert torch.equal(checkpoint.read_rows("m.weight", first, last), wanted[first:last])


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**16), cut=st.tuples(st.integers(0, 15), st.integers(16, ROWS)))
def test_gptq_is_scale_times_code_less_zero_point(tmp_path_factory, bits, version, seed, cut):
    codes, zeros, scales, group = matrix(bits, seed)
    for own in (group, group[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(seed))]):
        tensors = gptq_tensors(codes, zeros, scales, own, bits, version)
        checkpoint = opened(tmp_path_factory.mktemp("gptq"), tensors, gptq(bits, version))
        check(checkpoint, codes, zeros, scales, own, *cut)


@pytest.mark.parametrize("cut", [(0, 8), (3, 29), (7, 9)])
def test_awq_is_scale_times_code_less_zero_point(tmp_path, cut):
    codes, zeros, scales, group = matrix(4)
    check(opened(tmp_path, awq_tensors(codes, zeros, scales), AWQ), codes, zeros, scales, group, *cut)


def test_without_indices_groups_are_in_order(tmp_path):
    codes, zeros, scales, group = matrix(4)
    tensors = gptq_tensors(codes, zeros, scales, group, 4, "gptq")
    del tensors["m.g_idx"]
    check(opened(tmp_path, tensors, gptq()), codes, zeros, scales, group)


@pytest.mark.parametrize(("bits", "version"), [(4, "gptq"), (3, "gptq-v2")])
def test_what_we_write_is_captured_as_it_was(bits, version, tmp_path):
    step = Quantize(where="mlp", bits=bits, group=32, symmetric=version == "gptq")
    job, _, _ = written(tmp_path, step, version)
    found = capture(job.out)
    assert found.origin.config is not None and "quantization_config" not in found.origin.config
    ids = torch.arange(24).reshape(1, -1) % WIDE["vocab_size"]
    with torch.no_grad():
        theirs = load_model(job.out)(input_ids=ids).logits
    assert torch.allclose(theirs, run(job.graph, {"input_ids": ids})["logits"].float(), atol=1e-5)
    for name, param in job.graph.params.items():
        assert torch.equal(read_param(found, found.params[name]).float(), read_param(job.graph, param).float())


UNREAD = {
    "another method": ({"quant_method": "hqq"}, "which is read of methods gptq and awq alone"),
    "no method": ({"bits": 4}, "quant_method: unknown"),
    "no config": ("odd", "quant_method: unknown"),
    "other kernels": (AWQ | {"version": "gemv"}, "which is read as gemm with 4 bits"),
    "marlin": (gptq(version="marlin"), "which is read as gptq or gptq_v2 with 2, 3, 4, 8 bits"),
    "five bits": (gptq(5), "which is read as gptq or gptq_v2"),
    "another writer": (AWQ | {"backend": "llm-awq"}, "which is read as AutoAWQ writes it alone"),
    "odd rules": (gptq() | {"dynamic": 5}, "one scheme for all weights"),
    "several schemes": (gptq() | {"dynamic": {"+:.*mlp.*": {"bits": 8}}}, "one scheme for all weights"),
}


@pytest.mark.parametrize(("config", "message"), UNREAD.values(), ids=UNREAD)
def test_other_quantised_checkpoints_are_refused(tmp_path, config, message):
    with pytest.raises(CheckpointError, match="already quantised") as error:
        opened(tmp_path, {"m.weight": torch.ones(2, 2)}, config)
    assert message in str(error.value) and "unquantised" in str(error.value)


def test_parts_that_do_not_fit_are_damage(tmp_path):
    good = gptq_tensors(*matrix(4), 4, "gptq")
    damaged = {
        "has not all of qweight, qzeros, scales": {k: v for k, v in good.items() if k != "m.scales"},
        "a dense weight beside its codes": good | {"m.weight": torch.ones(2, 2)},
        "zero points": good | {"m.qzeros": good["m.qzeros"][:2].clone()},
        "names groups other than the 3": good | {"m.g_idx": good["m.g_idx"] + 1},
        "m has codes": good | {"m.g_idx": good["m.g_idx"].float()},
        "groups of 32": good | {f"m.{part}": good[f"m.{part}"][:, :12].clone() for part in ("qweight", "scales")},
    }
    for number, (message, tensors) in enumerate(damaged.items()):
        with pytest.raises(CheckpointError, match=message):
            check(opened(tmp_path / str(number), tensors, gptq()), *matrix(4))


def test_a_config_of_another_width_is_damage(tmp_path):
    tensors = gptq_tensors(*matrix(4), 4, "gptq")
    with pytest.raises(CheckpointError, match="m has codes"):
        check(opened(tmp_path, tensors, gptq(8)), *matrix(4))


def test_groups_in_the_order_of_activations_need_indices(tmp_path):
    tensors = gptq_tensors(*matrix(4), 4, "gptq")
    del tensors["m.g_idx"]
    with pytest.raises(CheckpointError, match="no g_idx"):
        check(opened(tmp_path, tensors, gptq() | {"desc_act": True}), *matrix(4))


def test_older_names_of_awq_are_known(tmp_path):
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    check(opened(tmp_path, awq_tensors(*matrix(4)[:3]), config), *matrix(4))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_biases_of_zeros_that_no_module_has_are_passed_over(value, tmp_path):
    """AutoGPTQ wrote one for every matrix."""
    job, _, _ = written(tmp_path, Quantize(where="mlp", bits=4, group=32), "gptq")
    file = job.out / "model.safetensors"
    tensors = load_file(file)
    bias = {"model.layers.0.mlp.up_proj.bias": torch.full((WIDE["intermediate_size"],), value, dtype=torch.float16)}
    save_file(tensors | bias, file, {"format": "pt"})
    if value:
        with pytest.raises(CheckpointError, match="no place for"):
            capture(job.out)
    else:
        assert "model.layers.0.mlp.up_proj.weight" in capture(job.out).params


def test_a_model_is_not_filled_up_with_chance(tmp_path):
    job, _, _ = written(tmp_path, Quantize(where="mlp", bits=4, group=32), "gptq")
    file = job.out / "model.safetensors"
    left = {name: tensor for name, tensor in load_file(file).items() if "layers.0.mlp.up_proj" not in name}
    save_file(left, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor: model.layers.0.mlp.up_proj.weight"):
        load_model(job.out)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_maps_whose_modules_are_transposed_are_turned_around(version, tmp_path):
    """GPT-2 has [in, out]; GPTQModel packs it as any map, [out, in]: also the square ones, which would fit unturned."""
    path, model = transposed(tmp_path, version)
    ids = torch.arange(24).reshape(1, -1) % 64
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        found = load_model(path)(input_ids=ids).logits, run(capture(path), {"input_ids": ids})["logits"].float()
    for logits in found:
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)


def transposed(directory, version):
    """A GPT-2 checkpoint in the layout of GPTQ in ``directory``, and the model that its numbers stand for."""
    model = FAMILIES["gpt2"].build(0, n_embd=32, n_inner=64, n_head=2, vocab_size=64).half().eval()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            codes, scales, dense = rounded(module.weight.detach().T)
            zeros, group = torch.full_like(scales, 8).int(), torch.arange(codes.shape[1]) // 32
            parts = gptq_tensors(codes, zeros, scales, group, 4, version)
            tensors |= {key.replace("m.", f"{name}.", 1): part for key, part in parts.items()}
            del tensors[f"{name}.weight"]
            module.weight.data = dense.T.contiguous()
    config = model.config.to_dict() | {"quantization_config": gptq(4, version)}
    return make_directory(directory, [tensors], config), model.float()


def rounded(weight: torch.Tensor):
    """Codes from 0 to 15 of [out, in], scales of groups of 32 in float16, and what they stand for."""
    grouped = weight.unflatten(1, (-1, 32))
    scales = (grouped.float().abs().amax(-1) / 7).half()
    codes = (grouped / scales[..., None]).round().clamp(-8, 7).int() + 8
    return codes.flatten(1), scales, ((codes - 8).half() * scales[..., None]).flatten(1)
