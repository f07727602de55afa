"""What each form of factors of `low-rank` makes of weights, with as many numbers each and nothing but the weights.

``python benchmarks/factor_forms.py --part 0.8 0.6`` prints, for weights of a few layers of SmolLM2-135M, the relative
error |W - W'| / |W| of what each form of the pass has in this part of W's numbers: masks and orders of rows count, and
what weighs errors is 1. The last column is how many times as many multiplications the tensor train takes as W.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import SMOLLM2, show
from compiler.factor import Metric
from compiler.frontend import capture
from compiler.ir.execute import read_param
from compiler.ir.graph import Graph, Param
from passes.low_rank.forms import approximated
from passes.low_rank.places import Form, Place
from passes.low_rank.sparse import DenseSparse
from passes.low_rank.train import Train
from passes.low_rank.tucker import heads_of

LAYERS = (0, 10, 20, 29)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FORMS = ("pair", "pivoted", "tucker", "tensor-train", "sparse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--part", type=float, nargs="+", default=[0.8, 0.6], help="parts of the numbers that remain")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    graph = capture(options.model)
    heads: dict[Param, Place] = {**heads_of(graph)}
    for part in options.part:
        rows = [[kind, *_row(graph, heads, kind, part)] for kind in KINDS]
        title = f"Relative error, mean of {len(LAYERS)} layers, at {part:.0%} of the numbers"
        show(title, [["weight", *FORMS, "train's products"], *rows])


def _row(graph: Graph, heads: dict[Param, Place], kind: str, part: float) -> list[str]:
    names = [name for name in graph.params if name.endswith(f"{kind}.weight")]
    params = [graph.params[names[layer]] for layer in LAYERS]
    found: list[str] = []
    for form in FORMS:
        places = [place for param in params if (place := _place(param, form, heads)) is not None]
        errors = [_error(graph, place, form, part) for place in places]
        found.append(f"{sum(errors) / len(errors):.3f}" if errors else "")
    return [*found, f"{_products(Train((params[0],)), part):.1f}"]


def _place(param: Param, form: str, heads: dict[Param, Place]) -> Place | None:
    match form:
        case "tucker":
            return heads.get(param)
        case "tensor-train":
            return Train((param,))
        case "sparse":
            return DenseSparse((param,))
        case _:
            return Place((param,))


def _error(graph: Graph, place: Place, kind: str, part: float) -> float:
    form, weight = Form(kind, bias=False), read_param(graph, place.params[0]).double()
    plain = Metric((weight.new_ones(len(weight)),), weight.new_ones(weight.shape[1]))
    made = approximated(form, place, form.largest(place, part * place.full), weight, plain)
    return float((weight - made.matrix()).norm() / weight.norm())


def _products(place: Train, part: float) -> float:
    """Multiplications of the train over those of the matrix."""
    a, b, c, d = place.cut
    rank = Form("tensor-train", bias=False).largest(place, part * place.full)
    return rank * (b * c * d + c * a * b) / place.full


if __name__ == "__main__":
    main()
