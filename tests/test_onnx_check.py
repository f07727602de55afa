"""A model that gives no numbers anywhere is wrong, wherever the check meets them."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.parser import parse_model

from backends.onnx import check
from backends.onnx.check import largest_error
from backends.onnx.reload import Reloaded

HEADER = '<ir_version: 9, opset_import: ["" : 18]>'
CACHED = """
cached (int64[batch, t] input_ids, int64[batch, s] attention_mask, float[batch, 1, past_sequence, 1] PAST) =>
    (float[batch, t, 1] logits, float[batch, 1, total, 1] PRESENT)
<float zero = {0}, float later = {0}, int64[1] last = {-1}, int64[1] one = {1}> {
    numbers = Cast <to = 1> (input_ids)
    column = Unsqueeze (numbers, last)
    key = Unsqueeze (column, one)
    PRESENT = Concat <axis = 2> (PAST, key)
    seen = Shape <start = 2, end = 3> (PAST)
    seen_as_float = Cast <to = 1> (seen)
    cached = Greater (seen_as_float, zero)
    added = Where (cached, later, zero)
    logits = Add (column, added)
}
"""
PAIR = """
two (float[batch, t] x) => (float[batch, t] first, float[batch, t] second)
{ first = Identity (x) second = Sqrt (x) }
"""
IDS = np.arange(1, 13).reshape(2, 6)


def cached(path: Path, later: float, entry: str = "0.key") -> Path:
    """A causal model that scores each token by its number, and adds ``later`` to those behind cached ones."""
    model = parse_model(HEADER + CACHED)
    names = {"PAST": f"past_key_values.{entry}", "PRESENT": f"present.{entry}"}
    graph = model.graph
    for value in [*graph.input, *graph.output]:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    (constant,) = [tensor for tensor in graph.initializer if tensor.name == "later"]
    constant.CopyFrom(onnx.numpy_helper.from_array(np.float32(later), "later"))
    onnx.save(model, path)
    return path


def vectors() -> dict[str, np.ndarray]:
    logits = IDS[..., None].astype(np.float32)
    return {"in.input_ids": IDS, "out.logits": logits, "tolerance": np.float32(1e-6)}


@pytest.mark.parametrize("later", [0.0, 12.0, math.inf, math.nan])
def test_a_cached_step_without_numbers_fails_the_check_and_its_script(later, tmp_path):
    path = cached(tmp_path / "model.onnx", later)
    found = largest_error(path, vectors())
    scale = IDS[:, IDS.shape[1] // 2].max()  # of the first step from the cache
    np.testing.assert_allclose(found, later / scale, rtol=1e-6)
    assert Reloaded(found, 1e-6).holds == (later == 0)
    np.savez(tmp_path / "parity.npz", **vectors())
    shutil.copy(check.__file__, tmp_path / "check.py")
    script = subprocess.run([sys.executable, tmp_path / "check.py"], capture_output=True, text=True, check=False)
    assert script.returncode == int(later != 0), script.stdout + script.stderr


def test_a_second_output_without_numbers_fails_the_check(tmp_path):
    onnx.save(parse_model(HEADER + PAIR), tmp_path / "model.onnx")
    x = np.array([[1.0, -1.0]], np.float32)
    given = {"in.x": x, "out.first": x, "out.second": np.ones_like(x)}
    assert math.isnan(largest_error(tmp_path / "model.onnx", given))


def test_a_paired_decoder_without_numbers_fails_the_check(tmp_path):
    encoder = "encoder (float[batch, t] x) => (float[batch, t] states) { states = Identity (x) }"
    onnx.save(parse_model(HEADER + encoder), tmp_path / "encoder.onnx")
    path = cached(tmp_path / "decoder.onnx", math.nan, "0.decoder.key")
    x = np.ones((2, 3), np.float32)
    own = {"in.decoder_input_ids": IDS, "out.logits": vectors()["out.logits"]}
    assert math.isnan(largest_error(path, {"in.x": x, "out.states": x, **own}))
