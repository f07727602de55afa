"""What published forms of factors make of a model's weights, with as many numbers each and nothing but the weights.

``python benchmarks/factor_forms.py --part 0.8 0.6`` prints, for weights of a few layers of SmolLM2-135M, the relative
error |W - W'| / |W| of the best matrix W' that each form holds in this part of W's numbers:

- pair: U V by singular values; pivoted: the same matrix by r of its rows (Pivoting Factorization, arXiv 2501.19090).
- train: a tensor train of two cores, sum of r Kronecker products A_i x B_i, optimal by singular values of the
  rearranged matrix (CompactifAI, arXiv 2401.14109, cuts weights so), the best of a few ways to cut rows and columns.
- tucker: heads of query, key, value and output projection of a layer as one tensor with factors that all share, by
  higher-order singular values (TensorLLM, arXiv 2501.15674); its error is that of the whole stack.
- sparse: U S with S 2:4-sparse, both fitted in turn (DSFormer, arXiv 2312.13211); its mask counts one bit of 16
  an element.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.common import SMOLLM2, show
from compiler.frontend import capture
from compiler.ir.execute import read_param
from compiler.ir.facts import attention_sites
from compiler.ir.graph import Graph

LAYERS = (0, 10, 20, 29)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS = 6  # of fitting in turn
MASK = 0.5 + 1 / 16  # numbers that an element of a 2:4-sparse matrix takes: half a value, and a bit of a mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--part", type=float, nargs="+", default=[0.8, 0.6], help="parts of the numbers that remain")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    graph = capture(options.model)
    for part in options.part:
        rows = [[kind, *(f"{error:.3f}" for error in errors(graph, kind, part))] for kind in KINDS]
        show(f"Relative error, mean of {len(LAYERS)} layers, at {part:.0%} of the numbers", [["weight", *FORMS], *rows])
        stacked = [mean_of(form, stacks(graph), part) for form in (tucker, apart)]
        print(f"\nHeads of a layer as one tensor: {stacked[0]:.3f}; beside each other, pivoted: {stacked[1]:.3f}")


def errors(graph: Graph, kind: str, part: float) -> list[float]:
    names = [name for name in graph.params if name.endswith(f"{kind}.weight")]
    weights = [read_param(graph, graph.params[names[layer]]) for layer in LAYERS]
    return [mean_of(form, weights, part) for form in FORMS.values()]


def mean_of(form: Callable[[Tensor, float], float], weights: list[Tensor], part: float) -> float:
    return sum(form(weight, part) for weight in weights) / len(weights)


def lost(values: Tensor, rank: int) -> float:
    """The relative error of dropping all but ``rank`` singular ``values``."""
    return float((values[rank:].square().sum() / values.square().sum()).sqrt())


def pair(weight: Tensor, part: float) -> float:
    rows, columns = weight.shape
    return lost(torch.linalg.svdvals(weight), int(part * rows * columns / (rows + columns)))


def pivoted(weight: Tensor, part: float) -> float:
    rows, columns = weight.shape
    budget = part * rows * columns - rows
    rank = max(r for r in range(min(rows, columns)) if r * (rows + columns - r) <= budget)
    return lost(torch.linalg.svdvals(weight), rank)


def train(weight: Tensor, part: float) -> float:
    rows, columns = weight.shape
    found: list[float] = []
    for a in (2, 8, 24, 64):
        for b in (2, 8, 24, 64):
            if rows % a == 0 and columns % b == 0:
                turned = weight.reshape(a, rows // a, b, columns // b).transpose(1, 2).reshape(a * b, -1)
                found.append(lost(torch.linalg.svdvals(turned), int(part * weight.numel() / sum(turned.shape))))
    return min(found)


def sparse(weight: Tensor, part: float) -> float:
    rows, columns = weight.shape
    rank = int(part * rows * columns / (rows + MASK * columns)) // 4 * 4
    rank = min(rank, min(rows, columns) // 4 * 4)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    dense, coded = left[:, :rank], values[:rank, None] * right[:rank]
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(0)))[0]
    dense, coded = dense @ turn, turn.T @ coded
    for _ in range(STEPS):
        mask = _two_of_four(coded)
        coded = _fitted(dense, weight, mask)
        dense = torch.linalg.lstsq(coded.T, weight.T).solution.T
    return float((weight - dense @ coded).norm() / weight.norm())


def _two_of_four(matrix: Tensor) -> Tensor:
    groups = matrix.abs().reshape(-1, 4, matrix.shape[1])
    return torch.zeros_like(groups).scatter_(1, groups.topk(2, 1).indices, 1.0).reshape(matrix.shape)


def _fitted(dense: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The best matrix with zeros where ``mask`` has them, columns of one mask by their own normal equations."""
    gram, wanted = dense.T @ dense, dense.T @ weight
    index = mask.T.nonzero()[:, 1].reshape(mask.shape[1], -1)
    small = gram[index[:, :, None], index[:, None, :]]
    found = torch.linalg.solve(small, wanted.T.gather(1, index))
    return torch.zeros_like(wanted.T).scatter_(1, index, found).T


def stacks(graph: Graph) -> list[Tensor]:
    """Of each layer the tensor [width, head width, heads of query, key, value and output projection]."""
    found: list[Tensor] = []
    for site in (attention_sites(graph)[layer] for layer in LAYERS):
        weights = [read_param(graph, graph.params[node.input(1).name]) for node in (site.query, site.key, site.value)]
        weights.append(read_param(graph, graph.params[site.output.input(1).name]).T)
        heads = [weight.reshape(-1, site.head_dim, weight.shape[1]) for weight in weights]
        found.append(torch.cat(heads).permute(2, 1, 0))
    return found


def apart(stack: Tensor, part: float) -> float:
    """All heads beside each other as one matrix, pivoted."""
    return pivoted(stack.flatten(1), part)


def tucker(stack: Tensor, part: float) -> float:
    """The least error over ranks of the three modes whose numbers are within ``part``."""
    found = 1.0
    sizes = stack.shape
    vectors = [torch.linalg.svd(stack.movedim(mode, 0).flatten(1), full_matrices=False)[0] for mode in range(3)]
    core = torch.einsum("ijk,ia,jb,kc->abc", stack, *vectors).square()
    energy = core.cumsum(0).cumsum(1).cumsum(2)
    for second in range(1, sizes[1] + 1):
        for third in range(1, sizes[2] + 1):
            rest = part * stack.numel() - sizes[1] * second - sizes[2] * third
            first = min(int(rest / (sizes[0] + second * third)), sizes[0])
            if first > 0:
                kept = energy[first - 1, second - 1, third - 1] / energy[-1, -1, -1]
                found = min(found, float((1 - kept).clamp_min(0).sqrt()))
    return found


FORMS: dict[str, Callable[[Tensor, float], float]] = {
    "pair": pair,
    "pivoted": pivoted,
    "train": train,
    "sparse": sparse,
}

if __name__ == "__main__":
    main()
