"""A small part of the fault campaign, always the same: `make torture` runs all of it with other chances."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler import cli
from compiler.errors import CheckpointError, PassError
from compiler.latency.table import Table
from compiler.weights.tensorfile import read_header
from tests.test_checkpoint import entry, write_raw
from tests.torture import inputs
from tests.torture.kills import killed, undisturbed
from tests.torture.outcomes import GOOD, Outcome, Tally, judged
from tests.torture.places import OBSTACLES, Case
from tests.torture.subjects import write_subjects

SEED, EACH = 0, 12
QUICK = (
    *("safetensors header", "safetensors file", "index", "shard", "GPTQ file", "recipe", "GGUF", "tokenizer.json"),
    *("latencies", "report, compared", "report, finished", "lock file", "idx pictures", "idx labels", "picture .png"),
    "questions",
)


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    return {victim.name: victim for victim in inputs.make_victims(tmp_path_factory.mktemp("torture"))}


@pytest.mark.parametrize("name", QUICK)
def test_damaged_inputs_are_refused_or_read_as_others_read_them(victims, name):
    victim, tally = victims[name], Tally()
    sound = victim.file.read_bytes()
    for case in range(EACH):
        outcome = inputs.mutated(victim, sound, random.Random(f"{SEED} {name} {case}"))
        tally.add(name, f"mutation {case} of seed {SEED}", outcome)
    assert tally.defects == []
    assert tally.counts[name].total() == EACH and tally.counts[name]["refused"] > 0
    assert victim.file.read_bytes() == sound and judged(victim.attempt) == Outcome("right")


def test_runs_that_are_killed_starved_or_led_astray_end_in_the_same_bytes(tmp_path):
    recipe, tally = write_subjects(tmp_path)["quantize"], Tally()
    expected, duration = undisturbed(recipe, tmp_path / "whole")
    tally.add("kills", "", killed(recipe, tmp_path / "killed", expected, duration, random.Random(SEED)))
    for name in ("file sizes", "links", "work"):
        case = Case(recipe, tmp_path / name.replace(" ", "-"), expected, random.Random(f"{SEED} {name}"))
        tally.add(name, "", OBSTACLES[name](case))
    assert tally.defects == []
    assert sum(found.total() for found in tally.counts.values()) == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(JSON, st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]))
def test_any_header_is_read_or_refused(tmp_path_factory, value, place):
    header = {"a": {**entry(), place: value}} if place in entry() else {"a": entry(), place: value}
    file = write_raw(tmp_path_factory.mktemp("header") / "model.safetensors", header, bytes(8))
    outcome = judged(lambda: "" if set(read_header(file)) == {"a"} else "other tensors")
    assert outcome.kind in GOOD, outcome.detail


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_table_of_latencies_is_read_or_refused(tmp_path_factory, value):
    file = tmp_path_factory.mktemp("table") / "table.json"
    file.write_text(json.dumps(value if isinstance(value, list) else {"microseconds": value}), encoding="utf-8")
    outcome = judged(lambda: "" if all(seconds >= 0 for seconds in Table.read(file).seconds.values()) else "negative")
    assert outcome.kind in GOOD, outcome.detail


def test_running_out_of_memory_is_one_error(monkeypatch, capsys):
    def fail(options, console):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setitem(cli.COMMANDS, "passes", (cli._passes_options, fail))
    assert cli.main(["passes"]) == 2
    assert capsys.readouterr().err.startswith("error[memory]: there is not enough memory\nhelp: free some")


def test_outcomes_are_told_apart():
    """A campaign that takes everything for good would prove nothing."""

    def vague():
        raise CheckpointError("something")

    def clear():
        raise PassError("something", remedy="do this")

    assert judged(lambda: "") == Outcome("right")
    assert judged(lambda: "w differs") == Outcome("wrong", "w differs")
    assert judged(vague).kind == "vague" and judged(clear).kind == "refused"
    assert judged(lambda: str(1 // 0)).kind == "traceback"
