"""What a recipe would give, from configs and file headers alone: no weight is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.checks import check_data
from compiler.console import human_bytes, human_count, table
from compiler.errors import MISSHAPEN, CaptureError, CheckpointError, CompressError, TargetError, UsageError, nearest
from compiler.instrument import DumpGraphs
from compiler.ir.graph import Graph, Param
from compiler.ledger import Bytes, Ledger
from compiler.pipeline import Calibration, Observer, PassReport, Pipeline, Report, no_calibration
from compiler.recipe import Recipe

if TYPE_CHECKING:
    from backends.gguf import GgufEmission
    from backends.onnx import OnnxEmission
    from backends.safetensors import Emission
    from compiler.weights.expr import Expr


LARGEST = 16  # tensors whose making is looked at for the estimate of memory


@dataclass(frozen=True)
class Output:
    """What would be written: the model class, its files (name to bytes of tensors), and where it loads."""

    architecture: str
    files: Mapping[str, int]
    loads_in: tuple[str, ...]

    @property
    def tensor_bytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True)
class Plan:
    """A recipe's outcome. ``peak_memory`` is what the run is expected to hold, in bytes; reloading the result to verify
    and to evaluate it takes the whole model.

    ``output`` is None when no format that the recipe asks for can hold the result; ``refusal``, ``remedy`` and
    ``where`` are then those of the error that the run ends with.
    """

    recipe: str
    model: str
    report: Report
    output: Output | None
    refusal: str
    peak_memory: int
    remedy: str = ""
    where: str = ""

    def check(self) -> Output:
        """What would be written. Raises TargetError, as the run does, when nothing holds the result."""
        if self.output is None:
            raise TargetError(self.refusal, remedy=self.remedy, where=self.where)
        return self.output

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """The plan as a person reads it; why nothing can be written is for ``check`` to say."""
        lines = [f"{self.recipe}: {self.model}", "", ledger_table(self.report), ""]
        lines += [line for entry in self.report.passes for line in pass_lines(entry)]
        return "\n".join([*lines, "", *self._output_lines()])

    def _output_lines(self) -> list[str]:
        if self.output is None:
            return ["writes   nothing: it cannot be written"]
        count = len(self.output.files)
        return [
            f"writes   {self.output.architecture}, {human_bytes(self.output.tensor_bytes)}"
            f" in {count} file{'s' if count > 1 else ''}",
            *(f"{'' if index else 'loads in':8} {place}" for index, place in enumerate(self.output.loads_in)),
            f"memory   about {human_bytes(self.peak_memory)}; the number of layers does not matter",
        ]


def make_plan(recipe: Recipe, *, dump_graphs: Path | None = None) -> Plan:
    """Capture the recipe's model and run its passes without reading a weight.

    Raises what capture and the passes raise; errors of passes point at the recipe.
    """
    graph = open_recipe_model(recipe)
    model = f"{graph.origin.architecture or graph.name} from {recipe.model}{_on_disk(graph)}"
    report = run_passes(recipe, graph, dump_graphs=dump_graphs)
    report.written_cache = written_cache(graph, recipe)
    name = str(recipe.path)
    try:
        output, memory = _output(recipe, graph)
    except TargetError as error:
        return Plan(name, model, report, None, error.cause, 0, error.remedy, error.where)
    return Plan(name, model, report, output, "", memory)


def _on_disk(graph: Graph) -> str:
    size = file_bytes(graph)
    return f" ({human_bytes(size)} on disk)" if size else ", a config without weights"


def file_bytes(graph: Graph) -> int:
    """Bytes of the files that the model's weights lie in; 0 without any."""
    from compiler.weights.checkpoint import Checkpoint

    source = graph.sources.get("model")
    return sum(file.stat().st_size for file in source.files) if isinstance(source, Checkpoint) else 0


def run_passes(recipe: Recipe, graph: Graph, *, dump_graphs: Path | None = None, up_to: int | None = None) -> Report:
    """The recipe's passes (the first ``up_to`` of them) as a planned run on ``graph``."""
    observers: list[Observer] = [recipe.locate()]
    if dump_graphs is not None:
        observers.append(DumpGraphs(dump_graphs))
    calibration: Calibration = no_calibration if recipe.calibration is None else lambda graph: []
    return Pipeline(recipe.passes[:up_to]).run(
        graph,
        observers=observers,
        planned=True,
        bytes_of=bytes_in_file(recipe.compact),
        calibration=calibration,
    )


