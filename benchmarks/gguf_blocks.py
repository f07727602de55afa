"""Block formats of GGUF files, by us and by llama.cpp, in the same matrices of one model and on the same windows.

``python benchmarks/gguf_blocks.py`` puts the `down_proj` matrices of SmolLM2-135M (whose width K-quants divide) into
each of ``--types`` and leaves all others as they are. Bytes are equal: only the choice of codes and scales differs.
Methods of llama.cpp are its own `ggml_quantize_chunk`, by the package xllamacpp, with and without an importance matrix,
which is the energy of inputs on the calibration windows of the original model. Ours are options of `quantize`. Scores:
loss above the original in nats and KL(original || rounded), over all positions but the first of each window.

The checkpoint comes from a file of 4 bits: its weights lie on a grid of 16 values in each 32 inputs, which formats of 4
bits and more can find again. Formats of 3 and 2 bits are what tells methods apart.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gguf
import torch
from torch import Tensor

from benchmarks.common import ROOT, SMOLLM2
from compiler.calibration.moments import measure
from compiler.calibration.sweep import token_batches
from compiler.evaluate import load_model
from compiler.evaluate.loading import load_tokenizer
from compiler.evaluate.texts import TextData
from compiler.frontend import capture
from compiler.ir.execute import read_param
from compiler.ir.graph import Graph, Param
from compiler.pipeline import Pipeline
from compiler.weights.ops.gguf.layouts import LAYOUTS
from passes import Quantize

WHERE = "mlp"
NAME = "down_proj.weight"
OURS = ({"scale": "weighted"}, {"method": "gptq"}, {"method": "refined"})
Values = Mapping[str, Tensor]
Batches = Sequence[Mapping[str, Tensor]]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    graph, model = capture(options.model), load_model(options.model)
    data = TextData(options.calibration, options.samples, options.length, 0)
    batches = token_batches(graph, data.windows(load_tokenizer(options.model)))
    texts = {path.stem: windows(path, options) for path in options.texts}
    reference = {name: [logits(model, window) for window in found] for name, found in texts.items()}
    original = {name: value.detach().clone() for name, value in model.state_dict().items() if name.endswith(NAME)}
    for method, make in methods(graph, batches):
        for kind in options.types:
            started = time.process_time()
            values = make(kind)
            row: dict[str, Any] = {"type": kind, "method": method, "seconds": round(time.process_time() - started, 1)}
            put(model, values)
            row |= {name: score(model, found, reference[name]) for name, found in texts.items()}
            put(model, original)
            print(json.dumps(row), flush=True)


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--types", nargs="+", choices=[*LAYOUTS], default=["q4_k", "q3_k", "q2_k"])
    parser.add_argument("--calibration", type=Path, default=ROOT / "benchmarks" / "data" / "emma.txt")
    parser.add_argument("--texts", type=Path, nargs="+", default=[ROOT / "benchmarks" / "data" / "persuasion.txt"])
    parser.add_argument("--samples", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--windows", type=int, default=4, help="windows of each text to score")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def windows(path: Path, options: argparse.Namespace) -> list[Tensor]:
    data = TextData(path, options.windows, options.length, 0)
    return list(data.windows(load_tokenizer(options.model)))


def methods(graph: Graph, batches: Batches) -> Iterator[tuple[str, Callable[[str], Values]]]:
    """Each method's name, and what makes the values of the matrices in a type by it."""
    params = [param for name, param in graph.params.items() if name.endswith(NAME)]
    yield "llama.cpp", lambda kind: theirs(kind, graph, params, {})
    yield "nearest", lambda kind: ours(kind, graph, batches, {})
    importance = energies(graph, params, batches)
    yield "llama.cpp, importance", lambda kind: theirs(kind, graph, params, importance)
    for given in OURS:
        name = ", ".join(f"{key}: {value}" for key, value in given.items())
        yield name, lambda kind, given=given: ours(kind, graph, batches, given)


def energies(graph: Graph, params: Sequence[Param], batches: Batches) -> Values:
    with tempfile.TemporaryDirectory() as folder:
        from compiler.weights.spill import Progress

        known = measure(graph, params, batches, Progress(Path(folder)))
        return {param.name: known.of(param).second.diagonal().float() for param in params}


def theirs(kind: str, graph: Graph, params: Sequence[Param], importance: Values) -> Values:
    return {param.name: by_llama_cpp(kind, read_param(graph, param), importance.get(param.name)) for param in params}


def by_llama_cpp(kind: str, weight: Tensor, importance: Tensor | None) -> Tensor:
    """``weight`` float32 [rows, columns] as llama.cpp's quantiser leaves it."""
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    layout, (rows, columns) = LAYOUTS[kind], weight.shape
    weight = weight.contiguous()
    made = torch.zeros(rows, columns // layout.size * layout.nbytes, dtype=torch.uint8)
    pointers = [ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(made.data_ptr())]
    sizes = [ctypes.c_int64(size) for size in (0, rows, columns)]
    counted = None if importance is None else ctypes.c_void_p(importance.contiguous().data_ptr())
    library.ggml_quantize_chunk(ctypes.c_int(layout.number), *pointers, *sizes, counted)
    return torch.from_numpy(gguf.quants.dequantize(made.numpy(), gguf.GGMLQuantizationType(layout.number)))


def ours(kind: str, graph: Graph, batches: Batches, given: Mapping[str, Any]) -> Values:
    from compiler.ir.layers import copy_of

    trial = copy_of(graph)
    trial.sources = dict(graph.sources)
    step = Quantize(where={"role": WHERE, "name": f"*{NAME}"}, type=kind, **given)
    with tempfile.TemporaryDirectory() as folder:
        Pipeline([step]).run(trial, workdir=Path(folder), calibration=lambda _: batches)
        changed = [param for param in trial.params.values() if param.expr.op == "dequantize_gguf"]
        return {param.name: read_param(trial, param) for param in changed}


def put(model: Any, values: Values) -> None:
    state = model.state_dict()
    for name, value in values.items():
        state[name].copy_(value)


def logits(model: Any, window: Tensor) -> Tensor:
    with torch.no_grad():
        return model(window.reshape(1, -1)).logits[0].log_softmax(-1)


def score(model: Any, found: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, float]:
    loss = divergence = count = 0.0
    for window, before in zip(found, reference, strict=True):
        after, wanted = logits(model, window)[:-1], window.reshape(-1)[1:, None]
        loss += float((before[:-1].gather(1, wanted) - after.gather(1, wanted)).sum())
        divergence += float((before[:-1].exp() * (before[:-1] - after)).sum())
        count += len(wanted)
    return {"loss": round(loss / count, 4), "kl": round(divergence / count, 4)}


if __name__ == "__main__":
    main()
