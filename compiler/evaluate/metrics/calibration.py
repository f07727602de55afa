"""calibration-error: whether a model is right as often as it is sure (Guo et al., arXiv 1706.04599)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from compiler.evaluate.estimates import Array
from compiler.evaluate.metrics.base import Metric, Row, Scored

BINS = 15


def _bins(window: Scored) -> Mapping[str, Row]:
    """For each of 15 equal bins of confidence: tokens in it, the sum of their confidences, how many were right.

    The confidence is the probability of the most likely token.
    """
    if window.ids is None:
        raise ValueError("only token windows can be predicted")
    sure, token = torch.softmax(window.output[:-1].float(), -1).max(-1)
    place = (sure * BINS).long().clamp(max=BINS - 1)
    columns = torch.stack([torch.ones_like(sure), sure, (token == window.ids[1:]).float()], -1).double()
    return {"": torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, place, columns).flatten().tolist()}


def expected_error(rows: Array, weights: Array) -> Array:
    """Mean over tokens of how far the confidence of their bin lies from the share of it that was right, [draws]."""
    count, sure, right = np.moveaxis((weights @ rows).reshape(len(weights), BINS, 3), -1, 0)
    return np.abs(sure - right).sum(1) / count.sum(1)


CALIBRATION_ERROR = Metric(_bins, "tokens", compares=False, statistic=expected_error)
