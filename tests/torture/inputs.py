"""Damaged inputs, thousands of them: each is refused with cause and remedy, or read as another reader reads it.

What no reader can see is out of scope: formats of weights have no checksums, so that a changed bit inside a weight is
another weight.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from compiler.evaluate.loading import load_model, load_tokenizer
from compiler.evaluate.speech import read_wave
from compiler.evaluate.texts import TextData
from compiler.frontend.capture import capture
from compiler.ir.execute import read_param, run
from compiler.latency.table import Table
from compiler.plan import make_plan
from compiler.recipe import Recipe
from compiler.weights.checkpoint import open_checkpoint
from compiler.weights.evaluate import evaluate
from compiler.weights.tokens import keep_tokens, tokens_of
from tests.test_gguf import bound, make_file
from tests.test_packed_sources import transposed
from tests.torture import more
from tests.torture.mutate import damage_bytes, damage_json, damage_text
from tests.torture.outcomes import Outcome, Tally, judged
from tests.torture.subjects import SHARDS, write_latencies, write_sharded, write_subjects, write_wave

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Victim:
    """A file that is damaged, and what then reads it and says what is wrong with the result.

    ``share`` is its part of all mutations.
    """

    name: str
    share: int
    file: Path
    damage: Damage
    attempt: Callable[[], str]


def mutate_inputs(mutations: int, seed: int, tally: Tally, work: Path, words: Sequence[str] = ()) -> None:
    """``mutations`` in all, shared out among the victims, or those with one of ``words`` in their names."""
    victims = [each for each in make_victims(work) if not words or any(word in each.name for word in words)]
    shares = sum(victim.share for victim in victims)
    for victim in victims:
        sound = victim.file.read_bytes()
        accepted = judged(victim.attempt)
        if accepted.kind != "right":
            tally.add(f"damaged: {victim.name}", "before any damage", Outcome("wrong", accepted.detail))
        for case in range(-(-mutations * victim.share // shares)):
            outcome = mutated(victim, sound, random.Random(f"{seed} {victim.name} {case}"))
            tally.add(f"damaged: {victim.name}", f"mutation {case} of seed {seed}", outcome)
        tally.show(f"damaged: {victim.name}")


def mutated(victim: Victim, sound: bytes, chance: random.Random) -> Outcome:
    """One mutation of a victim, which is sound again afterwards, and of the same time: jobs know their inputs by it."""
    before, times = _listing(victim.file.parent.parent), victim.file.stat()
    victim.file.write_bytes(victim.damage(sound, chance))
    try:
        outcome = judged(victim.attempt)
    finally:
        victim.file.write_bytes(sound)
        os.utime(victim.file, ns=(times.st_atime_ns, times.st_mtime_ns))
    strays = _listing(victim.file.parent.parent) - before
    return Outcome("stray", ", ".join(sorted(strays))) if strays else outcome


def _listing(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def make_victims(work: Path) -> list[Victim]:
    """All victims, below ``work``."""
    recipes = write_subjects(work)
    model, sharded = work / "tiny", write_sharded(work / "sharded")
    weights, gguf, latencies = model / "model.safetensors", work / "gguf" / "tiny.gguf", write_latencies(work)
    gguf.parent.mkdir()
    make_file(gguf)
    wave = write_wave(work / "speech" / "hello.wav")
    packed, _ = transposed(work / "packed", "gptq")
    return [
        Victim("safetensors header", 8, weights, _damage_header, lambda: _as_safetensors(model)),
        Victim("safetensors file", 4, weights, damage_bytes, lambda: _as_safetensors(model)),
        Victim("index", 4, sharded / "model.safetensors.index.json", _json, lambda: _as_safetensors(sharded)),
        Victim("shard", 3, sharded / SHARDS[1], damage_bytes, lambda: _as_safetensors(sharded)),
        Victim("config", 3, model / "config.json", _json, lambda: _as_transformers(model)),
        Victim("GPTQ header", 3, packed / "model.safetensors", _damage_header, lambda: _as_captured(packed)),
        Victim("GPTQ file", 3, packed / "model.safetensors", damage_bytes, lambda: _as_captured(packed)),
        Victim("GPTQ config", 3, packed / "config.json", _json, lambda: _as_captured(packed)),
        Victim("recipe", 6, recipes["quantize"], _text, lambda: _planned(recipes["quantize"])),
        Victim("GGUF", 6, gguf, _damage_front, lambda: _as_declared(gguf)),
        Victim("tokenizer.json", 3, model / "tokenizer.json", _json, lambda: _tokenized(model, work)),
        Victim("tokenizer_config.json", 2, model / "tokenizer_config.json", _json, lambda: _tokenized(model, work)),
        Victim("latencies", 3, latencies, _json, lambda: _timed(latencies)),
        Victim("recording", 2, wave, damage_bytes, lambda: _heard(wave)),
        *_more_victims(work),
    ]


def _more_victims(work: Path) -> list[Victim]:
    """What the program has written itself, pictures and questions."""
    one, other = more.write_outputs(work)
    pictures, photographs = more.write_pictures(work / "idx", 2 * more.COUNT), more.write_photographs(work / "photos")
    processor = more.write_processor(work / "processed")
    questions, model = more.write_questions(work / "items"), one / "onnx" / "model.onnx"
    report, lock = one / "compress" / "report.json", one / "compress" / "recipe.lock.yaml"
    images, labels = pictures / "train-images-idx3-ubyte.gz", pictures / "t10k-labels-idx1-ubyte"
    files = [photographs / name for name in ("a.png", "b.jpg", "c.webp")]
    return [
        Victim("report, compared", 3, report, _json, lambda: more.compared(one, other)),
        Victim("report, finished", 3, report, _json, lambda: more.finished_again(work / "onnx-out.yaml", one)),
        Victim("lock file", 3, lock, _text, lambda: more.told_apart(one, other)),
        Victim("ONNX model", 1, model, damage_bytes, lambda: more.answered(model)),
        Victim("idx pictures", 2, images, damage_bytes, lambda: more.seen(pictures)),
        Victim("idx labels", 2, labels, damage_bytes, lambda: more.seen(pictures)),
        *(
            Victim(f"picture {file.suffix}", 2, file, damage_bytes, lambda: more.looked_at(photographs))
            for file in files
        ),
        Victim("preprocessor", 2, processor, _json, lambda: more.looked_at(processor.parent)),
        Victim("questions", 3, questions, _text, lambda: more.asked(questions)),
    ]


def _json(data: bytes, chance: random.Random) -> bytes:
    return damage_json(json.loads(data), chance)


def _text(data: bytes, chance: random.Random) -> bytes:
    return damage_text(data.decode(), chance)


def _damage_header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header is another, sometimes with the length of the old one."""
    (length,) = struct.unpack("<Q", data[:8])
    text = damage_json(json.loads(data[8 : 8 + length]), chance)
    claimed = chance.choice((len(text), len(text), len(text), length, chance.randrange(2**64)))
    return struct.pack("<Q", claimed) + text + data[8 + length :]


