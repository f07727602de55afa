"""The main job: a recipe becomes an output directory, complete or not there at all.

Everything that can fail is tried on types before a weight is read; what takes long is resumable, because the work
directory is named after a hash of all that determines the output.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from backends.safetensors import Emission, emit
from backends.safetensors.gptq import missing_packages
from compiler.binaries import write_binaries
from compiler.checks import check_comparable, check_has_weights, pointing
from compiler.console import Console
from compiler.errors import MISSHAPEN, CheckpointError, DataError, OutputError
from compiler.evaluate.parity import Verification, verify_by_reload, verify_gguf, verify_onnx
from compiler.evaluate.texts import TextData
from compiler.instrument import DumpGraphs, Narrate, Timing
from compiler.ir.graph import Graph
from compiler.means import Means, memory_to_use, open_means
from compiler.output import OutputDirectory
from compiler.pipeline import Observer, Pipeline, Report, no_calibration
from compiler.plan import bytes_in_file, open_recipe_model, written_cache
from compiler.recipe import Recipe
from compiler.recipe.schema import Calibration
from compiler.report.lock import job_key, make_lock
from compiler.report.text import summary
from compiler.report.write import Findings, write_reports
from compiler.target import checkpoint_for, gguf_for, onnx_for
from compiler.weights.checkpoint import Checkpoint
from compiler.weights.writer import explained

if TYPE_CHECKING:
    from backends.gguf import GgufEmission
    from backends.onnx import OnnxEmission
    from compiler.evaluate import Evaluation

ONNX_FOLDER = "onnx"
GGUF_FOLDER = "gguf"


@dataclass
class Result:
    """A finished output directory. ``document`` is its report.json; ``report`` is None when it was made earlier."""

    path: Path
    document: dict[str, Any]
    report: Report | None = None

    def summary(self) -> str:
        """What the command prints at the end."""
        return summary(self.document, self.path)


@dataclass
class _Run:
    """What the steps of one run share."""

    recipe: Recipe
    console: Console
    trust_remote_code: bool
    dump_graphs: Path | None
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    batches: Sequence[Mapping[str, Tensor]] = ()

    def calibration(self, graph: Graph) -> Sequence[Mapping[str, Tensor]]:
        """The recipe's calibration data as batches of ``graph``'s inputs."""
        if self.recipe.calibration is None:
            return no_calibration(graph)
        if not self.batches:
            with pointing(self.recipe, "calibration", "data"):
                self.batches = self._batches(graph, self.recipe.calibration)
        return self.batches

    def _batches(self, graph: Graph, wanted: Calibration) -> Sequence[Mapping[str, Tensor]]:
        from compiler.evaluate.data import data_windows, graph_calls
        from compiler.evaluate.loading import load_model

        path, trusted = self.recipe.model, self.trust_remote_code
        data = TextData(wanted.data, wanted.samples, wanted.length, wanted.seed)
        if wanted.written and list(graph.inputs) != ["input_ids"]:
            raise DataError("samples are written by models that continue texts", remedy="leave `written` out")
        if "decoder_input_ids" not in graph.inputs:
            batches = graph_calls(graph, path, data, trust_remote_code=trusted)
            return self._with_own_text(wanted, batches) if wanted.written else batches
        with self.step("write decoder inputs"):
            windows = data_windows(load_model(path, trust_remote_code=trusted), path, data, trust_remote_code=trusted)
        return [{name: window.arguments[name] for name in graph.inputs} for window in windows]

    def _with_own_text(self, wanted: Calibration, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """``batches`` and samples that the model writes itself, mixed: who takes a part of them takes some of both."""
        from compiler.evaluate.loading import load_model, load_tokenizer
        from compiler.evaluate.own_text import own_text

        path, trusted = self.recipe.model, self.trust_remote_code
        with self.step("write calibration samples"):
            model = load_model(path, trust_remote_code=trusted)
            tokenizer = load_tokenizer(path, trust_remote_code=trusted)
            own = own_text(model, tokenizer, wanted.written, wanted.length, wanted.seed)
        mixed = [*batches, *({"input_ids": each} for each in own.split(1))]
        random.Random(wanted.seed).shuffle(mixed)
        return mixed

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        self.console.say(f"{name} …")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def compress(
    recipe: Recipe,
    out: str | Path,
    *,
    console: Console | None = None,
    trust_remote_code: bool = False,
    dump_graphs: Path | None = None,
) -> Result:
    """Do what ``recipe`` says and write the directory ``out``. An interrupted run, repeated, goes on.

    Raises CompressError for everything that the recipe, the model or the disk can have wrong.
    """
    run = _Run(recipe, console or Console(quiet=True), trust_remote_code, dump_graphs)
    with run.step("capture"):
        graph = open_recipe_model(recipe)
    check_has_weights(graph, recipe)
    lock = make_lock(recipe, graph)
    output = OutputDirectory(Path(out), job_key(lock, graph.sources["model"].identity()))
    if output.finished:
        result = _finished(output)
        run.console.say(f"{out} is already finished: nothing to do")
        return result
    output.check_target()
    with open_means(recipe) as means:
        with run.step("passes"):
            planned = _pass_and_propose(run, graph, None)
        check_comparable(planned.graph, recipe, trust_remote_code)
        with output, _interruptible(run, output), explained(output.path):
            if output.resumed:
                run.console.say("resuming an interrupted run")
            return _make(run, planned, lock, output, means)


def _finished(output: OutputDirectory) -> Result:
    """The output of an earlier run. Raises OutputError when it is no longer what that run wrote."""
    try:
        document = json.loads((output.path / "compress" / "report.json").read_text(encoding="utf-8"))
        files: dict[str, int] = document["output"]["files"]
        changed = [name for name, size in files.items() if (output.path / name).stat().st_size != size]
        summary(document, output.path)  # which reads all that is shown
    except OSError as reason:
        raise _spoilt(output, f"cannot read {Path(reason.filename).name}: {reason.strerror}") from reason
    except MISSHAPEN as reason:
        raise _spoilt(output, "report.json cannot be read") from reason
    if changed:
        raise _spoilt(output, f"{changed[0]} has another size than it was written with")
    output.clean()
    return Result(output.path, document)


def _spoilt(output: OutputDirectory, reason: str) -> OutputError:
    return OutputError(
        f"the finished output is damaged: {reason}", where=str(output.path), remedy="delete it and run again"
    )


@contextmanager
def _interruptible(run: _Run, output: OutputDirectory) -> Generator[None]:
    try:
        yield
    except KeyboardInterrupt:
        run.console.error(f"run the same command again to go on; what is done so far is in {output.state.parent}")
        raise


@dataclass(frozen=True)
class _Passed:
    """A graph after its passes, what they did, and what is to be written for it."""

    graph: Graph
    report: Report
    emission: Emission | None
    onnx: OnnxEmission | None
    gguf: GgufEmission | None


def _pass_and_propose(run: _Run, graph: Graph, workdir: Path | None) -> _Passed:
    """Run the passes, without a ``workdir`` on types alone, and find the class that holds the result."""
    observers: list[Observer] = [run.recipe.locate(), Timing(), Narrate(run.console.say)]
    if run.dump_graphs is not None:
        observers.append(DumpGraphs(run.dump_graphs))
    pipeline, recipe = Pipeline(run.recipe.passes), run.recipe
    report = pipeline.run(
        graph,
        observers=observers,
        planned=workdir is None,
        workdir=workdir,
        bytes_of=bytes_in_file(recipe.compact),
        calibration=no_calibration if run.recipe.calibration is None else run.calibration,
    )
    report.written_cache = written_cache(graph, recipe)
    return _Passed(graph, report, checkpoint_for(graph, recipe), onnx_for(graph, recipe), gguf_for(graph, recipe))


def _make(run: _Run, passed: _Passed, lock: dict[str, Any], output: OutputDirectory, means: Means) -> Result:
    if passed.report.read_weights:
        with run.step("compute"):
            passed = _pass_and_propose(run, open_recipe_model(run.recipe), output.state)
    graph = passed.graph
    passed = replace(passed, onnx=_write_all(run, passed, output, means))
    with run.step("hash"):
        lock["inputs"]["model"]["files"] = digests_of(graph)
    own_code = bool(passed.emission and passed.emission.files)
    with run.step("verify"):
        verification, reloaded = _verify(run, passed, output, own_code)
        of_gguf = _verify_gguf(run, passed, output)
    evaluation, not_evaluated = _evaluate(run, output, own_code)
    findings = Findings(
        passed.report, passed.emission, verification, evaluation, lock, run.seconds, passed.onnx, reloaded
    )
    findings = replace(findings, gguf=passed.gguf, gguf_verification=of_gguf, not_evaluated=not_evaluated)
    document = write_reports(findings, output.files)
    output.commit()
    return Result(output.path, document, passed.report)


def _write_all(run: _Run, passed: _Passed, output: OutputDirectory, means: Means) -> OnnxEmission | None:
    """Write everything. Returns the ONNX models as they were written: what is measured on them may change them."""
    if passed.emission is not None:
        _write(run, passed.emission, passed.graph, output, means)
        _write_binaries(run, passed.emission, passed.graph, output)
    written = None if passed.onnx is None else _write_onnx(run, passed.onnx, output, means)
    if passed.gguf is not None:
        _write_gguf(run, passed.gguf, passed.graph, output, means)
    return written


def _write(run: _Run, emission: Emission, graph: Graph, output: OutputDirectory, means: Means) -> None:
    assert run.recipe.checkpoint is not None  # there is an emission for it
    with run.step("write"), run.console.progress("write") as advance:
        emit(
            emission,
            graph.sources,
            output.files,
            shard_bytes=run.recipe.checkpoint.shard,
            journal=output.state / "journal",
            on_progress=advance,
            **means.options(),
        )


def _write_binaries(run: _Run, emission: Emission, graph: Graph, output: OutputDirectory) -> None:
    wanted = run.recipe.checkpoint
    if wanted is not None and wanted.binaries:
        with run.step("compile kernels"), run.console.progress("compile kernels") as advance:
            write_binaries(graph, emission, wanted, output.files, advance)


def _write_onnx(run: _Run, emission: OnnxEmission, output: OutputDirectory, means: Means) -> OnnxEmission:
    from backends.onnx import emit, measured

    folder = output.files / ONNX_FOLDER
    folder.mkdir(exist_ok=True)
    with run.step("write onnx"), run.console.progress("write onnx") as advance:
        journal = output.state / "onnx-journal"
        emit(emission, emission.graph.sources, folder, journal=journal, on_progress=advance, **means.options())
    bound = run.recipe.onnx.input_error if run.recipe.onnx is not None else None
    if bound is None:
        return emission
    with run.step("measure rounded inputs"):
        return measured(emission, folder, run.calibration(emission.graph), bound)


def _write_gguf(run: _Run, emission: GgufEmission, graph: Graph, output: OutputDirectory, means: Means) -> None:
    from backends.gguf import emit

    folder = output.files / GGUF_FOLDER
    folder.mkdir(exist_ok=True)
    with run.step("write gguf"), run.console.progress("write gguf") as advance:
        journal = output.state / "gguf-journal"
        emit(emission, graph.sources, folder, journal=journal, on_progress=advance, **means.options())


def _verify_gguf(run: _Run, passed: _Passed, output: OutputDirectory) -> Verification | None:
    """What transformers' reader of GGUF files gave; None when none is written."""
    from backends.gguf import FILE_NAME

    if passed.gguf is None:
        return None
    return verify_gguf(passed.graph, output.files / GGUF_FOLDER / FILE_NAME, memory=memory_to_use(run.recipe))


