"""What low_rank.py and prune.py share: a smaller decoder by each method, scored on the same windows in one run.

Every method runs in a process of its own. A published one is calibrated once for all its settings, and changes a copy
of the model for each. Ours is the real thing: the command runs a recipe, transformers loads the result.

Scores: loss above the original in nats, KL(original || smaller) and agreement on the most likely token, over all
positions of all windows but their first. Costs: processor seconds and peak memory of a process that loads the model
and makes it smaller (ours: that also writes the result). ``kept`` is the part of the numbers of the decoder layers'
linear maps that remains: 1 less the numbers by which the whole model shrank, as a part of those.

Rows go to benchmarks/results/ as JSON, one by one. A run with the --name of an earlier one on the same windows keeps
the rows of methods that it does not measure anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import COMMAND, ROOT, SMOLLM2, Finished, run, show
from benchmarks.mla import RESULTS, base, plain_checkpoint, scores, settings, where
from benchmarks.mla_windows import TEXTS, Windows, cut, fitting
from compiler.evaluate import load_model

LINEARS = {"role": "linear", "name": "*.layers.*"}
REPORTED = ["wikipedia", "persuasion", "brown_k"]
Row = dict[str, Any]


def by_part(keep: float, model: Any) -> list[Row]:
    return [{"keep": keep}]


@dataclass(frozen=True)
class Peer:
    """A published method.

    ``calibrate`` takes the model and windows of tokens, int64 [count, length]. ``apply`` changes a model in place by
    what that found, and one of the ``settings`` for a part of the parameters; it returns how many numbers were saved.
    """

    calibrate: Callable[[Any, Tensor], Any]
    apply: Callable[..., int]
    settings: Callable[[float, Any], list[Row]] = by_part


@dataclass(frozen=True)
class Outside:
    """A package that runs in an environment of its own.

    ``settings`` are those for a part of the parameters. ``make`` takes the checkpoint, the file of the windows, a
    setting, where to write a checkpoint that transformers loads, and threads; it returns the part that remains, and
    what that took.
    """

    settings: Callable[[float], list[Row]]
    make: Callable[[Path, Path, Row, Path, int], tuple[float, Finished]]


def by_numbers(before: Any, after: Any) -> float:
    """The part of the layers' numbers that remains, by how much the checkpoint shrank."""
    return 1 - (numbers(before) - numbers(after)) / linear_numbers(before)


@dataclass(frozen=True)
class Benchmark:
    """``script`` is the file that runs it, ``entry`` a recipe's pass for a setting of ours.

    ``kept`` is the part that remains, of the original and of ours.
    """

    name: str
    script: str
    title: str
    description: str
    peers: Mapping[str, Peer]
    entry: Callable[[Row], Row]
    ours: tuple[Row, ...]
    keep: tuple[float, ...]
    kept: Callable[[Any, Any], float] = by_numbers
    outside: Mapping[str, Outside] = field(default_factory=dict[str, Outside])

    def main(self) -> None:
        options = parse(self)
        torch.set_num_threads(options.threads)
        if options.job:
            print(json.dumps(do_job(self, json.loads(options.job))))
            return
        Run(self, options).all()


def parse(benchmark: Benchmark) -> argparse.Namespace:
    methods, default = [*benchmark.peers, *benchmark.outside, "ours"], [*benchmark.peers, "ours"]
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=benchmark.description, formatter_class=form)
    parser.add_argument("--model", type=lambda text: Path(text).absolute(), default=SMOLLM2)
    parser.add_argument(
        "--keep", type=float, nargs="+", default=benchmark.keep, help="parts of the parameters that remain"
    )
    parser.add_argument("--only", nargs="+", choices=methods, default=default, metavar="METHOD")
    parser.add_argument("--ours", type=json.loads, action="append", help="options of the pass and the like, as JSON")
    parser.add_argument("--ours-length", type=int, default=512, help="tokens in a calibration window of ours")
    parser.add_argument("--texts", nargs="+", choices=[*TEXTS], default=REPORTED, metavar="TEXT")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--calibration", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the file in benchmarks/results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


