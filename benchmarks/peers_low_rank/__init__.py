"""Published factorisations of decoder weights, reimplemented as published to be measured beside ours.

Every linear map of the decoder layers gets the rank floor(m n ratio / (m + n)), the same part of each. The weights are
replaced by the product of their factors, which computes the same; the factors' numbers are counted.

`svd`: the truncated singular value decomposition of W. `asvd` (arXiv 2312.05821): of W S, S the mean absolute value of
each input to the power 1/2, exact decomposition, without its search for ranks by measured perplexity. `svd-llm` (arXiv
2403.07378): of W S, S the Cholesky factor of the sum of x x^T in float64, shifted by its lowest eigenvalue where it has
none, without its update on a few samples and its adapters, which are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoders import feed, linears

Sums = dict[str, tuple[Tensor, Tensor]]
Scale = Callable[[Tensor, Tensor], Tensor]


def rank_of(linear: nn.Linear, ratio: float) -> int:
    rows, columns = linear.weight.shape
    return int(rows * columns * ratio / (rows + columns))


def calibrate(model: Any, windows: Tensor) -> Sums:
    return sums_of(linears(model), feed(model, windows))


@torch.inference_mode()
def sums_of(parts: dict[str, nn.Linear], forward: Callable[[], None]) -> Sums:
    """For every linear map the sum of x x^T [n, n] and of |x| [n] over all that ``forward`` feeds it, float64.

    Maps that read the same tensor share the sums.
    """
    sums = {name: (torch.zeros(part.in_features, part.in_features, dtype=torch.float64),
                   torch.zeros(part.in_features, dtype=torch.float64)) for name, part in parts.items()}  # fmt: skip
    seen: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        last = next(reversed(seen), "")
        if last and seen[last] is x:
            sums[name] = sums[last]
            return
        seen.clear()
        seen[name] = x
        rows = x.reshape(-1, x.shape[-1]).double()
        sums[name][0].add_(rows.T @ rows)
        sums[name][1].add_(rows.abs().sum(0))

    hooks = [
        part.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, part in parts.items()
    ]
    forward()
    for hook in hooks:
        hook.remove()
    return sums


def plain(second: Tensor, absolute: Tensor) -> Tensor:
    return torch.eye(len(second))


def by_size(second: Tensor, absolute: Tensor) -> Tensor:
    return absolute.div(absolute.mean()).sqrt().clamp_min(1e-6).float().diag()


def whitened(second: Tensor, absolute: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(second)
    if failed:
        shift = 1e-6 - torch.linalg.eigvalsh(second)[0]
        factor = torch.linalg.cholesky(second + shift * torch.eye(len(second), dtype=second.dtype))
    return factor.float()


METHODS: dict[str, Scale] = {"svd": plain, "asvd": by_size, "svd-llm": whitened}


def apply(model: Any, sums: Sums, keep: float, method: str) -> int:
    return factorise(linears(model), sums, keep, method)


@torch.inference_mode()
def factorise(parts: dict[str, nn.Linear], sums: Sums, keep: float, method: str) -> int:
    """Factorise ``parts`` in place. Returns how many numbers fewer the factors hold."""
    saved = 0
    for name, part in parts.items():
        scale, rank = METHODS[method](*sums[name]), rank_of(part, keep)
        left, values, right = torch.linalg.svd(part.weight.float() @ scale, full_matrices=False)
        first = torch.linalg.solve(scale, right[:rank], left=False)
        part.weight.copy_(left[:, :rank] * values[:rank] @ first)
        saved += part.weight.numel() - rank * sum(part.weight.shape)
    return saved
