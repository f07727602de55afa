"""A language model generating with onnxruntime alone: greedy decoding with a cache that is written in place.

Buffers for keys and values are as long as the prompt and the answer together. The model reads and writes the same ones,
so that a step copies nothing where the model's own attention allows it; others get what the step before returned.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from backends.onnx.check import PAST, PRESENT, PROMPT, buffers, empty_cache, session, with_room
from compiler.errors import CheckpointError, DataError

ONE = np.ones(1, np.int64)
POSITIONS = ".positions"  # of a stage's tokens, [B, S]
IN_PLACE = "compress-model.cache-in-place"
AGAIN = "write or fetch it again"


@dataclass(frozen=True)
class Timing:
    """Seconds for the prompt, and for each token after it."""

    prefill: float
    steps: Sequence[float]

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, without the prompt."""
        return len(self.steps) / sum(self.steps) if self.steps else 0.0


class Runner:
    """A causal ONNX model, which lies in ``path``, on ``threads`` threads. A model for prompts that lies beside it
    reads all but single tokens.

    Raises CheckpointError when onnxruntime is not installed, or the model is no language model with a cache.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        try:
            import onnxruntime as ort
        except ImportError as reason:
            raise CheckpointError(
                "running an ONNX model needs the package onnxruntime, which is not installed",
                remedy="pip install 'compress-model[onnx]'",
            ) from reason
        self._ort: Any = ort
        self.path = path
        try:
            self._session = session(path, threads)
            beside = path.with_name(PROMPT)
            self._prompts = session(beside, threads) if beside.is_file() else self._session
        except Exception as reason:  # the runtime's own classes of errors share no better base
            cause = f"ONNX Runtime cannot load it: {str(reason)[:200]}"
            raise CheckpointError(
                cause, where=str(path), remedy="write or fetch it again, with all files beside it"
            ) from reason
        self._past = [value for value in self._session.get_inputs() if value.name.startswith(PAST)]
        self._buffers = buffers(self._session)
        names = {value.name for value in self._session.get_inputs()}
        if not self._past or not {"input_ids", "attention_mask"} <= names:
            raise CheckpointError(
                "it is no language model with a cache",
                where=str(path),
                remedy="name one that `emit: [onnx]` has written",
            )
        defaults = {value.name for value in self._session.get_overridable_initializers()}
        self._scores_last = "logits_to_keep" in defaults
        self._in_place = self._session.get_modelmeta().custom_metadata_map.get(IN_PLACE) == "yes"

    def logits(self, ids: Any) -> Any:
        """Logits [B, T, V] of the tokens ``ids`` [B, T], without a cache."""
        found, _ = self._run(ids, np.ones(ids.shape, np.int64), self._empty(len(ids)), last=False)
        return found

    def greedy(self, ids: Sequence[int], count: int) -> Iterator[tuple[int, float]]:
        """The likeliest ``count`` tokens after ``ids``, each with the seconds it took; those of the first are the
        prompt's."""
        mask = np.ones((1, len(ids) + count), np.int64)
        started = time.perf_counter()
        found, past = self._run(np.array([ids]), mask[:, : len(ids)], self._empty(1))
        steps = self._steps(past, count) if self._in_place else None
        for step in range(count):
            token = int(found[0, -1].argmax())
            yield token, time.perf_counter() - started
            started = time.perf_counter()
            if step + 1 < count:
                given = mask[:, : len(ids) + step + 1]
                if steps is not None:
                    found = steps.run(token, given)
                else:
                    found, past = self._run(np.array([[token]]), given, past)

    def timed(self, ids: Sequence[int], count: int) -> Timing:
        """How long the prompt ``ids`` and ``count`` tokens after it take."""
        seconds = [taken for _, taken in self.greedy(ids, count + 1)]
        return Timing(seconds[0], seconds[1:])

    def _empty(self, batch: int) -> dict[str, Any]:
        return {name: self._value(array) for name, array in empty_cache(self._session, batch).items()}

    def _value(self, array: Any) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def _steps(self, past: dict[str, Any], count: int) -> _Steps:
        """What runs single tokens, with the cache in buffers that have room for ``count`` more."""
        grown = {name: value for name, value in past.items() if name.endswith(POSITIONS)}
        roomy: dict[str, Any] = {}
        for name in past.keys() - grown.keys():
            array = past[name].numpy()
            wide = np.zeros((*array.shape[:2], array.shape[2] + count, array.shape[3]), array.dtype)
            wide[:, :, : array.shape[2]] = array
            roomy[name] = self._value(wide)
        width = next(value.shape[-1] for value in self._session.get_outputs() if value.name == "logits")
        return _Steps(self._session, roomy, grown, np.zeros((1, 1, width), np.float32), self._value)

    def _with_room(self, name: str, value: Any, count: int) -> Any:
        """A cached tensor; a buffer for ``count`` tokens when new ones are written into it."""
        if name not in self._buffers or value.shape()[2] >= count:
            return value
        return self._value(with_room(value.numpy(), count))

    def _run(self, ids: Any, mask: Any, past: dict[str, Any], *, last: bool = True) -> tuple[Any, dict[str, Any]]:
        """Logits, of the ``last`` token or of all, and what is cached then."""
        given = {"input_ids": np.ascontiguousarray(ids, np.int64), "attention_mask": np.ascontiguousarray(mask)}
        if last and self._scores_last:
            given["logits_to_keep"] = ONE
        past = {name: self._with_room(name, value, mask.shape[1]) for name, value in past.items()}
        feeds = {**{name: self._value(array) for name, array in given.items()}, **past}
        names = ["logits", *(name.replace(PAST, PRESENT, 1) for name in past)]
        model = self._session if ids.shape[1] == 1 else self._prompts
        logits, *present = model.run_with_ort_values(names, feeds)
        return logits.numpy(), dict(zip(past, present, strict=True))