def _damage_front(data: bytes, chance: random.Random) -> bytes:
    """A GGUF file injured where its header is, most of the time."""
    size = chance.choice((32, 400, 2000, len(data)))
    return damage_bytes(data[:size], chance) + data[size:]


# --- what reads them, and what it must agree with ----------------------------------------------------------------


def _as_safetensors(model: Path) -> str:
    """Every tensor is what the library `safetensors` reads, from the same files."""
    from safetensors import safe_open

    checkpoint = open_checkpoint(model)
    found = {name: checkpoint.read(name) for name in checkpoint.types}
    checkpoint.fingerprint()
    for file in checkpoint.files:
        with safe_open(file, framework="pt") as theirs:
            for name in list(theirs.keys()):
                if not torch.equal(_bits(theirs.get_tensor(name)), _bits(found.pop(name))):
                    return f"{name} is not what safetensors reads"
    return f"{sorted(found)} are in no file" if found else ""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _as_transformers(model: Path) -> str:
    """Whatever is captured computes what transformers computes, where it loads the model at all."""
    graph = capture(model)
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            theirs = load_model(model)(input_ids=ids).logits
    except Exception:
        return ""  # transformers refuses it by itself, and with it the check of what would be written
    ours = run(graph, {"input_ids": ids})["logits"].float()
    if not torch.isfinite(theirs).all():
        return ""
    distance = (ours - theirs).abs().max().item() / (theirs.abs().max().item() or 1.0)
    return f"the graph differs from transformers by {distance:.3g}" if not distance < 1e-3 else ""


def _as_captured(model: Path) -> str:
    """Every weight of the graph can be read, in the shape that the graph says."""
    graph = capture(model)
    shapes = {name: tuple(read_param(graph, param).shape) for name, param in graph.params.items()}
    wrong = [name for name, shape in shapes.items() if shape != graph.params[name].type.shape]
    return f"{wrong} have other shapes" if wrong else ""


def _planned(recipe: Path) -> str:
    plan = make_plan(Recipe.load(recipe))
    return "" if plan.text() else "the plan is empty"


def _as_declared(file: Path) -> str:
    """Every weight of the model can be read, in the shape that the model has."""
    checkpoint = open_checkpoint(file)
    for name, expr in bound(checkpoint).items():
        (value,) = evaluate([expr], {"model": checkpoint})
        if tuple(value.shape) != expr.shape:
            return f"{name} is {tuple(value.shape)} in place of {expr.shape}"
    return ""


def _tokenized(model: Path, work: Path) -> str:
    """Calibration windows, and a vocabulary with fewer tokens."""
    windows = TextData(work / "text.txt", samples=2, length=16).windows(load_tokenizer(model))
    if windows.shape != (2, 16):
        return f"windows are {tuple(windows.shape)}"
    tokens = tokens_of(open_checkpoint(model))
    with TemporaryDirectory() as copy:
        open_checkpoint(model).save_tokenizer(Path(copy))
        keep_tokens(Path(copy), sorted({*tokens.needed, *range(min(tokens.count, 200))}))
    return ""


def _timed(file: Path) -> str:
    table: Any = Table.read(file)
    return "" if all(value >= 0 for value in table.seconds.values()) else "a task takes no time"


def _heard(file: Path) -> str:
    wave = read_wave(file, 16_000)
    return "" if wave.ndim == 1 else f"a wave has the shape {wave.shape}"
