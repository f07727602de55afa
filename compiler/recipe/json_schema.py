"""The JSON Schema of recipes, by which editors complete and check, made from their sections and passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import TypeAdapter

from compiler.recipe.schema import EMITTERS, PERCENT, SECTIONS, option_name


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of recipes, with every installed pass."""
    from passes import pass_class, pass_names

    text = {"type": "string"}
    passes = {key: pass_class(key) for key in pass_names()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compress-model recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "model": {**text, "description": "A checkpoint directory, a hub id, or a .gguf file"},
            "include": {
                "anyOf": [text, {"type": "array", "items": text}],
                "description": "Recipes to build on; their passes come first",
            },
            "passes": {"type": "array", "items": _entry_schema(passes, ("included",))},
            "emit": {"type": "array", "items": _entry_schema(EMITTERS)},
            **{name: _options_schema(cls) for name, cls in SECTIONS.items()},
        },
    }


def _entry_schema(classes: Mapping[str, type], bare: tuple[str, ...] = ()) -> dict[str, Any]:
    """A list entry: a name, or a mapping of one name to its options."""
    properties = {key: {"anyOf": [_options_schema(cls), {"type": "null"}]} for key, cls in classes.items()}
    named = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"anyOf": [{"enum": [*classes, *bare]}, named]}


def _options_schema(cls: type) -> dict[str, Any]:
    schema = _inline(TypeAdapter(cls).json_schema())
    properties = {option_name(name): _percent(value) for name, value in schema.get("properties", {}).items()}
    required = [option_name(name) for name in schema.get("required", [])]
    return {
        "type": "object",
        "description": (cls.__doc__ or "").strip(),
        "properties": properties,
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` with its ``$defs`` written out where they are referred to."""
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(item) for item in cast("list[Any]", part)]
        if not isinstance(part, dict):
            return part
        mapping = cast("dict[str, Any]", part)
        if "$ref" in mapping:
            return resolve(definitions[mapping["$ref"].rsplit("/", 1)[-1]])
        return {name: resolve(value) for name, value in mapping.items() if name != "title"}

    return {
        name: {key: resolve(value) for key, value in schema[name].items()} if name == "properties" else value
        for name, value in schema.items()
    }


def _percent(schema: dict[str, Any]) -> dict[str, Any]:
    """A number may be written as a percentage."""
    percent = {"type": "string", "pattern": f"^{PERCENT}$"}
    if schema.get("type") == "number":
        number = {name: value for name, value in schema.items() if name != "default"}
        return {"anyOf": [number, percent], **({"default": schema["default"]} if "default" in schema else {})}
    if any(choice.get("type") == "number" for choice in schema.get("anyOf", [])):
        return {**schema, "anyOf": [*schema["anyOf"], percent]}
    return schema