class _Steps:
    """Single tokens through a model whose cache is read and written in ``buffers``; all is bound once but the mask, and
    the few numbers that have ``grown`` by the token before."""

    def __init__(self, model: Any, buffers: dict[str, Any], grown: dict[str, Any], logits: Any, value: Any) -> None:
        self._model, self._buffers, self._grown, self._logits = model, buffers, grown, logits
        self._token, self._binding = np.zeros((1, 1), np.int64), model.io_binding()
        self._held = (value(self._token), value(logits))  # these views live as long as their binding
        self._binding.bind_ortvalue_input("input_ids", self._held[0])
        self._binding.bind_ortvalue_output("logits", self._held[1])
        for name, buffer in buffers.items():
            self._binding.bind_ortvalue_input(name, buffer)
            self._binding.bind_ortvalue_output(name.replace(PAST, PRESENT, 1), buffer)
        self._outputs = ["logits", *(name.replace(PAST, PRESENT, 1) for name in (*buffers, *grown))]

    def run(self, token: int, mask: Any) -> Any:
        """Logits [1, 1, V] after ``token``; ``mask`` [1, S] has it and all before it."""
        self._token[0, 0] = token
        given = np.ascontiguousarray(mask)
        self._binding.bind_cpu_input("attention_mask", given)
        for name, value in self._grown.items():
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_output(name.replace(PAST, PRESENT, 1))
        self._model.run_with_iobinding(self._binding)
        if self._grown:
            found = dict(zip(self._outputs, self._binding.get_outputs(), strict=True))
            self._grown = {name: found[name.replace(PAST, PRESENT, 1)] for name in self._grown}
        return self._logits


def answer(path: Path, prompt: str, count: int, *, threads: int = 0) -> Iterator[tuple[str, float]]:
    """Pieces of the answer of the model in ``path`` to ``prompt``, with the seconds that each took.

    The tokenizer beside the model is used, and its chat template when there is one. Raises CheckpointError when
    there is no tokenizer or what lies beside the model cannot be read, DataError when the prompt has no tokens, or
    it or the answer has one that the model cannot take.
    """
    runner, tokenizer = Runner(path, threads=threads), _tokenizer(path.parent)
    ids = tokenizer.encode(*in_template(path.parent, prompt)).ids
    if not ids:
        raise DataError("the prompt has no tokens", where=str(path), remedy="say something to the model")
    ends, written, shown = _ends(path.parent), list[int](), ""
    for token, seconds in _taken(runner, ids, count):
        if token in ends:
            return
        written.append(token)
        text = tokenizer.decode(written)
        piece = "" if text.endswith("\ufffd") else text[len(shown) :]
        shown += piece
        yield piece, seconds


def _taken(runner: Runner, ids: Sequence[int], count: int) -> Iterator[tuple[int, float]]:
    """What ``runner`` gives until the model has no position for a token, or no row of its table."""
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    try:
        yield from runner.greedy(ids, count)
    except InvalidArgument as reason:
        cause = f"the model cannot go on with a prompt of {len(ids)} tokens: {str(reason)[:300]}"
        remedy = "a shorter prompt or answer, and the tokenizer that belongs to the model"
        raise DataError(cause, where=str(runner.path), remedy=remedy) from reason


def in_template(directory: Path, prompt: str) -> tuple[str, None, bool, bool]:
    """The arguments with which a tokenizer encodes ``prompt``: in a chat template, which has its own special tokens.

    Raises CheckpointError when the template cannot be read or filled.
    """
    settings = _json(directory / "tokenizer_config.json")
    file = directory / "chat_template.jinja"
    template = _read(file) if file.is_file() else settings.get("chat_template")
    if not isinstance(template, str):
        return prompt, None, False, True
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    known = {name: _text(settings.get(name)) for name in ("bos_token", "eos_token")}
    message = [{"role": "user", "content": prompt}]
    try:
        filled = environment.from_string(template).render(messages=message, add_generation_prompt=True, **known)
    except Exception as reason:  # a template is code, which may raise anything
        cause = f"the chat template cannot be filled: {reason}"
        raise CheckpointError(cause, where=str(directory), remedy="mend or remove it") from reason
    return filled, None, False, False


def _text(token: Any) -> str:
    return str(token.get("content", "") if isinstance(token, dict) else token or "")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as reason:
        raise CheckpointError(f"it cannot be read: {reason}", where=str(file), remedy=AGAIN) from reason


def _json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``, an empty one where there is no file. The reader of checkpoints would need torch."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read(file))
    except (ValueError, RecursionError) as reason:
        raise CheckpointError(f"its JSON cannot be read: {reason}", where=str(file), remedy=AGAIN) from reason
    if not isinstance(found, dict):
        raise CheckpointError("its JSON is not an object", where=str(file), remedy=AGAIN)
    return cast(dict[str, Any], found)


def _tokenizer(directory: Path) -> Any:
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            "there is no tokenizer.json beside the model", where=str(directory), remedy="copy the original's there"
        )
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as reason:  # the package raises no class of its own
        raise CheckpointError(f"it is no tokenizer: {reason}", where=str(file), remedy=AGAIN) from reason


def _ends(directory: Path) -> set[int]:
    """The tokens that end an answer."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        given = _json(directory / name).get("eos_token_id")
        ends: list[Any] = given if isinstance(given, list) else [] if given is None else [given]
        if not all(isinstance(end, int) for end in ends):
            cause = f"`eos_token_id` is {given!r}, not a token or a list of tokens"
            raise CheckpointError(cause, where=str(directory / name), remedy="correct it")
        found.update(ends)
    return found
