"""Every example on every page: recipes are planned, Python is run, command lines are parsed, named files exist."""

import math
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, ViTConfig

from compiler import capture, cli
from compiler.cli import main
from compiler.ir.graph import Graph
from compiler.ir.types import TensorType
from compiler.rewrite.driver import rewrite
from compiler.rewrite.pattern import attr, op, rule, var
from compiler.rewrite.site import Refused
from compiler.weights.evaluate import evaluate
from compiler.weights.source import MemorySource
from tests.captures import plan_of
from tests.small import write_folder, write_model, write_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WORDS = {"RECIPE": "recipe.yaml", "MODEL": "model", "NAME": "quantize", "COMMAND": "plan"}
"""What stands for something else in command lines."""
SHARED_OPTIONS = (ROOT / "benchmarks" / "decoders.py").read_text()
MODELS = {
    "deep": ("recipes.md-1", "graph.md-0"),
    "bare": ("gguf.md",),
    "wide": ("README.md",),
    "pictures": ("drop-tokens.md",),
}
"""Examples that are of another model than the usual tiny one."""


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(name, text) of the fenced blocks of a page; the name follows the language, if there is one."""
    return re.findall(rf"^```{language}(?: (\S+))?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def examples(language: str) -> dict[str, str]:
    """The texts of all blocks by page and number; those that are files of another example are left out."""
    return {
        f"{page.name}-{i}": text
        for page in PAGES
        for i, (name, text) in enumerate(blocks(page, language))
        if page.name != "write-a-pass.md" and not name.startswith("parts/")
    }


RECIPES, PYTHON = examples("yaml"), examples("python")


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """A folder with all that examples name: models, texts, included recipes, outputs."""
    folder = write_folder(tmp_path_factory.mktemp("kitchen"))
    (folder / "held-out.txt").write_text((folder / "text.txt").read_text())
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "checkpoint").symlink_to(folder / "wide")
    (folder / "SmolLM2-135M-Instruct").symlink_to(folder / "tiny")
    for page in PAGES:
        for name, text in blocks(page, "yaml"):
            if name.startswith("parts/"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
    for name in ("wide", "bare"):
        write_model(folder / name, hidden_size=256, intermediate_size=256, tie_word_embeddings=True)
    for file in (folder / "bare").glob("tokenizer*"):  # llama.cpp has no name for tokens that are bytes
        file.unlink()
    deep = LlamaConfig(num_hidden_layers=28, hidden_size=1024, intermediate_size=2048, num_attention_heads=8)
    deep.architectures = ["LlamaForCausalLM"]
    deep.save_pretrained(folder / "deep")
    pictures = ViTConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=12)
    pictures.architectures = ["ViTModel"]
    pictures.save_pretrained(folder / "pictures")
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_planned(name, kitchen, capsys):
    model = next((model for model, names in MODELS.items() if name.startswith(names)), "tiny")
    text = RECIPES[name]
    if text.startswith("where:"):
        text = f"passes: [quantize: {{{text.strip()}}}]\n"
    if not re.search("^model:", text, re.MULTILINE):
        text = f"model: {model}\n{text}"
    (kitchen / f"{name}.yaml").write_text(text)
    chosen = ["--model", str(kitchen / model)] if model != "tiny" else []
    assert main(["plan", str(kitchen / f"{name}.yaml"), *chosen]) == 0
    assert "loads in" in capsys.readouterr().out


@cache
def finished(folder: Path) -> Path:
    """A folder in which the example of the README has been made for stock classes and ONNX Runtime."""
    recipe = write_recipe(folder, "[quantize: {bits: 4, group: 16}]", "emit: [safetensors, onnx]\n", name="both.yaml")
    assert main([str(recipe), "-o", str(folder / "made" / "out"), "-q"]) == 0
    return folder / "made"


@cache
def stacked(folder: Path) -> Path:
    """A folder in which ``out`` is a checkpoint of any size."""
    recipe = write_recipe(folder, "[any-size: {metric: plain}]", name="stacked.yaml")
    assert main([str(recipe), "-o", str(folder / "stacked" / "out"), "-q"]) == 0
    return folder / "stacked"


def spelled_out() -> Graph:
    """A gelu by its tanh, in single operations."""
    graph = Graph("gelu")
    x = graph.add_input("x", TensorType(torch.float32, ("B", 4)))
    cubic = graph.op("add", [x, graph.op("mul", [graph.op("pow", [x], {"scalar": 3.0})], {"scalar": 0.044715})])
    tanh = graph.op("tanh", [graph.op("mul", [cubic], {"scalar": math.sqrt(2 / math.pi)})])
    half = graph.op("mul", [x], {"scalar": 0.5})
    graph.outputs["y"] = graph.op("mul", [half, graph.op("add", [tanh], {"scalar": 1.0})])
    return graph


def given(name: str, kitchen: Path, directory: Path) -> dict[str, object]:
    """What the text around an example says is there."""
    match name:
        case "gguf.md-0" | "onnx.md-0":
            return {"graph": capture(kitchen / "bare"), "directory": directory}
        case "graph.md-1":
            known = {"var": var, "op": op, "attr": attr, "rule": rule, "Refused": Refused, "rewrite": rewrite}
            return {**known, "math": math, "graph": spelled_out()}
        case "write-a-pass.md-2":
            return {"graph": plan_of("llama")}
        case "kernels.md-0":
            words = torch.zeros(16, 8, dtype=torch.int32)
            return {"x": torch.ones(2, 64), "words": words, "scales": torch.ones(16, 1), "zeros": None, "bits": 4}
        case "weights.md-0":
            weight = {"model.layers.0.mlp.up_proj.weight": torch.ones(4100, 4096, dtype=torch.float16)}
            return {"checkpoint": MemorySource(weight), "torch": torch, "evaluate": evaluate}
    return {}


@pytest.mark.parametrize("name", [*PYTHON, "write-a-pass.md-2"])
def test_python_runs(name, kitchen, tmp_path, monkeypatch):
    text = PYTHON.get(name) or blocks(ROOT / "docs" / "write-a-pass.md", "python")[2][1]
    places = {"deploy": finished, "generated": finished, "any-size": stacked}
    monkeypatch.chdir(places.get(name.partition(".")[0], lambda folder: folder)(kitchen))
    if name == "README.md-0":
        few = "{data: text.txt, samples: 4, length: 32}"
        recipe = RECIPES["README.md-0"].replace("{data: text.txt}", few).replace("held-out.txt", few[7:-1])
        (kitchen / "recipe.yaml").write_text(recipe)
    names = given(name, kitchen, tmp_path)
    exec(compile(text, name, "exec"), names)
    if name == "graph.md-1":
        assert names["outcome"].applied == {"gelu_by_tanh": 1}


def command_lines() -> list[tuple[str, str]]:
    """Every `compress-model …` with arguments of every page, in fences, indented, or in a line."""
    found = [
        (page.name, line.strip())
        for page in PAGES
        for line in re.findall(r"(?:^|`)((?: {4}|\$ )?compress-model [^`\n]+)(?:$|`)", page.read_text(), re.MULTILINE)
        if not re.match(r"(compress-model is |compress-model [a-z]+$)", line)
    ]
    assert len(found) > 30
    return found


def test_command_lines_are_parsed():
    for page, line in command_lines():
        words = shlex.split(re.sub(r"[\[\]]|…", "", line), comments=True)[1:]
        try:
            cli._parse([WORDS.get(word, word) for word in words if word not in (">", "recipe.schema.json")])
        except SystemExit as done:
            assert {"--help", "--version"} & {*words} and done.code == 0, (page, line)
        except cli.CompressError as error:
            pytest.fail(f"{page}: {line}: {error}")


def test_files_that_are_named_exist():
    named = re.compile(r"(?<![\w/.])((?:benchmarks|tests|recipes|compiler|passes|backends)/[\w/.-]+\.(?:py|yaml))")
    for page in PAGES:
        for path in set(named.findall(page.read_text())) - {"passes/store_as.py", "tests/test_store_as.py"}:
            assert (ROOT / path).exists(), (page.name, path)


def test_options_of_benchmarks_exist():
    """Commands that measured what pages say can be given again."""
    for page in PAGES:
        for script, options in re.findall(r"`(?:python )?(benchmarks/\w+\.py)((?: [^`]*)?)`", page.read_text()):
            code = (ROOT / script).read_text() + SHARED_OPTIONS
            for option in re.findall(r"(--[a-z-]+)", options):
                assert f'"{option}"' in code, (page.name, script, option)
