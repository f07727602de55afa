"""Structured pruning: exact at 100 %, sizes as asked for, stock classes that reload, reasons for what stays."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch

from backends.safetensors import emit, require
from compiler.errors import PassError, SelectorError, TargetError
from compiler.evaluate import load_model
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.ir.facts import attention_sites, expert_sites, kv_cache_values, mlp_sites, parameter_count
from compiler.ir.layers import layer_of
from compiler.ledger import measure
from compiler.pipeline import Context, PassReport, Pipeline
from compiler.target import emission_of
from compiler.weights.ops.basic import literal
from compiler.weights.spill import Progress
from passes.low_rank import LowRank
from passes.prune import Prune, refit
from passes.prune.places import places_of
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, Job, distance, stored_bytes
from tests.families import FAMILIES
from tests.removed import value, zero


def batches(name: str, count: int = 6) -> list[dict[str, torch.Tensor]]:
    return [FAMILIES[name].inputs(batch=1, tokens=24, seed=seed) for seed in range(count)]


class Pruned(Job):
    """A job whose pass is calibrated on random inputs."""

    def __init__(self, name, directory, **options):
        super().__init__(name, directory)
        given = batches(name)
        pipeline = Pipeline([Prune(**{"align": 8, **options})])
        self.report = pipeline.run(self.graph, bytes_of=stored_bytes, calibration=lambda _: given, workdir=directory)


def context(graph) -> Context:
    """For functions that only report."""
    return Context(graph, graph, Prune(), PassReport("", {}, True, *[measure(graph)] * 2), None, None, False, None)


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("llama", {"what": "channels", "keep": 0.8}, {"channels": 48}),
        ("phi3", {"what": "channels", "keep": 48}, {"channels": 48}),
        ("gpt2", {"what": ["channels", "heads"], "keep": 0.75}, {}),
        ("llama", {"what": "groups", "keep": 0.9}, {"groups": 1, "heads": 2}),
        ("qwen3", {"what": "heads", "keep": 0.9}, {"groups": 2, "heads": 2}),
        ("mixtral", {"what": "experts", "keep": 0.8, "refit": False}, {"experts": 3}),
        ("llama", {"what": "layers", "keep": 0.5}, {"layers": 1}),
        ("llama", {"what": "hidden", "keep": 0.9}, {"hidden": 40}),
        ("gemma2", {"what": "hidden", "keep": 40}, {"hidden": 40}),
        ("mixtral", {"what": "hidden", "keep": 40, "rotate": True}, {"hidden": 40}),
        ("gemma", {"what": "hidden", "keep": 24, "rotate": True, "refit": False}, {"hidden": 24}),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_uniform_result_is_the_sources_own_class_and_reloads(name, options, sizes, tmp_path):
    job = Pruned(name, tmp_path, **options)
    (entry,) = job.report.passes
    emission = job.emit()
    assert emission.architecture == FAMILIES[name].architecture and not emission.files
    assert job.reload_error() <= TOLERANCE
    assert entry.after.parameters == parameter_count(job.graph) < entry.before.parameters
    assert sizes.items() <= sizes_of(job.graph).items()
    if isinstance(options["keep"], float):
        matrices = selected(plan_of(name))
        assert entry.before.parameters - entry.after.parameters >= (1 - options["keep"]) * matrices


def sizes_of(graph) -> dict[str, int]:
    sites = attention_sites(graph)
    return {
        "channels": mlp_sites(graph)[0].down.input(0).shape[-1] if mlp_sites(graph) else 0,
        "groups": sites[0].groups,
        "heads": sites[0].heads,
        "experts": expert_sites(graph)[0].count if expert_sites(graph) else 0,
        "layers": len({layer_of(node.scope) for node in graph.nodes} - {None}),
        "hidden": graph.nodes_named("embedding")[0].output.shape[-1],
    }


def selected(graph) -> int:
    """The numbers of all matrices of attention, MLPs and experts."""
    from compiler.ir.select import resolve

    return sum(param.type.numel for param in resolve(graph, ["attention", "mlp", "experts"], ()))


def test_removed_groups_leave_the_cache(captured):
    job = graph_of("llama")
    before = kv_cache_values(job)
    Pipeline([Prune(what="groups", keep=0.9, refit=False)]).run(job, calibration=lambda _: batches("llama"))
    assert kv_cache_values(job) == before // 2


def test_sizes_by_layer_are_kept_where_they_are_nearer_to_the_original(tmp_path):
    job = Pruned("llama", tmp_path, keep=0.8, sizes="by-layer", refit=True)
    (entry,) = job.report.passes
    tried = {trial.what: trial for trial in entry.trials}
    assert {"sizes uniform", "sizes by layer", "as it is cut", "refitted"} == tried.keys()
    chosen = min((tried["sizes uniform"], tried["sizes by layer"]), key=lambda trial: trial.distance)
    assert chosen.chosen
    assert chosen.distance == pytest.approx(tried["as it is cut"].distance, rel=1e-5), "not what is cut"
    widths = [site.down.input(0).shape[-1] for site in mlp_sites(job.graph)]
    assert all(width % 8 == 0 for width in widths)


def test_refitting_is_undone_where_it_does_not_help():
    graph = graph_of("llama")
    report = Pipeline([Prune(keep=0.8, align=8, refit=True)]).run(graph, calibration=lambda _: batches("llama"))
    cut, refitted = report.passes[0].trials
    assert cut.chosen == (cut.distance <= refitted.distance) and refitted.chosen != cut.chosen


@pytest.mark.parametrize("score", ["magnitude", "activation", "fluctuation", "taylor"])
def test_other_scores_need_no_second_moments_of_gradients_and_prune_alike(score):
    graph = graph_of("opt")
    step = Prune(keep=0.8, align=8, score=score, refit=False)
    assert step.calibrated == (score != "magnitude")
    Pipeline([step]).run(graph, calibration=lambda _: batches("opt"))
    assert {site.down.input(0).shape[-1] for site in mlp_sites(graph)} == {40}
    assert torch.isfinite(run(graph, FAMILIES["opt"].inputs())["logits"]).all()


@pytest.mark.parametrize(("name", "what"), [("qwen3", "heads"), ("llama", "hidden"), ("phi3", "groups")])
def test_first_order_scores_rank_heads_groups_and_the_stream(name, what):
    graph = graph_of(name)
    before = parameter_count(graph)
    step = Prune(what=what, keep=0.9, align=8, score="taylor", refit=False)
    Pipeline([step]).run(graph, calibration=lambda _: batches(name))
    assert parameter_count(graph) < before
    assert torch.isfinite(run(graph, FAMILIES[name].inputs())["logits"]).all()


def test_by_outputs_what_changes_them_least_goes():
    """A head whose values do nothing changes no output, and is the one that goes."""
    graph = graph_of("gpt2")
    before = run(graph, FAMILIES["gpt2"].inputs())
    for place in places_of(graph, context(graph), ["heads"], list(graph.params.values())):
        zero(graph, place.group, [0, 1, 3])
    silent = run(graph, FAMILIES["gpt2"].inputs())
    step = Prune(what="heads", keep=3, score="output", refit=False)
    Pipeline([step]).run(graph, calibration=lambda _: batches("gpt2"))
    assert distance(run(graph, FAMILIES["gpt2"].inputs()), silent) < TOLERANCE < distance(before, silent)
    with pytest.raises(PassError, match="too many to leave out one by one"):
        Prune(what="channels", score="output")


@pytest.mark.parametrize(("form", "refused"), [("pair", ""), ("pivoted", "gives meaning to positions")])
def test_factors_are_pruned_if_no_output_is_computed_from_others(form, refused):
    graph = plan_of("llama")
    passes = [LowRank(where="mlp", keep=0.8, form=form), Prune(keep=0.8, where="*", align=8)]
    if not refused:
        first, second = Pipeline(passes).run(graph, planned=True).passes
        assert second.after.parameters < 0.9 * first.after.parameters
        return
    with pytest.raises(PassError, match=refused):
        Pipeline(passes).run(graph, planned=True)


def test_what_experts_hold_inside_has_no_first_order_score():
    step = Prune(keep=0.8, align=8, score="taylor", refit=False)
    with pytest.raises(PassError, match="no slope of its own"):
        Pipeline([step]).run(graph_of("mixtral"), calibration=lambda _: batches("mixtral"))


def test_magnitudes_leave_the_rows_with_the_largest_weights():
    graph = graph_of("opt")
    site = mlp_sites(graph)[0]
    parts = [site.up.input(1), site.up.input(2), site.down.input(1)]
    up, bias, down = (value(graph, part).double().square() for part in parts)
    sizes = up.sum(1) + bias + down.sum(0)
    kept = sizes.argsort(descending=True)[:40].sort().values
    before = value(graph, parts[0])
    Pipeline([Prune(keep=40, align=8, score="magnitude", refit=False)]).run(graph)
    assert torch.equal(value(graph, mlp_sites(graph)[0].up.input(1)), before[kept])


def test_keep_counts_the_whole_model_if_asked_to():
    for what, where in (("hidden", "mlp"), ("channels", "mlp")):
        graph = plan_of("llama")
        before = parameter_count(graph)
        step = Prune(what=what, where=where, keep=0.8, of="model", align=1)
        Pipeline([step]).run(graph, planned=True)
        assert 0.76 * before < parameter_count(graph) <= 0.8 * before
    with pytest.raises(PassError, match="what must remain"):
        Pipeline([Prune(keep=0.2, of="model", align=1)]).run(plan_of("llama"), planned=True)


def test_a_plan_reads_no_weight_and_knows_the_sizes():
    graph = plan_of("llama")
    report = Pipeline([Prune(what=("channels", "groups"), keep=0.6, align=8)]).run(graph, planned=True)
    assert report.after.parameters < report.before.parameters


def test_an_interrupted_run_gives_the_same_bytes(tmp_path):
    found = []
    for attempt in range(2):
        graph = graph_of("llama")
        step = Prune(keep=0.8, align=8)
        Pipeline([step]).run(graph, calibration=lambda _: batches("llama"), workdir=tmp_path)
        found.append([value(graph, param) for param in graph.params.values()])
        assert attempt or any(tmp_path.rglob("*.safetensors"))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_refit_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    seen: list[str] = []
    fit, save = refit._fit, Progress.save

    def counted(ctx, node, *rest):
        seen.append(node.scope)
        return fit(ctx, node, *rest)

    def killed(progress, name, tensors):
        save(progress, name, tensors)
        if name.startswith("refitted-") and len(seen) == 2:
            raise KeyboardInterrupt

    def pruned(directory):
        graph = graph_of("llama")
        step = Prune(keep=0.8, align=8, refit=True)
        (report,) = Pipeline([step]).run(graph, calibration=lambda _: batches("llama"), workdir=directory).passes
        return [value(graph, param) for param in graph.params.values()], report.rewritten

    monkeypatch.setattr(refit, "_fit", counted)
    whole = pruned(tmp_path / "whole")
    everything, seen[:] = list(seen), []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "save", killed)
        pruned(tmp_path / "torn")
    done, seen[:] = list(seen), []
    again = pruned(tmp_path / "torn")
    assert len(done) == 2
    assert done + seen == everything
    assert whole[1] == again[1]
    assert all(torch.equal(*pair) for pair in zip(whole[0], again[0], strict=True))


def test_what_is_too_little_says_what_is_enough():
    wanted = {"what": "channels", "score": "magnitude", "where": ["attention", "mlp"]}
    with pytest.raises(PassError, match="must remain") as raised:
        Pipeline([Prune(**wanted, keep=0.05)]).run(plan_of("llama"), planned=True)
    least = float(re.search(r"([0-9.]+) %", raised.value.cause)[1]) / 100
    Pipeline([Prune(**wanted, keep=least + 0.001)]).run(plan_of("llama"), planned=True)
    with pytest.raises(PassError, match="must remain"):
        Pipeline([Prune(**wanted, keep=least - 0.001)]).run(plan_of("llama"), planned=True)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("deepseek_v3", {"what": "experts"}, "is not told its experts by one topk"),
        ("bert", {"what": "experts"}, "the model has none"),
        ("deepseek_v3", {"what": "groups"}, "nothing to prune of groups"),
        ("llama", {"what": "channels", "where": "attention"}, "which `where` does not select"),
        ("llama", {"what": ("groups", "heads")}, "are dimensions of the same weights"),
        ("llama", {"what": "channels", "keep": 0.05}, "less than what must remain"),
        ("llama", {"what": "channels", "keep": 51}, "cannot keep 51 of its 80 channels"),
    ],
)
def test_what_cannot_be_pruned_is_an_error_with_the_reason(name, options, reason):
    graph = plan_of(name)
    with pytest.raises(PassError) as raised:
        Pipeline([Prune(**{"keep": 0.5, "align": 8, **options})]).run(graph, planned=True)
    assert reason in raised.value.cause


def test_a_selector_that_matches_nothing_is_an_error():
    with pytest.raises(SelectorError):
        Pipeline([Prune(where="*.nothing", keep=0.5)]).run(plan_of("llama"), planned=True)


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(PassError, match="the same for each place"):
        Prune(what=("channels", "groups"), keep=64)
    with pytest.raises(PassError, match="sublayers are parts of layers"):
        Prune(what=("layers", "sublayers"))
    with pytest.raises(PassError, match="have an influence"):
        Prune(what=("layers", "channels"), score="influence")
    with pytest.raises(PassError, match="not of the model"):
        Prune(keep=64, of="model")
    with pytest.raises(PassError, match="does not compare between layers"):
        Prune(sizes="by-layer", score="magnitude")
    with pytest.raises(PassError, match="layers hold parts of the residual stream"):
        Prune(what=("hidden", "layers"))
    with pytest.raises(PassError, match="what layers cost does not compare with `score: magnitude`"):
        Prune(what=("channels", "layers"), score="magnitude")


def test_curves_say_what_every_place_would_lose_and_what_it_got():
    graph = graph_of("llama")
    pipeline = Pipeline([Prune(keep=0.8, align=8, refit=False)])
    (report,) = pipeline.run(graph, calibration=lambda _: batches("llama")).passes
    kept = {rewrite.scope: rewrite.numbers for rewrite in report.rewritten}
    assert {curve.scope for curve in report.curves} == set(kept)
    for curve in report.curves:
        assert curve.chosen == kept[curve.scope]["parameters_after"] / kept[curve.scope]["parameters_before"]
        assert all(more >= less for more, less in pairwise(curve.lost))
        assert curve.lost[-1] == 0


def test_frozen_groups_are_in_the_report():
    graph = plan_of("deepseek_v3")
    report = Pipeline([Prune(what=("channels", "groups"), keep=0.9, align=8)]).run(graph, planned=True)
    reasons = [skip.reason for skip in report.passes[0].skipped]
    assert any("latent_attention" in reason for reason in reasons), reasons


def test_experts_that_go_are_those_whose_tokens_are_masked_away():
    """Without experts the model computes what it does when the router can never choose them."""
    family = FAMILIES["qwen3_moe"]
    graph = graph_of(family.name, layers=1)
    masked = graph_of(family.name, layers=1)
    Pipeline([Prune(what="experts", keep=3, refit=False)]).run(graph, calibration=lambda _: batches("qwen3_moe"))
    (site,) = expert_sites(masked)
    rows = value(graph, expert_sites(graph)[0].router.input(1))
    all_rows = value(masked, site.router.input(1))
    gone = [i for i, row in enumerate(all_rows) if not (rows == row).all(1).any()]
    assert len(gone) == 1 and len(rows) == 3
    scored = site.router.output
    mask = torch.zeros(4)
    mask[gone] = -1e9

    param = masked.add_param("mask", literal(mask.tolist()))
    after = next(iter(scored.users))
    masked.set_input(after, 0, masked.op("add", [scored, param], scope=after.scope, before=after))
    assert distance(run(graph, family.inputs()), run(masked, family.inputs())) <= TOLERANCE


def test_many_kinds_of_sizes_are_shared_out_without_trying_all_combinations():
    widths = [96, 112, 128, 144, 160, 176]
    layers: list[torch.nn.Module] = []
    for before, after in pairwise([8, *widths, 8]):
        layers += [torch.nn.Linear(before, after), torch.nn.GELU()]
    graph = capture(torch.nn.Sequential(*layers[:-1]).eval(), inputs={"input": torch.randn(4, 8)})
    Pipeline([Prune(where="linear", keep=0.5, align=1, score="magnitude", refit=False)]).run(graph)
    left = sum(param.type.numel for param in graph.params.values() if param.type.rank == 2)
    full = sum(a * b for a, b in pairwise([8, *widths, 8]))
    assert 0.45 * full < left <= 0.5 * full


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "whisper"])
def test_sizes_by_layer_are_written_as_code_that_computes_the_same(name, tmp_path):
    job = Pruned(name, tmp_path, keep=0.8, sizes="by-layer", refit=False)
    job.out.mkdir()
    emit(emission_of(job.graph, "generated"), job.graph.sources, job.out)
    with torch.no_grad():
        found = load_model(job.out, trust_remote_code=True)(**job.family.inputs())
    assert distance(found, job.outputs()) < TOLERANCE


def test_a_class_that_cannot_run_with_the_sizes_is_refused_and_code_written(tmp_path):
    job = Pruned("modernbert", tmp_path, what="heads", keep=0.8, refit=False)
    with pytest.raises(TargetError, match="no stock model class"):
        require(job.graph)
    assert emission_of(job.graph, "auto").files