def written_cache(graph: Graph, recipe: Recipe) -> int | None:
    """Bytes that the class that is written caches of a token, where `cache-bits` rounds them."""
    from backends.torch_module import cached_bytes

    wanted = recipe.checkpoint
    return cached_bytes(graph, wanted.cache_bits) if wanted is not None and wanted.cache_bits else None


def bytes_in_file(compact: bool = False) -> Bytes:
    """A count of the bytes of the tensors that stand for a parameter in a safetensors file; it remembers.

    ``compact``: sparse weights are stored as bits and values.
    """
    from backends.safetensors import stored_tensors
    from backends.torch_module import stored

    known: dict[Any, int] = {}

    def count(param: Param) -> int:
        kind = _kind(param)
        if kind not in known:
            parts = stored(param.name, param, compact=True).values() if compact else stored_tensors(param)
            known[kind] = sum(expr.type.nbytes for expr in parts)
        return known[kind]

    return count


def _kind(param: Param) -> Any:
    """All that the bytes of a parameter depend on: types, how it is quantised or sparse, and who reads it."""
    from compiler.weights.ops.codec import is_quantised
    from compiler.weights.ops.sparse import as_scatter

    readers = {(node.op.name, index) for node in param.users for index, v in enumerate(node.inputs) if v is param}
    expr = as_scatter(param.expr) or param.expr
    made = expr.attrs if is_quantised(expr) or expr.op == "scatter" else ()
    parts = tuple(arg.type for arg in expr.args) if made else ()
    return param.type, param.storage, made, parts, frozenset(readers)


def open_recipe_model(recipe: Recipe) -> Graph:
    """The graph of the recipe's model, which takes the recipe's data; errors point at the recipe."""
    try:
        graph = open_model(recipe.model, recipe.inputs.image)
    except CompressError as error:
        place = recipe.places.get("inputs" if recipe.inputs.image else "model")
        error.span = error.span or (place.span if place is not None else None)
        raise
    check_data(recipe, graph)
    return graph


def open_model(model: str, image: int | None = None) -> Graph:
    """The graph of a checkpoint, or of a config alone (a directory without weights, or a ``config.json``).

    Pictures are ``image`` pixels high and wide, by default as the config says.
    """
    from compiler.frontend.capture import capture

    config = _config_alone(Path(model))
    return capture(model, image=image) if config is None else _from_config(config, image)


def _config_alone(path: Path) -> Path | None:
    """The config file to capture from, when there are no weights beside it."""
    if path.is_file() and path.suffix == ".json":
        return path
    config = path / "config.json"
    return config if config.is_file() and not _has_weights(path) else None


def _has_weights(path: Path) -> bool:
    return any(
        file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name.endswith(".index.json")
        for file in path.iterdir()
    )


def _from_config(file: Path, image: int | None) -> Graph:
    from compiler.frontend.capture import capture
    from compiler.frontend.subject import config_from_dict

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, *MISSHAPEN) as reason:
        raise CheckpointError(
            f"the config cannot be read: {reason}",
            where=str(file),
            remedy="check that it is the config.json of a transformers model",
        ) from reason
    return capture(config_from_dict(values), image=image)


def graph_of(model: str, *, after: str | None = None) -> Graph:
    """The graph of a model, or of a recipe after all its passes or those up to ``after``.

    Raises UsageError when ``after`` is given without a recipe or names none of its passes.
    """
    if not model.endswith((".yaml", ".yml")):
        if after is not None:
            raise UsageError(
                "`--after` shows what a recipe's pass makes, and this is no recipe",
                remedy="give a recipe (.yaml) instead of a model",
            )
        return _open_shown(model)
    recipe = Recipe.load(model)
    keys = [step.key() for step in recipe.passes]
    if after is not None and after not in keys:
        raise UsageError(f"the recipe has no pass `{after}`", remedy=nearest(after, keys))
    graph = open_recipe_model(recipe)
    run_passes(recipe, graph, up_to=None if after is None else len(keys) - keys[::-1].index(after))
    return graph


def _open_shown(model: str) -> Graph:
    """The graph of a model. Raises CaptureError, with what to do instead, for an output that is not captured again."""
    try:
        return open_model(model)
    except CompressError as error:
        if not (Path(model) / "compress" / "recipe.lock.yaml").is_file():
            raise
        raise CaptureError(
            f"this is an output of compress-model, which is not read again: {error.cause}",
            where=model,
            remedy=f"`compress-model show RECIPE`, of the recipe that made it, shows its graph; {model}/README.md says "
            f"what was done, `compress-model diff ORIGINAL {model}` what its files hold",
        ) from error


