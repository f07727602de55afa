"""How quantised weights are stored, one file a format. Each has ``NAME``, ``holds`` and ``parts``."""

from __future__ import annotations

from backends.safetensors.formats import int_quantized, pack_quantized
from backends.safetensors.formats.scheme import Format, Scheme, scheme_of

FORMATS: tuple[Format, ...] = (int_quantized.FORMAT, pack_quantized.FORMAT)

__all__ = ["FORMATS", "Format", "Scheme", "format_named", "format_of", "scheme_of"]


def format_of(scheme: Scheme) -> Format:
    """The first format that holds ``scheme``. Every scheme that a ``dequantize`` can have is held by one."""
    return next(format for format in FORMATS if format.holds(scheme))


def format_named(name: str) -> Format:
    return next(format for format in FORMATS if format.name == name)
