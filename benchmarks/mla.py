"""Conversions to a smaller attention cache, ours and published ones, on the same windows in one run.

``python benchmarks/mla.py --cache 256 192 128 --seeds 0 1 2`` converts SmolLM2-135M by every method to as many cached
values per token and layer, each method in a process of its own, and scores all of them on texts that nothing was
calibrated on. Calibration: windows of Brown B to F; seed 0 takes the first ones, any other seed a random choice.

Ours is the real thing: the command runs a recipe with `gqa-to-mla`, transformers loads what it wrote. ``--ours`` takes
options of the pass as JSON, may be repeated, and replaces `{"cache": ...}` at each of ``--cache``; ``--only`` picks
methods; ``--model`` any checkpoint of a decoder with grouped or multi-query attention and rotary positions.

Scores: loss above the original in nats, perplexity, KL(original || converted) and agreement on the most likely token,
each over the positions of all windows but their first. Costs: processor seconds and peak memory of a process that
loads the model and converts it (ours: that also writes the result). What a stock cache would hold is counted for the
published methods and measured on a live cache for ours. All of it goes to benchmarks/results/ as JSON, row by row;
a run with the --name of an earlier one keeps what that measured of the published methods, and measures ours anew.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import COMMAND, ROOT, SMOLLM2, WORK, compress, run
from benchmarks.mla_report import report
from benchmarks.mla_windows import TEXTS, Windows, cut, fitting
from benchmarks.peers_mla import mha2mla, transmla, whitened
from benchmarks.peers_mla.attention import Shape, Size, shape_of
from compiler.evaluate import cache_size, load_model

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Peer:
    """A published method: how it splits a number of cached values into rank and rotary width, converts, and stores."""

    split: Callable[[Shape, int], tuple[int, int]]
    calibrate: Callable[[Any, Tensor, int], Any]
    apply: Callable[[Any, Any, int, int], None]
    size: Callable[[Shape, int, int], Size]


def all_kept(shape: Shape, cache: int) -> tuple[int, int]:
    rope_dim = transmla.split(shape, cache)[1]
    return 2 * shape.kv - rope_dim, rope_dim


def as_calibrated(model: Any, calibrated: Any, rank: int, rope_dim: int) -> None:
    """Nothing is truncated."""


PEERS = {
    "transmla": Peer(transmla.split, transmla.calibrate, transmla.apply, transmla.size),
    "transmla-positions-only": Peer(all_kept, transmla.keep_positions, as_calibrated, transmla.size),
    "mha2mla": Peer(mha2mla.split, mha2mla.calibrate, mha2mla.apply, mha2mla.size),
    "mha2mla-best": Peer(mha2mla.split_best, mha2mla.calibrate, mha2mla.apply_best, mha2mla.size_best),
    "whitened": Peer(whitened.split, whitened.calibrate, whitened.apply, whitened.size),
}
DEFAULT = ["transmla", "mha2mla-best", "whitened", "ours"]


@dataclass(frozen=True)
class Score:
    """A model on one text: ``losses`` are means per window, in nats per token; the others over all positions."""

    losses: list[float]
    kl: float
    agreement: float


def main() -> None:
    options = parse()
    if options.job:
        do_job(json.loads(options.job))
        return
    model = plain_checkpoint(options.model)
    windows = cut(model, options)
    original = base(model, windows, options)
    shape = Shape(**original["shape"])
    path = RESULTS / f"mla-{options.name or time.strftime('%Y%m%d-%H%M%S')}.json"
    rows = peers_measured(path, options)
    found = {"model": str(options.model), "settings": settings(options), "original": original, "methods": rows}
    RESULTS.mkdir(exist_ok=True)
    for seed in options.seeds:
        for method, wanted in jobs(shape, options).items():
            known = [row["setting"] for row in rows if (row["method"], row["seed"]) == (method, seed)]
            missing = [setting for setting in wanted if setting not in known]
            runner = ours if method == "ours" else peer
            for setting, measured in runner(model, windows, method, missing, seed, options):
                print(f"{time.strftime('%H:%M:%S')} {method} {setting} seed {seed}", file=sys.stderr, flush=True)
                rows.append({"method": method, "setting": setting, "seed": seed, **measured})
                path.write_text(json.dumps(found, indent=1))  # after each, so that a broken run loses nothing
    report(found)
    print(f"\n{path.relative_to(ROOT)}")


def peers_measured(path: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The published methods' rows of an earlier run called the same, if it measured on the same windows."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if (earlier["model"], earlier["settings"]) != (str(options.model), settings(options)):
        sys.exit(f"{path} holds a run with other settings: choose another --name")
    return [row for row in earlier["methods"] if row["method"] != "ours"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=lambda text: Path(text).absolute(), default=SMOLLM2, help="a checkpoint directory or .gguf file"
    )
    parser.add_argument("--cache", type=int, nargs="+", default=[256, 192, 128], help="values per token and layer")
    parser.add_argument("--only", nargs="+", choices=[*PEERS, "ours"], default=DEFAULT, metavar="METHOD")
    parser.add_argument("--ours", type=json.loads, action="append", help="options of gqa-to-mla, as JSON")
    parser.add_argument("--emit", type=json.loads, help="options of ours' emitted safetensors, as JSON")
    parser.add_argument("--ours-length", type=int, default=2048, help="tokens in a calibration window of ours")
    parser.add_argument("--texts", nargs="+", choices=[*TEXTS], default=[*TEXTS], metavar="TEXT")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--calibration", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the file in benchmarks/results; published methods in it are kept")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for rows to be comparable."""
    kept = ("texts", "windows", "length", "calibration", "threads")
    return {name: getattr(options, name) for name in kept}


