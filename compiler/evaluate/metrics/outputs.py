"""cosine and relative-error: how far the outputs of any model, features of pictures too, are from the original's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from compiler.evaluate.estimates import ratio
from compiler.evaluate.metrics.base import Metric, Row, Scored


def _cosine(window: Scored) -> Mapping[str, Row]:
    """Cosine similarity of the outputs at each position."""
    found = torch.nn.functional.cosine_similarity(window.output.double(), window.original().double(), dim=-1)
    return {"": (found.sum().item(), float(len(found)))}


def _squared_error(window: Scored) -> Mapping[str, Row]:
    """Squared Frobenius norm of the difference, and that of the reference."""
    reference = window.original().double()
    return {"": ((window.output.double() - reference).square().sum().item(), reference.square().sum().item())}


COSINE = Metric(_cosine, "any")
RELATIVE_ERROR = Metric(_squared_error, "any", statistic=ratio(np.sqrt))
