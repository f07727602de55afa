"""The numbers of a row's tables, all together, for codes that are given: least squares (GANQ, arXiv 2501.12956)."""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.weights.ops.codebook import Codebook
from compiler.weights.ops.codec import Parameters

RIDGE = 1e-4  # of the mean of a row's diagonal: what a departure from the numbers before costs
ELEMENTS = 1 << 22  # of features and of their products that are held together


def fitted_tables(wanted: Tensor, second: Tensor, codec: Codebook, codes: Tensor, parameters: Parameters) -> Parameters:
    """Parameters [rows, groups] of least (w - v) H (w - v)^T, v being what ``codes`` [rows, columns] stand for."""
    columns = wanted.shape[1]
    groups = columns // (codec.group or columns)
    step = max(1, ELEMENTS // (columns * groups * codec.numbers))
    table = torch.stack(parameters, -1).float()
    parts = zip(wanted.split(step), codes.split(step), table.split(step), strict=True)
    fitted = torch.cat([_fitted(own, second, codec, chosen, before) for own, chosen, before in parts])
    return tuple(fitted.to(codec.dtype).unbind(-1))


def _fitted(wanted: Tensor, second: Tensor, codec: Codebook, codes: Tensor, table: Tensor) -> Tensor:
    """Tables [rows, groups, numbers] of some rows."""
    rows, groups, numbers = table.shape
    features = codec.features(codes).unflatten(1, (groups, -1))  # [rows, groups, size, numbers]
    values = (features @ table.unsqueeze(-1)).flatten(1)
    seconds = second.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))  # [groups, size, groups, size]
    met = torch.einsum("gshu,rhun->rgshn", seconds, features)
    equations = torch.einsum("rgsm,rgshn->rgmhn", features, met).reshape(rows, groups * numbers, -1)
    pull = ((wanted - values) @ second).unflatten(1, (groups, -1))
    aims = torch.einsum("rgsm,rgs->rgm", features, pull).reshape(rows, -1, 1)
    diagonal = equations.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    return table + torch.linalg.solve(equations, aims).reshape(table.shape)
