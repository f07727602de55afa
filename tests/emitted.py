"""From a family to a checkpoint, through passes, to what plain transformers makes of the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.safetensors import Emission, emit, require, stored_tensors
from backends.torch_module.packing import KERNELS
from compiler.evaluate import load_model
from compiler.ir.execute import run
from compiler.pipeline import Calibration, Pass, Pipeline, Report, no_calibration
from tests.captures import saved
from tests.families import FAMILIES

TOLERANCE = 1e-5


class Job:
    """A family's tiny model, saved and captured, changed by ``passes`` and written again in ``directory``."""

    def __init__(
        self,
        name: str,
        directory: Path,
        passes: Sequence[Pass] = (),
        dtype: Any = torch.float32,
        calibration: Calibration = no_calibration,
        **changes: Any,
    ):
        self.family, self.directory = FAMILIES[name], directory
        self.out = directory / "out"
        self.source, self.graph = saved(name, dtype=dtype, **changes)
        self.before = self.outputs() if passes else {}
        self.report: Report = Pipeline(passes).run(self.graph, bytes_of=stored_bytes, calibration=calibration)

    def outputs(self) -> dict[str, Tensor]:
        """What the graph computes, in float32."""
        return run(self.graph, self.family.inputs())

    def emit(self) -> Emission:
        """Write the graph to ``out``."""
        emission = require(self.graph)
        self.out.mkdir(parents=True)
        emit(emission, self.graph.sources, self.out)
        return emission

    def reloaded(self) -> Any:
        """The written model, as plain transformers loads it, its stored weights cast to float32."""
        return load_model(self.out)

    def reload_error(self) -> float:
        """How far the reloaded model is from the graph, relative to the outputs' scale."""
        with torch.no_grad():
            theirs = self.reloaded()(**self.family.inputs())
        return distance(theirs, self.outputs())


def stored_bytes(param: Any) -> int:
    return sum(expr.type.nbytes for expr in stored_tensors(param))


def distance(theirs: Any, ours: dict[str, Tensor]) -> float:
    """The largest difference of any output over that output's largest value."""
    assert ours
    return max(float((theirs[name].float() - value).abs().max() / value.abs().max()) for name, value in ours.items())


def written_for(emission):
    """The files of an emission that were written for its graph: without the kernels that it carries."""
    return {file: text for file, text in emission.files.items() if not (KERNELS / file).exists()}
