"""Proof by reloading: what was written, loaded by its own runtime, computes what the graph computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compiler.errors import CheckpointError, ParityError
from compiler.instrument import give_back
from compiler.ir.graph import Graph
from compiler.ir.layers import segments
from compiler.ir.rounded import other_codes, rounds_activations, without_rounding

if TYPE_CHECKING:
    from backends.onnx import OnnxEmission

LENGTH = 24
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Verification:
    """Whether the output was reloaded and compared, how far it was from the graph, and what was allowed.

    ``error`` is the largest difference of an output over the largest output; ``skipped`` says why nothing was done.
    """

    performed: bool
    error: float | None = None
    tolerance: float | None = None
    skipped: str = ""


def verify_by_reload(graph: Graph, directory: Path, *, memory: int, own_code: bool = False) -> Verification:
    """Load ``directory`` with plain transformers and compare its outputs with the graph's, on random inputs.

    ``own_code`` says that the code in ``directory`` was written by this program, and may be run.
    Where the graph rounds activations to codes, those of a stock class are compared without that too: codes differ by
    the last bit of a sum, and the bound that this needs would hide a wrong matrix.
    Skipped when the model in float32 does not fit ``memory`` bytes. Raises ParityError when the outputs differ.
    """
    from backends.torch_module import as_computed
    from compiler.evaluate import load_model
    from compiler.evaluate.inputs import position_limit, random_windows
    from compiler.ir.execute import run

    needed = FLOAT32_BYTES * sum(param.type.numel for param in graph.params.values())
    if needed > memory:
        return Verification(False, skipped=f"the model needs {needed} bytes in float32, more than there is to use")
    give_back()
    model = load_model(directory, trust_remote_code=own_code)
    give_back()  # what it took to unpack weights
    (window,) = random_windows(model, 1, min(LENGTH, position_limit(model) or LENGTH), seed=0)
    graph = as_computed(graph) if own_code else graph
    theirs = _computed(model, window.arguments, graph)
    del model
    give_back()  # before the graph's weights are read: both would be the most that a run holds
    inputs = {name: window.arguments[name] for name in graph.inputs}
    ours = run(graph, inputs)
    error = _error(theirs, ours)
    tolerance = 16 * torch.finfo(torch.float32).eps * max(1, len(segments(graph)))  # sums in another order, by layers
    if rounds_activations(graph):
        exact = run(without_rounding(graph), inputs)
        if not own_code:
            plain = _computed(load_model(directory, rounding=False), window.arguments, graph)
            _check(_error(plain, exact), tolerance, directory)
        tolerance = max(tolerance, other_codes(graph, ours, exact))
    _check(error, tolerance, directory)
    return Verification(True, error, tolerance)


def _computed(model: Any, arguments: Mapping[str, torch.Tensor], graph: Graph) -> dict[str, torch.Tensor]:
    """The outputs of ``model`` that ``graph`` has, in float32."""
    with torch.no_grad():
        found = model(**arguments, **_exactly(model))
    return {name: output_named(found, name).float() for name in graph.outputs}


def _error(theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> float:
    """How far ``theirs`` are from ``ours``, over the scale of each."""
    return _largest([_distance(theirs[name], value.float()) for name, value in ours.items()])


def _check(error: float, tolerance: float, directory: Path) -> None:
    if not error <= tolerance:
        raise ParityError(
            f"the written model differs from the graph by {error:.3g} of the output's scale",
            where=str(directory),
            remedy=f"at most {tolerance:.3g} is rounding; this is a bug",
        )


def verify_gguf(graph: Graph, file: Path, *, memory: int) -> Verification:
    """``verify_by_reload`` of a GGUF file; skipped where transformers' reader does not know its architecture."""
    try:
        return verify_by_reload(graph, file, memory=memory)
    except CheckpointError as reason:
        return Verification(
            False, skipped=f"transformers' reader of GGUF files does not take it: {reason.cause.rstrip('.')}"
        )


def verify_onnx(emission: OnnxEmission, directory: Path, *, memory: int) -> Verification:
    """Run the ONNX model in ``directory`` by ONNX Runtime and compare its outputs with the graph's, on random inputs.

    Where products round their inputs, or the graph its activations, to codes, that is compared without rounding, and
    with it against a wide bound. Skipped when its tensors do not fit ``memory`` bytes. Raises ParityError when the
    outputs differ.
    """
    from backends.onnx import verify

    if 2 * emission.nbytes > memory:
        return Verification(False, skipped=f"ONNX Runtime needs about {2 * emission.nbytes} bytes, more than there is")
    found = verify(emission, directory)
    if not found.holds:
        rounded = "" if found.rounded is None else f" ({found.rounded:.3g} with rounded inputs)"
        raise ParityError(
            f"the ONNX model differs from the graph by {found.error:.3g} of the output's scale{rounded}",
            where=str(directory),
            remedy=f"at most {found.tolerance:.3g} is rounding; this is a bug",
        )
    return Verification(True, found.error, found.tolerance)


def _exactly(model: Any) -> dict[str, Any]:
    """What keeps a forward pass from rounding what it caches."""
    return {"use_cache": False} if getattr(model.config, "cache_bits", 0) else {}


def _largest(distances: list[float]) -> float:
    """The largest distance; NaN when one is no number, which Python's ``max`` may pass over."""
    return torch.tensor(distances, dtype=torch.float64).amax().item()


def output_named(outputs: Any, path: str) -> torch.Tensor:
    """What a dotted output name of a graph stands for: fields by name, members of a tuple by number."""
    for part in path.split("."):
        outputs = outputs[int(part) if part.isdigit() else part]
    return outputs


def _distance(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    scale = ours.abs().max().item()
    return (theirs - ours).abs().max().item() / (scale or 1.0)
