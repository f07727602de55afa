"""Recipes that are right: what they mean, how they merge, and that what is written about them is a recipe again."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.errors import OrderError, RecipeError, Span
from compiler.ir.select import Selector
from compiler.pipeline import Pass
from compiler.recipe import Recipe
from compiler.recipe.schema import (
    UNITS,
    Evaluate,
    Safetensors,
    build,
    format_memory,
    parse_memory,
    spell,
)
from compiler.recipe.yamltree import Tree, read_tree
from compiler.report.lock import recipe_text, resolved
from passes import GqaToMla, Quantize

SHIPPED = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@dataclass(frozen=True)
class Shrink(Pass):
    """Has an option of every kind."""

    where: Selector = "linear"
    keep_share: float = 1.0
    budget: int | float | None = None
    skip: tuple[str, ...] = ()

    def run(self, graph, ctx):
        ctx.select(self.where)


def write(folder, text, name="recipe.yaml"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(folder, text):
    return Recipe.load(write(folder, text))


def options(text, folder):
    """``Shrink`` with the options that the YAML ``text`` says."""
    return build(Shrink, read_tree(write(folder, text)), "shrink")


def test_everything_a_recipe_can_say(tmp_path):
    write(tmp_path, "words", "text.txt")
    (tmp_path / "model").mkdir()
    recipe = load(
        tmp_path,
        """
model: model
calibration: {data: text.txt, samples: 8, length: 128, seed: 3}
passes:
  - gqa-to-mla
  - quantize: {bits: 4, group: 32, skip: [lm_head], where: {role: mlp, layers: "0-3"}}
  - quantize:
emit:
  - safetensors: {shard: 2GiB}
evaluate: {data: text.txt, metrics: [kl]}
run: {device: cpu, memory: 1.5GB}
""",
    )
    assert recipe.model == str(tmp_path / "model")
    where = {"role": "mlp", "layers": "0-3"}
    assert recipe.passes == (GqaToMla(), Quantize(where=where, skip=("lm_head",), bits=4, group=32), Quantize())
    assert (recipe.calibration.samples, recipe.calibration.length, recipe.calibration.seed) == (8, 128, 3)
    assert recipe.evaluate == Evaluate(tmp_path / "text.txt", metrics=("kl",))
    assert recipe.emit == (Safetensors(2 << 30),)
    assert (recipe.run.device, recipe.run.memory) == ("cpu", 1_500_000_000)


def test_the_least_a_recipe_can_say(tmp_path):
    recipe = load(tmp_path, "model: someone/some-model\n")
    assert recipe.model == "someone/some-model"
    assert recipe.passes == () and recipe.emit == (Safetensors(),)
    assert recipe.evaluate is None and recipe.calibration is None


def test_another_model_can_stand_in(tmp_path):
    path = write(tmp_path, "passes: [quantize]\n")
    with pytest.raises(RecipeError, match="names no `model`"):
        Recipe.load(path)
    recipe = Recipe.load(path, model="elsewhere")
    assert recipe.model == "elsewhere" and recipe.text["model"] == "elsewhere"


def test_data_may_lie_anywhere_that_the_user_says(tmp_path):
    text = write(tmp_path, "words", "texts/text.txt")
    for name in ("../texts/text.txt", str(text)):
        recipe = load(tmp_path / "recipes", f"model: a/b\nevaluate: {{data: {name}}}\n")
        assert recipe.evaluate.data.resolve() == text


@given(st.floats(0, 100, allow_nan=False).map(lambda x: round(x, 4)))
@settings(max_examples=50, deadline=None)
def test_a_percentage_is_a_fraction(tmp_path_factory, percent):
    folder = tmp_path_factory.getbasetemp()
    spelt = f"{percent:.4f}".rstrip("0").rstrip(".")
    assert options(f"keep-share: {spelt}%", folder) == Shrink(keep_share=float(spelt) / 100)
    assert options(f"budget: {spelt}%", folder) == Shrink(budget=float(spelt) / 100)


def test_a_percentage_is_no_count(tmp_path):
    with pytest.raises(RecipeError, match="`samples` must be a whole number, not the text `50%`"):
        load(tmp_path, "model: a/b\ncalibration: {data: recipe.yaml, samples: 50%}\n")


def test_whole_numbers_are_numbers(tmp_path):
    assert options("{keep-share: 1, budget: 3}", tmp_path) == Shrink(keep_share=1.0, budget=3)


@given(st.integers(0, 10**15))
def test_memory_is_spelt_exactly(count):
    assert parse_memory(format_memory(count)) == count


@given(st.integers(1, 999), st.sampled_from(sorted(UNITS)), st.booleans())
def test_memory_has_units(count, unit, space):
    assert parse_memory(f"{count}{' ' * space}{unit}B") == count * UNITS[unit]


@pytest.mark.parametrize("wrong", ["4", "GB", "4 gb", "-1GB", "4GB or so", "", 4, None, 1.5, True])
def test_memory_is_nothing_else(wrong):
    with pytest.raises(ValueError, match="size"):
        parse_memory(wrong)


def test_include_comes_first_and_is_overridden(tmp_path):
    write(tmp_path, "words", "base/text.txt")
    write(
        tmp_path,
        """
model: someone/base
passes: [gqa-to-mla]
emit: [safetensors: {shard: 1GB}]
evaluate: {data: text.txt, samples: 3, seed: 5}
""",
        "base/base.yaml",
    )
    recipe = load(
        tmp_path,
        """
