"""What an output says about itself: report.json, report.html, the model card, the lock file, the console's tables."""

import copy
import io
import json
import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compiler.console import Console, human_bytes, human_count, table
from compiler.job import compress
from compiler.plan import open_recipe_model
from compiler.recipe import Recipe
from compiler.report.card import model_card
from compiler.report.grid import curve_picture, kept_picture
from compiler.report.lock import job_key, lock_text, make_lock, resolved
from compiler.report.page import page
from compiler.report.picture import layer_picture
from compiler.report.quality import spelt_estimate
from compiler.report.text import comparison, summary
from tests.small import write_folder, write_model, write_recipe
from tests.test_compare import wide_parts

PASSES = "[gqa-to-mla, quantize: {bits: 4, group: 16, where: [linear, norm], skip: [lm_head]}]"
EVALUATE = "evaluate: {data: text.txt, samples: 2, length: 16, metrics: [perplexity, kl]}\n"
VOID = {"meta", "line", "rect", "br"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("report"))
    compress(Recipe.load(write_recipe(folder, PASSES, EVALUATE)), folder / "out")
    return folder


@pytest.fixture(scope="module")
def document(folder):
    return json.loads((folder / "out" / "compress" / "report.json").read_text())


@pytest.fixture
def plain(document):
    """The report of a run without passes and evaluation, that could not be verified."""
    document = copy.deepcopy(document)
    document |= {"passes": [], "evaluation": None}
    document["verification"] = {"performed": False, "error": None, "tolerance": None, "skipped": "it is too large"}
    document["output"] |= {"quantization": None, "loads_in": ["transformers"], "other_files": ["config.json"]}
    return document


def read(folder, name):
    return (folder / "out" / name).read_text(encoding="utf-8")


def test_a_number_that_all_items_agree_on_has_no_interval():
    assert spelt_estimate({"value": 677.44, "low": 677.44, "high": 677.44}) == "677.4"
    assert spelt_estimate({"value": 0.5, "low": 0.25, "high": 0.75}) == "0.5 (0.25 to 0.75)"


def test_keys_are_stable(document):
    assert list(document) == [
        "schema",
        "recipe",
        "inputs",
        "versions",
        "output",
        "ledger",
        "passes",
        "layers",
        "matrices",
        "verification",
        "onnx",
        "gguf",
        "evaluation",
        "not_evaluated",
    ]
    assert list(document["passes"][0]) == [
        "name",
        "options",
        "exact",
        "before",
        "after",
        "selected",
        "rewritten",
        "skipped",
        "trials",
        "curves",
        "warnings",
    ]
    assert set(document["output"]) == {
        "architecture",
        "model_type",
        "target",
        "auto_class",
        "quantization",
        "loads_in",
        "tensor_bytes",
        "files",
        "other_files",
    }
    assert document["schema"] == 1


def test_report_says_what_happened(document):
    mla, quantize = document["passes"]
    assert mla["exact"] and not quantize["exact"]
    assert len(mla["rewritten"]) == 2 and all(rewrite["scope"] for rewrite in mla["rewritten"])
    assert quantize["skipped"] and all(skip["reason"] for skip in quantize["skipped"])
    assert document["verification"]["performed"]
    assert document["verification"]["error"] <= document["verification"]["tolerance"]
    assert sum(document["layers"]["after"].values()) == document["output"]["tensor_bytes"]
    assert document["evaluation"]["metrics"]["kl"]["value"] >= 0


def test_report_holds_no_time(document):
    assert not re.search(r'"(seconds|peak_rss|time|date)"', json.dumps(document))


def test_model_card_reads_well(folder):
    card = read(folder, "README.md")
    headings = re.findall(r"^#+ .*$", card, re.MULTILINE)
    assert headings == [
        "# tiny, compressed",
        "## What was done",
        "## Loading it",
        "## Before and after",
        "## What to keep in mind",
        "## What was left alone, and why",
        "## Making it again",
    ]
    assert "DeepseekV3ForCausalLM.from_pretrained" in card
    assert "| perplexity | " in card
    assert "computes the same as before" in card and "changes what the model computes" in card
    assert "`quantize` with `where: [linear, norm], skip: [lm_head], bits: 4, group: 16` rewrote" in card


