"""Latent attention with a smaller cache: what is exact, what is best, what is measured, and what is written."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from compiler.calibration.sweep import sweep
from compiler.errors import PassError
from compiler.ir.facts import attention_sites, kv_cache_values, latent_sites
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.pipeline import Pipeline
from passes.gqa_to_mla import GqaToMla
from passes.gqa_to_mla.latent import Analysis, LatentMaps, Layout, largest_rank, latent_maps
from passes.gqa_to_mla.rotary import keep_best
from passes.gqa_to_mla.source import compressible
from passes.gqa_to_mla.truncate import Form, form_of
from tests.captures import graph_of
from tests.test_gqa_to_mla import SHAPES, VOCABULARY, Decoder
from tests.truncation import (
    analyses,
    batches,
    complex_heads,
    convert,
    first_output,
    moved,
    reduced,
    relative_square,
    token_ids,
    whole,
)

ROUNDING = 1e-5  # float32, relative to the largest output: sums of some dozen terms, over the layers of a tiny model

BY_HAND = {
    **SHAPES,
    "window": {"window": 7},
    "cap": {"softcap": 3.0},
    "cap and key bias": {"softcap": 3.0, "bias": "k"},
    "cap, window, table": {"softcap": 3.0, "window": 9, "table_scale": 1.3, "groups": 1},
}
CAUSAL = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "cohere2", "smollm3", "gpt2", "gpt_neox",
]  # fmt: skip
SUBJECTS = [*BY_HAND, *CAUSAL]


@pytest.fixture(scope="module")
def subject():
    """``subject(name)``: a fresh copy of a decoder by hand or of a family's tiny model."""
    made: dict[str, Graph] = {}

    def fresh(name: str) -> Graph:
        if name not in made:
            made[name] = Decoder(**BY_HAND[name]).graph if name in BY_HAND else graph_of(name, 3)
        return copy_of(made[name])

    return fresh


@pytest.fixture(scope="module")
def analysed(subject):
    """``analysed(name)``: the graph and what calibration says of its attentions; not to be changed."""
    made: dict[str, tuple[Graph, list[Analysis]]] = {}

    def seen(name: str) -> tuple[Graph, list[Analysis]]:
        if name not in made:
            graph = subject(name)
            made[name] = graph, analyses(graph, batches(vocabulary=vocabulary(name)))
        return made[name]

    return seen


def vocabulary(name: str) -> int:
    return VOCABULARY if name in BY_HAND else 96


def kept_of(found: list[Analysis], share: float) -> list[tuple[int, ...]]:
    """The best ``share`` of the components of every attention, as the pass distributes them."""
    shapes = {one.source.pairs: one.source.groups for one in found}
    counts = {
        pairs: tuple(keep_best([a.components.loss for a in found if a.source.pairs == pairs], int(share * pairs * g)))
        for pairs, g in shapes.items()
    }
    return [counts[one.source.pairs] for one in found]


def layouts_of(found: list[Analysis], share: float, part: float) -> list[Layout]:
    """``share`` of the rotary components, and ``part`` of the rank at which no more than rotation is lost."""
    kept = kept_of(found, share)
    return [Layout(max(1, int(part * largest_rank(a.source, k))), k) for a, k in zip(found, kept, strict=True)]


# nothing is cut


@pytest.mark.parametrize("name", SUBJECTS)
def test_whole_widths_compute_the_same(name, subject, analysed):
    """By way of the truncating maps, as published where that is possible, and as plainly as can be. What calibration
    saw does not matter: the inputs are others."""
    graph, found = analysed(name)
    ids = token_ids(tokens=24, vocabulary=vocabulary(name))
    before = first_output(graph, ids)
    layouts = [whole(one.source) for one in found]
    for form in {Form(standard=False), form_of(graph, [one.source for one in found], layouts)}:
        changed = subject(name)
        maps = convert(changed, moved(found, changed), layouts, form)
        assert (first_output(changed, ids) - before).abs().max() <= ROUNDING * before.abs().max()
        assert [one.error for one in maps] == [0] * len(maps)
        assert kv_cache_values(changed) == kv_cache_values(graph)


