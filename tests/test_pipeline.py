"""Passes and the pipeline: verification, accounts, observers, planned runs, scratch tensors, discovery."""

import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import passes
from compiler.errors import OrderError, PassError, SelectorError, VerifyError
from compiler.instrument import DumpGraphs, Timing
from compiler.ir.select import Selector
from compiler.pipeline import Observer, Pass, Pipeline
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import apply
from tests.graphs import tiny_llama


@dataclass(frozen=True)
class DoubleWeights(Pass):
    """Multiply weights."""

    where: Selector = "mlp"
    factor: float = 1.0
    exact_when: ClassVar = {"factor": 1.0}

    def run(self, graph, ctx):
        for param in ctx.select(self.where):
            param.expr = apply("scale", [param.expr], {"by": self.factor})
            ctx.rewrote(param.name, "scaled", by=self.factor)
        ctx.skipped("lm_head", "it is no part of this test")


@dataclass(frozen=True)
class Freeze(Pass):
    """Replace weights by their values."""

    def run(self, graph, ctx):
        for param in ctx.select("mlp.down"):
            param.expr = ctx.spill("frozen", ctx.read(param) * 2)


@dataclass(frozen=True)
class RoundAll(Pass):
    """Stands for a pass that quantises."""

    quantises: ClassVar = True
    edits_weights: ClassVar = False

    def run(self, graph, ctx):
        ctx.rewrote("", "rounded")


@dataclass(frozen=True)
class Corrupt(Pass):
    """Breaks the graph."""

    def run(self, graph, ctx):
        next(iter(graph.params.values())).name = "another"


@dataclass(frozen=True)
class Retype(Pass):
    """Changes what the model gives."""

    def run(self, graph, ctx):
        graph.outputs["hidden"] = graph.outputs.pop("logits")


@dataclass(frozen=True)
class Fail(Pass):
    """Cannot do it."""

    def run(self, graph, ctx):
        raise PassError("this model has no spoon")


class Unreadable:
    """A source whose tensors may not be read."""

    def __init__(self, source):
        self.types = source.types

    def read(self, key):
        raise AssertionError(f"{key} was read")


def test_key_and_options_come_from_the_class():
    assert DoubleWeights.key() == "double-weights"
    assert DoubleWeights(factor=2.0).options() == {"where": "mlp", "factor": 2.0}


def test_exactness_is_what_the_options_say():
    assert DoubleWeights().exact
    assert not DoubleWeights(factor=2.0).exact
    assert Freeze().exact  # declares nothing else


def test_report_counts_and_lists():
    report = Pipeline([DoubleWeights(factor=2.0)]).run(tiny_llama())
    (entry,) = report.passes
    assert (entry.name, entry.exact) == ("double-weights", False)
    assert [(s.selector, s.count) for s in entry.selected] == [("mlp", 9)]
    assert len(entry.rewritten) == 9 and entry.rewritten[0].numbers == {"by": 2.0}
    assert [(s.scope, s.reason) for s in entry.skipped] == [("lm_head", "it is no part of this test")]
    assert entry.before == entry.after == report.before == report.after
    assert not report.read_weights


def test_accounts_of_a_graph():
    report = Pipeline([]).run(tiny_llama(layers=2))
    graph = tiny_llama(layers=2)
    stored = [p for p in graph.params.values() if p.persistent]
    assert report.after.parameters == sum(p.type.numel for p in stored)
    assert report.after.stored_bytes == 2 * report.after.parameters == sum(report.layers_after.values())
    assert report.after.cache_bytes_per_token == 2 * 2 * (8 + 8)  # bfloat16, layers, keys and values
    assert set(report.layers_after) == {"", "model.layers.0", "model.layers.1"}


def test_quantising_is_terminal():
    with pytest.raises(OrderError, match="`double-weights` edits dense weights") as caught:
        Pipeline([RoundAll(), DoubleWeights()])
    assert caught.value.remedy == "put `double-weights` before `round-all`"
    Pipeline([DoubleWeights(), RoundAll(), RoundAll()])


@pytest.mark.parametrize("step", [Corrupt(), Retype()])
def test_every_pass_is_verified(step):
    with pytest.raises(VerifyError) as caught:
        Pipeline([DoubleWeights(), step]).run(tiny_llama())
    assert caught.value.where.startswith(f"pass 2, {step.key()}")


