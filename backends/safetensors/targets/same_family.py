"""The class that the model came from: for passes that change weights, or sizes that its config can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.safetensors.emission import Proposal, Refusal, missing_names
from backends.safetensors.targets.sizes import smaller_config
from backends.safetensors.targets.target import Target
from backends.safetensors.unify import Mismatch
from compiler.ir.facts import image_size
from compiler.ir.graph import Graph
from compiler.ir.types import TensorType
from compiler.weights.checkpoint import Checkpoint, bind
from compiler.weights.expr import Expr, load
from compiler.weights.tokens import renumbered

NAME = "same family"
RUNTIME = ("auto_map", "quantization_config", "_name_or_path", "experts_implementation", "_experts_implementation")


def source_config(graph: Graph) -> dict[str, Any] | None:
    """The config of the model that ``graph`` was captured from: as its checkpoint has it, where there is one.

    Tokens have the numbers of ``graph``.
    """
    config = _before(graph)
    return config if config is None or graph.tokens is None else renumbered(config, graph.tokens)


def _before(graph: Graph) -> dict[str, Any] | None:
    config = getattr(graph.sources.get("model"), "config", None) or graph.origin.config
    return dict(config) if config else None


def shares_embedding(graph: Graph) -> bool:
    """Whether some linear map (a head) reads the table of an embedding."""
    tables = (node.input(0) for node in graph.nodes_named("embedding"))
    return any(user.op.name == "linear" for table in tables for user in table.users)


def unused(graph: Graph, module: Any, named: Mapping[str, Expr]) -> Mapping[str, Expr] | Mismatch:
    """Tensors that the class never computes with (a mask token) as the source has them."""
    missing = missing_names(module, named)
    source = graph.sources.get("model")
    stored = bind(source, _source_module(graph)) if missing and isinstance(source, Checkpoint) else {}
    return {name: stored.get(name) or _named(name, module.state_dict()[name]) for name in missing}


def _source_module(graph: Graph) -> Any:
    """The class as the source has it: ``module`` may have been untied since, and need more than the source holds."""
    from compiler.frontend.subject import build_on_meta, config_from_dict

    return build_on_meta(config_from_dict(_before(graph) or {}), graph.origin.architecture or "")


def _named(name: str, tensor: Any) -> Expr:
    """A tensor of a source that calls it as the module does: a live module, or a config alone."""
    return load("model", name, TensorType(tensor.dtype, tuple(tensor.shape)))


def _has_head(config: Mapping[str, Any], architecture: str) -> bool:
    """Whether the class has an output embedding that could share the table of its input's."""
    from compiler.frontend.subject import build_on_meta, config_from_dict

    return build_on_meta(config_from_dict(config), architecture).get_output_embeddings() is not None


def propose(graph: Graph) -> tuple[Proposal, ...] | Refusal:
    """The source's config, and after it that config with the sizes that the graph has now where these differ."""
    config = source_config(graph)
    if config is None or graph.origin.architecture is None:
        return Refusal(NAME, "the source is no transformers model")
    config = {
        name: value
        for name, value in config.items()
        if name not in RUNTIME and not name.removeprefix("_").startswith("attn_implementation")
    }
    config |= {name: size for name, size in image_size(graph).items() if name in config}
    tied = (graph.origin.config or config).get("tie_word_embeddings")
    if tied and not shares_embedding(graph) and _has_head(config, graph.origin.architecture):
        config["tie_word_embeddings"] = False
    resized = smaller_config(graph, config)
    configs = [config] if resized == config else [config, resized]
    return tuple(Proposal(graph.origin.architecture, config, unused=unused) for config in configs)


TARGET = Target(NAME, propose)
