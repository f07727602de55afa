"""Sparse weights as generated modules store them: bits and values, which their code unpacks while it loads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from backends.torch_module.rendering import render, strings
from compiler.ir.graph import Param
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import cast
from compiler.weights.ops.sparse import as_scatter


def stored(name: str, param: Param, *, compact: bool) -> dict[str, Expr]:
    """The tensors that stand for ``param`` under ``name``: if ``compact``, bits and values where these are smaller."""
    dense = cast(param.expr, param.storage)
    sparse = as_scatter(dense)
    if not compact or sparse is None or sum(part.type.nbytes for part in sparse.args) >= dense.type.nbytes:
        return {name: dense}
    return dict(zip((f"{name}_mask", f"{name}_values"), sparse.args, strict=True))


def loading_code(tensors: Mapping[str, Param], model_type: str) -> str:
    """The source of what unpacks the compact ones of ``tensors``; "" when there are none."""
    names = _ends(name for name, param in tensors.items() if len(stored(name, param, compact=True)) > 1)
    return render("sparse.py.jinja", names=strings(names), model_type=model_type) if names else ""


def _ends(names: Iterable[str]) -> list[str]:
    """The last two parts of each name, which layers share."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})