def _output(recipe: Recipe, graph: Graph) -> tuple[Output, int]:
    from compiler.means import expected_means
    from compiler.target import checkpoint_for, gguf_for, onnx_for
    from compiler.weights.layout import SHARD_BYTES, layout

    checkpoint, onnx, gguf = (make(graph, recipe) for make in (checkpoint_for, onnx_for, gguf_for))
    shard = recipe.checkpoint.shard if recipe.checkpoint else SHARD_BYTES
    written = [emission for emission in (checkpoint, onnx, gguf) if emission is not None]
    files: dict[str, int] = {} if gguf is None else {"gguf/model.gguf": gguf.nbytes}
    for emission in [emission for emission in written if emission is not gguf]:
        folder = "onnx/" if emission is onnx else ""
        files |= {f"{folder}{part.name}": part.tensor_bytes for part in layout(emission.tensors, shard)}
    output = Output(written[0].architecture, files, tuple(line for emission in written for line in loads_in(emission)))
    means = expected_means(recipe)
    share = means.budget // means.workers
    return output, means.taken + means.workers * max(_largest_step(emission.tensors, share) for emission in written)


def loads_in(emission: Emission | OnnxEmission | GgufEmission) -> tuple[str, ...]:
    """Where it loads, and where it does not."""
    from backends.safetensors import Emission
    from backends.safetensors.gptq import PACKAGES

    if not isinstance(emission, Emission):
        return emission.loads_in
    quantised = emission.quantization_config
    if not quantised:
        needs = ""
    elif quantised["quant_method"] == "gptq":
        needs = f" with {' and '.join(PACKAGES)}"
    else:
        needs = f" with compressed-tensors {version('compressed-tensors')}"
    code = "with its own code (trust_remote_code=True)" if emission.files else "without remote code"
    ours = f"transformers {version('transformers')}{needs}, {code}"
    why = (f"no stock class: {emission.no_stock}",) if emission.no_stock else ()
    return (ours, *why, *(f"but: {note}" for note in emission.notes))


def _largest_step(tensors: Mapping[str, Expr], budget: int) -> int:
    """The most bytes that making a part of one of the largest tensors takes within ``budget``; others take less."""
    from compiler.weights.evaluate import working_set
    from compiler.weights.tasks import plan

    largest = sorted(tensors, key=lambda name: tensors[name].type.nbytes)[-LARGEST:]
    tasks = plan({name: tensors[name] for name in largest}, budget)
    return max(working_set([piece.expr for piece in task.pieces]) for task in tasks)


def ledger_table(report: Report) -> str:
    """Parameters, bytes, arithmetic and cache: of the model, and after each pass."""
    rows = [("", "parameters", "stored", "FLOPs/token", "cache/token"), ("the model", *_cells(report.before))]
    rows += [(f"{index}. {entry.name}", *_cells(entry.after)) for index, entry in enumerate(report.passes, 1)]
    if report.passes:
        rows.append(("change", *_change(report.before, report.after)))
    return table(rows)


def _cells(ledger: Ledger) -> tuple[str, ...]:
    return (
        human_count(ledger.parameters),
        human_bytes(ledger.stored_bytes),
        human_count(ledger.flops_per_token),
        human_bytes(ledger.cache_bytes_per_token),
    )


def _change(before: Ledger, after: Ledger) -> tuple[str, ...]:
    pairs = zip(dataclasses.astuple(before), dataclasses.astuple(after), strict=True)
    return tuple(f"{100 * (y / x - 1):+.1f} %" if x else "" for x, y in pairs)


def pass_lines(entry: PassReport) -> list[str]:
    """What one pass selected, rewrote and skipped."""
    exact = "exact" if entry.exact else "not exact"
    lines = [f"{entry.name} ({exact}): {len(entry.rewritten)} rewritten"]
    lines += [f"  `{selection.selector}` selects {selection.count}" for selection in entry.selected]
    reasons: dict[str, list[str]] = {}
    for skip in entry.skipped:
        reasons.setdefault(skip.reason, []).append(skip.scope)
    for reason, scopes in reasons.items():
        more = f" and {len(scopes) - 3} more" if len(scopes) > 3 else ""
        lines.append(f"  skipped {', '.join(scopes[:3])}{more}: {reason}")
    return lines + [f"  warning: {warning}" for warning in entry.warnings]
