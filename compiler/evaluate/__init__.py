"""What a model is worth: how well it predicts, how far it is from another, its live cache, its speed, its words.

Models are loaded by plain transformers, as any user of them would. The outputs of the reference are kept in a
temporary file, so that divergences are exact and two models are never in memory together.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch
from torch import Tensor

from compiler.datafiles import fingerprint
from compiler.errors import DataError
from compiler.evaluate.data import data_windows
from compiler.evaluate.decode import pieces, prompt_ids, timed
from compiler.evaluate.inputs import Window, is_causal, is_paired, position_limit, random_windows
from compiler.evaluate.loading import load_model, load_tokenizer
from compiler.evaluate.metrics import METRICS, Estimate, Scored, Sums, alone, check_names, choose
from compiler.evaluate.texts import TextData

__all__ = [
    "Answer",
    "CacheSize",
    "Evaluation",
    "Speed",
    "cache_size",
    "compare_speed",
    "evaluate_model",
    "generate",
    "kv_cache",
    "load_model",
    "load_tokenizer",
]

CACHE_LENGTH = 64
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CacheSize:
    """What the live key/value cache holds per token of one sequence, over all layers."""

    values_per_token: float
    bytes_per_token: float


@dataclass(frozen=True)
class Evaluation:
    """What was measured of ``model`` and, beside it, of ``against``.

    ``metrics`` and ``reference`` map names to estimates: ``perplexity`` and ``bits-per-byte`` of either; only of
    ``model``: ``kl`` (nats per position, KL(against || model)), ``agreement`` (share of positions with the same most
    likely token), ``cosine`` (mean over positions) and ``relative-error`` (Frobenius) of the outputs.
    ``positions`` counts the positions compared; ``seconds`` is the time all of it took.
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
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers, fit for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of two models, timed in turns; only their ratio means anything beyond this machine."""

    prefill: float
    decode: float
    reference_prefill: float
    reference_decode: float

    @property
    def prefill_ratio(self) -> float:
        return self.prefill / self.reference_prefill

    @property
    def decode_ratio(self) -> float:
        return self.decode / self.reference_decode


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt. ``seconds`` counts reading the prompt and writing, not loading."""

    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


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
            raise DataError(f"the outputs cannot be compared: {list(like.shape)} and, of the reference, {list(shape)}")
        read = bytearray(self.file.read(shape.numel() * torch.float32.itemsize))
        return torch.frombuffer(read, dtype=torch.float32).view(shape)


@dataclass(frozen=True)
class _Measured:
    metrics: Mapping[str, Estimate]
    positions: int
    cache: CacheSize | None