def expected_scores(one: Analysis, layout: Layout, query: Tensor, key: Tensor, turn: Tensor) -> Tensor:
    """Scores [H] of a query [H, d] and a key [g, d], components that stay turned by ``turn`` [pairs], others by the
    phasor."""
    source, parts = one.source, one.components
    own = torch.tensor(source.group_of, dtype=torch.int64)
    numbers = torch.einsum("pij,jp->pi", parts.key, complex_heads(source, key))
    queries = parts.query[:, :, own].permute(2, 0, 1) * complex_heads(source, query)[:, :, None]
    stays = torch.arange(source.groups) < torch.tensor(layout.kept, dtype=torch.int64)[:, None]
    turns = torch.where(stays, turn[:, None], parts.phasor[:, :, None])
    rotated = (queries * numbers.conj() * turns).real.sum((1, 2))
    passed = (query[:, 2 * source.pairs :] * key[own, 2 * source.pairs :]).sum(1)
    return rotated + passed


def latent_scores(one: Analysis, layout: Layout, maps: LatentMaps, query: Tensor, y: Tensor, turn: Tensor):
    """The scores [H] that the maps give, and the values [H, v]."""
    source, rotary = one.source, layout.rotary_dim
    made = torch.einsum("hnd,hd->hn", maps.query, query)
    up = (maps.up @ (maps.down @ y)).reshape(source.heads, -1)
    unrotated = made.shape[1] - rotary
    keys, values = up[:, :unrotated], up[:, unrotated:]
    turned = torch.view_as_complex(made[:, unrotated:].reshape(source.heads, -1, 2)) * turn[layout.frequencies]
    own = torch.view_as_complex((maps.rotary_key @ y).reshape(-1, 2))
    return (made[:, :unrotated] * keys).sum(1) + (turned * own.conj()).real.sum(1), values