def _verify(
    run: _Run, passed: _Passed, output: OutputDirectory, own_code: bool
) -> tuple[Verification | None, Verification | None]:
    """What reloading the checkpoint, and the ONNX model, gave; None for what is not written."""
    memory = memory_to_use(run.recipe)
    checkpoint, onnx = None, None
    if passed.emission is not None:
        missing = missing_packages(passed.emission.quantization_config)
        checkpoint = (
            Verification(False, skipped=f"transformers needs {' and '.join(missing)} to load it")
            if missing
            else verify_by_reload(passed.graph, output.files, memory=memory, own_code=own_code)
        )
    if passed.onnx is not None:
        onnx = verify_onnx(passed.onnx, output.files / ONNX_FOLDER, memory=memory)
    return checkpoint, onnx


def _evaluate(run: _Run, output: OutputDirectory, own_code: bool) -> tuple[Evaluation | None, str]:
    """The comparison with the original that the recipe asks for, None when it asks for none; or why there is none."""
    from backends.gguf import FILE_NAME

    alone = run.recipe.checkpoint is None
    path = output.files / GGUF_FOLDER / FILE_NAME if alone else output.files
    try:
        return _compared(run, path, own_code), ""
    except CheckpointError as reason:
        if not alone or reason.where != str(path):
            raise
        return None, f"transformers' reader of GGUF files does not take it: {reason.cause.rstrip('.')}"


def _compared(run: _Run, path: Path, own_code: bool) -> Evaluation | None:
    from compiler.evaluate import evaluate_model

    wanted = run.recipe.evaluate
    if wanted is None:
        return None
    with run.step("evaluate"), run.console.progress("evaluate") as advance:
        return evaluate_model(
            path,
            against=run.recipe.model,
            data=wanted.data,
            items=wanted.items,
            metrics=wanted.metrics or None,
            samples=wanted.samples,
            length=wanted.length,
            seed=wanted.seed,
            image=run.recipe.inputs.image,
            trust_remote_code=run.trust_remote_code,
            own_code=own_code,
            on_progress=advance,
        )


def digests_of(graph: Graph) -> dict[str, str]:
    """The sha256 of every file of the model's checkpoint."""
    source = graph.sources["model"]
    return source.digests() if isinstance(source, Checkpoint) else {}
