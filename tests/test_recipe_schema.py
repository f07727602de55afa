"""The JSON Schema of recipes says what the compiler accepts."""

import re

import pytest

from compiler.evaluate.metrics import METRICS
from compiler.recipe.json_schema import json_schema
from compiler.recipe.yamltree import read_tree
from tests.test_recipe import SHIPPED, write


def valid(schema, value):
    """Whether ``value`` fits ``schema``, for the part of JSON Schema that ours uses."""
    known = {
        "$schema",
        "title",
        "description",
        "default",
        "type",
        "properties",
        "additionalProperties",
        "required",
        "anyOf",
        "enum",
        "const",
        "items",
        "pattern",
        "minimum",
        "exclusiveMinimum",
        "maximum",
        "exclusiveMaximum",
        "minProperties",
        "maxProperties",
        "format",
    }
    assert set(schema) <= known, f"the test does not know {set(schema) - known}"
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, bool) and schema.get("type") in ("integer", "number"):
        return False
    if isinstance(value, dict):
        properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        if not set(schema.get("required", [])) <= set(value):
            return False
        if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
            return False
        rest = [inner for name, inner in value.items() if name not in properties]
        if more is False and rest:
            return False
        if isinstance(more, dict) and not all(valid(more, inner) for inner in rest):
            return False
        if not all(valid(properties[name], inner) for name, inner in value.items() if name in properties):
            return False
    if isinstance(value, list) and not all(valid(schema.get("items", {}), inner) for inner in value):
        return False
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    if "exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"]:
        return False
    if "minimum" in schema and value < schema["minimum"]:
        return False
    if "anyOf" in schema and not any(valid(option, value) for option in schema["anyOf"]):
        return False
    return value in schema.get("enum", [value]) and value == schema.get("const", value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_json_schema_accepts_shipped_recipes(path):
    assert valid(json_schema(), read_tree(path).plain())


@pytest.mark.parametrize(
    "text, fits",
    [
        ("model: a/b", True),
        ("passes: [quantize, {gqa-to-mla: }, included]", True),
        ("passes: [quantize: {bits: 4, where: {role: mlp}, skip: [lm_head]}]", True),
        ("passes: [gqa-to-mla: {rope-dim: 16, rank: full}]", True),
        ("run: {memory: 4GB, device: auto}", True),
        ("include: [a.yaml, b.yaml]", True),
        ("modell: a/b", False),
        ("passes: [quantise]", False),
        ("passes: quantize", False),
        ("passes: [quantize: {bits: 9}]", False),
        ("passes: [quantize: {bitz: 4}]", False),
        ("passes: [gqa-to-mla: {}, {quantize: , gqa-to-mla: }]", False),
        ("passes: [gqa-to-mla: {rope_dim: 16}]", False),
        ("evaluate: {samples: 3}", False),
        ("evaluate: {data: t.txt, samples: 0}", False),
        ("evaluate: {data: t.txt, metrics: [kll]}", False),
        ("run: {memory: lots}", False),
        ("emit: [safetensor]", False),
    ],
)
def test_the_json_schema_is_as_strict_as_the_compiler(tmp_path, text, fits):
    assert valid(json_schema(), read_tree(write(tmp_path, text)).plain()) is fits


def test_the_json_schema_names_every_metric():
    metrics = json_schema()["properties"]["evaluate"]["properties"]["metrics"]["items"]["enum"]
    assert metrics == list(METRICS)