def jobs(shape: Shape, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The settings of every method: of a peer rank and rope_dim, of ours the options of the pass."""
    found: dict[str, list[dict[str, Any]]] = {}
    for method in options.only:
        if method == "ours":
            found[method] = options.ours or our_settings(shape, options.cache)
        else:
            pairs = dict.fromkeys(PEERS[method].split(shape, cache) for cache in options.cache)
            found[method] = [{"rank": rank, "rope_dim": rope_dim} for rank, rope_dim in pairs]
    return found


def our_settings(shape: Shape, caches: Sequence[int]) -> list[dict[str, Any]]:
    return [{"cache": cache / (2 * shape.kv)} for cache in caches]


def plain_checkpoint(model: Path) -> Path:
    """``model`` as a directory; a .gguf file is written out once, so that no method pays for unpacking it."""
    if model.suffix != ".gguf":
        return model
    name = f"{model.parent.name}-plain"
    return WORK / name if (WORK / name / "config.json").exists() else compress(name, model, [])[0]


def in_process(job: dict[str, Any], options: argparse.Namespace) -> Any:
    """Do ``job`` in a process of its own and return what it printed last (of peers a row for each rank)."""
    job = {**job, "threads": options.threads}
    done = run([sys.executable, __file__, "--job", json.dumps(job)], OMP_NUM_THREADS=str(options.threads))
    return json.loads(done.output.splitlines()[-1])


def base(model: Path, windows: Windows, options: argparse.Namespace) -> dict[str, Any]:
    """The original's shape and losses; its logits are left in the windows' folder, and not computed twice."""
    path = windows.folder / "original.json"
    known = json.loads(path.read_text()) if path.exists() else {"texts": {}}
    missing = {name: file for name, file in windows.texts.items() if file not in known["texts"]}
    if missing:
        found = in_process({"do": "base", **where(model, windows), "texts": missing}, options)
        losses = {missing[name]: losses for name, losses in found["texts"].items()}
        known = {**found, "texts": {**known["texts"], **losses}}
        path.write_text(json.dumps(known))
    return {**known, "texts": {name: known["texts"][file] for name, file in windows.texts.items()}}


def where(model: Path, windows: Windows) -> dict[str, Any]:
    return {"model": str(model), "folder": str(windows.folder), "texts": windows.texts}


Measured = Iterator[tuple[dict[str, Any], dict[str, Any]]]


def peer(
    model: Path, windows: Windows, method: str, wanted: list[dict[str, Any]], seed: int, options: argparse.Namespace
) -> Measured:
    """All settings of a published method in one process, which calibrates once for those of one rotary width."""
    for rope_dim in dict.fromkeys(setting["rope_dim"] for setting in wanted):
        ranks = [setting["rank"] for setting in wanted if setting["rope_dim"] == rope_dim]
        job = {"do": "peer", **where(model, windows), "method": method, "calibration": windows.calibration[seed]}
        rows = in_process({**job, "ranks": ranks, "rope_dim": rope_dim}, options)
        yield from (({"rank": rank, "rope_dim": rope_dim}, row) for rank, row in zip(ranks, rows, strict=True))


def ours(
    model: Path, windows: Windows, method: str, wanted: list[dict[str, Any]], seed: int, options: argparse.Namespace
) -> Measured:
    """The pass with each of the options ``wanted``."""
    for setting in wanted:
        yield setting, our_row(model, windows, setting, seed, options)


def our_row(
    model: Path, windows: Windows, setting: dict[str, Any], seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Run the command with the pass on the text of the peers' windows, cut anew as the recipe says, and score it.

    Cut from equal stretches of that text, the windows of ours hold somewhat fewer tokens than those of the peers.
    """
    length = options.ours_length
    text = windows.folder / f"{windows.calibration[seed]}.txt"
    samples = fitting(text, model, length, options.calibration * options.length // length, seed)
    recipe = {
        "model": str(model),
        "calibration": {"data": str(text), "samples": samples, "length": length, "seed": seed},
        "passes": [{"gqa-to-mla": setting}],
        "emit": [{"safetensors": options.emit}] if options.emit else ["safetensors"],
    }
    out = windows.folder / f"ours-{options.name or 'latest'}"
    path = out.with_suffix(".json")
    path.write_text(json.dumps(recipe))
    shutil.rmtree(out, ignore_errors=True)
    done = run([*COMMAND, str(path), "-o", str(out), "--quiet"], OMP_NUM_THREADS=str(options.threads))
    found = in_process({"do": "score", **where(out, windows)}, options)
    return {"cpu_seconds": done.cpu_seconds, "peak_rss": done.peak_rss, **found}


def do_job(job: dict[str, Any]) -> None:
    """What a process of its own does; prints its findings as JSON."""
    torch.set_num_threads(job["threads"])
    actions = {"base": do_base, "peer": do_peer, "score": do_score}
    texts = {name: Path(job["folder"]) / file for name, file in job["texts"].items()}
    print(json.dumps(actions[job["do"]](job, texts)))


def do_base(job: dict[str, Any], texts: dict[str, Path]) -> dict[str, Any]:
    model = load_model(job["model"])
    losses = {name: keep_logits(model, file) for name, file in texts.items()}
    live = cache_size(model)
    return {
        "shape": asdict(shape_of(model)),
        "layers": model.config.get_text_config().num_hidden_layers,
        "cache": live.values_per_token / model.config.get_text_config().num_hidden_layers if live else None,
        "linear_parameters": linear_parameters(model),
        "texts": losses,
    }


@torch.inference_mode()
def keep_logits(model: Any, text: Path) -> list[float]:
    """Mean loss per window of the original; its logits go beside, float32 [windows, length - 1, vocabulary]."""
    windows = torch.load(text.with_suffix(".pt"))
    shape = (len(windows), windows.shape[1] - 1, model.config.get_text_config().vocab_size)
    kept = np.lib.format.open_memmap(text.with_suffix(".npy"), mode="w+", dtype=np.float32, shape=shape)
    losses: list[float] = []
    for index, ids in enumerate(windows):
        logits = next_logits(model, ids)
        kept[index] = logits.numpy()
        losses.append(functional.cross_entropy(logits, ids[1:]).item())
    return losses


def next_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits for the tokens of ``ids`` [length] but the first: float32 [length - 1, vocabulary].

    A cache that rounds is on: what it rounds then changes the logits of the same pass.
    """
    return model(input_ids=ids[None], use_cache=bool(getattr(model.config, "cache_bits", 0))).logits[0, :-1].float()


@torch.inference_mode()
def do_peer(job: dict[str, Any], texts: dict[str, Path]) -> list[dict[str, Any]]:
    """A row per rank. Each counts the time to load and calibrate, once spent, and that to apply the rank."""
    model = load_model(job["model"])
    before, shape, method = linear_parameters(model), shape_of(model), PEERS[job["method"]]
    windows = torch.load(Path(job["folder"]) / f"{job['calibration']}.pt")
    loaded = time.process_time()
    calibrated = method.calibrate(model, windows, job["rope_dim"])
    spent = time.process_time()
    rows: list[dict[str, Any]] = []
    for rank in job["ranks"]:
        started = time.process_time()
        method.apply(model, calibrated, rank, job["rope_dim"])
        seconds = spent + time.process_time() - started
        peak_rss = rows[0]["peak_rss"] if rows else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        size = method.size(shape, rank, job["rope_dim"])
        replaced = 2 * (shape.heads + shape.groups) * shape.head_dim * shape.hidden
        growth = model.config.get_text_config().num_hidden_layers * (size.parameters - replaced)
        rows.append(
            {
                "cpu_seconds": seconds,
                "convert_cpu_seconds": seconds - loaded,
                "peak_rss": peak_rss,
                "cache": size.cache,
                "live": False,
                "linear_parameters": before + growth,
                "texts": scores(model, texts),
            }
        )
    return rows


def do_score(job: dict[str, Any], texts: dict[str, Path]) -> dict[str, Any]:
    model = load_model(job["model"], trust_remote_code=True)
    live = cache_size(model)
    return {
        "cache": live.values_per_token / model.config.get_text_config().num_hidden_layers if live else None,
        "live": True,
        "class": type(model).__name__,
        "linear_parameters": linear_parameters(model),
        "texts": scores(model, texts),
    }


def linear_parameters(model: Any) -> int:
    """Entries of the matrices of the decoder layers."""
    return sum(weight.numel() for weight in model.base_model.layers.parameters() if weight.dim() == 2)


def scores(model: Any, texts: dict[str, Path]) -> dict[str, Any]:
    return {name: asdict(score(model, file)) for name, file in texts.items()}


@torch.inference_mode()
def score(model: Any, text: Path) -> Score:
    """Compare ``model`` with the logits of the original on the windows in the files of ``text``."""
    windows = torch.load(text.with_suffix(".pt"))
    kept = np.load(text.with_suffix(".npy"), mmap_mode="r")
    losses: list[float] = []
    kl = agreement = 0.0
    for index, ids in enumerate(windows):
        logits, theirs = next_logits(model, ids), torch.from_numpy(np.array(kept[index]))
        losses.append(functional.cross_entropy(logits, ids[1:]).item())
        agreement += (logits.argmax(-1) == theirs.argmax(-1)).float().mean().item()
        ours, theirs = logits.log_softmax(-1), theirs.log_softmax(-1)
        kl += functional.kl_div(ours, theirs, reduction="sum", log_target=True).item() / len(ours)
    return Score(losses, kl / len(windows), agreement / len(windows))


if __name__ == "__main__":
    main()
