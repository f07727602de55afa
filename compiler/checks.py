"""What a job refuses before anything long begins: no weights, or data and metrics that do not fit the model."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from compiler.datafiles import check_kind, taken
from compiler.errors import CheckpointError, DataError, RecipeError
from compiler.ir.graph import Graph
from compiler.recipe import Recipe


def check_has_weights(graph: Graph, recipe: Recipe) -> None:
    """Raises CheckpointError for a model that is a config alone."""
    if "model" not in graph.sources:
        raise CheckpointError(
            "the model has a config but no weights",
            where=recipe.model,
            remedy="`compress-model plan` works on a config alone; compressing needs the weights",
        )


def check_data(recipe: Recipe, graph: Graph) -> None:
    """Raises DataError, which points at the recipe, when its model takes other data or metrics do not fit it.

    No file of data is opened.
    """
    model = graph.origin.architecture or graph.name
    for name, section in (("calibration", recipe.calibration), ("evaluate", recipe.evaluate)):
        if section is not None:
            with pointing(recipe, name, "data"):
                check_kind(taken(graph.inputs), section.data, model)
    wanted, architecture, config = recipe.evaluate, graph.origin.architecture, graph.origin.config
    if wanted is not None and architecture is not None and config is not None:
        from compiler.evaluate.beforehand import check_metrics

        with pointing(recipe, "evaluate", "metrics"):
            check_metrics(architecture, config, wanted.metrics or None, wanted.data, wanted.items is not None)


def check_comparable(graph: Graph, recipe: Recipe, trust_remote_code: bool) -> None:
    """Raises RecipeError or DataError, which point at the recipe, when ``graph`` cannot be compared with the original.

    The data is opened and cut; no weight is read.
    """
    wanted, architecture, config = recipe.evaluate, graph.origin.architecture, graph.origin.config
    if wanted is None or architecture is None or config is None:
        return
    if graph.tokens is not None:
        raise RecipeError(
            "a model with fewer tokens cannot be compared with the original token by token",
            span=recipe.places["evaluate"].span if "evaluate" in recipe.places else None,
            remedy="leave `evaluate` out; bits-per-byte of either, by `compress-model eval`, can be compared",
        )
    from compiler.evaluate.beforehand import check_comparison
    from compiler.evaluate.texts import TextData

    data = TextData(wanted.data, wanted.samples, wanted.length, wanted.seed)
    with pointing(recipe, "evaluate", "data"):
        check_comparison(
            recipe.model,
            architecture,
            config,
            wanted.metrics or None,
            data,
            image=recipe.inputs.image,
            trust_remote_code=trust_remote_code,
        )


@contextmanager
def pointing(recipe: Recipe, section: str, key: str) -> Generator[None]:
    """Errors of data point at the option that they name of the recipe's ``section``, where it is given; otherwise at
    ``key``, or at the section where it has no such key."""
    try:
        yield
    except DataError as error:
        place = recipe.places.get(section)
        if place is not None and error.span is None:
            given = [name for name in (error.option, key) if name in place.items]
            error.span = place.items[given[0]].span if given else place.span
        raise
