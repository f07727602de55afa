"""Proof by reloading finds one wrong matrix, also where activations are rounded to codes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiler.errors import ParityError
from compiler.evaluate.parity import verify_by_reload
from passes.quantize import Quantize
from tests.emitted import Job
from tests.families import FAMILIES

ENOUGH = 1 << 40
CASES = {
    "int8": ("llama", Quantize(activations="int8"), "layers.1.mlp.down_proj.weight"),
    "fp8": ("llama", Quantize(type="fp8", activations="fp8"), "layers.1.self_attn.o_proj.weight"),
    "static": ("llama", Quantize(activations="int8", activation_scale="static"), "layers.0.mlp.up_proj.weight"),
    "cache": ("mistral", Quantize(cache="int8"), "layers.1.self_attn.v_proj.weight"),
    "fp8 experts": ("qwen3_moe", Quantize(type="fp8", activations="fp8"), "experts.1.down_proj.weight"),
}


@pytest.mark.parametrize(("name", "step", "matrix"), CASES.values(), ids=CASES)
def test_a_matrix_of_zeros_is_found_behind_rounded_activations(name, step, matrix, tmp_path):
    job = Job(name, tmp_path, [step], calibration=lambda graph: [FAMILIES[name].inputs()])
    job.emit()
    found = verify_by_reload(job.graph, job.out, memory=ENOUGH)
    assert found.performed and found.error <= found.tolerance
    file = job.out / "model.safetensors"
    tensors = load_file(file)
    (key, *_) = [key for key in tensors if matrix in key.replace("_packed", "")]
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, file, metadata={"format": "pt"})
    with pytest.raises(ParityError, match="differs from the graph"):
        verify_by_reload(job.graph, job.out, memory=ENOUGH)
