"""How quantised weights are stored, a file a format. Each has a ``FORMAT``: its name, what it holds, and its parts."""

from __future__ import annotations

from backends.safetensors.formats import (
    float_quantized,
    int_quantized,
    mxfp4_pack_quantized,
    mxfp6_pack_quantized,
    mxfp8_quantized,
    nvfp4_pack_quantized,
    pack_quantized,
)
from backends.safetensors.formats.scheme import Format, Scheme, scheme_of

FORMATS: tuple[Format, ...] = (
    int_quantized.FORMAT,
    pack_quantized.FORMAT,
    float_quantized.FORMAT,
    mxfp4_pack_quantized.FORMAT,
    mxfp6_pack_quantized.FORMAT,
    mxfp8_quantized.FORMAT,
    nvfp4_pack_quantized.FORMAT,
)

__all__ = ["FORMATS", "Format", "Scheme", "format_of", "scheme_of"]


def format_of(scheme: Scheme, *, expert: bool = False) -> Format:
    """The first format that holds ``scheme``. Integer experts, which are no modules, are always packed."""
    return (
        pack_quantized.FORMAT
        if expert and scheme.kind == "int"
        else next(format for format in FORMATS if format.holds(scheme))
    )
