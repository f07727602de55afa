"""Outputs beside each other, the page of it, and the numbers of lm-eval."""

import json
import re
import sys
import types
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from compiler import cli
from compiler.compare import compare, comparison_text, read_output
from compiler.errors import CheckpointError, DataError, UsageError
from compiler.evaluate.estimates import estimate, ratio
from compiler.evaluate.harness import harness
from compiler.report.pareto import BROAD, LEFT, LETTER, LINE, NARROW, pareto_page, pareto_picture
from tests.small import write_model


def write_output(folder, name, size, losses, data="same", **changes):
    rows = np.stack([losses, np.ones(len(losses))], 1)
    found = estimate(rows, ratio(np.exp), seed=0)
    evaluation = {
        "inputs": {"data": data, "seed": 0},
        "metrics": {"perplexity": {"value": found.value, "low": found.low, "high": found.high}},
        "rows": {"perplexity": rows.tolist()},
    }
    document = {
        "output": {"tensor_bytes": size},
        "ledger": {"after": {"cache_bytes_per_token": 8, "flops_per_token": 2 * size}},
        "evaluation": evaluation | changes,
    }
    (folder / name / "compress").mkdir(parents=True)
    (folder / name / "compress" / "report.json").write_text(json.dumps(document))
    return folder / name


@pytest.fixture
def outputs(tmp_path):
    losses = np.random.default_rng(0).normal(3, 0.5, 20)
    noisy = losses + np.random.default_rng(1).normal(0, 0.01, 20)
    return [
        write_output(tmp_path, "large", 4_000_000, losses),
        write_output(tmp_path, "middle", 3_000_000, noisy),
        write_output(tmp_path, "wasteful", 3_500_000, losses + 0.4),
        write_output(tmp_path, "small", 1_000_000, losses + 0.2),
    ]


def test_what_is_noise_and_what_is_best_for_its_size(outputs):
    found = compare([read_output(path) for path in outputs])
    assert found.pairs["large", "middle"].noise == "within"
    assert found.pairs["large", "small"].noise == "beyond"
    assert "wasteful" not in found.best() and "small" in found.best()
    text = comparison_text(found)
    assert "perplexity, middle less large" in text and "within noise" in text
    assert json.loads(json.dumps(found.to_dict()))["best"] == found.best()


def test_the_picture_has_a_point_and_an_interval_for_each(outputs):
    found = compare([read_output(path) for path in outputs], cost="flops")
    picture = xml.etree.ElementTree.fromstring(pareto_picture(found, BROAD))
    points = {circle.get("class") for circle in picture.iter("circle")}
    assert len(list(picture.iter("circle"))) == 4 and points == {"before", "after"}
    whiskers = [line for line in picture.iter("line") if line.get("class") == "whisker"]
    assert all(float(line.get("y2")) < float(line.get("y1")) for line in whiskers) and len(whiskers) == 4
    page = pareto_page(found)
    assert page.startswith("<!doctype html>") and "http" not in page and "middle less large" in page


@pytest.mark.parametrize("width", [NARROW, BROAD])
def test_names_lie_within_the_picture_and_on_no_other_name(width, tmp_path):
    losses = np.random.default_rng(0).normal(3, 0.5, 20)
    places = {"one": (10, 0.0), "another": (10, 0.0), "a-third": (10, 0.001), "n" * 200: (1, 0.3), "far": (90, 0.1)}
    paths = [write_output(tmp_path, name, size, losses + more) for name, (size, more) in places.items()]
    picture = xml.etree.ElementTree.fromstring(pareto_picture(compare([read_output(path) for path in paths]), width))
    assert int(picture.get("width")) == width
    texts = [text for text in picture.iter("text") if text.get("class") == "name"]
    boxes = [(float(text.get("x")), float(text.get("y")), LETTER * len(text.text)) for text in texts]
    assert len(boxes) == 5
    assert all(left >= LEFT and left + length <= width + 1 for left, _, length in boxes)
    for index, (left, line, length) in enumerate(boxes):
        for start, other, wide in boxes[:index]:
            assert abs(line - other) >= LINE - 0.1 or left >= start + wide - 0.1 or start >= left + length - 0.1


def test_nothing_is_wider_than_a_telephone(outputs):
    """The narrow picture fits beside the margins of a screen of 360 pixels."""
    page = pareto_page(compare([read_output(path) for path in outputs]))
    assert wide_parts(page) == []
    assert NARROW + 2 * 0.9 * 16 <= 360
    assert set(re.findall(r'data-name="([^"]*)"', page)) >= {"bytes of weights", "perplexity"}


def test_no_line_ends_within_a_number(tmp_path):
    metrics = {"perplexity": {"value": 3.5e-07, "low": 3.2e-07, "high": 4e-07}}
    paths = [write_output(tmp_path, name, 1000, np.ones(4), metrics=metrics) for name in ("one-e-2", "<two>")]
    page = pareto_page(compare([read_output(path) for path in paths]))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page, re.DOTALL)
    kept = re.findall(r'<span class="unbroken">([^<]*)</span>', cells[-1])
    assert kept == ["3.5e-07", "3.2e-07", "4e-07"]
    assert "one-e-2" in cells and "&lt;two&gt;" in cells


