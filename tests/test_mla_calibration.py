"""What the truncating conversion asks of calibration data, and what it says of them."""

from __future__ import annotations

import pytest

from compiler.errors import PassError
from compiler.ir.facts import attention_sites
from compiler.ir.graph import Graph, Value
from compiler.pipeline import Pipeline, Report
from compiler.target import emission_of
from passes.gqa_to_mla import GqaToMla
from tests.captures import graph_of
from tests.test_gqa_to_mla import VOCABULARY, Decoder
from tests.truncation import batches, first_output, reduced, relative_square, token_ids


def computed(graph: Graph, bias: Value) -> Value:
    """Twice ``bias``, by an operation."""
    return graph.op("add", [bias, bias], before=next(iter(graph.nodes)))


def test_a_bias_of_the_output_projection_may_be_computed():
    """It is left out of what the projection is fitted to, like one that is a parameter."""
    lost = []
    for change in (False, True):
        decoder = Decoder(bias="o")
        for output in (site.output for site in attention_sites(decoder.graph)):
            bias = output.input(2)
            decoder.tensors[bias.name].mul_(10 if change else 20)
            if change:
                decoder.graph.set_input(output, 2, computed(decoder.graph, bias))
        ids = token_ids(vocabulary=VOCABULARY)
        before = first_output(decoder.graph, ids)
        reduced(decoder.graph, batches(vocabulary=VOCABULARY), rank=24, rope_dim=16)
        lost.append(relative_square(first_output(decoder.graph, ids), before))
    assert lost[1] == pytest.approx(lost[0], rel=1e-3)


def warnings_of(tokens: int) -> list[str]:
    report: Report = reduced(Decoder().graph, batches(1, tokens, vocabulary=VOCABULARY), rank=24, rope_dim=16)
    return report.passes[0].warnings


def test_few_tokens_for_the_latent_are_warned_of():
    assert warnings_of(96) == []
    assert warnings_of(95) == ["a latent of 24 follows from 95 tokens of calibration data: 96 would be enough"]


def test_a_plan_and_a_run_with_one_rotary_pair_agree_on_the_class():
    classes = []
    for planned in (True, False):
        graph = graph_of("llama", 3)
        reduced(graph, batches(2), planned=planned, rank=14, rope_dim=2)
        classes.append(emission_of(graph).architecture)
    assert classes[0] == classes[1]


def test_numbers_that_are_the_full_widths_need_no_calibration_and_a_plan_asks_for_it_where_they_are_not():
    Pipeline([GqaToMla(rank=32, rope_dim=32)]).run(Decoder().graph, planned=True)
    assert not GqaToMla(rank=16).calibrated
    with pytest.raises(PassError, match="this needs calibration data"):
        Pipeline([GqaToMla(rank=16)]).run(Decoder().graph, planned=True)
