"""Checkpoints in the layouts of GPTQ and AutoAWQ, read as the dense weights that their codes stand for.

GPTQ, of a matrix [out, in]: ``qweight`` int32 [in * bits / 32, out], codes packed along inputs; ``qzeros`` int32
[groups, out * bits / 32], zero points packed along outputs, less one in the first version (below); ``scales``
[groups, out]; ``g_idx`` int32 [in], the group of every input, in any order. AutoAWQ, as its GEMM kernels have it:
``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8], ``scales`` [groups, out]; the nibbles of a word
hold outputs 0, 2, 4, 6, 1, 3, 5, 7. A weight is scale * (code - zero point), in the dtype of its scales. Only rows that
are asked for are ever made.

GPTQModel takes the ones of the first version off whole words, so that a zero point of 0 borrows from the next; it is
read as it was written. Three bits, whose zero points run over the borders of words, are read one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiler.errors import CheckpointError
from compiler.ir.types import TensorType
from compiler.weights.checkpoint import Checkpoint, DirectoryCheckpoint
from compiler.weights.ops.codec import CHUNK_ELEMENTS

WORD = 32
GPTQ_BITS, AWQ_BITS = (2, 3, 4, 8), (4,)
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AutoAWQ the outputs 0 to 7 are."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_ORIGINAL = "start from the original, unquantised checkpoint"
_DAMAGED = "the checkpoint is damaged, or its quantization_config is another's: fetch it again"


@dataclass(frozen=True)
class Layout:
    """What a ``quantization_config`` says: of AutoAWQ or GPTQ, ``added`` to zero points, inputs that share a scale."""

    awq: bool
    bits: int
    group: int
    added: int
    ordered: bool
    """Whether groups are in order where nothing says in which group an input is."""

    def codes(self, words: Tensor, start: int, stop: int) -> Tensor:
        """The codes int64 [stop - start, in] of some outputs, of ``qweight``."""
        if not self.awq:
            return _numbers(words[:, start:stop], self.bits).T
        first = start // len(NIBBLES)
        numbers = _in_order(_numbers(words[:, first : -(-stop // len(NIBBLES))].T, self.bits))
        return numbers[start - first * len(NIBBLES) : stop - first * len(NIBBLES)]

    def zeros(self, words: Tensor) -> Tensor:
        """The zero points int64 [out, groups] of ``qzeros``. The first version of GPTQ adds one, in as many bits."""
        if self.awq:
            return _in_order(_numbers(words.T, self.bits))
        if WORD % self.bits:
            return _numbers(words.T, self.bits) + self.added & (1 << self.bits) - 1
        ones = sum(self.added << place for place in range(0, WORD, self.bits))
        return _numbers((words + ones).T, self.bits)

    @staticmethod
    def of(config: Any, file: Path) -> Layout:
        """Raises CheckpointError for what is neither, or a kind of it that is not read."""
        known: Mapping[str, Any] = config if isinstance(config, dict) else {}
        method, bits, group = (known.get(name) for name in ("quant_method", "bits", "group_size"))
        awq = method == "awq"
        if awq:
            bits, group = known.get("w_bit", bits), known.get("q_group_size", group)
        dynamic = known.get("dynamic") or {}
        form = known.get("version" if awq else "checkpoint_format", known.get("format")) or ("gemm" if awq else "gptq")
        formats, widths = (("gemm",), AWQ_BITS) if awq else (("gptq", "gptq_v2"), GPTQ_BITS)
        if method not in ("awq", "gptq"):
            shown, cause = method or "unknown", "is read of methods gptq and awq alone"
        elif (
            str(form).lower() not in formats
            or not isinstance(group, int)
            or not isinstance(bits, int)
            or bits not in widths
        ):
            shown = f"{method}, {form}, {bits} bits, groups of {group}"
            cause = f"is read as {' or '.join(formats)} with {', '.join(map(str, widths))} bits"
        elif awq and known.get("backend", "autoawq") != "autoawq":
            shown, cause = f"awq, {known['backend']}", "is read as AutoAWQ writes it alone"
        elif not isinstance(dynamic, dict) or any(not str(rule).startswith("-:") for rule in dynamic):
            shown, cause = f"{method}, `dynamic`", "is read with one scheme for all weights"
        else:
            added = int(not awq and str(form).lower() == "gptq")
            return Layout(awq, bits, max(group, 0), added, awq or not known.get("desc_act"))
        raise CheckpointError(
            f"the checkpoint is already quantised (quant_method: {shown}), which {cause}",
            where=str(file),
            remedy=_ORIGINAL,
        )


class PackedCheckpoint(Checkpoint):
    """A directory whose ``config`` has a ``quantization_config`` of GPTQ or AutoAWQ. Raises CheckpointError."""

    def __init__(self, stored: DirectoryCheckpoint) -> None:
        self._stored = stored
        self.path, self.files = stored.path, stored.files
        self.config = {name: value for name, value in stored.config.items() if name != "quantization_config"}
        self._layout = Layout.of(stored.config["quantization_config"], stored.path / "config.json")

    @property
    def types(self) -> Mapping[str, TensorType]:
        return self._types

    @cached_property
    def _types(self) -> dict[str, TensorType]:
        known = self._stored.types
        modules = dict.fromkeys(key.removesuffix(".qweight") for key in known if key.endswith(".qweight"))
        parts = {f"{module}.{part}" for module in modules for part in PARTS}
        dense = {key: type for key, type in known.items() if key not in parts}
        return dense | {f"{module}.weight": self._packed(module) for module in modules}

    def _packed(self, module: str) -> TensorType:
        """The type of the weight of ``module``, whose parts must fit each other."""
        found = {part: self._stored.types.get(f"{module}.{part}") for part in PARTS}
        codes, zeros, scales = found["qweight"], found["qzeros"], found["scales"]
        if codes is None or zeros is None or scales is None:
            raise self._damaged(f"{module} has not all of {', '.join(PARTS[:3])}")
        if f"{module}.weight" in self._stored.types:
            raise self._damaged(f"{module} has a dense weight beside its codes")
        if any(len(type.shape) != 2 for type in (codes, zeros, scales)) or not scales.dtype.is_floating_point:
            raise self._damaged(f"{module} has codes {codes}, zero points {zeros} and scales {scales}")
        (groups, rows), (length, width) = scales.static_shape, codes.static_shape
        columns = length if self._layout.awq else length * WORD // self._layout.bits
        packed = rows * self._layout.bits // WORD
        per = self._layout.group or max(columns, 1)
        index = found["g_idx"]
        if index is None and not self._layout.ordered and self._layout.group > 0:
            raise self._damaged(f"{module} has no g_idx, and its groups are in the order of activations (desc_act)")
        fits = (
            columns > 0
            and rows * self._layout.bits % WORD == 0
            and (self._layout.awq or length * WORD % self._layout.bits == 0)
            and (index is None or not index.dtype.is_floating_point)
            and width == (packed if self._layout.awq else rows)
            and zeros.static_shape == (groups, packed)
            and groups == -(-columns // per)
            and (self._layout.awq or index is None or index.static_shape == (columns,))
            and all(type.dtype == torch.int32 for type in (codes, zeros))
        )
        if not fits:
            raise self._damaged(f"{module} has codes {codes}, zero points {zeros} and scales {scales}, groups of {per}")
        return TensorType(scales.dtype, (rows, columns))

    def read(self, key: str) -> Tensor:
        if key in self._stored.types:
            return self._stored.read(key)
        return self.read_rows(key, 0, self.types[key].static_shape[0])

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        if key in self._stored.types:
            return self._stored.read_rows(key, start, stop)
        module, type = key.removesuffix(".weight"), self.types[key]
        columns = type.static_shape[1]
        codes, zeros, scales = (self._stored.read(f"{module}.{part}") for part in PARTS[:3])
        group, zero, scale = self._groups(module, columns, len(scales)), self._layout.zeros(zeros), scales.T
        found = torch.empty(stop - start, columns, dtype=type.dtype)
        step = max(1, CHUNK_ELEMENTS // columns)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values = self._layout.codes(codes, first, last) - zero[first:last, group]
            found[first - start : last - start] = values.to(type.dtype) * scale[first:last, group]
        return found

    def _groups(self, module: str, columns: int, groups: int) -> Tensor:
        """The group of every input: int64 [columns]."""
        name = f"{module}.g_idx"
        if self._layout.awq or name not in self._stored.types:
            return torch.arange(columns) // (self._layout.group or columns)
        found = self._stored.read(name).long()
        if found.min() < 0 or found.max() >= groups:
            raise self._damaged(f"{name} names groups other than the {groups} that there are")
        return found

    def is_filler(self, key: str) -> bool:
        """Whether ``key`` is a bias of zeros, as AutoGPTQ wrote for every matrix."""
        module = key.removesuffix(".bias")
        return key.endswith(".bias") and f"{module}.weight" in self.types and not self.read(key).any()

    def is_linear(self, key: str) -> bool:
        """Of weights that are packed: writers turn those of GPT-2's maps, [in, out], around."""
        return key not in self._stored.types

    def fingerprint(self) -> str:
        return self._stored.fingerprint()

    def save_tokenizer(self, directory: Path) -> list[Path]:
        return self._stored.save_tokenizer(directory)

    def _damaged(self, cause: str) -> CheckpointError:
        return CheckpointError(cause, where=str(self.path), remedy=_DAMAGED)


def _numbers(words: Tensor, bits: int) -> Tensor:
    """The unsigned numbers int64 [n * 32 / bits, m] that words int32 [n, m] hold along axis 0, over their borders."""
    first = torch.arange(len(words) * WORD // bits) * bits
    wide = torch.cat([words, words[-1:]]).long() & 0xFFFFFFFF
    word, offset = first // WORD, (first % WORD)[:, None]
    return (wide[word] >> offset | wide[word + 1] << WORD - offset) & (1 << bits) - 1


def _in_order(numbers: Tensor) -> Tensor:
    """``numbers`` [outputs, m] as the words of AutoAWQ hold them, in the order of outputs."""
    return numbers.unflatten(0, (-1, len(NIBBLES)))[:, list(NIBBLES)].flatten(0, 1)
