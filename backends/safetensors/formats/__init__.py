"""How quantised weights are stored, one file a format. Each has ``NAME``, ``holds`` and ``parts``."""

from __future__ import annotations

from backends.safetensors.formats import int_quantized, pack_quantized
from backends.safetensors.formats.scheme import Format, Scheme, scheme_of

FORMATS: tuple[Format, ...] = (int_quantized.FORMAT, pack_quantized.FORMAT)

__all__ = ["FORMATS", "Format", "Scheme", "format_of", "scheme_of"]


def format_of(scheme: Scheme, *, expert: bool = False) -> Format:
    """The first format that holds ``scheme``. Loaders of experts, which are no modules, know the packed one only."""
    return pack_quantized.FORMAT if expert else next(format for format in FORMATS if format.holds(scheme))
