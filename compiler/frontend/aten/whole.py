"""Linear maps, norms, attention and experts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from compiler.frontend.aten.shared import Complex, Handler, Masking, reshaped
from compiler.frontend.experts import expert_operands
from compiler.ir.graph import Value

if TYPE_CHECKING:
    from compiler.frontend.importer import Importer


def _linear(importer: Importer, x: Value, weight: Value, bias: Value | None = None) -> Value:
    return importer.emit("linear", x, weight, bias)


def _matmul(importer: Importer, x: Value, y: Value) -> Value:
    return importer.emit("matmul", x, y)


def _addmm(importer: Importer, bias: Value, x: Value, y: Value) -> Value:
    return importer.emit("add", importer.emit("matmul", x, y), bias)


def _baddbmm(importer: Importer, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    product = importer.emit("matmul", x, y)
    product = product if alpha == 1 else importer.emit("mul", product, scalar=float(alpha))
    if beta == 0:
        return product
    return importer.emit("add", product, bias if beta == 1 else importer.emit("mul", bias, scalar=float(beta)))


def _layer_norm(
    importer: Importer,
    x: Value,
    shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Value:
    if len(shape) != 1:
        raise importer.fail("a layer norm over several axes is not in the graph's vocabulary")
    return importer.emit("layer_norm", x, weight, bias, eps=eps)


def _rms_norm(
    importer: Importer, x: Value, shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> Value:
    if len(shape) != 1:
        raise importer.fail("an RMS norm over several axes is not in the graph's vocabulary")
    return importer.emit("rms_norm", x, weight, eps=torch.finfo(torch.float32).eps if eps is None else eps)


def _batch_norm(
    importer: Importer,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value,
    variance: Value,
    training: bool,
    momentum: float,
    eps: float,
    *args: Any,
) -> Value:
    """(x - mean) / sqrt(variance + eps) * weight + bias for each channel, by the statistics of training."""
    if training:
        raise importer.fail("the module computes batch statistics", "call .eval() on it first")
    shape = (x.shape[1], *(1 for _ in x.shape[2:]))
    scale = importer.emit("rsqrt", importer.emit("add", variance, scalar=eps))
    scale = scale if weight is None else importer.emit("mul", scale, weight)
    centred = importer.emit("sub", x, reshaped(importer, mean, shape))
    scaled = importer.emit("mul", centred, reshaped(importer, scale, shape))
    return scaled if bias is None else importer.emit("add", scaled, reshaped(importer, bias, shape))


def _conv(
    importer: Importer,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    axes = x.type.rank - 2
    stride, dilation = _per_axis(stride, axes), _per_axis(dilation, axes)
    if padding == "same":
        raise importer.fail("a convolution with padding `same` is not in the graph's vocabulary")
    padding = _per_axis(0 if padding == "valid" else padding, axes)
    return importer.emit("conv", x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _max_pool(
    importer: Importer,
    x: Value,
    window: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceiling: bool = False,
) -> Value:
    """The largest of each window, as the maximum of shifted pictures."""
    axes = x.type.rank - 2
    window, padding, dilation = (_per_axis(value, axes) for value in (window, padding, dilation))
    stride = _per_axis(stride, axes) if stride else window
    if ceiling or any(isinstance(size, str) for size in x.shape[2:]):
        raise importer.fail("pooling that rounds up, or of pictures of any size, is not in the graph's vocabulary")
    if any(padding):
        around = (0, 0, *padding)
        x = importer.emit("pad", x, before=around, after=around, value=torch.finfo(x.type.dtype).min)
    for axis, (width, step, gap) in enumerate(zip(window, stride, dilation, strict=True), 2):
        x = _largest(importer, x, axis, width, step, gap)
    return x


def _largest(importer: Importer, x: Value, axis: int, width: int, step: int, gap: int) -> Value:
    """The largest of ``width`` positions along ``axis``, ``gap`` apart, at every ``step``-th position."""
    last = int(x.shape[axis]) - gap * (width - 1)
    parts = [importer.emit("slice", x, axis=axis, start=gap * i, stop=gap * i + last, step=step) for i in range(width)]
    return reduce(lambda best, part: importer.emit("maximum", best, part), parts)


def _adaptive_mean(importer: Importer, x: Value, size: Any) -> Value:
    if set(_per_axis(size, x.type.rank - 2)) != {1}:
        raise importer.fail("adaptive pooling to more than one position is not in the graph's vocabulary")
    return importer.emit("mean", x, axes=tuple(range(2, x.type.rank)), keep=True)


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * axes if len(values) == 1 else values)


def _masking(importer: Importer, mask: Value | None, window: int, causal: bool) -> Masking:
    return Masking(mask, window, causal)


def _attention(
    importer: Importer,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | Masking | None,
    bias: Value | None,
    sinks: Value | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Value:
    if isinstance(mask, Masking):
        if window and mask.window not in (0, window):
            raise importer.fail(f"an attention has a window of {window}, and its mask one of {mask.window}")
        mask, window, causal = mask.mask, mask.window or window, mask.causal or causal
    return importer.emit(
        "attention", query, key, value, mask, bias, sinks, scale=scale, causal=causal, window=window, softcap=softcap
    )


def _sdpa(
    importer: Importer,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    width = query.shape[-1]
    if (
        not isinstance(width, int)
        or query.type.rank != 4
        or (mask is not None and not mask.type.dtype.is_floating_point)
    ):
        raise importer.fail("this form of scaled_dot_product_attention is not in the graph's vocabulary")
    scale = width**-0.5 if scale is None else scale
    result = importer.emit("attention", query, key, value, None, mask, None, scale=scale, causal=causal)
    return importer.emit("transpose", result, perm=(0, 2, 1, 3))


def _experts(importer: Importer, x: Value, indices: Value, weights: Value, parameters: Sequence[Value]) -> Value:
    operands, attrs = expert_operands(importer, parameters)
    return importer.emit("experts", x, indices, weights, *operands, **attrs)


def _polar(importer: Importer, length: Value, angle: Value) -> Complex:
    parts = [importer.emit("mul", length, importer.emit(op, angle)) for op in ("cos", "sin")]
    return Complex(*parts)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("max_pool1d", "max_pool2d"), _max_pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), _adaptive_mean),
    "addmm": _addmm,
    "attention": _attention,
    "baddbmm": _baddbmm,
    "batch_norm": _batch_norm,
    "experts": _experts,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "masking": _masking,
    "polar": _polar,
    "rms_norm": _rms_norm,
    "scaled_dot_product_attention": _sdpa,
}
