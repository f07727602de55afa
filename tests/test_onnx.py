"""ONNX models compute what their graphs compute: whole, token by token from a cache, in batches, with padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from backends.onnx import emit, propose, verify
from backends.onnx.check import buffers, empty_cache, with_room
from backends.onnx.emitters import RULES
from compiler.errors import TargetError
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.layers import segments
from compiler.ir.ops import op_named, operations
from compiler.ir.types import TensorType
from compiler.pipeline import Pipeline
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import load
from compiler.weights.ops import take
from compiler.weights.ops.rotary import rotary_table
from compiler.weights.source import MemorySource
from passes import GqaToMla
from tests.captures import graph_of
from tests.families import FAMILIES
from tests.latent import latent_graph

TARGETS = ("ort-cpu", "onnx")
CAUSAL = [name for name, family in FAMILIES.items() if family.architecture.endswith(("CausalLM", "LMHeadModel"))]
PAIRED = ["t5", "whisper"]
ENCODERS = [name for name in FAMILIES if name not in CAUSAL and name not in PAIRED]


def tolerance(graph: Graph) -> float:
    """Rounding of float32 sums in another order, adding up over the layers; relative to the largest output."""
    return 16 * torch.finfo(torch.float32).eps * max(1, len(segments(graph)))


class Session:
    """A written model in ONNX Runtime. ``cache`` holds what it keeps of past tokens."""

    def __init__(self, path: Path):
        onnx.checker.check_model(path, full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(path, options)
        self.past = [value for value in self.session.get_inputs() if value.name.startswith("past")]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        return empty_cache(self.session, batch)

    def run(self, **feeds: torch.Tensor | np.ndarray) -> dict[str, torch.Tensor]:
        given = {name: np.asarray(value) for name, value in feeds.items()}
        return {name: torch.from_numpy(x) for name, x in zip(self.outputs, self.session.run(None, given), strict=True)}

    def step(self, ids: torch.Tensor, mask: torch.Tensor, past: dict | None = None) -> tuple[torch.Tensor, dict]:
        """Logits for ``ids`` after ``past``, and what is past then."""
        past = past or self.empty(len(ids))
        past |= {name: with_room(np.asarray(past[name]), mask.shape[1]) for name in buffers(self.session)}
        found = self.run(input_ids=ids, attention_mask=mask, **past)
        kept = {
            name.replace("present", "past_key_values"): x for name, x in found.items() if name.startswith("present")
        }
        return found["logits"], kept


def written(graph: Graph, directory: Path, target: str = "ort-cpu", **options) -> Session:
    directory.mkdir(parents=True, exist_ok=True)
    emit(propose(graph, target, **options), graph.sources, directory)
    return Session(directory / "model.onnx")


def error(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    assert theirs.shape == ours.shape
    return float((theirs - ours).abs().max() / ours.abs().max())


def check_decoding(graph: Graph, model: Session, ids: torch.Tensor, *, chunks: bool) -> None:
    """Prefill, then token by token; where possible in pieces; padded on the left and on the right."""
    allowed, logits = tolerance(graph), run(graph, {"input_ids": ids})["logits"]
    ones = torch.ones_like(ids)
    first, past = model.step(ids[:, :4], ones[:, :4])
    assert error(first, logits[:, :4]) <= allowed
    for place in range(4, 7):
        found, past = model.step(ids[:, place : place + 1], ones[:, : place + 1], past)
        assert error(found, logits[:, place : place + 1]) <= allowed
    if chunks:
        assert error(model.step(ids[:, 7:], ones, past)[0], logits[:, 7:]) <= allowed
    check_padding(model, ids, logits, allowed, left=True)
    check_padding(model, ids, logits, allowed, left=False)


def check_padding(model: Session, ids: torch.Tensor, logits: torch.Tensor, allowed: float, *, left: bool) -> None:
    """Samples of different lengths in one batch, and a token after each: what each of them gives alone."""
    batch, length = ids.shape
    lengths = [length - 2 - 2 * index for index in range(batch)]
    padded, mask = torch.zeros(batch, length - 1, dtype=torch.int64), torch.zeros(batch, length - 1, dtype=torch.int64)
    places = [slice(length - 1 - n, None) if left else slice(0, n) for n in lengths]
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        padded[row, place], mask[row, place] = ids[row, :n], 1
    found, past = model.step(padded, mask)
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        assert error(found[row, place], logits[row, :n]) <= allowed
    following = torch.stack([ids[row, n] for row, n in enumerate(lengths)])[:, None]
    found, _ = model.step(following, torch.cat((mask, torch.ones(batch, 1, dtype=torch.int64)), 1), past)
    for row, n in enumerate(lengths):
        assert error(found[row, 0], logits[row, n]) <= allowed


def test_every_operation_and_attribute_has_a_rule():
    assert set(RULES) == set(operations())
    assert {name: rule.attrs for name, rule in RULES.items()} == {name: op_named(name).attrs.keys() for name in RULES}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model_computes_and_continues_as_its_graph(name, tmp_path):
    graph = graph_of(name, 3)
    ids = FAMILIES[name].inputs(batch=3, tokens=9)["input_ids"]
    for target in TARGETS:
        model = written(graph, tmp_path / target, target)
        check_decoding(graph, model, ids, chunks=target == "onnx")
        check_decoding(graph, model, ids[:1], chunks=True)


WIDE = {
    "llama": {"head_dim": 16},
    "qwen2": {"hidden_size": 64},
    "cohere2": {"head_dim": 16, "hidden_size": 64},
    "gpt_neox": {"hidden_size": 128},
    "gpt2": {"n_embd": 64},
    "mistral": {"head_dim": 16},
}
"""Heads of a multiple of eight, which ONNX Runtime's own attention takes: with biases, rotated in part or in pairs, in
windows, without rotation."""


@pytest.mark.parametrize("name", WIDE)
def test_grouped_attention_computes_and_continues_as_its_graph(name, tmp_path):
    family = FAMILIES[name]
    graph = graph_of(family.name, 3, **WIDE[name])
    emission = propose(graph)
    assert emission.models["model.onnx"].in_place
    emit(emission, graph.sources, tmp_path)
    model, ids = Session(tmp_path / "model.onnx"), family.inputs(batch=3, tokens=9)["input_ids"]
    check_decoding(graph, model, ids, chunks=False)
    check_decoding(graph, model, ids[:1], chunks=True)


def test_only_the_last_tokens_are_scored_when_asked(tmp_path):
    family = FAMILIES["llama"]
    graph = graph_of(family.name, 3)
    model, ids = written(graph, tmp_path), family.inputs(batch=2, tokens=6)["input_ids"]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **model.empty(2)}
    whole = model.run(**given)["logits"]
    for count in (1, 2, 6):
        assert torch.equal(model.run(**given, logits_to_keep=torch.tensor([count]))["logits"], whole[:, -count:])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PAIRED)
def test_an_encoder_and_a_decoder_compute_what_their_graph_computes(name, target, tmp_path):
    """The encoder once, the decoder at once, token by token and padded."""
    graph = graph_of(name, 3)
    emission = propose(graph, target)
    emit(emission, graph.sources, tmp_path)
    for file in emission.models:
        onnx.checker.check_model(tmp_path / file, full_check=True)
    found = verify(emission, tmp_path)
    assert found.error <= tolerance(graph) and found.holds


def test_a_decoder_ignores_padding_of_the_source(tmp_path):
    family = FAMILIES["t5"]
    graph = graph_of(family.name, 3)
    emit(propose(graph), graph.sources, tmp_path)
    encoder, decoder = (Session(tmp_path / f"{name}.onnx") for name in ("encoder", "decoder"))
    given = family.inputs(batch=2, tokens=6)
    short = run(graph, {**given, "input_ids": given["input_ids"][:, :5]})["logits"]
    mask = torch.ones_like(given["input_ids"])
    mask[:, 5:] = 0
    made = encoder.run(input_ids=given["input_ids"], attention_mask=mask)
    crossed = {f"past_key_values.{name}": value for name, value in made.items() if ".encoder." in name}
    own = {v.name: np.zeros([2, v.shape[1], 0, v.shape[3]], np.float32) for v in decoder.past if ".decoder." in v.name}
    ids = given["decoder_input_ids"]
    masks = {"attention_mask": torch.ones_like(ids), "encoder_attention_mask": mask}
    found = decoder.run(decoder_input_ids=ids, **masks, **crossed, **own)["logits"]
    assert error(found, short) <= tolerance(graph)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_computes_what_its_graph_computes(name, tmp_path):
    family = FAMILIES[name]
    graph = graph_of(family.name, 3)
    for target in TARGETS:
        model = written(graph, tmp_path / target, target)
        for batch in (1, 2):
            given = family.inputs(batch=batch)
            mask = {"attention_mask": torch.ones_like(given["input_ids"])} if "input_ids" in given else {}
            found = model.run(**given, **mask)
            for output, value in run(graph, given).items():
                assert error(found[output], value) <= tolerance(graph)


@pytest.mark.parametrize("name", [name for name in ENCODERS if FAMILIES[name].kind == "text"])
def test_an_encoder_ignores_padding(name, tmp_path):
    family = FAMILIES[name]
    graph = graph_of(family.name, 3)
    ids, output = family.inputs(batch=2, tokens=9)["input_ids"], next(iter(graph.outputs))
    short = run(graph, {"input_ids": ids[:, :6]})[output]
    ids[:, 6:], mask = 0, torch.ones_like(ids)
    mask[:, 6:] = 0
    found = written(graph, tmp_path).run(input_ids=ids, attention_mask=mask)[output]
    assert error(found[:, :6], short) <= tolerance(graph)


LATENT = {
    "sizes by layer": ("llama", (16, 11), (4, 2), True),
    "some layers": ("qwen2", (16, -1), (4, 0), False),
    "windows": ("gemma3", (16, 12), (3, 2), True),
    "caps": ("gemma2", (20, 20), (4, 4), False),
    "no rotation": ("opt", (12, 10), (0, 0), False),
}


@pytest.mark.parametrize("kind", LATENT)
def test_latent_attention_caches_latents(kind, tmp_path):
    name, ranks, pairs, normed = LATENT[kind]
    graph = latent_graph(graph_of(name, 3), ranks, pairs, normed=normed)
    for target in TARGETS:
        model = written(graph, tmp_path / target, target)
        check_decoding(graph, model, FAMILIES[name].inputs(batch=3, tokens=9)["input_ids"], chunks=True)
        widths = {value.name: value.shape[-1] for value in model.past}
        for index, (rank, count) in enumerate(zip(ranks, pairs, strict=True)):
            if rank >= 0:
                assert widths[f"past_key_values.{index}.latent"] == rank + 2 * count
                assert (f"past_key_values.{index}.latent" in buffers(model.session)) == (target == "ort-cpu")


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3", "gpt2"])
def test_exact_latent_attention_computes_and_continues(name, tmp_path):
    """At full width all of a key may be rotated, some of it, or none."""
    graph = graph_of(name, 3)
    Pipeline([GqaToMla(rank="full")]).run(graph)
    for target in TARGETS:
        model = written(graph, tmp_path / target, target)
        check_decoding(graph, model, FAMILIES[name].inputs(batch=3, tokens=9)["input_ids"], chunks=True)


def test_what_has_no_rule_is_refused_with_its_scope(monkeypatch, captured):
    monkeypatch.delitem(RULES, "silu")
    with pytest.raises(TargetError, match="`silu` has no ONNX form") as refused:
        propose(captured("llama"))
    assert refused.value.where == "model.layers.0.mlp.act_fn"


def test_an_unknown_target_is_refused(captured):
    with pytest.raises(TargetError, match="no ONNX target `ort-cup`") as refused:
        propose(captured("llama"), "ort-cup")
    assert refused.value.remedy == "did you mean `ort-cpu`?"


def test_tensors_may_lie_in_several_files(tmp_path):
    family = FAMILIES["llama"]
    graph = graph_of(family.name, 3)
    emit(propose(graph), graph.sources, tmp_path, shard_bytes=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = family.inputs()["input_ids"]
    found, _ = Session(tmp_path / "model.onnx").step(ids, torch.ones_like(ids))
    assert error(found, run(graph, {"input_ids": ids})["logits"]) <= tolerance(graph)


def test_a_part_of_a_rotary_table_is_that_part_of_the_whole():
    source = {"model": MemorySource({"frequencies": torch.rand(4)})}
    frequencies = load("model", "frequencies", TensorType(torch.float32, (4,)))
    whole = rotary_table(frequencies, "sin", 20, 1.5)
    for part in (take(whole, 0, 3, 9), take(take(whole, 0, 3, 15), 0, 2, 4), take(whole, 1, 1, 3)):
        assert part.type.static_shape == tuple(evaluate([part], source)[0].shape)
    values, part = evaluate([whole, take(take(whole, 0, 3, 15), 0, 2, 4)], source)
    assert torch.equal(part, values[5:7])
    assert torch.equal(values[2], torch.sin(2 * evaluate([frequencies], source)[0]) * 1.5)


def test_what_lies_in_half_precision_and_is_looked_up_stays_so(tmp_path):
    graph = graph_of("llama", 3, dtype=torch.bfloat16)
    emission = propose(graph)
    dtypes = {name: expr.dtype for name, expr in emission.tensors.items()}
    assert dtypes["model.embed_tokens.weight"] == torch.bfloat16
    assert {dtype for name, dtype in dtypes.items() if "embed" not in name} == {torch.float32}
    emit(emission, graph.sources, tmp_path)
    assert verify(emission, tmp_path).holds
