"""Pruning of the residual stream, as it lies or turned to its principal components."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from backends.safetensors import emit, require
from compiler.errors import PassError, TargetError
from compiler.evaluate import load_model
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.pipeline import Pipeline
from compiler.rewrite.rotation import turn
from compiler.target import emission_of
from compiler.weights.ops.basic import literal
from passes.low_rank import LowRank
from passes.prune import Prune
from tests.captures import graph_of, plan_of
from tests.emitted import TOLERANCE, Job, distance
from tests.families import FAMILIES
from tests.removed import set_value, zero
from tests.test_prune import Pruned, batches
from tests.test_stream import stream_groups


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
    graph = graph_of("llama")
    before = run(graph, FAMILIES["llama"].inputs())
    (group,) = stream_groups(graph)
    zero(graph, group, [index for index in range(48) if index % 6])
    there = run(graph, FAMILIES["llama"].inputs())
    Pipeline([Prune(what="hidden", keep=40, align=8, refit=False)]).run(graph, calibration=lambda _: batches("llama"))
    assert distance(run(graph, FAMILIES["llama"].inputs()), there) < TOLERANCE < distance(before, there)


def test_of_a_turned_stream_the_directions_go_that_nothing_lies_along():
    """A stream in 40 of 48 dimensions, none of them an axis, loses the others for nothing."""
    graph = graph_of("llama")
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
    graph = plan_of("gemma")
    Pipeline([Prune(what="hidden", keep=24, align=8, rotate=True)]).run(graph, planned=True)
    assert graph.nodes_named("embedding")[0].output.shape[-1] == 24
    with pytest.raises(PassError, match="the head cannot share"):
        Pipeline([Prune(what="hidden", keep=47, align=1, rotate=True)]).run(plan_of("gemma"), planned=True)
    with pytest.raises(PassError, match="only the residual stream is turned"):
        Prune(what="channels", rotate=True)
