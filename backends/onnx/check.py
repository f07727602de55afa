"""Check that an ONNX model still computes what it was written to compute, with onnxruntime and numpy alone.

    python check.py [MODEL.onnx]

``parity.npz`` beside the model holds inputs and the outputs that the compiled graph has for them. A language model is
run whole, then token by token from its cache, then with padding on the left.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PAST, PRESENT = "past_key_values", "present"
PROMPT = "prompt.onnx"  # what reads prompts, where another model than for single tokens does
PADDING = 3

Arrays = Mapping[str, Any]


def session(path: Path, threads: int = 1) -> Any:
    """``path`` loaded by ONNX Runtime on the CPU.

    Plans of memory by shapes are of no use where each step has a shape of its own, and are wrong where a cache is
    written in place.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def largest_error(path: Path, vectors: Arrays) -> float:
    """How far outputs of the model in ``path`` are from those in ``vectors``, over the largest of each output."""
    if path.name.endswith("decoder.onnx"):
        return _paired_error(session(path.with_name(path.name.replace("decoder", "encoder"))), session(path), vectors)
    model = session(path)
    given = {name.removeprefix("in."): value for name, value in vectors.items() if name.startswith("in.")}
    expected = {name.removeprefix("out."): value for name, value in vectors.items() if name.startswith("out.")}
    if any(value.name.startswith(PAST) for value in model.get_inputs()):
        return _largest(_decoded(model, given["input_ids"], expected["logits"], {}, vectors.get("decoded.logits")))
    found = _run(model, given)
    return _largest([_distance(found[name], value) for name, value in expected.items()])


def _paired_error(encoder: Any, decoder: Any, vectors: Arrays) -> float:
    """The error of a decoder of what an encoder made."""
    given = {name.removeprefix("in."): value for name, value in vectors.items() if name.startswith("in.")}
    ids = given.pop("decoder_input_ids")
    found = _run(encoder, given)
    errors = [_distance(x, vectors[f"out.{name}"]) for name, x in found.items() if f"out.{name}" in vectors]
    crossed = {f"{PAST}.{name}": value for name, value in found.items() if ".encoder." in name}
    if "attention_mask" in given:
        crossed["encoder_attention_mask"] = given["attention_mask"]
    return _largest(errors + _decoded(decoder, ids, vectors["out.logits"], crossed))


def _run(model: Any, feeds: Arrays) -> dict[str, Any]:
    names = [value.name for value in model.get_outputs()]
    return dict(zip(names, model.run(names, dict(feeds)), strict=True))


def _decoded(model: Any, ids: Any, logits: Any, beside: Arrays, later: Any = None) -> list[float]:
    """The errors of all at once, of a start and the rest token by token, and of all after padding; ``beside`` are the
    inputs that are the same in each step. ``later`` are the logits where only the start is a prompt, if they differ."""
    batch, length = ids.shape
    ones = np.ones((batch, length + PADDING), np.int64)
    errors = [_apart(_step(model, ids, ones[:, :length], beside)[0], logits)]
    start = length // 2
    steps = logits if later is None else later
    found, past = _step(model, ids[:, :start], ones[:, :start], beside)
    errors.append(_apart(found, steps[:, :start]))
    for place in range(start, length):
        found, past = _step(model, ids[:, place : place + 1], ones[:, : place + 1], {**beside, **past})
        errors.append(_distance(found, steps[:, place : place + 1]))
    right = model.get_modelmeta().custom_metadata_map.get("compress-model.padding") == "right"
    nothing, place = np.zeros((batch, PADDING), np.int64), slice(0, length) if right else slice(PADDING, None)
    padded = np.concatenate((ids, nothing) if right else (nothing, ids), 1)
    mask = np.zeros_like(ones)
    mask[:, place] = 1
    found = _step(model, padded, mask, beside)[0]
    errors.append(_apart(found[:, place] if found.shape[1] > 1 else found, logits))
    return errors


def _apart(found: Any, logits: Any) -> float:
    """The error of the last tokens; some models score the last one only."""
    return _distance(found, logits[:, -found.shape[1] :])


def _step(model: Any, ids: Any, mask: Any, given: Arrays) -> tuple[Any, dict[str, Any]]:
    tokens = next(value.name for value in model.get_inputs() if value.name.endswith("input_ids"))
    feeds = {tokens: ids, "attention_mask": mask, **empty_cache(model, len(ids)), **given}
    feeds |= {name: with_room(feeds[name], mask.shape[1]) for name in buffers(model)}
    found = _run(model, feeds)
    kept = {name.replace(PRESENT, PAST, 1): value for name, value in found.items() if name.startswith(PRESENT)}
    return found["logits"], kept


def empty_cache(model: Any, batch: int) -> dict[str, Any]:
    """A cache of no tokens."""
    inputs = [v for v in model.get_inputs() if v.name.startswith(PAST) and ".encoder." not in v.name]
    return {value.name: np.zeros(_without_past(value.shape, batch), dtype_of(value)) for value in inputs}


def buffers(model: Any) -> list[str]:
    """The inputs into which new tokens are written, behind past ones: they have room for all there are."""
    return [value.name for value in model.get_inputs() if value.name.startswith(PAST) and "capacity" in value.shape]


def with_room(array: Any, count: int) -> Any:
    """A buffer [B, 1, capacity, width] for ``count`` tokens or more."""
    missing = max(0, count - array.shape[2])
    return np.pad(array, ((0, 0), (0, 0), (0, missing), (0, 0)))


def _without_past(shape: Any, batch: int) -> list[int]:
    return [dim if isinstance(dim, int) else batch if dim == "batch" else 0 for dim in shape]


def dtype_of(value: Any) -> Any:
    """What numpy calls the numbers of an input; a cache holds floats or their codes, and positions."""
    kinds = {"tensor(int8)": np.int8, "tensor(int64)": np.int64, "tensor(float16)": np.float16}
    return kinds.get(value.type, np.float32)


def _distance(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / (np.abs(expected).max() or 1.0))


def _largest(errors: list[float]) -> float:
    """The largest error; NaN if one is NaN, which ``max`` keeps only where it comes first."""
    return float(np.max(errors))


def main() -> int:
    beside = [Path(__file__).parent / name for name in ("model.onnx", "decoder.onnx", PROMPT)]
    paths = [Path(sys.argv[1])] if len(sys.argv) > 1 else [file for file in beside if file.is_file()]
    vectors = np.load(paths[0].parent / "parity.npz")
    error, allowed = _largest([largest_error(path, vectors) for path in paths]), float(vectors["tolerance"])
    sys.stdout.write(f"largest error {error:.3g} of the outputs' scale, {allowed:.3g} allowed\n")
    return int(not error <= allowed)


if __name__ == "__main__":
    sys.exit(main())
