"""perplexity and bits-per-byte: how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from compiler.evaluate.estimates import ratio
from compiler.evaluate.metrics.base import Metric, Row, Scored


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross entropy in nats, float64 [positions - 1], of tokens 1.. of ``ids``, each by the logits before it."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none").double()


def _nats(window: Scored) -> Mapping[str, Row]:
    found = losses(window.output, _ids(window))
    return {"": (found.sum().item(), float(len(found)))}


def _bits(window: Scored) -> Mapping[str, Row]:
    found = losses(window.output, _ids(window)).sum().item()
    return {"": (found / math.log(2), float(window.text_bytes))}


def _ids(window: Scored) -> Tensor:
    if window.ids is None:
        raise ValueError("only token windows have a cross entropy")
    return window.ids


PERPLEXITY = Metric(_nats, "tokens", compares=False, statistic=ratio(np.exp))
BITS_PER_BYTE = Metric(_bits, "causal", compares=False)
