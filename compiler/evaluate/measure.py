"""Measuring a model, alone or against another, by the metrics that fit.

The outputs of the reference are kept in a temporary file, so that divergences are exact and two models are never in
memory together; so are its rows of every metric, so that differences are paired.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from compiler.datafiles import checked_data, fingerprint
from compiler.errors import DataError
from compiler.evaluate.beforehand import situation_of
from compiler.evaluate.data import data_windows
from compiler.evaluate.estimates import Array, Change, Estimate, Statistic, change, estimate
from compiler.evaluate.inputs import Window, forward, random_windows
from compiler.evaluate.items import checked_file
from compiler.evaluate.live_cache import CacheSize, cache_size
from compiler.evaluate.loading import load_model, load_tokenizer
from compiler.evaluate.metrics import METRICS, Situation, alone, check_names, choose
from compiler.evaluate.metrics.base import Given, Metric, Row, Scored, Task, stacked
from compiler.evaluate.texts import TextData
from compiler.weights.checkpoint import check_location

Progress = Callable[[int, int], None]
WIDEST = 64  # numbers in a row that is kept for later comparisons


@dataclass(frozen=True)
class Evaluation:
    """What was measured of ``model`` and, beside it, of ``against``.

    ``metrics`` and ``reference`` map names to estimates; a metric of several parts has a name for each, such as
    ``kl-by-position: 1 to 128``. ``changes`` says of what was measured of both how far ``model`` is above ``against``.
    ``rows`` are what each item added to the estimates of ``model``, so that a later comparison with another output can
    be paired. ``positions`` counts the positions compared; ``seconds`` is the time all of it took.
    """

    model: str
    against: str | None
    inputs: Mapping[str, Any]
    dtype: str
    positions: int
    metrics: Mapping[str, Estimate]
    cache: CacheSize | None
    reference: Mapping[str, Estimate]
    reference_cache: CacheSize | None
    changes: Mapping[str, Change]
    rows: Mapping[str, Sequence[Row]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers, fit for JSON."""
        return asdict(self)


@dataclass
class _Kept:
    """Outputs of the reference in a file, written in one pass over the windows and read in the next."""

    file: IO[bytes]
    shapes: list[torch.Size] = field(default_factory=list[torch.Size])

    def add(self, output: Tensor) -> None:
        self.shapes.append(output.shape)
        self.file.write(output.contiguous().numpy().tobytes())

    def take(self, like: Tensor) -> Tensor:
        shape = self.shapes.pop(0)
        if shape != like.shape:
            raise DataError(
                f"the outputs cannot be compared: {list(like.shape)} and, of the reference, {list(shape)}",
                remedy="compare with a model of the same kind and sizes of outputs",
            )
        read = bytearray(self.file.read(shape.numel() * torch.float32.itemsize))
        return torch.frombuffer(read, dtype=torch.float32).view(shape)


@dataclass(frozen=True)
class _Measured:
    """Rows [items, numbers] by name, what tasks observed, and what was counted."""

    rows: Mapping[str, Array]
    observed: Mapping[str, list[Any]]
    positions: int
    cache: CacheSize | None

    def estimates(self, seed: int) -> dict[str, Estimate]:
        return {name: estimate(rows, _metric(name).statistic, seed) for name, rows in self.rows.items()}


