"""Which products with codes take their inputs as they are: those whose outputs rounded inputs would move too far.

How far is measured by ONNX Runtime's own kernels: a twin of the model, which rounds nothing, makes each such product
once more from rounded inputs and gives the energy of the difference, and of the output, as outputs of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from backends.onnx.check import PROMPT, buffers, empty_cache, session, with_room
from backends.onnx.lower import Lowered
from backends.onnx.target import CONTRIB
from compiler.errors import TargetError

if TYPE_CHECKING:
    from backends.onnx.emission import OnnxEmission

PRODUCT, CODES = "MatMulNBits", ".codes"
BATCHES = 4  # windows of calibration data: errors of products hardly differ between texts


@dataclass(frozen=True)
class Levels:
    """``errors`` by weight: the root of the energy of what rounded inputs change, over that of the output. Products
    with more than ``bound`` take theirs as they are."""

    errors: Mapping[str, float]
    bound: float

    @property
    def unrounded(self) -> frozenset[str]:
        """The weights whose products take inputs as they are."""
        return frozenset(name for name, error in self.errors.items() if not error <= self.bound)

    def note(self) -> str:
        """What the user should know."""
        kept = [error for name, error in self.errors.items() if name not in self.unrounded]
        others = f"; the others are moved by at most {max(kept):.2g}" if kept else ""
        worst = max(self.errors, key=lambda name: self.errors[name])
        return (
            f"{len(self.unrounded)} of {len(self.errors)} products with codes take their inputs as they are, for"
            f" rounding moves what they give by more than {self.bound:.2g} of its size{others}; of all, rounding moves"
            f" what {worst} gives most, by {self.errors[worst]:.2g}"
        )


def require_products(emission: OnnxEmission) -> None:
    """Raises TargetError where no product's inputs are rounded, where those of two models are, in half precision, or
    where tokens are not those of calibration data."""
    if emission.kind == "pair":
        cause = "`input-error` measures one model, and an encoder-decoder is two"
        raise TargetError(cause, remedy="leave it out, or write `accuracy-level: 0`")
    if PROMPT in emission.models:
        cause = "`input-error` measures one model, and `prompts: int8` rounds the inputs of another's products as well"
        raise TargetError(cause, remedy="leave one of them out")
    if emission.runtime.real != torch.float32:
        cause = f"`input-error` is measured in float32, which `target: {emission.runtime.name}` does not compute in"
        raise TargetError(cause, remedy="leave it out, or write `target: ort-cpu`")
    if emission.graph.tokens is not None:
        cause = "`input-error` is measured on calibration data, whose tokens a model with a smaller vocabulary has not"
        raise TargetError(cause, remedy="leave it out, or keep the vocabulary")
    main = emission.models[emission.main]
    if not emission.accuracy or PRODUCT not in main.operations(CONTRIB):
        cause = "`input-error` is of products with codes whose inputs are rounded to int8, and there are none"
        raise TargetError(cause, remedy="leave it out")


def measured(
    emission: OnnxEmission, directory: Path, batches: Sequence[Mapping[str, Tensor]], bound: float
) -> OnnxEmission:
    """``emission``, as it lies in ``directory``, with levels by what ``batches`` of the graph's inputs show; its models
    are written again.

    ``batches`` hold int64 [B, T] or float32 of a model's own shapes. Tensors stay as they are written.
    """
    from backends.onnx.write import SHARD_BYTES, save_models, save_twin

    exact = emission.exact()
    twin, sums = _with_both(exact.models[exact.main])
    file = f".both.{exact.main}"
    save_twin(replace(exact, models={exact.main: twin}), emission, directory, SHARD_BYTES, {exact.main: file})
    try:
        errors = _errors(session(directory / file, 0), sums, batches[:BATCHES])
    finally:
        (directory / file).unlink()
    found = emission.with_levels(Levels(errors, bound))
    save_models(found, directory)
    return found


def _with_both(model: Lowered) -> tuple[Lowered, dict[str, list[tuple[str, str]]]]:
    """``model`` with each product made again from rounded inputs, and by weight, for each of its products, the names of
    the outputs that are the energies of the difference and of what the product gives."""
    nodes, outputs, sums = list[ir.Node](), list(model.outputs), dict[str, list[tuple[str, str]]]()
    for node in model.nodes:
        nodes.append(node)
        weight = node.inputs[1].name if node.op_type == PRODUCT and node.inputs[1] is not None else None
        if weight is None:
            continue
        products = sums.setdefault(weight.removesuffix(CODES), [])
        name = f"{weight.removesuffix(CODES)}/{len(products)}"
        given = {key: each.value for key, each in node.attributes.items()} | {"accuracy_level": 4}
        again = ir.node(PRODUCT, node.inputs, given, domain=CONTRIB, name=f"{name}/rounded")
        apart = ir.node("Sub", [again.outputs[0], node.outputs[0]], name=f"{name}/apart")
        both = [
            ir.node("ReduceSumSquare", [value], {"keepdims": 0}, name=f"{name}/{what}")
            for what, value in (("error", apart.outputs[0]), ("energy", node.outputs[0]))
        ]
        nodes += [again, apart, *both]
        for made in (again, apart, *both):
            made.outputs[0].name = made.name
        for made in both:
            made.outputs[0].type, made.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        outputs += [made.outputs[0] for made in both]
        products.append((f"{name}/error", f"{name}/energy"))
    return replace(model, nodes=nodes, outputs=outputs), sums


def _errors(
    model: Any, sums: Mapping[str, Sequence[tuple[str, str]]], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:
    names = [name for products in sums.values() for pair in products for name in pair]
    total = np.zeros(len(names))
    for batch in batches:
        total += np.array(model.run(names, _feeds(model, batch)), np.float64)
    energies = dict(zip(names, total, strict=True))
    return {weight: _error([(energies[apart], energies[own]) for apart, own in sums[weight]]) for weight in sums}


def _error(energies: Sequence[tuple[float, float]]) -> float:
    """Of all products of a weight, from the energies of each one's difference and output."""
    apart, own = (sum(column) for column in zip(*energies, strict=True))
    return float(np.sqrt(apart / own)) if own else 0.0


def _feeds(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs of ``model`` for a batch of the graph's, with no padding and no past."""
    given: dict[str, Any] = {name: value.numpy() for name, value in batch.items()}
    if any(value.name == "attention_mask" for value in model.get_inputs()):
        given["attention_mask"] = np.ones(given["input_ids"].shape, np.int64)
    first = next(iter(given.values()))
    given |= empty_cache(model, len(first))
    return given | {name: with_room(given[name], first.shape[1]) for name in buffers(model)}
