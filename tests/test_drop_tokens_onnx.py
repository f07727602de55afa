"""ONNX models of fewer tokens give what their graphs do, and a sample in a padded batch what it gives alone."""

from __future__ import annotations

import pytest
import torch

from backends.onnx import emit, propose, verify
from compiler.errors import TargetError
from compiler.ir.execute import run
from tests.families import FAMILIES
from tests.test_drop_tokens import MERGED, OPTIONS, dropped
from tests.test_onnx import error, tolerance, written


def test_an_onnx_model_merges_nothing_of_one_token(tmp_path):
    graph, reduced = dropped("bert", keep=0.6, merge="bipartite")
    given = FAMILIES["bert"].inputs(batch=2, tokens=1)
    found = written(reduced, tmp_path, "ort-cpu").run(**given, attention_mask=torch.ones_like(given["input_ids"]))
    for output, value in run(graph, given).items():
        torch.testing.assert_close(found[output], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [*OPTIONS.values(), *MERGED.values()], ids=[*OPTIONS, *MERGED])
def test_an_onnx_model_drops_the_same_tokens(options, tmp_path):
    for name in ("dinov2", "modernbert"):
        if FAMILIES[name].kind == "text" and options in list(MERGED.values()):
            continue
        graph, reduced = dropped(name, **options)
        given = FAMILIES[name].inputs(batch=2, tokens=9)
        mask = {"attention_mask": torch.ones_like(given["input_ids"])} if "input_ids" in given else {}
        for target in ("ort-cpu", "onnx"):
            found = written(reduced, tmp_path / name / target, target).run(**given, **mask)
            for output, value in run(reduced, given).items():
                assert error(found[output], value) <= tolerance(graph)


@pytest.mark.parametrize(("name", "merge"), [("whisper", "average"), ("t5", "none"), ("t5", "bipartite")])
def test_an_encoder_of_fewer_tokens_is_decoded_as_in_the_graph(name, merge, tmp_path):
    _, reduced = dropped(name, keep=0.6, merge=merge)
    emission = propose(reduced)
    emit(emission, reduced.sources, tmp_path)
    assert verify(emission, tmp_path).holds


@pytest.mark.parametrize("name", ["bert", "modernbert", "siglip_text"])
@pytest.mark.parametrize("score", ["class", "received", "last", "recency", "similarity", "merged"])
def test_a_sample_gives_in_a_padded_batch_what_it_gives_alone(name, score, tmp_path):
    chosen = {"merge": "bipartite"} if score == "merged" else {"score": score, "suffix": int(score != "similarity")}
    graph, reduced = dropped(name, depth=3, keep=(0.8, 0.45, 0.3), **chosen)
    model, (output, *_) = written(reduced, tmp_path), reduced.outputs
    ids = FAMILIES[name].inputs(batch=3, tokens=12)["input_ids"]
    lengths, mask = (12, 7, 1), torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, length:], mask[row, length:] = 0, 0
    found = model.run(input_ids=ids, attention_mask=mask)[output]
    for row, length in enumerate(lengths):
        alone = run(reduced, {"input_ids": ids[row : row + 1, :length]})[output]
        assert error(found[row : row + 1, :length], alone) <= tolerance(graph)


def test_merged_tokens_cannot_go_on_from_a_cache():
    _, reduced = dropped("llama", keep=0.6, merge="bipartite")
    with pytest.raises(TargetError, match="cannot go on from a cache"):
        propose(reduced)