def test_numbers_beyond_floats_are_damage(tmp_path):
    path = write_output(tmp_path, "one", 10**400, np.ones(4))
    with pytest.raises(CheckpointError, match="no report that can be read"):
        read_output(path)


def wide_parts(page: str) -> list[str]:
    """What of a page may be wider than a screen and lies outside of the boxes that scroll by themselves."""
    body, boxes = re.subn(r'<div class="wide[^"]*">.*?</div>', "", page[page.index("<body>") :], flags=re.DOTALL)
    assert boxes
    return re.findall(r"<table|<svg|<img|nowrap|width[:=][^;>]*px", body)


def test_names_are_escaped_in_the_page(tmp_path):
    paths = [write_output(tmp_path, name, 10, np.ones(6)) for name in ("<b>", "c")]
    assert "<b>" not in pareto_page(compare([read_output(path) for path in paths]))


def test_what_cannot_be_compared_is_one_clear_error(tmp_path, outputs):
    with pytest.raises(CheckpointError, match="is no output of compress-model"):
        read_output(tmp_path)
    first = read_output(outputs[0])
    with pytest.raises(UsageError, match="the same name"):
        compare([first, first])
    other = read_output(write_output(tmp_path, "other", 1, np.ones(6), data="another"))
    with pytest.raises(DataError, match="different data"):
        compare([first, other])
    nothing = read_output(write_output(tmp_path, "nothing", 1, np.ones(6), metrics={}))
    with pytest.raises(DataError, match="no metric was measured of all outputs"):
        compare([first, nothing])
    with pytest.raises(DataError, match="not all outputs have `kl`"):
        compare([first, read_output(outputs[1])], quality="kl")


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "different dtypes"),
        ({"against": "small"}, {"against": "large"}, "different originals"),
    ],
)
def test_what_was_not_measured_alike_is_not_compared(tmp_path, ours, theirs, said):
    one, other = (
        read_output(write_output(tmp_path, name, 1, np.ones(6), **changes))
        for name, changes in (("one", ours), ("other", theirs))
    )
    with pytest.raises(DataError, match=said):
        compare([one, other])


def test_the_original_matters_where_the_original_alone_gives_no_number(tmp_path):
    """Perplexity, which the original has too, is compared whatever the original was."""
    paths = [write_output(tmp_path, name, 1, np.ones(6), reference={"perplexity": {}}) for name in "ab"]
    for path in paths:
        document = json.loads((path / "compress" / "report.json").read_text())
        document["inputs"] = {"model": {"files": {"model.safetensors": path.name}}}
        (path / "compress" / "report.json").write_text(json.dumps(document))
    one, other = map(read_output, paths)
    assert one.evaluation["against"] != other.evaluation["against"]
    assert compare([one, other]).quality == "perplexity"


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (["--against", "x"], {"against": "x"}),
        (["--metrics", "kl,agreement"], {"metrics": ["kl", "agreement"]}),
        (["--samples", "3"], {"samples": 3}),
        (["--length", "9"], {"length": 9}),
        (["--seed", "0"], {"seed": 0}),
        (["--data", "x", "--image", "8"], {"data": Path("x"), "image": 8}),
        ([], None),
    ],
)
def test_any_option_of_what_to_measure_measures(outputs, monkeypatch, capsys, options, given):
    asked = []

    def measured(path, **options):
        asked.append(
            {name: value for name, value in options.items() if name not in ("trust_remote_code", "on_progress")}
        )
        return types.SimpleNamespace(to_dict=lambda: read_output(Path(path)).evaluation)

    monkeypatch.setattr("compiler.evaluate.evaluate_model", measured)
    assert cli.main(["compare", *map(str, outputs), *options]) == 0
    assert asked == ([] if given is None else [given] * len(outputs))
    capsys.readouterr()


def test_the_command_writes_a_page_and_overwrites_none(outputs, tmp_path, capsys):
    arguments = ["compare", *map(str, outputs), "--html", str(tmp_path / "page.html")]
    assert cli.main(arguments) == 0
    assert "best for their bytes of weights" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().count("<circle") == 2 * 4
    assert cli.main(arguments) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert cli.main(["compare", str(outputs[0])]) == 1
    assert "two or more" in capsys.readouterr().err


def test_numbers_of_lm_eval_come_with_intervals(tmp_path, monkeypatch):
    path = write_model(tmp_path)
    with pytest.raises(DataError, match="lm-eval is not there"):
        harness(str(path), ["arc"])
    results = {"results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.25}}}
    evaluator = types.SimpleNamespace(simple_evaluate=lambda **given: results)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", evaluator)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", types.SimpleNamespace(HFLM=lambda **given: given))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", types.SimpleNamespace(TaskManager=lambda **given: given))
    found = harness(str(path), ["arc"])
    assert found["lm-eval arc: acc"] == pytest.approx({"value": 0.5, "low": 0.304, "high": 0.696})
    assert found["lm-eval arc: f1"] == {"value": 0.25, "low": 0.25, "high": 0.25}