def test_an_error_names_its_pass():
    with pytest.raises(PassError) as caught:
        Pipeline([DoubleWeights(), Fail()]).run(tiny_llama())
    assert caught.value.where == "pass 2, fail"


def test_a_selector_error_names_its_option():
    with pytest.raises(SelectorError) as caught:
        Pipeline([DoubleWeights(where="experts")]).run(tiny_llama())
    assert caught.value.option == "where"


def test_a_planned_run_reads_nothing_and_types_everything():
    graph = tiny_llama()
    graph.sources["model"] = Unreadable(graph.sources["model"])
    report = Pipeline([DoubleWeights(), Freeze()]).run(graph, planned=True)
    assert report.read_weights
    down = graph.params["model.layers.0.mlp.down_proj.weight"]
    assert down.expr.op == "load" and down.expr.type.static_shape == (16, 24)


@pytest.mark.parametrize("on_disk", [False, True])
def test_spilled_tensors_are_read_back(tmp_path, on_disk):
    graph = tiny_llama()
    before = evaluate([graph.params["model.layers.1.mlp.down_proj.weight"].expr], graph.sources)[0]
    Pipeline([Freeze()]).run(graph, workdir=tmp_path if on_disk else None)
    after = evaluate([graph.params["model.layers.1.mlp.down_proj.weight"].expr], graph.sources)[0]
    assert torch.equal(after, before * 2)
    assert len(list(tmp_path.glob("spill/*.safetensors"))) == (3 if on_disk else 0)


def test_spilled_tensors_are_named_by_content(tmp_path):
    names = []
    for _ in range(2):
        graph = tiny_llama()
        Pipeline([Freeze()]).run(graph, workdir=tmp_path)
        names.append(sorted(graph.sources["spill"].types))
    assert names[0] == names[1]
    assert len(list((tmp_path / "spill").iterdir())) == 3


def test_observers_see_every_pass():
    seen = []

    class Watch(Observer):
        def before(self, index, step, graph):
            seen.append(("before", index, step.key()))

        def after(self, index, step, graph, report):
            seen.append(("after", index, report.name))

        def failed(self, index, step, graph, error):
            seen.append(("failed", index, error.code))

    with pytest.raises(PassError):
        Pipeline([DoubleWeights(), Fail()]).run(tiny_llama(), observers=[Watch()])
    assert seen == [
        ("before", 0, "double-weights"),
        ("after", 0, "double-weights"),
        ("before", 1, "fail"),
        ("failed", 1, "pass"),
    ]


def test_timing_fills_in_the_report():
    report = Pipeline([DoubleWeights()]).run(tiny_llama(), observers=[Timing()])
    assert report.passes[0].seconds > 0
    assert report.passes[0].peak_rss > 1 << 20


def test_graphs_are_dumped_after_each_pass(tmp_path):
    with pytest.raises(PassError):
        Pipeline([DoubleWeights(), Fail()]).run(tiny_llama(), observers=[DumpGraphs(tmp_path)])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000_captured.mir", "001_double-weights.mir", "002_fail.failed.mir"]
    assert "scale(" in (tmp_path / "001_double-weights.mir").read_text()


def test_passes_are_found_by_file_name():
    from passes import Quantize

    assert {"gqa-to-mla", "quantize"} <= set(passes.pass_names())
    assert passes.pass_class("quantize") is Quantize
    assert all(passes.pass_class(key).key() == key for key in passes.pass_names())
    with pytest.raises(AttributeError, match="NoSuchPass"):
        _ = passes.NoSuchPass


def test_a_pass_that_cannot_be_imported_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "broken_pass.py").write_text("import no_such_module_at_all\n")
    monkeypatch.setattr(passes, "__path__", [*passes.__path__, str(tmp_path)])
    assert "broken-pass" in passes.pass_names()
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        passes.pass_class("broken-pass")


def test_other_packages_add_passes(monkeypatch):
    from importlib.metadata import EntryPoint

    entry = EntryPoint("double-weights", f"{__name__}:DoubleWeights", passes.ENTRY_POINTS)
    monkeypatch.setattr(passes, "entry_points", lambda group: [entry] if group == passes.ENTRY_POINTS else [])
    assert "double-weights" in passes.pass_names()
    assert passes.pass_class("double-weights") is sys.modules[__name__].DoubleWeights
