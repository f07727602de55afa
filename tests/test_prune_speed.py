"""Pruning for a requested speed: within the budget by the table, never cheaper for more, exact for nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compiler.errors import PassError, RecipeError
from compiler.frontend import capture
from compiler.ir.facts import parameter_count
from compiler.ir.graph import Graph
from compiler.job import compress
from compiler.latency import Latency, Table, Task, Workload
from compiler.latency.measure import in_turns, measuring, sample
from compiler.latency.onnx import Builder, lowered
from compiler.pipeline import Pipeline
from compiler.recipe import Recipe
from compiler.report.lock import resolved
from passes.prune import Prune
from passes.prune.choose import by_layer, choose, uniform
from passes.prune.places import Place
from passes.prune.ranking import Ranking
from passes.prune.speed import Seconds
from tests.captures import graph_of, plan_of
from tests.small import write_folder, write_recipe
from tests.test_prune import batches
from tests.test_removal import Convolutional

TOKENS = 8


def made_up(tasks: list[Task]) -> list[float]:
    """Seconds of a device that takes a little to start, then goes by multiplications and the numbers that it moves."""
    return [1e-6 + 1e-9 * task.products + 1e-10 * moved(task) for task in tasks]


def moved(task: Task) -> int:
    return sum(type.numel for type in task.operands if type is not None)


@pytest.fixture
def device(monkeypatch):
    """Measuring gives the times of the made-up device."""
    monkeypatch.setattr("compiler.latency.measure.measuring", lambda workload: made_up)


def prune(graph: Graph, name: str = "llama", planned: bool = False, **options):
    step = Prune(**{"align": 8, "refit": False, "tokens": TOKENS, **options})
    report = Pipeline([step]).run(graph, calibration=lambda _: batches(name, 3), planned=planned)
    return report.passes[0]


def seconds(graph: Graph, table: Table) -> float:
    return Latency(graph, table, 1, TOKENS).seconds({})


@pytest.mark.parametrize(
    ("name", "faster", "options"),
    [
        ("llama", 1.25, {"what": ("channels", "groups")}),
        ("gpt2", 1.3, {"what": ("channels", "heads"), "sizes": "by-layer"}),
        ("mixtral", 1.001, {"what": "experts"}),
        ("whisper", 1.05, {"what": "channels"}),
        ("gemma2", 1.4, {"what": ("channels", "layers")}),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_the_pruned_graph_takes_what_was_predicted_and_no_more_than_was_asked(name, faster, options, device):
    graph = graph_of(name)
    table = Table({}, measure=made_up)
    whole, parameters = seconds(graph, table), parameter_count(graph)
    entry = prune(graph, name, faster=faster, **options)
    found = seconds(graph, table)
    said = next(done for done in entry.rewritten if "milliseconds_after" in done.numbers)
    assert found <= whole / faster * (1 + 1e-6)
    assert said.numbers["milliseconds_before"] == pytest.approx(1e3 * whole)
    assert said.numbers["milliseconds_after"] == pytest.approx(1e3 * found)
    assert parameter_count(graph) < parameters


def test_convolutions_that_lose_both_ways_are_still_within_the_budget(device):
    torch.manual_seed(0)
    given = [{"image": torch.randn(1, 3, 12, 12)} for _ in range(3)]
    graph = capture(Convolutional().eval(), inputs=given[0])
    table = Table({}, measure=made_up)
    whole = seconds(graph, table)
    step = Prune(where=("conv", "linear"), faster=1.3, align=2, tokens=TOKENS, refit=False)
    Pipeline([step]).run(graph, calibration=lambda _: given)
    assert seconds(graph, table) <= whole / 1.3 * (1 + 1e-6)


@pytest.mark.parametrize("share", [uniform, by_layer])
def test_more_speed_never_predicts_less_loss(share):
    graph = plan_of("llama", layers=3)
    places = found_places(graph)
    generator = torch.Generator().manual_seed(3)
    rankings = {place: random_ranking(place, generator) for place in places}
    latency = Latency(graph, Table({}, measure=noisy(generator)), 1, TOKENS)
    losses = []
    for faster in (1.0, 1.05, 1.1, 1.2, 1.3):
        budget = Seconds(latency, faster)
        choice = choose(rankings, {}, 8, budget, share)
        assert budget.total(choice.counts, ()) <= budget.most * (1 + 1e-6)
        losses.append(sum(float(rankings[place].losses[count]) for place, count in choice.counts.items()))
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]


def found_places(graph: Graph) -> list[Place]:
    from compiler.ir.coupling import coupling_groups
    from compiler.ir.roles import roles
    from passes.prune.places import _candidates

    return [p for p in _candidates(graph, coupling_groups(graph), roles(graph), ["channels"]) if not p.group.frozen]


def random_ranking(place: Place, generator: torch.Generator) -> Ranking:
    steps = torch.rand(place.size, generator=generator, dtype=torch.float64)
    return Ranking(tuple(range(place.size)), torch.cat([steps, torch.zeros(1)]).flip(0).cumsum(0).flip(0))


def noisy(generator: torch.Generator):
    """The made-up device, measured badly: sizes that take longer than larger ones are among them."""
    return lambda tasks: [t * (0.8 + 0.4 * float(torch.rand(1, generator=generator))) for t in made_up(tasks)]


def test_the_table_that_a_run_leaves_makes_the_same_choice_again(tmp_path, device, monkeypatch):
    first = graph_of("llama")
    entry = prune(first, faster=1.25)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(entry.records["latency"]))
    monkeypatch.undo()
    second = graph_of("llama")
    prune(second, faster=1.25, latency=path)
    assert [str(p.type) for p in first.params.values()] == [str(p.type) for p in second.params.values()]
    held = {**entry.records["latency"]["microseconds"]}
    name = next(name for name in held if name.startswith("linear("))
    del held[name]
    path.write_text(json.dumps({"microseconds": held}))
    with pytest.raises(PassError, match="lacks") as raised:
        prune(graph_of("llama"), faster=1.25, latency=path)
    assert name in raised.value.cause and raised.value.option == "latency"


@pytest.mark.parametrize("text", ["no json", "{}", '{"microseconds": [1]}', '{"microseconds": {"a": "b"}}'])
def test_a_file_that_is_no_table_is_an_error(text, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(PassError, match="no table of latencies"):
        Table.read(path)
    with pytest.raises(PassError, match="cannot read"):
        Table.read(tmp_path / "none.json")


@pytest.mark.parametrize("microseconds", ["NaN", "Infinity", "-1.0"])
def test_a_table_of_impossible_times_is_an_error(microseconds, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(f'{{"microseconds": {{"add(f32[1], f32[1])": {microseconds}}}}}')
    with pytest.raises(PassError, match=r"add\(f32\[1\], f32\[1\]\) takes .* microseconds"):
        Table.read(path)


def test_what_a_table_was_measured_with_counts_and_no_option_may_say_otherwise(tmp_path, device):
    entry = prune(graph_of("llama"), faster=1.25)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(entry.records["latency"]))
    again = prune(graph_of("llama"), faster=1.25, latency=path, tokens=128)
    assert again.after.parameters == entry.after.parameters
    assert any("`tokens` is 8, as the table" in skip.reason for skip in again.skipped)
    for name, other in (("tokens", 16), ("batch", 2), ("threads", 3), ("runtime", "torch")):
        with pytest.raises(PassError, match=f"is of `{name}: .*`, not of `{name}: {other}`") as raised:
            prune(graph_of("llama"), faster=1.25, latency=path, **{name: other})
        assert raised.value.option == name


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"latency": Path("table.json")}, "latency"),
        ({"runtime": "torch"}, "runtime"),
        ({"batch": 2}, "batch"),
        ({"tokens": 1}, "tokens"),
        ({"threads": 2}, "threads"),
        ({"faster": 1.5, "of": "model"}, "of"),
        ({"what": ()}, "what"),
        ({"what": "experts", "score": "taylor"}, "score"),
        ({"what": "experts", "score": "activation"}, "score"),
        ({"what": ("channels", "experts"), "score": "fluctuation"}, "score"),
    ],
)
def test_an_option_without_effect_is_refused(options, option):
    with pytest.raises(PassError) as raised:
        Prune(**options)
    assert raised.value.option == option


def test_a_plan_refuses_slopes_of_what_experts_hold_inside():
    with pytest.raises(PassError, match="no slope of its own"):
        Pipeline([Prune(keep=0.8, align=8, score="taylor")]).run(plan_of("mixtral"), planned=True)


def test_a_plan_leaves_to_seconds_what_multiplications_cannot_tell():
    entry = prune(plan_of("mixtral"), "mixtral", planned=True, faster=1.05, what="experts")
    assert any("multiplications do not tell" in skip.reason for skip in entry.skipped)
    assert entry.after.parameters == entry.before.parameters


def test_multiplications_of_experts_and_attention_are_counted():
    found = {task.op.name: task for task in tasks_of(plan_of("mixtral")).values()}
    (tokens, active), (_, two_inner, width) = (found["experts"].operands[i].static_shape for i in (1, 3))
    assert found["experts"].products == tokens * active * width * (two_inner + two_inner // 2)
    (_, heads, length, depth) = found["attention"].operands[0].static_shape
    assert found["attention"].products == heads * length * length * 2 * depth


def test_the_mel_axis_is_not_one_of_tokens():
    names = tasks_of(plan_of("whisper"))
    convolutions = [task for task in names.values() if task.op.name == "conv"]
    assert convolutions
    for task in convolutions:
        x, weight = task.operands[:2]
        assert x.static_shape[1] == weight.static_shape[1] * task.op.all_attrs(task.attrs)["groups"]


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_what_a_runtime_cannot_run_is_named(runtime):
    task = next(task for task in tasks_of(plan_of("opt")).values() if task.op.name == "add")
    odd = replace(task, operands=(task.operands[0].with_shape((3, 5)), task.operands[1].with_shape((3, 7))))
    with pytest.raises(PassError, match=r"cannot run add\(f32\[3,5\], .*f32\[3,7\]\)"):
        measuring(Workload(runtime))([odd])


def test_a_plan_measures_nothing():
    entry = prune(plan_of("llama"), planned=True, faster=1.25)
    assert any("this plan goes by the number of multiplications" in skip.reason for skip in entry.skipped)
    assert entry.after.parameters < entry.before.parameters and not entry.records


def test_as_fast_as_it_is_changes_nothing_and_two_wishes_are_refused():
    assert Prune(faster=1.0).exact and not Prune(faster=1.5).exact
    with pytest.raises(PassError, match="both say how much goes"):
        Prune(keep=0.5, faster=1.5)


def test_more_speed_than_there_is_to_have_is_an_error(device):
    with pytest.raises(PassError, match="less than what must remain") as raised:
        prune(graph_of("llama"), faster=50.0)
    assert raised.value.option == "faster"


def test_without_onnx_runtime_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PassError, match="needs the package onnxruntime"):
        measuring(Workload())


def test_runners_take_turns():
    ran: list[int] = []
    found = in_turns([lambda: ran.append(0), lambda: ran.append(1)])
    assert len(found) == 2 and ran.count(0) == ran.count(1)
    assert all({*pair} == {0, 1} for pair in zip(ran[::2], ran[1::2], strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen3", "gemma2", "opt", "convolutional"])
def test_what_is_timed_computes_what_the_operation_computes(name):
    """The ONNX form of every operation of a family, on the samples that it is timed on."""
    import onnxruntime

    if name == "convolutional":
        graph = capture(Convolutional().eval(), inputs={"image": torch.randn(1, 3, 12, 12)})
    else:
        graph = plan_of(name)
    seen: dict[str, Task] = {}
    Latency(graph, Table({}, measure=lambda tasks: [seen.setdefault(str(t), t) and 1.0 for t in tasks]), 1, 6).prepare(
        []
    )
    assert len(seen) > 5
    for task in seen.values():
        build, tensors = Builder(), [None if type is None else sample(type) for type in task.operands]
        pairs = zip(tensors, task.constant, strict=True)
        names = ["" if x is None else (build.constant if known else build.feed)(x) for x, known in pairs]
        session = onnxruntime.InferenceSession(build.model(lowered(build, task, names)))
        found = torch.from_numpy(session.run(None, build.feeds)[0])
        tensors += [None] * (len(task.op.operands.split()) - len(tensors))
        wanted = task.op.eval(*tensors, **task.op.all_attrs(task.attrs))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=str(task))


def test_both_runtimes_measure(captured=None):
    task = next(iter(tasks_of(plan_of("opt")).values()))
    for runtime in ("torch", "onnxruntime"):
        (found,) = measuring(Workload(runtime))([task])
        assert found >= 0


def tasks_of(graph: Graph) -> dict[str, Task]:
    seen: dict[str, Task] = {}
    Latency(graph, Table({}, measure=lambda tasks: [seen.setdefault(str(t), t) and 1.0 for t in tasks]), 1, 6).prepare(
        []
    )
    return seen


def test_what_no_exporter_writes_is_refused_by_name():
    experts = next(task for task in tasks_of(plan_of("mixtral")).values() if task.op.name == "experts")
    with pytest.raises(PassError, match="`experts` has no ONNX form"):
        measuring(Workload())([experts])


def test_only_the_last_tokens_logits_are_counted():
    names = [*tasks_of(plan_of("llama"))]
    assert any(name.startswith("linear(f32[1,1,") for name in names)


def test_the_command_leaves_the_table_and_locks_the_one_it_is_given(tmp_path, device):
    folder = write_folder(tmp_path)
    options = "{faster: 1.1, score: magnitude, refit: false, align: 16, tokens: 8"
    first = compress(Recipe.load(write_recipe(folder, f"\n  - prune: {options}}}")), tmp_path / "out")
    table = first.path / "compress" / "1-latency.json"
    (folder / "table.json").write_bytes(table.read_bytes())
    again = Recipe.load(write_recipe(folder, f"\n  - prune: {options}, latency: table.json}}"))
    second = compress(again, tmp_path / "again")
    assert second.document["recipe"]["passes"][0]["prune"]["latency"] == "table.json"
    assert len(second.document["inputs"]["1-latency"]["sha256"]) == 64
    assert second.document["output"]["tensor_bytes"] == first.document["output"]["tensor_bytes"]
    assert "onnxruntime" in first.document["versions"] and "onnxruntime" not in second.document["versions"]
    with pytest.raises(RecipeError, match="is a directory"):
        Recipe.load(write_recipe(folder, f"\n  - prune: {options}, latency: tiny}}"))
    with pytest.raises(RecipeError, match="there is no file"):
        Recipe.load(write_recipe(folder, f"\n  - prune: {options}, latency: none.json}}"))


def test_the_lock_names_the_table_of_an_included_recipe_from_where_the_recipe_is(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "table.json").write_text('{"microseconds": {}}')
    (tmp_path / "parts" / "part.yaml").write_text("passes: [prune: {faster: 1.5, latency: table.json}]\n")
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a/b\ninclude: parts/part.yaml\ncalibration: {data: text.txt}\n")
    (tmp_path / "text.txt").write_text("words")
    assert resolved(Recipe.load(path))["passes"][0]["prune"]["latency"] == "parts/table.json"