def test_model_card_has_the_recipe_that_made_it(folder):
    (text,) = re.findall(r"```yaml\n(.*?)```", read(folder, "README.md"), re.DOTALL)
    (folder / "again.yaml").write_text(text)
    again, first = Recipe.load(folder / "again.yaml"), Recipe.load(folder / "recipe.yaml")
    assert (again.passes, again.emit, again.model, again.evaluate) == (
        first.passes,
        first.emit,
        first.model,
        first.evaluate,
    )


def test_model_card_of_little(plain):
    card = model_card(plain)
    assert "Nothing but the file format." in card
    assert "Not verified by reloading: it is too large." in card
    assert "was not measured" in card
    assert "compressed-tensors" not in card.split("## Making it again")[0]
    assert "AutoTokenizer" not in card


class Tags(HTMLParser):
    """Collects tags and checks that they are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_no_network(folder):
    text = read(folder, "compress/report.html")
    tags = Tags()
    tags.feed(text)
    assert not tags.open and not tags.links
    assert "script" not in tags.seen
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert {"svg", "table", "details"} <= set(tags.seen)
    assert "color-scheme: light dark" in text


def test_nothing_is_wider_than_a_telephone(folder):
    assert wide_parts(read(folder, "compress/report.html")) == []


def test_page_shows_what_was_skipped(folder, document):
    text = read(folder, "compress/report.html")
    for entry in document["passes"]:
        for skip in entry["skipped"]:
            assert skip["scope"] in text


def test_page_escapes_what_it_shows(document):
    document = copy.deepcopy(document)
    document["recipe"]["model"] = "<b>&amp;"
    document["passes"][0]["rewritten"][0]["what"] = "</pre><script>"
    text = page(document)
    assert "<b>" not in text and "<script>" not in text
    assert "&lt;b&gt;&amp;amp;" in text


def test_page_of_little(plain):
    assert "Nothing: every place that a step selected was rewritten." in page(plain)


def test_picture_has_two_bars_a_layer():
    before = {"": 100, **{f"model.layers.{i}": 50 for i in range(9)}}
    after = {"": 100, **{f"model.layers.{i}": 20 for i in range(8)}, "new": 5}
    picture = xml.etree.ElementTree.fromstring(layer_picture(before, after))
    bars = [(e.get("class"), float(e.get("height"))) for e in picture.iter("rect")]
    assert len(bars) == 2 * 11
    assert [height for kind, height in bars if kind == "after"][:2] == [180.0, 36.0]
    assert picture.find(".//title").text == "outside of layers: 100 B before, 100 B after"


def test_picture_of_nothing():
    assert layer_picture({}, {}).startswith("<svg ")


def test_pictures_of_places_have_a_row_a_kind_and_a_column_a_layer():
    scopes = [f"{stack}.layers.{i}.mlp.up" for stack in ("encoder", "decoder") for i in range(3)]
    numbers = {"parameters_before": 8, "parameters_after": 2}
    kept = xml.etree.ElementTree.fromstring(
        kept_picture([{"scope": scope, "what": "<a>", "numbers": numbers} for scope in [*scopes, "head"]])
    )
    assert [text.text for text in kept.iter("text")] == [
        "encoder.layers.*.mlp.up",
        "decoder.layers.*.mlp.up",
        "head",
        *"012",
    ]
    heights = [float(bar.get("height")) for bar in kept.iter("rect")]
    assert heights == 7 * [24.0, 6.0]
    assert kept.find(".//title").text == "encoder.layers.0.mlp.up: <a>, 25% of its parameters"
    curve = {"scope": "layers.4.up", "kept": [0.0, 0.5, 1.0], "lost": [2.0, 0.5, 0.0], "chosen": 0.5}
    drawn = xml.etree.ElementTree.fromstring(curve_picture([curve]))
    points = [
        [float(number) for number in point.split(",")] for point in drawn.find(".//polyline").get("points").split()
    ]
    dot = drawn.find(".//circle")
    assert [float(dot.get("cx")), float(dot.get("cy"))] == points[1]
    assert [y for _, y in points] == [0.0, 18.0, 24.0]
    assert kept_picture([{"scope": "a", "what": "", "numbers": {}}]) == curve_picture([]) == ""


def test_lock_names_no_place_outside_the_recipe(folder):
    text = read(folder, "compress/recipe.lock.yaml")
    assert str(folder) not in text
    assert "model: tiny\n" in text and "data: text.txt\n" in text


def test_lock_has_every_hash(folder, document):
    inputs = document["inputs"]
    import hashlib

    assert inputs["model"]["files"] == {
        "model.safetensors": hashlib.sha256((folder / "tiny" / "model.safetensors").read_bytes()).hexdigest()
    }
    assert inputs["evaluate"]["sha256"] == hashlib.sha256((folder / "text.txt").read_bytes()).hexdigest()
    assert set(document["versions"]) >= {"compress-model", "python", "torch", "transformers"}


def lock_of(recipe):
    return make_lock(recipe, open_recipe_model(recipe))


def test_job_depends_on_what_determines_the_output(tmp_path):
    write_folder(tmp_path)
    keys = {job_key(lock_of(Recipe.load(write_recipe(tmp_path, "[quantize]", EVALUATE))), "")}
    assert keys == {job_key(lock_of(Recipe.load(write_recipe(tmp_path, "[quantize: {bits: 8}]", EVALUATE))), "")}
    keys.add(job_key(lock_of(Recipe.load(write_recipe(tmp_path, "[quantize: {bits: 4}]", EVALUATE))), ""))
    keys.add(
        job_key(
            lock_of(Recipe.load(write_recipe(tmp_path, "[quantize]", EVALUATE + "emit: [safetensors: {shard: 1MB}]"))),
            "",
        )
    )
    (tmp_path / "text.txt").write_text("other words")
    keys.add(job_key(lock_of(Recipe.load(write_recipe(tmp_path, "[quantize]", EVALUATE))), ""))
    write_model(tmp_path / "tiny", seed=1)
    keys.add(job_key(lock_of(Recipe.load(write_recipe(tmp_path, "[quantize]", EVALUATE))), ""))
    assert len(keys) == 5


def test_lock_has_what_compiles_binaries(tmp_path):
    write_folder(tmp_path)
    plain, compiled = "emit: [safetensors]\n", "emit: [safetensors: {binaries: [sm_80]}]\n"
    locks = [lock_of(Recipe.load(write_recipe(tmp_path, "[quantize]", emit))) for emit in (plain, compiled)]
    assert locks[1]["versions"].keys() - locks[0]["versions"].keys() == {"triton"}


def test_lock_text_is_yaml(folder, document):
    from ruamel.yaml import YAML

    lock = YAML(typ="safe", pure=True).load(read(folder, "compress/recipe.lock.yaml"))
    assert lock == {name: document[name] for name in ("recipe", "inputs", "versions")}
    assert lock_text(lock) == read(folder, "compress/recipe.lock.yaml")


def test_summary_and_comparison(document):
    text = summary(document, Path("out"))
    assert "out: DeepseekV3ForCausalLM" in text
    assert [row[0] for row in comparison(document)] == [
        "parameters",
        "bytes of weights",
        "bytes of their files",
        "FLOPs a token",
        "cache bytes a token",
        "cached values a token, live",
        "cached bytes a token, live, in float32",
        "perplexity",
        "KL to the original (nats a token)",
    ]


def test_table_is_aligned():
    lines = table([("name", "size"), ("a", "1"), ("longer", "1000")]).splitlines()
    assert lines == ["name    size", "------  ----", "a          1", "longer  1000"]


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_500_000, "1.50 MB"),
        (811_700_000_000, "811.7 GB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def test_human_counts():
    assert [human_count(n) for n in (7, 1234, 405_900_000_000)] == ["7", "1.23 k", "405.9 G"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal():
    terminal = Terminal()
    with Console(err=terminal).progress("write") as advance:
        advance(1, 4)
        advance(4, 4)
    assert "write" in terminal.getvalue() and "100%" in terminal.getvalue()


def test_progress_is_lines_elsewhere():
    stream = io.StringIO()
    with Console(err=stream).progress("write") as advance:
        for done in range(101):
            advance(done, 100)
    assert stream.getvalue() == "write: 100%\n"


def test_quiet_says_nothing_but_results():
    out, err = io.StringIO(), io.StringIO()
    console = Console(quiet=True, out=out, err=err)
    with console.progress("write") as advance:
        advance(1, 1)
    console.say("working")
    console.result("done")
    assert (out.getvalue(), err.getvalue()) == ("done\n", "")


def test_letters_that_a_terminal_lacks_are_no_error():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(out=stream).result("caf\u00e9")
    assert stream.buffer.getvalue() == b"caf?\n"


def test_the_lock_says_how_large_pictures_are(folder):
    recipe = Recipe.load(write_recipe(folder, "[]", "inputs: {image: 32}\n", name="pictures.yaml"))
    assert resolved(recipe)["inputs"] == {"image": 32}