@pytest.mark.parametrize("share", [1.0, 0.6, 0.25, 0.0])
@pytest.mark.parametrize("name", SUBJECTS)
def test_the_maps_are_the_change_of_basis_and_the_phasor_and_nothing_else(name, share, analysed):
    """In float64, at the largest rank, for any query, key, value and angle."""
    found = analysed(name)[1]
    generator = torch.Generator().manual_seed(3)
    for one, layout in zip(found, layouts_of(found, share, 1.0), strict=True):
        source, maps = one.source, latent_maps(one, layout)
        y = torch.randn(source.cached, generator=generator, dtype=torch.float64)
        query = torch.randn(source.heads, source.head_dim, generator=generator, dtype=torch.float64)
        turn = torch.polar(
            torch.ones(source.pairs).double(), 7 * torch.rand(source.pairs, generator=generator).double()
        )
        width = source.groups * source.head_dim
        key, value = y[:width].reshape(source.groups, -1), y[width:].reshape(source.groups, -1)
        scores, values = latent_scores(one, layout, maps, query, y, turn)
        wanted = expected_scores(one, layout, query, key, turn)
        assert torch.allclose(scores, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
        assert torch.allclose(values, value[source.group_of], rtol=0, atol=1e-9 * float(value.abs().max()))


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_components_are_another_basis_of_the_keys(name, analysed):
    """So that what all components together give is the sum over a head's own pairs, as before."""
    for one in analysed(name)[1]:
        parts, groups = one.components, one.source.groups
        product = parts.query.mT @ parts.key.conj()
        assert (product - torch.eye(groups, dtype=product.dtype)).abs().le(1e-9).all()
        assert (parts.loss >= 0).all()
        assert (parts.loss.diff(dim=1) <= 0).all(), "components are ordered by their loss"


# what is predicted


def first_projection(graph: Graph, given) -> list[Tensor]:
    """What the first attention's output projection yields, batch by batch."""
    output = (latent_sites(graph) or attention_sites(graph))[0].output
    stage = next(stage for stage in sweep(graph, given) if output in stage.nodes)
    return [values[output.output].double() for values in stage.values([output.output])]


PREDICTED = ["grouped", "multi-head", "multi-query", "partly rotated", "scaled table", "cap", "window", "key bias"]


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("name", [*PREDICTED, "llama", "qwen3", "gemma2", "gpt_neox"])
def test_giving_up_rotation_costs_what_is_predicted(name, share, subject, analysed):
    """To first order, and with errors taken as independent: within a factor of 2.5 of the measured."""
    graph, found = analysed(name)
    given = batches(vocabulary=vocabulary(name))
    changed = subject(name)
    maps = convert(changed, moved(found, changed), layouts_of(found, share, 1.0), Form(standard=False))[0]
    pairs = list(zip(first_projection(graph, given), first_projection(changed, given), strict=True))
    lost = sum(float((old - new).square().sum()) for old, new in pairs) / sum(len(old[0]) for old, _ in pairs)
    assert maps.error == maps.freed
    assert maps.freed / 2.5 <= lost / found[0].energy <= maps.freed * 2.5


@pytest.mark.parametrize("name", ["grouped", "multi-query", "cap, window, table", "llama", "qwen2", "qwen3", "gpt2"])
def test_more_cache_is_predicted_and_found_to_lose_less(name, subject, analysed):
    graph, found = analysed(name)
    ids = token_ids(4, 40, 11, vocabulary(name))
    wanted = first_output(graph, ids)
    predicted, lost = [], []
    for part in (0.2, 0.4, 0.6, 0.8, 1.0):
        changed = subject(name)
        maps = convert(changed, moved(found, changed), layouts_of(found, 0.5, part), Form(standard=False))
        predicted.append([one.key_error + one.value_error for one in maps])
        lost.append(relative_square(first_output(changed, ids), wanted))
    rounding = 1e-7  # of the energy: moments are sums of float32 products
    for less, more in pairwise(predicted):
        assert all(b <= a + rounding for a, b in zip(less, more, strict=True))
    assert lost[-1] <= lost[2] + rounding
    assert lost[2] <= lost[0] + rounding


@pytest.mark.parametrize("name", ["grouped", "multi-head", "window", "llama", "gemma3"])
def test_each_component_that_stays_lowers_the_loss_of_rotation(name, analysed):
    for one in analysed(name)[1]:
        total = one.source.pairs * one.source.groups
        kept = [tuple(keep_best([one.components.loss], count)) for count in range(total + 1)]
        assert [sum(counts) for counts in kept] == list(range(total + 1))
        freed = [latent_maps(one, Layout(largest_rank(one.source, k), k), 0).freed for k in kept[:: max(1, total // 6)]]
        assert freed == sorted(freed, reverse=True)


# the pass as a whole


@pytest.mark.parametrize("name", [*PREDICTED, "query bias", "output bias", "fused", "llama", "qwen2", "gemma3", "gpt2"])
def test_a_plan_has_the_caches_of_the_run_and_weights_no_smaller(name, subject):
    """The number of unrotated query rows follows from calibration; a plan states the most it can be."""
    sites = [compressible(site) for site in attention_sites(subject(name))]
    options = {"rank": min(site.cached for site in sites) // 3, "rope_dim": 2 * (sites[0].pairs * sites[0].groups // 3)}
    done, planned = subject(name), subject(name)
    report = reduced(done, batches(2, vocabulary=vocabulary(name)), **options)
    plan = reduced(planned, [], planned=True, **options)
    assert plan.after.cache_bytes_per_token == report.after.cache_bytes_per_token
    assert report.after.cache_bytes_per_token < report.before.cache_bytes_per_token
    assert plan.after.parameters >= report.after.parameters
    assert planned.params.keys() == done.params.keys()
    assert all(planned.params[name].storage == param.storage for name, param in done.params.items())
    assert kv_cache_values(done) == sum(
        options["rank"] + min(options["rope_dim"], 2 * s.pairs * s.groups) for s in sites
    )


@pytest.mark.parametrize("name", ["grouped", "llama", "qwen3", "gemma2", "gpt2"])
def test_refitting_brings_the_model_nearer_on_what_it_was_fitted_to(name, subject):
    given = batches(6, vocabulary=vocabulary(name))
    before = [first_output(subject(name), batch) for batch in given]
    lost = []
    for refit in (False, True):
        changed = subject(name)
        width = 2 * (compressible(attention_sites(changed)[0]).pairs // 2)
        reduced(changed, given, rank=12, rope_dim=width, refit=refit)
        lost.append(sum(relative_square(first_output(changed, b), y) for b, y in zip(given, before, strict=True)))
    assert lost[1] < lost[0]


@pytest.mark.parametrize("name", ["grouped", "llama", "qwen2", "gemma3"])
def test_a_part_of_the_cache_is_split_where_the_distance_is_least(name, subject):
    graph = subject(name)
    (entry,) = reduced(graph, batches(vocabulary=vocabulary(name)), cache=0.5).passes
    assert len(entry.trials) >= 2
    (chosen,) = [trial for trial in entry.trials if trial.chosen]
    assert chosen.distance == min(trial.distance for trial in entry.trials)
    assert all(math.isfinite(trial.distance) and trial.distance >= 0 for trial in entry.trials)
    before, after = entry.before.cache_bytes_per_token, entry.after.cache_bytes_per_token
    assert 0.4 * before <= after <= 0.5 * before
    rank, rotary = latent_sites(graph)[0].rank, latent_sites(graph)[0].rotary_dim
    assert chosen.what == f"rotary key of {rotary}, latent of {rank}"


def test_the_same_data_give_the_same_bits(subject):
    found = []
    for _ in range(2):
        graph = subject("llama")
        reduced(graph, batches(), rank=12, rope_dim=8)
        found.append((graph.sources["spill"].fingerprint(), first_output(graph, token_ids())))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_half_precision_it_loses_no_more_than_rounding(dtype):
    """Weights that are written have the source's dtype; an attention of little effect does not under- or overflow."""
    for spread in (1.0, 1e-3):
        decoder, exact = Decoder(dtype=dtype), Decoder()
        for one in (decoder, exact):
            for name, tensor in one.tensors.items():
                if name.endswith(".o.weight"):
                    tensor.mul_(spread)
        before, wanted = decoder.outputs(), exact.outputs()
        given = batches(vocabulary=VOCABULARY)
        reduced(decoder.graph, given, rank=32, rope_dim=24)
        reduced(exact.graph, given, rank=32, rope_dim=24)
        made = {p.expr.dtype for p in decoder.graph.params.values() if p.persistent}
        assert made == {dtype}
        rounding = torch.finfo(dtype).eps ** 2 * spread**2
        assert relative_square(decoder.outputs(), before) <= 2 * relative_square(exact.outputs(), wanted) + 4 * rounding


def test_attention_that_is_not_causal_is_left_as_it_is(subject):
    graph = subject("grouped")
    last = graph.nodes_named("attention")[1]
    open_one = graph.op("attention", last.inputs, {**last.attrs, "causal": False}, scope=last.scope, before=last)
    graph.replace(last.output, open_one)
    graph.erase(last)
    for options in ({"rank": 16, "rope_dim": 16}, {"cache": 0.5}):
        changed = copy_of(graph)
        report = reduced(changed, batches(vocabulary=VOCABULARY), **options)
        assert [skip.scope for skip in report.passes[0].skipped] == ["layers.1.attention"]
        assert [node.scope for node in changed.nodes_named("latent_attention")] == ["layers.0.attention"]


def test_attentions_that_share_a_cache_keep_it(subject):
    graph = subject("grouped")
    first, last = graph.nodes_named("attention")
    for part in (1, 2):
        graph.set_input(last, part, first.input(part))
    graph.prune()
    with pytest.raises(PassError, match="it shares its keys or values with another attention"):
        reduced(graph, batches(2, vocabulary=VOCABULARY), rank=16, rope_dim=16)


WRONG = {
    "rank too large": ({"rank": 49, "rope_dim": 16}, "rank", "rank 49 is not from 1 to 48, which loses nothing beside"),
    "no rank": ({"rank": 0, "rope_dim": 16}, "rank", "rank 0 is not from 1 to 48"),
    "odd rotary width": ({"rope_dim": 7}, "rope_dim", "rope-dim 7 is no even number up to 32"),
    "rotary width too large": ({"rope_dim": 34}, "rope_dim", "rope-dim 34 is no even number up to 32"),
}


@pytest.mark.parametrize(("options", "option", "cause"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("planned", [False, True])
def test_widths_that_do_not_fit_are_refused(options, option, cause, planned, subject):
    with pytest.raises(PassError) as raised:
        reduced(subject("grouped"), batches(2, vocabulary=VOCABULARY), planned=planned, **options)
    assert raised.value.option == option
    assert raised.value.cause.startswith(cause)
    assert raised.value.remedy


def test_a_cache_of_next_to_nothing_is_refused_by_its_own_name(subject):
    with pytest.raises(PassError) as raised:
        reduced(subject("grouped"), batches(2, vocabulary=VOCABULARY), cache=0.01)
    assert raised.value.option == "cache"


def test_widths_without_calibration_data_are_refused(subject):
    for options in ({"rank": 16}, {"rope_dim": 8}, {"cache": 0.5}):
        with pytest.raises(PassError, match="this needs calibration data") as raised:
            Pipeline([GqaToMla(**options)]).run(subject("grouped"))
        assert raised.value.remedy == "add `calibration: {data: text.txt}`"
