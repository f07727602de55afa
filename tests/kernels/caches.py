"""Caches as generated modules hold them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.torch_module.rendering import environment


def rounded(x: Tensor, bits: int) -> Tensor:
    """x [..., size] as the bytes uint8 of a rounded cache, by the code of generated modules."""
    names = {"torch": torch, "F": F}
    exec(environment().get_template("helpers.py.jinja").module.pack(), names)
    return names["pack"](x, bits)