class Run:
    """One run of a benchmark."""

    def __init__(self, benchmark: Benchmark, options: argparse.Namespace) -> None:
        self.benchmark, self.options = benchmark, options
        self.model = plain_checkpoint(options.model)
        self.windows: Windows = cut(self.model, options)

    def all(self) -> None:
        options = self.options
        original = base(self.model, self.windows, options)
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.benchmark.name}-{options.name or time.strftime('%Y%m%d-%H%M%S')}.json"
        rows = self.measured(path)
        found = {"model": str(options.model), "settings": settings(options), "original": original, "methods": rows}
        for seed in options.seeds:
            for method in options.only:
                for row in self.rows(method, seed):
                    rows.append({"method": method, "seed": seed, **row})
                    path.write_text(json.dumps(found, indent=1))
                    print(f"{time.strftime('%H:%M:%S')} {method} {row['setting']}", file=sys.stderr, flush=True)
        report(self.benchmark.title, found)
        print(f"\n{path.relative_to(ROOT)}")

    def rows(self, method: str, seed: int) -> Iterable[Row]:
        if method == "ours":
            return self.ours(seed)
        outside = self.benchmark.outside.get(method)
        return self.peer(method, seed) if outside is None else self.package(outside, seed)

    def measured(self, path: Path) -> list[Row]:
        """Rows of an earlier run called the same, of methods and seeds that this one leaves out."""
        if not path.exists():
            return []
        earlier = json.loads(path.read_text())
        if (earlier["model"], earlier["settings"]) != (str(self.options.model), settings(self.options)):
            sys.exit(f"{path} holds a run with other settings: choose another --name")
        anew = [(method, seed) for method in self.options.only for seed in self.options.seeds]
        return [row for row in earlier["methods"] if (row["method"], row["seed"]) not in anew]

    def in_process(self, job: Row) -> Any:
        threads = str(self.options.threads)
        command = [sys.executable, self.benchmark.script, "--threads", threads, "--job", json.dumps(job)]
        return json.loads(run(command, OMP_NUM_THREADS=threads).output.splitlines()[-1])

    def peer(self, method: str, seed: int) -> list[Row]:
        job = {"method": method, "calibration": self.windows.calibration[seed], "keep": self.options.keep}
        return self.in_process({**where(self.model, self.windows), **job})

    def package(self, outside: Outside, seed: int) -> Iterator[Row]:
        windows = self.windows.folder / f"{self.windows.calibration[seed]}.pt"
        for setting in [each for keep in self.options.keep for each in outside.settings(keep)]:
            out = self.out()
            kept, done = outside.make(self.model, windows, setting, out, self.options.threads)
            yield {"setting": setting, **costs(done), **self.scored(out), "kept": kept}

    def ours(self, seed: int) -> Iterator[Row]:
        for keep in self.options.keep:
            for own in self.options.ours or self.benchmark.ours:
                yield self.our_row({"keep": keep, **own}, seed)

    def our_row(self, setting: Row, seed: int) -> Row:
        """Ours by ``setting``: options of the pass, `written` of the calibration, and `then`, passes that follow."""
        options, length = self.options, self.options.ours_length
        passed = {name: value for name, value in setting.items() if name not in ("written", "then")}
        written = setting.get("written", 0)
        text = self.windows.folder / f"{self.windows.calibration[seed]}.txt"
        samples = fitting(text, self.model, length, options.calibration * options.length // length, seed)
        recipe = {
            "model": str(self.model),
            "calibration": {"data": str(text), "samples": samples, "length": length, "seed": seed, "written": written},
            "passes": [self.benchmark.entry(passed), *setting.get("then", [])],
            "emit": ["safetensors"],
        }
        out = self.out()
        path = out.with_suffix(".json")
        path.write_text(json.dumps(recipe))
        done = run([*COMMAND, str(path), "-o", str(out), "--quiet"], OMP_NUM_THREADS=str(options.threads))
        return {"setting": setting, **costs(done), **self.scored(out)}

    def out(self) -> Path:
        """Where a method writes; nothing is there."""
        out = self.windows.folder / f"{self.benchmark.name}-{self.options.name or 'latest'}"
        shutil.rmtree(out, ignore_errors=True)
        return out

    def scored(self, out: Path) -> Row:
        return self.in_process({**where(out, self.windows), "method": "score", "original": str(self.model)})


def costs(done: Finished) -> Row:
    return {"cpu_seconds": done.cpu_seconds, "peak_rss": done.peak_rss}


def do_job(benchmark: Benchmark, job: Row) -> Any:
    """What a process of its own does: score a checkpoint, or prune or factorise by a published method."""
    texts = {name: Path(job["folder"]) / file for name, file in job["texts"].items()}
    if job["method"] == "score":
        before, model = load_model(job["original"]), load_model(job["model"], trust_remote_code=True)
        return {"kept": benchmark.kept(before, model), "class": type(model).__name__, "texts": scores(model, texts)}
    windows = torch.load(Path(job["folder"]) / f"{job['calibration']}.pt")
    return peer_rows(load_model(job["model"]), windows, benchmark.peers[job["method"]], job["keep"], texts)


def peer_rows(model: Any, windows: Tensor, peer: Peer, keeps: list[float], texts: dict[str, Path]) -> list[Row]:
    """A row for each setting. Each counts the time to load and calibrate, once spent, and that to apply it."""
    calibrated = peer.calibrate(model, windows)
    spent, whole = time.process_time(), linear_numbers(model)
    rows: list[Row] = []
    for setting in [each for keep in keeps for each in peer.settings(keep, model)]:
        smaller = copy.deepcopy(model)
        started = time.process_time()
        saved = peer.apply(smaller, calibrated, **setting)
        seconds = spent + time.process_time() - started
        # The most that a process held never falls: what scoring needs must not be counted.
        peak = rows[0]["peak_rss"] if rows else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {"setting": setting, "cpu_seconds": seconds, "peak_rss": peak, "kept": 1 - saved / whole}
        rows.append({**row, "texts": scores(smaller, texts)})
    return rows


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linear maps of the decoder layers."""
    return {name: part for name, part in model.base_model.layers.named_modules() if isinstance(part, nn.Linear)}


def linear_numbers(model: Any) -> int:
    return sum(part.weight.numel() for part in linears(model).values())


def numbers(model: Any) -> int:
    """Every number that the checkpoint of ``model`` holds, tied ones once."""
    return sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())


def feed(model: Any, windows: Tensor) -> Callable[[], None]:
    """Runs ``windows``, int64 [count, length], through ``model``."""

    def forward() -> None:
        for ids in windows:
            model.base_model(input_ids=ids[None], use_cache=False)

    return forward


@torch.no_grad()
def watch(forward: Callable[[], None], seen: Mapping[nn.Module, Callable[[Tensor], Any]]) -> None:
    """Call ``forward``; each part's input goes to its function, as float64 rows [tokens, width]."""

    def hook(see: Callable[[Tensor], Any]) -> Any:
        def seen_before(_: Any, args: Any) -> None:
            see(args[0].reshape(-1, args[0].shape[-1]).double())

        return seen_before

    hooks = [part.register_forward_pre_hook(hook(see)) for part, see in seen.items()]
    forward()
    for each in hooks:
        each.remove()


def report(title: str, found: Row) -> None:
    names = list(found["original"]["texts"])
    base_losses = {name: mean(losses) for name, losses in found["original"]["texts"].items()}
    rows = [["method", "setting", "seed", "kept", *(f"{name} +nats" for name in names), "CPU s", "peak MiB"]]
    distances = [["method", "setting", "seed", *(f"{name}: KL / agreement" for name in names)]]
    for row in found["methods"]:
        setting = ", ".join(f"{key} {value}" for key, value in row["setting"].items())
        cells, texts = [row["method"], setting, str(row["seed"])], row["texts"]
        above = [f"{mean(texts[name]['losses']) - base_losses[name]:+.3f}" for name in names]
        costs = [f"{row['cpu_seconds']:.0f}", f"{row['peak_rss'] / 2**20:.0f}"]
        rows.append([*cells, f"{row['kept']:.3f}", *above, *costs])
        distances.append([*cells, *(f"{texts[name]['kl']:.3f} / {texts[name]['agreement']:.3f}" for name in names)])
    show(f"{title}: loss above the original", rows)
    show(f"{title}: KL(original || smaller) in nats, agreement on the most likely token", distances)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
