"""How the truncating conversion chooses: downhill between splits, a rank for every layer, fewer numbers to meet in."""

from __future__ import annotations

import pytest
import torch

from compiler.errors import PassError
from compiler.ir.facts import latent_sites
from compiler.pipeline import Pipeline
from passes.gqa_to_mla import GqaToMla
from passes.gqa_to_mla.choose import descend
from tests.captures import graph_of


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 50, (2, 24), generator=generator)} for _ in range(count)]


def converted(family, **options):
    torch.manual_seed(0)
    graph = graph_of(family)
    report = Pipeline([GqaToMla(**options)]).run(graph, calibration=lambda _: batches())
    return graph, report.passes[0]


@pytest.mark.parametrize("lowest", range(6))
def test_descent_from_the_middle_finds_the_lowest_point_of_a_valley(lowest):
    found = descend(range(6), lambda place: abs(place - lowest))
    assert min(found, key=lambda place: found[place]) == lowest


def test_descent_takes_what_there_is():
    assert descend([7], float) == {7: 7.0}
    assert descend([7, 3], float) == {7: 7.0, 3: 3.0}


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_ranks_by_layer_keep_to_the_cache_and_are_taken_only_when_nearer(family):
    graph, report = converted(family, cache=0.5, ranks="by-layer")
    cached = [site.rank + site.rotary_dim for site in latent_sites(graph)]
    before = sum(item.numbers["cache_values_before"] for item in report.rewritten)
    assert sum(cached) <= before / 2
    chosen = [trial for trial in report.trials if trial.chosen]
    assert len(chosen) == 1
    assert chosen[0].distance == min(trial.distance for trial in report.trials)


def test_a_plan_of_ranks_by_layer_promises_no_stock_class():
    for ranks, distinct in (("uniform", 1), ("by-layer", 2)):
        graph = graph_of("llama")
        Pipeline([GqaToMla(cache=0.5, ranks=ranks)]).run(graph, planned=True, calibration=lambda _: batches())
        assert len({site.rank for site in latent_sites(graph)}) == distinct


def test_ranks_by_layer_without_a_cache_are_refused():
    with pytest.raises(PassError, match="shares out a `cache`, and none is given"):
        GqaToMla(rank=8, ranks="by-layer")


def test_heads_meet_in_fewer_numbers_only_where_that_costs_next_to_nothing():
    _, exact = converted("llama", rank=16, rope_dim="full")
    rows = exact.rewritten[0].numbers
    assert rows["query_rows_after"] == 4 * 24  # every component rotates: no unrotated number is left
    graph, report = converted("llama", rank=18, rope_dim=6)
    widths = {site.unrotated_dim for site in latent_sites(graph)}
    assert len(widths) == 1
    assert widths.pop() <= 12
    assert all(item.numbers["key_error"] >= 0 for item in report.rewritten)