def evaluate_model(
    path: str | Path,
    *,
    against: str | Path | None = None,
    data: str | Path | None = None,
    items: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    samples: int = 16,
    length: int = 512,
    seed: int = 0,
    image: int | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    own_code: bool = False,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure the model in ``path``, a checkpoint directory or a ``.gguf`` file, and its distance from ``against``.

    A text file ``data`` is cut into ``samples`` windows of ``length`` tokens by the tokenizer of ``against`` (or of
    the model); recordings give ``samples`` clips of speech, idx files ``samples`` pictures. The decoder of an
    encoder-decoder gets what ``against`` itself writes from them. Without ``data`` inputs are random with ``seed``.
    Pictures are ``image`` pixels high and wide, by default as the config of ``against`` (or of the model) says.
    ``items`` is the JSONL file of the metrics choices, ratings and word-errors. ``metrics`` are names in
    ``metrics.METRICS``; by default those that fit: perplexity of models that write tokens, kl and agreement of models
    that generate, cosine and relative-error of all others. ``own_code`` says that the code beside the model in
    ``path`` was written by this program. ``on_progress(done, all)`` counts windows, and metrics that are more than
    a look at these.

    Raises DataError when a metric does not apply or the data is unfit, CheckpointError when a model does not load.
    """
    started = time.perf_counter()
    check_names(metrics or ())
    check_location(path)
    text = None if data is None else TextData(checked_data(Path(data)), samples, length, seed)
    base = path if against is None else against
    model = load_model(base, dtype=dtype, trust_remote_code=trust_remote_code or (own_code and against is None))
    file_of_items = None if items is None else checked_file(Path(items))
    if image is not None and model.main_input_name != "pixel_values":
        raise DataError(f"a {type(model).__name__} takes no pictures", remedy="leave out the size of pictures")
    situation = situation_of(
        model, compared=against is not None, data=None if text is None else text.data, items=file_of_items is not None
    )
    names = choose(metrics, situation)
    if not names and not situation.generates:  # of what generates the cache is measured
        cause = f"of a {situation.model} alone nothing is measured on such data"
        raise DataError(cause, remedy="name the model to compare with (`--against`)")
    given = _given(model, base, names, text, file_of_items, (samples, length, seed), image, trust_remote_code)
    looks = any(isinstance(METRICS[name], Metric) for name in names)
    steps = (len(given.windows) if looks else 0) + len(_tasks(names))
    tick = _ticker(on_progress, steps * (1 if against is None else 2))
    theirs: _Measured | None = None
    with tempfile.TemporaryFile() as file:
        kept = _Kept(file)
        if against is not None:
            theirs = _measure(model, given, names, tick, keep=kept if looks else None, asked=alone(names))
            tokens = _token_count(model)
            del model
            gc.collect()
            file.seek(0)
            model = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code or own_code)
            _check_tokens(_token_count(model), tokens)
        ours = _measure(model, given, names, tick, reference=kept if theirs else None, theirs=theirs, asked=names)
    return Evaluation(
        model=str(path),
        against=None if against is None else str(against),
        inputs=_inputs(situation, text, file_of_items, image, (samples, length, seed)),
        dtype=dtype,
        positions=ours.positions,
        metrics=ours.estimates(seed),
        cache=ours.cache,
        reference=theirs.estimates(seed) if theirs else {},
        reference_cache=theirs.cache if theirs else None,
        changes=_changes(ours, theirs, seed) if theirs else {},
        rows={name: rows.tolist() for name, rows in ours.rows.items() if rows.shape[1] <= WIDEST},
        seconds=time.perf_counter() - started,
    )


def _given(
    model: Any,
    base: str | Path,
    names: Sequence[str],
    text: TextData | None,
    items: Path | None,
    sizes: tuple[int, int, int],
    image: int | None,
    trusted: bool,
) -> Given:
    """The windows, where a metric looks at some, and all else that models get."""
    samples, length, seed = sizes
    speaks = bool(_tasks(names)) and model.main_input_name != "pixel_values"
    tokenizer = load_tokenizer(base, trust_remote_code=trusted) if speaks else None
    windows: list[Window] = []
    if any(METRICS[name].needs in ("windows", "text") for name in names):
        windows = (
            random_windows(model, samples, length, seed, image)
            if text is None
            else data_windows(model, base, text, tokenizer=tokenizer, image=image, trust_remote_code=trusted)
        )
    return Given(windows, base, text.data if text else None, items, samples, length, seed, tokenizer, image)


def _inputs(
    situation: Situation, text: TextData | None, items: Path | None, image: int | None, sizes: tuple[int, int, int]
) -> dict[str, Any]:
    """What was measured on: two evaluations are alike where these are equal."""
    samples, length, seed = sizes
    data = fingerprint(text.data) if text else "random"
    kind = situation.data or situation.takes
    asked = {"items": None if items is None else fingerprint(items), "image": image}
    given = {name: value for name, value in asked.items() if value is not None}
    return {"data": data, "kind": kind, **given, "samples": samples, "length": length, "seed": seed}


def _check_tokens(ours: int | None, theirs: int | None) -> None:
    if ours != theirs:
        raise DataError(
            f"the models have {ours} and {theirs} tokens, and cannot be compared token by token",
            remedy="compare the bits-per-byte of either, measured without `--against`",
        )


def _token_count(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _tasks(names: Sequence[str]) -> dict[str, Task]:
    return {name: task for name in names if isinstance(task := METRICS[name], Task)}


def statistic_of(name: str) -> Statistic:
    """The statistic that an estimate of this name is of."""
    return _metric(name).statistic


def _metric(name: str) -> Metric | Task:
    """The metric that an estimate is of, or of a part of."""
    return METRICS[name.partition(": ")[0]]


def _measure(
    model: Any,
    given: Given,
    names: Sequence[str],
    tick: Callable[[], None],
    *,
    asked: Sequence[str],
    keep: _Kept | None = None,
    reference: _Kept | None = None,
    theirs: _Measured | None = None,
) -> _Measured:
    rows, positions = _scored(model, given, asked, tick, keep, reference)
    observed: dict[str, list[Any]] = {}
    for name, task in _tasks(names).items():
        observed[name] = task.observe(model, given)
        rows |= _named(name, task.score(observed[name], theirs.observed[name] if theirs else None))
        tick()
    return _Measured({name: rows[name] for name in _in_order(rows, names)}, observed, positions, cache_size(model))


def _in_order(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The names of what was found, in the order in which the metrics were asked for."""
    return [part for name in names for part in found if part.partition(": ")[0] == name]


def _scored(
    model: Any,
    given: Given,
    names: Sequence[str],
    tick: Callable[[], None],
    keep: _Kept | None,
    reference: _Kept | None,
) -> tuple[dict[str, Array], int]:
    """Rows of the metrics that look at windows, and how many positions these have."""
    looked = {name: metric for name in names if isinstance(metric := METRICS[name], Metric)}
    found: dict[str, list[Mapping[str, Row]]] = {name: [] for name in looked}
    positions = 0
    for window in given.windows if looked or keep else ():
        output = _output(model, window, needs_logits=any(metric.of != "any" for metric in looked.values()))
        positions += len(output)
        if keep is not None:
            keep.add(output)
        scored = Scored(output, reference.take(output) if reference else None, window.ids, window.text_bytes)
        for name, metric in looked.items():
            found[name].append(metric.score(scored))
        tick()
    rows = (_named(name, stacked(each)) for name, each in found.items())
    return {part: values for each in rows for part, values in each.items()}, positions


def _named(name: str, parts: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{name}: {part}" if part else name: rows for part, rows in parts.items()}


def _changes(ours: _Measured, theirs: _Measured, seed: int) -> dict[str, Change]:
    both = [name for name in ours.rows if name in theirs.rows]
    return {name: change(ours.rows[name], theirs.rows[name], _metric(name).statistic, seed) for name in both}


def _output(model: Any, window: Window, needs_logits: bool) -> Tensor:
    """The logits, or the first output, as float32 [positions, width]."""
    result = forward(model, window.cast(model.dtype))
    if needs_logits and "logits" not in result:
        raise DataError(f"a {type(model).__name__} has no logits", remedy="use the metrics cosine and relative-error")
    output: Tensor = result["logits"] if "logits" in result else result[0]
    return output.float().flatten(0, -2)


def _ticker(on_progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    return tick
