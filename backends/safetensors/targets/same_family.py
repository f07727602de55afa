"""The class that the model came from: for passes that change weights, or sizes that its config can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.safetensors.emission import Proposal, Refusal, missing_names
from backends.safetensors.targets.sizes import HIDDEN, smaller_config
from backends.safetensors.targets.target import Target
from backends.safetensors.unify import Mismatch
from compiler.ir.facts import attention_sites, image_size
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
    """Tensors that the class never computes with (a mask token, the tower of pictures) as the source has them.

    A Mismatch says which of them the class, with sizes of its own, has no longer, or otherwise.
    """
    missing = missing_names(module, named)
    source = graph.sources.get("model")
    stored = bind(source, _source_module(graph)) if missing and isinstance(source, Checkpoint) else {}
    types = module.state_dict()
    others = {
        name: expr for name, expr in stored.items() if name.startswith(tuple(f"{p}." for p in graph.origin.apart))
    }
    for name, expr in others.items():
        if name not in types or tuple(types[name].shape) != expr.shape:
            return Mismatch(f"{name} takes no part in the graph, and does not fit the class with these sizes")
    return {name: stored.get(name) or _named(name, types[name]) for name in missing}


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
    resized = config if _narrower(graph) else smaller_config(graph, config)
    configs = [config] if resized == config else [config, resized]
    return tuple(Proposal(graph.origin.architecture, config, unused=unused) for config in configs)


def _narrower(graph: Graph) -> bool:
    """Whether the stream is not as wide as what is apart writes to it, of which no config tells."""
    before = _before(graph) or {}
    text = before.get("text_config", before)
    if not graph.origin.apart:
        return False
    widths = {site.output.input(1).shape[0] for site in attention_sites(graph) if site.output is not None}
    said = {text[name] for name in HIDDEN if name in text}
    return bool(said) and bool(widths) and not widths <= said


TARGET = Target(NAME, propose)
