"""The class that the model came from: for passes that change weights, or sizes that its config can say."""

from __future__ import annotations

from typing import Any

from backends.safetensors.emission import Proposal, Refusal
from backends.safetensors.targets.target import Target
from compiler.ir.graph import Graph

NAME = "same family"


def source_config(graph: Graph) -> dict[str, Any] | None:
    """The config of the model that ``graph`` was captured from: as its checkpoint has it, where there is one."""
    config = getattr(graph.sources.get("model"), "config", None) or graph.origin.config
    return dict(config) if config else None


def shares_embedding(graph: Graph) -> bool:
    """Whether some linear map (a head) reads the table of an embedding."""
    tables = (node.input(0) for node in graph.nodes_named("embedding"))
    return any(user.op.name == "linear" for table in tables for user in table.users)


def propose(graph: Graph) -> Proposal | Refusal:
    config = source_config(graph)
    if config is None or graph.origin.architecture is None:
        return Refusal(NAME, "the source is no transformers model")
    config.pop("quantization_config", None)
    if config.get("tie_word_embeddings") and not shares_embedding(graph):
        config["tie_word_embeddings"] = False
    return Proposal(graph.origin.architecture, config)


TARGET = Target(NAME, propose)
