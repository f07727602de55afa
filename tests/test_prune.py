"""Structured pruning: exact at 100 %, sizes as asked for, stock classes that reload, reasons for what stays."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from backends.safetensors import emit, require
from compiler.calibration.moments import Moments
from compiler.errors import PassError, SelectorError, TargetError
from compiler.evaluate import load_model
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.ir.facts import attention_sites, expert_sites, kv_cache_values, layers, mlp_sites, parameter_count
from compiler.ir.layers import copy_of
from compiler.ledger import measure
from compiler.pipeline import Context, PassReport, Pipeline
from compiler.rewrite.rotation import turn
from compiler.target import emission_of
from compiler.weights.ops.basic import literal
from passes.low_rank import LowRank
from passes.prune import Prune
from passes.prune.depth import blocks_of, take_out
from passes.prune.places import places_of
from passes.prune.ranking import Reader, inputs, restored, surgeon
from passes.prune.refit import _Sums, fitted
from tests.emitted import TOLERANCE, Job, distance, stored_bytes
from tests.families import FAMILIES
from tests.removed import double, outputs, set_value, value, zero
from tests.test_removal import Convolutional, residual_net
from tests.test_stream import stream_groups


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


def moments(width: int, out: int, generator: torch.Generator) -> Moments:
    x, g = (torch.randn(4 * n, n, generator=generator, dtype=torch.float64) for n in (width, out))
    mixed = x @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    return Moments(torch.tensor(1.0), mixed.mean(0), mixed.T @ mixed / len(x), g.T @ g / len(g))


# --- the mathematics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3])
def test_the_predicted_loss_is_that_of_the_restored_columns_and_grows_with_what_goes(width):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 8 * width, generator=generator, dtype=torch.float64)
    known = moments(8 * width, 5, generator)
    reader = Reader(weight, [list(range(i * width, (i + 1) * width)) for i in range(8)], known)
    ranking = surgeon([reader], 8)
    assert sorted(ranking.order) == list(range(8))
    assert (ranking.losses.diff() <= 0).all() and ranking.losses[8] == 0
    for count in (7, 4, 1):
        kept = ranking.kept(count)
        error = weight.clone()
        error[:, reader.remaining(kept)] -= restored(reader, kept)
        cost = 0.5 * (known.gradient @ error @ inputs(known) * error).sum()
        torch.testing.assert_close(ranking.losses[count], cost, rtol=1e-3, atol=0)  # the surgeon works in float32


def test_restored_columns_are_better_than_plain_ones():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    reader = Reader(weight, [[i] for i in range(12)], moments(12, 4, generator))
    kept = list(range(8))
    plain, made = weight.clone(), weight.clone()
    plain[:, :8] -= weight[:, :8]
    made[:, :8] -= restored(reader, kept)
    second = reader.moments.second
    assert (made @ second * made).sum() < (plain @ second * plain).sum()


def test_a_fit_is_kept_only_if_it_is_better_on_what_it_did_not_see():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    seen, unseen = _Sums.of(3, 6), _Sums.of(3, 6)
    for sums, count in ((seen, 40), (unseen, 20)):
        x = torch.randn(count, 6, generator=generator)
        sums.add(x, x @ (weight.float() + 0.5).T, torch.ones(count, 1))
    made, before, after = fitted(weight, seen, unseen)
    assert after < before
    torch.testing.assert_close(made, weight + 0.5, rtol=0, atol=0.05)
    noise = _Sums.of(3, 6)
    noise.add(torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator), torch.ones(4, 1))
    right = _Sums.of(3, 6)
    x = torch.randn(50, 6, generator=generator)
    right.add(x, x @ weight.float().T, torch.ones(50, 1))
    kept, before, after = fitted(weight, noise, right)
    assert kept is weight and before == after


def test_channels_of_a_convolutional_net_are_pruned_by_what_they_cost():
    torch.manual_seed(0)
    given = [{"image": torch.randn(2, 3, 12, 12)} for _ in range(4)]
    graph = capture(Convolutional().eval(), inputs=given[0])
    before = parameter_count(graph)
    step = Prune(what="channels", where=("conv", "linear"), keep=0.8, align=2)
    (entry,) = Pipeline([step]).run(graph, calibration=lambda _: given).passes
    assert parameter_count(graph) < 0.82 * before
    assert any("conv" not in done.scope and "channels" in done.what for done in entry.rewritten)
    assert torch.isfinite(run(graph, given[0])["output"]).all()


def test_channels_of_a_residual_net_are_pruned_in_its_stages_too():
    torch.manual_seed(1)
    given = [{"image": torch.randn(2, 3, 32, 32)} for _ in range(4)]
    graph = capture(residual_net(), inputs=given[0])
    before = parameter_count(graph)
    step = Prune(what="channels", where=("conv", "linear"), keep=0.7, align=2)
    (entry,) = Pipeline([step]).run(graph, calibration=lambda _: given).passes
    assert 0.5 * before < parameter_count(graph) < 0.72 * before
    assert any(done.scope == "head" and "of 16 channels" in done.what for done in entry.rewritten)
    assert torch.isfinite(run(graph, given[0])["output"]).all()


# --- the pass ------------------------------------------------------------------------------------------------


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
        matrices = selected(capture(FAMILIES[name].config()))
        assert entry.before.parameters - entry.after.parameters >= (1 - options["keep"]) * matrices


def sizes_of(graph) -> dict[str, int]:
    sites = attention_sites(graph)
    return {
        "channels": mlp_sites(graph)[0].down.input(0).shape[-1] if mlp_sites(graph) else 0,
        "groups": sites[0].groups,
        "heads": sites[0].heads,
        "experts": expert_sites(graph)[0].count if expert_sites(graph) else 0,
        "layers": len(layers(graph)),
        "hidden": graph.nodes_named("embedding")[0].output.shape[-1],
    }


def selected(graph) -> int:
    """The numbers of all matrices of attention, MLPs and experts."""
    from compiler.ir.select import resolve

    return sum(param.type.numel for param in resolve(graph, ["attention", "mlp", "experts"], ()))


def test_removed_groups_leave_the_cache(captured):
    job = capture(FAMILIES["llama"].build())
    before = kv_cache_values(job)
    Pipeline([Prune(what="groups", keep=0.9, refit=False)]).run(job, calibration=lambda _: batches("llama"))
    assert kv_cache_values(job) == before // 2


def test_sizes_by_layer_are_kept_where_they_are_nearer_to_the_original(tmp_path):
    job = Pruned("llama", tmp_path, keep=0.8, sizes="by-layer")
    (entry,) = job.report.passes
    tried = {trial.what: trial for trial in entry.trials}
    assert {"sizes uniform", "sizes by layer", "as it is cut", "refitted"} == tried.keys()
    chosen = min((tried["sizes uniform"], tried["sizes by layer"]), key=lambda trial: trial.distance)
    assert chosen.chosen
    widths = [site.down.input(0).shape[-1] for site in mlp_sites(job.graph)]
    assert all(width % 8 == 0 for width in widths)


def test_refitting_is_undone_where_it_does_not_help():
    graph = capture(FAMILIES["llama"].build())
    report = Pipeline([Prune(keep=0.8, align=8)]).run(graph, calibration=lambda _: batches("llama"))
    cut, refitted = report.passes[0].trials
    assert cut.chosen == (cut.distance <= refitted.distance) and refitted.chosen != cut.chosen


@pytest.mark.parametrize("score", ["magnitude", "activation", "fluctuation", "taylor"])
def test_other_scores_need_no_second_moments_of_gradients_and_prune_alike(score):
    graph = capture(FAMILIES["opt"].build())
    step = Prune(keep=0.8, align=8, score=score, refit=False)
    assert step.calibrated == (score != "magnitude")
    Pipeline([step]).run(graph, calibration=lambda _: batches("opt"))
    assert {site.down.input(0).shape[-1] for site in mlp_sites(graph)} == {40}
    assert torch.isfinite(run(graph, FAMILIES["opt"].inputs())["logits"]).all()


@pytest.mark.parametrize(("name", "what"), [("qwen3", "heads"), ("llama", "hidden"), ("phi3", "groups")])
def test_first_order_scores_rank_heads_groups_and_the_stream(name, what):
    graph = capture(FAMILIES[name].build())
    before = parameter_count(graph)
    step = Prune(what=what, keep=0.9, align=8, score="taylor", refit=False)
    Pipeline([step]).run(graph, calibration=lambda _: batches(name))
    assert parameter_count(graph) < before
    assert torch.isfinite(run(graph, FAMILIES[name].inputs())["logits"]).all()


def test_by_outputs_what_changes_them_least_goes():
    """A head whose values do nothing changes no output, and is the one that goes."""
    graph = capture(FAMILIES["gpt2"].build())
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
    graph = capture(FAMILIES["llama"].config())
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
        Pipeline([step]).run(capture(FAMILIES["mixtral"].build()), calibration=lambda _: batches("mixtral"))


def test_magnitudes_leave_the_rows_with_the_largest_weights():
    graph = capture(FAMILIES["opt"].build(layers=1))
    site = mlp_sites(graph)[0]
    parts = [site.up.input(1), site.up.input(2), site.down.input(1)]
    up, bias, down = (value(graph, part).double().square() for part in parts)
    sizes = up.sum(1) + bias + down.sum(0)
    kept = sizes.argsort(descending=True)[:40].sort().values
    before = value(graph, parts[0])
    Pipeline([Prune(keep=40, align=8, score="magnitude", refit=False)]).run(graph)
    assert torch.equal(value(graph, mlp_sites(graph)[0].up.input(1)), before[kept])


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "vit"])
@pytest.mark.parametrize("score", ["loss", "influence"])
def test_attention_and_mlps_alone_are_taken_out_and_what_is_left_is_written_as_code(name, score, tmp_path):
    job = Pruned(name, tmp_path, what="sublayers", keep=0.75, score=score, refit=False)
    (entry,) = job.report.passes
    taken = [done.scope for done in entry.rewritten if done.what == "taken out"]
    assert taken and entry.after.parameters < entry.before.parameters
    assert all({"influence" if score == "influence" else "predicted_loss"} == {*e.numbers} for e in entry.rewritten)
    job.out.mkdir()
    emit(emission_of(job.graph, "generated"), job.graph.sources, job.out)
    with torch.no_grad():
        found = load_model(job.out, trust_remote_code=True)(**job.family.inputs())
    assert distance(found, job.outputs()) < TOLERANCE


@pytest.mark.parametrize(("name", "gone"), [("llama", (0, 1)), ("whisper", (0, 1, 4, 5, 6))])
def test_layers_of_code_are_numbered_anew_where_all_parts_of_one_are_gone(name, gone, tmp_path):
    job = Job(name, tmp_path)
    found = blocks_of(job.graph, context(job.graph), ["sublayers"])
    take_out(job.graph, [found[number] for number in gone])
    job.out.mkdir()
    emit(emission_of(job.graph, "generated"), job.graph.sources, job.out)
    with torch.no_grad():
        written = load_model(job.out, trust_remote_code=True)(**job.family.inputs())
    assert distance(written, job.outputs()) < TOLERANCE


def test_a_plan_says_that_it_does_not_know_which_layers_go():
    graph = capture(FAMILIES["llama"].config())
    (entry,) = Pipeline([Prune(what="layers", keep=0.5)]).run(graph, planned=True).passes
    assert any("is measured when the recipe runs" in text for text in entry.warnings)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sublayer_that_is_taken_out_is_one_that_adds_nothing(name):
    family = FAMILIES[name]
    graph = double(capture(family.build(layers=2 if "deepseek" in name else 1)))
    step = context(graph)
    found = blocks_of(graph, step, ["sublayers"])
    assert len(found) >= (1 if name in ("gpt_neox", "cohere2") else 2)
    for number in range(len(found)):
        cut, silent = copy_of(graph), copy_of(graph)
        take_out(cut, [blocks_of(cut, step, ["sublayers"])[number]])
        block = blocks_of(silent, step, ["sublayers"])[number]
        added = next(v for v in block.leaves.node.inputs if v is not block.enters)
        nothing = silent.op("mul", [added], {"scalar": 0.0}, scope=added.node.scope, before=block.leaves.node)
        silent.set_input(block.leaves.node, block.leaves.node.inputs.index(added), nothing)
        given = family.inputs(batch=1, tokens=5)
        there = outputs(silent, given)
        for output, tensor in outputs(cut, given).items():
            assert torch.equal(tensor, there[output])


@pytest.mark.parametrize(("what", "keep", "left"), [("layers", 2, 2), ("layers", 3, 3), ("sublayers", 5, 3)])
def test_a_number_says_how_many_layers_remain(what, keep, left):
    graph = capture(FAMILIES["llama"].build(layers=3))
    Pipeline([Prune(what=what, keep=keep)]).run(graph, calibration=lambda _: batches("llama"))
    assert len(layers(graph)) == left
    assert len(attention_sites(graph)) + len(mlp_sites(graph)) == (keep if what == "sublayers" else 2 * keep)


def test_more_layers_than_there_are_cannot_remain():
    graph = capture(FAMILIES["llama"].build(layers=2))
    with pytest.raises(PassError, match="there are 2 to keep, not 3"):
        Pipeline([Prune(what="layers", keep=3)]).run(graph, calibration=lambda _: batches("llama"))


def test_keep_counts_the_whole_model_if_asked_to():
    for what, where in (("hidden", "mlp"), ("channels", "mlp")):
        graph = capture(FAMILIES["llama"].config())
        before = parameter_count(graph)
        step = Prune(what=what, where=where, keep=0.8, of="model", align=1)
        Pipeline([step]).run(graph, planned=True)
        assert 0.76 * before < parameter_count(graph) <= 0.8 * before
    with pytest.raises(PassError, match="what must remain"):
        Pipeline([Prune(keep=0.2, of="model", align=1)]).run(capture(FAMILIES["llama"].config()), planned=True)


def test_a_plan_reads_no_weight_and_knows_the_sizes():
    graph = capture(FAMILIES["llama"].config())
    report = Pipeline([Prune(what=("channels", "groups"), keep=0.6, align=8)]).run(graph, planned=True)
    assert report.after.parameters < report.before.parameters


def test_an_interrupted_run_gives_the_same_bytes(tmp_path):
    found = []
    for attempt in range(2):
        graph = capture(FAMILIES["llama"].build())
        step = Prune(keep=0.8, align=8)
        Pipeline([step]).run(graph, calibration=lambda _: batches("llama"), workdir=tmp_path)
        found.append([value(graph, param) for param in graph.params.values()])
        assert attempt or any(tmp_path.rglob("*.safetensors"))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


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
    graph = capture(FAMILIES[name].config())
    with pytest.raises(PassError) as raised:
        Pipeline([Prune(**{"keep": 0.5, "align": 8, **options})]).run(graph, planned=True)
    assert reason in raised.value.cause


def test_a_selector_that_matches_nothing_is_an_error():
    with pytest.raises(SelectorError):
        Pipeline([Prune(where="*.nothing", keep=0.5)]).run(capture(FAMILIES["llama"].config()), planned=True)


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
    graph = capture(FAMILIES["llama"].build(layers=2))
    pipeline = Pipeline([Prune(keep=0.8, align=8, refit=False)])
    (report,) = pipeline.run(graph, calibration=lambda _: batches("llama")).passes
    kept = {rewrite.scope: rewrite.numbers for rewrite in report.rewritten}
    assert {curve.scope for curve in report.curves} == set(kept)
    for curve in report.curves:
        assert curve.chosen == kept[curve.scope]["parameters_after"] / kept[curve.scope]["parameters_before"]
        assert all(more >= less for more, less in pairwise(curve.lost))
        assert curve.lost[-1] == 0


def test_frozen_groups_are_in_the_report():
    graph = capture(FAMILIES["deepseek_v3"].config())
    report = Pipeline([Prune(what=("channels", "groups"), keep=0.9, align=8)]).run(graph, planned=True)
    reasons = [skip.reason for skip in report.passes[0].skipped]
    assert any("latent_attention" in reason for reason in reasons), reasons


def test_experts_that_go_are_those_whose_tokens_are_masked_away():
    """Without experts the model computes what it does when the router can never choose them."""
    family = FAMILIES["qwen3_moe"]
    graph = capture(family.build(layers=1))
    masked = capture(family.build(layers=1))
    Pipeline([Prune(what="experts", keep=3, refit=False)]).run(graph, calibration=lambda _: batches("qwen3_moe"))
    (site,) = expert_sites(masked)
    rows = value(graph, expert_sites(graph)[0].router.input(1))
    all_rows = value(masked, site.router.input(1))
    gone = [i for i, row in enumerate(all_rows) if not (rows == row).all(1).any()]
    assert len(gone) == 1 and len(rows) == 3
    scored = site.router.output
    mask = torch.zeros(4)
    mask[gone] = -1e9
    from compiler.weights.ops.basic import literal

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


@pytest.mark.parametrize("name", ["gpt2", "opt", "whisper"])
def test_a_narrower_stream_is_written_as_code_where_classes_divide_it_into_heads(name, tmp_path):
    job = Pruned(name, tmp_path, what="hidden", keep=0.8, where="*", refit=name == "gpt2")
    with pytest.raises(TargetError, match="no stock model class"):
        require(job.graph)
    job.out.mkdir()
    emit(emission_of(job.graph, "generated"), job.graph.sources, job.out)
    with torch.no_grad():
        found = load_model(job.out, trust_remote_code=True)(**job.family.inputs())
    assert distance(found, job.outputs()) < TOLERANCE


def test_a_narrow_stream_in_half_precision_computes_what_its_code_does(tmp_path):
    """Scales of norms are divided by a root, and rounded; factors have no class of their own."""
    narrow = Prune(what="hidden", keep=0.8, align=8, score="magnitude", refit=False)
    factors = LowRank(where="linear", keep=0.8, metric="plain", ranks="uniform", update=False, bias=False)
    job = Job("llama", tmp_path, [narrow, factors], torch.bfloat16)
    job.out.mkdir()
    emit(emission_of(job.graph, "generated"), job.graph.sources, job.out)
    with torch.no_grad():
        found = load_model(job.out, trust_remote_code=True)(**job.family.inputs())
    assert distance(found, job.outputs()) < TOLERANCE


def test_channels_of_a_patch_embedding_go_with_the_stream():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16, "patch_size": 8}
    model = ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=1, num_labels=5)).eval()
    graph = capture(model)
    given = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(3)]
    Pipeline([Prune(what="hidden", keep=32, align=8, where="*", refit=False)]).run(graph, calibration=lambda _: given)
    assert graph.params["vit.embeddings.patch_embeddings.projection.weight"].shape == (32, 3, 8, 8)
    assert run(graph, given[0])["logits"].shape == (2, 5)


def test_of_a_stream_the_directions_go_that_hold_nothing():
    """Channels that are zero in all that is written cost nothing, and are the first to go."""
    graph = capture(FAMILIES["llama"].build())
    before = run(graph, FAMILIES["llama"].inputs())
    (group,) = stream_groups(graph)
    zero(graph, group, [index for index in range(48) if index % 6])
    there = run(graph, FAMILIES["llama"].inputs())
    Pipeline([Prune(what="hidden", keep=40, align=8, refit=False)]).run(graph, calibration=lambda _: batches("llama"))
    assert distance(run(graph, FAMILIES["llama"].inputs()), there) < TOLERANCE < distance(before, there)


def test_of_a_turned_stream_the_directions_go_that_nothing_lies_along():
    """A stream in 40 of 48 dimensions, none of them an axis, loses the others for nothing."""
    graph = capture(FAMILIES["llama"].build())
    basis = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    (group,) = stream_groups(graph)
    zero(graph, group, list(range(40)))
    for param in graph.params.values():
        if param.type.rank == 1 and param.type.numel == 48:
            set_value(graph, param, torch.ones(48))
    turn(graph, stream_groups(graph)[0], literal(basis.flatten().tolist(), basis.shape, torch.float64))
    there = run(graph, FAMILIES["llama"].inputs())
    step = Prune(what="hidden", keep=40, align=8, refit=False, rotate=True)
    Pipeline([step]).run(graph, calibration=lambda _: batches("llama"))
    assert distance(run(graph, FAMILIES["llama"].inputs()), there) < TOLERANCE


def test_a_plan_knows_the_sizes_of_a_turned_stream_and_a_larger_model_is_refused():
    graph = capture(FAMILIES["gemma"].config())
    Pipeline([Prune(what="hidden", keep=24, align=8, rotate=True)]).run(graph, planned=True)
    assert graph.nodes_named("embedding")[0].output.shape[-1] == 24
    with pytest.raises(PassError, match="the head cannot share"):
        Pipeline([Prune(what="hidden", keep=47, align=1, rotate=True)]).run(
            capture(FAMILIES["gemma"].config()), planned=True
        )
    with pytest.raises(PassError, match="only the residual stream is turned"):
        Prune(what="channels", rotate=True)


def test_a_class_that_cannot_run_with_the_sizes_is_refused_and_code_written(tmp_path):
    job = Pruned("modernbert", tmp_path, what="heads", keep=0.8, refit=False)
    with pytest.raises(TargetError, match="no stock model class"):
        require(job.graph)
    assert emission_of(job.graph, "auto").files