def evaluate_model(
    path: str | Path,
    *,
    against: str | Path | None = None,
    data: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    samples: int = 16,
    length: int = 512,
    seed: int = 0,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    own_code: bool = False,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure the model in ``path``, a checkpoint directory or a ``.gguf`` file, and its distance from ``against``.

    A text file ``data`` is cut into ``samples`` windows of ``length`` tokens by the tokenizer of ``against`` (or of
    the model); recordings give ``samples`` clips of speech. The decoder of an encoder-decoder gets what ``against``
    itself writes from them. Without ``data`` inputs are random with ``seed``. ``metrics`` are names in
    ``metrics.METRICS``; by default those that fit: perplexity of models that write tokens, kl and agreement of models
    that generate, cosine and relative-error of all others. ``own_code`` says that the code beside the model in
    ``path`` was written by this program. ``on_progress(done, all)`` counts windows.

    Raises DataError when a metric does not apply or the data is unfit, CheckpointError when a model does not load.
    """
    started = time.perf_counter()
    check_names(metrics or ())
    base = path if against is None else against
    model = load_model(base, dtype=dtype, trust_remote_code=trust_remote_code or (own_code and against is None))
    names = choose(
        metrics,
        type(model).__name__,
        causal=is_causal(model),
        paired=is_paired(model),
        generates=model.can_generate(),
        compared=against is not None,
        texts=data is not None,
    )
    text = None if data is None else TextData(Path(data), samples, length, seed)
    windows = (
        random_windows(model, samples, length, seed)
        if text is None
        else data_windows(model, base, text, trust_remote_code=trust_remote_code)
    )
    tick = _ticker(on_progress, len(windows) * (1 if against is None else 2))
    theirs: _Measured | None = None
    with tempfile.TemporaryFile() as file:
        kept = _Kept(file)
        if against is not None:
            theirs = _measure(model, windows, alone(names), seed, tick, keep=kept)
            tokens = _token_count(model)
            del model
            gc.collect()
            file.seek(0)
            model = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code or own_code)
            if _token_count(model) != tokens:
                raise DataError(
                    f"the models have {_token_count(model)} and {tokens} tokens, and cannot be compared token by token",
                    remedy="compare the bits-per-byte of either, measured without `--against`",
                )
        ours = _measure(model, windows, names, seed, tick, reference=kept if theirs else None)
    return Evaluation(
        model=str(path),
        against=None if against is None else str(against),
        inputs={
            "data": fingerprint(text.data) if text else "random",
            "samples": samples,
            "length": length,
            "seed": seed,
        },
        dtype=dtype,
        positions=ours.positions,
        metrics=ours.metrics,
        cache=ours.cache,
        reference=theirs.metrics if theirs else {},
        reference_cache=theirs.cache if theirs else None,
        seconds=time.perf_counter() - started,
    )


def kv_cache(path: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False) -> CacheSize:
    """The live cache of the model in ``path`` after a forward pass. Raises DataError when it has no growing cache."""
    size = cache_size(load_model(path, dtype=dtype, trust_remote_code=trust_remote_code))
    if size is None:
        raise DataError("the model has no key/value cache", where=str(path))
    return size


def compare_speed(
    path: str | Path,
    against: str | Path,
    *,
    length: int = 256,
    new_tokens: int = 32,
    rounds: int = 3,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Speed:
    """Tokens per second of reading ``length`` random tokens and of writing ``new_tokens`` more, medians over rounds.

    Both models are in memory and take turns, after one round that does not count.
    """
    models = [load_model(each, dtype=dtype, trust_remote_code=trust_remote_code) for each in (path, against)]
    timings = [[timed(model, length, new_tokens) for model in models] for _ in range(rounds + 1)][1:]
    (prefill, decode), (their_prefill, their_decode) = (
        [median(turn[which][phase] for turn in timings) for phase in (0, 1)] for which in (0, 1)
    )
    return Speed(length / prefill, new_tokens / decode, length / their_prefill, new_tokens / their_decode)


def generate(
    path: str | Path,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    chat: bool | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """The model's greedy continuation of ``prompt``; ``on_text`` gets it piece by piece as it is made.

    ``chat`` puts the prompt into the tokenizer's chat template; by default when there is one. Raises CheckpointError
    when model or tokenizer do not load, DataError when the model does not generate text.
    """
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    model = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
    if not is_causal(model):
        raise DataError(f"a {type(model).__name__} does not continue texts", where=str(path))
    started, made = time.perf_counter(), list[str]()
    for piece in pieces(model, tokenizer, prompt_ids(tokenizer, prompt, chat), max_new_tokens):
        made.append(piece)
        if on_text is not None:
            on_text(piece)
    return Answer("".join(made), len(made), time.perf_counter() - started)


def _token_count(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _measure(
    model: Any,
    windows: Sequence[Window],
    names: Sequence[str],
    seed: int,
    tick: Callable[[], None],
    *,
    keep: _Kept | None = None,
    reference: _Kept | None = None,
) -> _Measured:
    sums = {name: Sums() for name in names}
    positions = 0
    for window in windows:
        output = _output(model, window, needs_logits=any(METRICS[name].of != "any" for name in names))
        positions += len(output)
        if keep is not None:
            keep.add(output)
        scored = Scored(output, reference.take(output) if reference else None, window.ids, window.text_bytes)
        for name in names:
            sums[name].add(*METRICS[name].score(scored))
        tick()
    metrics = {name: sums[name].estimate(METRICS[name], seed) for name in names}
    return _Measured(metrics, positions, cache_size(model))


def _output(model: Any, window: Window, needs_logits: bool) -> Tensor:
    """The logits, or the first output, as float32 [positions, width]."""
    with torch.inference_mode():
        result = model(**{name: _cast(value, model.dtype) for name, value in window.arguments.items()})
    if needs_logits and "logits" not in result:
        raise DataError(f"a {type(model).__name__} has no logits", remedy="use the metrics cosine and relative-error")
    output: Tensor = result["logits"] if "logits" in result else result[0]
    return output.float().flatten(0, -2)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def cache_size(model: Any) -> CacheSize | None:
    """Sizes of the tensors in the cache after reading ``CACHE_LENGTH`` tokens, or as many as the model takes.

    Of an encoder-decoder what the decoder keeps of its own tokens. None without a growing cache.
    """
    if not is_causal(model) and not is_paired(model):
        return None
    length = min(CACHE_LENGTH, position_limit(model) or CACHE_LENGTH)
    (window,) = random_windows(model, 1, length, seed=0)
    with torch.inference_mode():
        cache = model(**{name: _cast(value, model.dtype) for name, value in window.arguments.items()}, use_cache=True)
    cache = cache.past_key_values
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
    values = sum(tensor.numel() for tensor in tensors)
    return CacheSize(values / length, sum(_live_bytes(tensors)) / length)


def _live_bytes(tensors: Sequence[Tensor]) -> list[int]:
    """Bytes of the distinct storages, so that a view counts the memory that it keeps alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return list(storages.values())


def _ticker(on_progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    return tick