include: base/base.yaml
model: someone/other
passes: [quantize]
evaluate: {samples: 7}
""",
    )
    assert recipe.model == "someone/other"
    assert recipe.passes == (GqaToMla(), Quantize())
    assert recipe.emit == (Safetensors(10**9),)
    assert (recipe.evaluate.samples, recipe.evaluate.seed) == (7, 5)
    assert recipe.evaluate.data == tmp_path / "base" / "text.txt"
    assert recipe.text["evaluate"]["data"] == "base/text.txt"


def test_included_passes_stand_where_the_recipe_says(tmp_path):
    write(tmp_path, "passes: [quantize: {bits: 4, where: mlp}]\n", "mlp.yaml")
    recipe = load(tmp_path, "model: a/b\ninclude: [mlp.yaml]\npasses: [gqa-to-mla, included, quantize]\n")
    assert recipe.passes == (GqaToMla(), Quantize(bits=4, where="mlp"), Quantize())


def test_several_and_nested_includes(tmp_path):
    write(tmp_path, "passes: [quantize: {bits: 2}]\n", "parts/two.yaml")
    write(tmp_path, "include: two.yaml\npasses: [quantize: {bits: 3}]\n", "parts/three.yaml")
    write(tmp_path, "passes: [quantize: {bits: 4}]\n", "parts/four.yaml")
    recipe = load(tmp_path, "model: a/b\ninclude: [parts/three.yaml, parts/four.yaml]\npasses: [quantize: {bits: 5}]\n")
    assert [step.bits for step in recipe.passes] == [2, 3, 4, 5]


def test_a_link_does_not_lead_out_of_the_directory(tmp_path):
    write(tmp_path, "passes: [quantize]\n", "elsewhere/other.yaml")
    write(tmp_path, "words", "recipes/text.txt")
    (tmp_path / "recipes" / "link.yaml").symlink_to(tmp_path / "elsewhere" / "other.yaml")
    with pytest.raises(RecipeError, match="leaves the recipe's directory"):
        load(tmp_path / "recipes", "model: a/b\ninclude: link.yaml\n")


def test_a_pass_that_needs_calibration_asks_for_it(tmp_path):
    load(tmp_path, "model: a/b\npasses:\n  - gqa-to-mla\n")
    with pytest.raises(RecipeError, match="`gqa-to-mla` needs calibration data") as caught:
        load(tmp_path, "model: a/b\npasses:\n  - gqa-to-mla: {cache: 50%}\n")
    assert (caught.value.span.line, caught.value.span.column) == (3, 5)


def test_order_errors_point_at_the_later_pass(tmp_path):
    with pytest.raises(OrderError) as caught:
        load(tmp_path, "model: a/b\npasses:\n  - quantize\n  - gqa-to-mla: {}\n")
    assert caught.value.span == Span(tmp_path / "recipe.yaml", 4, 5, 10, "  - gqa-to-mla: {}")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_short_and_explain_themselves(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 20
    assert lines[0].startswith("# ")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_resolved_recipe_is_a_recipe_that_means_the_same(tmp_path, bits):
    write(tmp_path, "words", "text.txt")
    write(tmp_path, f"passes: [quantize: {{bits: {bits}, where: {{role: mlp, expect: 9}}}}]\n", "parts/part.yaml")
    recipe = load(
        tmp_path,
        """
include: parts/part.yaml
model: someone/model
evaluate: {data: text.txt, samples: 3}
emit: [safetensors: {shard: 300MB}]
""",
    )
    again = load(tmp_path, recipe_text(resolved(recipe)))
    for name in ("model", "passes", "emit", "evaluate", "calibration"):
        assert getattr(again, name) == getattr(recipe, name)
    assert resolved(again) == resolved(recipe)


def test_spelling_of_sections():
    assert spell(Safetensors(5 * 10**9)) == {
        "shard": "5GB",
        "class": "auto",
        "binaries": (),
        "cache-bits": None,
        "sparse": "zeros",
        "quantised-as": "compressed-tensors",
    }


@pytest.mark.parametrize(
    "text, value",
    [
        ("1", 1),
        ("-3", -3),
        ("0x1f", 31),
        ("0o17", 15),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("1_000", "1_000"),
        ("80%", "80%"),
        ("2024-01-01", "2024-01-01"),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path, text, value):
    assert read_tree(write(tmp_path, f"key: {text}\n")).plain() == {"key": value}


def test_a_byte_order_mark_and_windows_lines_are_fine(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: a/b\r\npasses: [quantize]\r\n")
    assert Recipe.load(path).passes == (Quantize(),)


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_tree_or_one_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "replace"))
    _tree_or_error(path)


PARTS = [*" \n\t[]{}:,'\"|#%@-", "model: a", "passes", "quantize", "&a", "*a", "!x", "? ", "bits: 4", "..."]


@given(st.lists(st.sampled_from(PARTS), max_size=25))
@settings(max_examples=300, deadline=None)
def test_any_heap_of_yaml_is_a_tree_or_one_error(tmp_path_factory, parts):
    path = tmp_path_factory.getbasetemp() / "heap.yaml"
    path.write_text("".join(parts), encoding="utf-8")
    _tree_or_error(path)


@given(st.binary(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_tree_or_one_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    _tree_or_error(path)


def _tree_or_error(path):
    try:
        assert isinstance(read_tree(path), Tree)
    except RecipeError as error:
        assert error.remedy and re.search(rf"{path.name}:\d+:\d+", str(error))


def test_a_file_that_is_far_too_large_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b" " * (2 << 20))
    with pytest.raises(RecipeError, match="that is no recipe"):
        Recipe.load(path)


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is not a file"):
        Recipe.load(tmp_path)


def test_an_absolute_model_path_is_recorded_without_its_folders(tmp_path):
    (tmp_path / "tiny").mkdir()
    recipe = load(tmp_path, f"model: {tmp_path / 'tiny'}\npasses: []\n")
    assert resolved(recipe)["model"] == "tiny"
