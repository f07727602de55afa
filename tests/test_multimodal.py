"""Language models that read pictures or sound as well: compressed for texts, the other parts stay as they are."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from backends.safetensors import emit, require
from compiler.errors import TargetError
from compiler.evaluate.loading import load_model
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.pipeline import Pipeline
from compiler.target import emission_of
from passes.prune import Prune
from passes.quantize import Quantize
from tests.emitted import TOLERANCE, distance, stored_bytes
from tests.multimodal import MULTIMODAL, VOCABULARY, idefics2
from tests.test_generated import written as generated
from tests.test_onnx import check_decoding, written

APART = ("tower", "visual", "vision_model", "projector", "connector")
IDS = torch.arange(14).reshape(2, 7) * 5 % (VOCABULARY - 10)
LAYERS = {"role": "linear", "name": "*.layers.*"}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_language_model_is_captured_for_texts_and_written_smaller_with_all_other_parts(name, tmp_path):
    """Sizes go into the config of texts within the config; what reads pictures or sound is the same to the bit."""
    model = MULTIMODAL[name]()
    model.save_pretrained(tmp_path / "model")
    graph = capture(tmp_path / "model")
    with torch.no_grad():
        assert distance(model(input_ids=IDS), run(graph, {"input_ids": IDS})) <= TOLERANCE
    assert graph.origin.apart and all(any(word in path for word in APART) for path in graph.origin.apart)
    steps = [Prune(where="mlp", keep=0.5, align=32, score="magnitude"), Quantize(group=16, bits=4, where=LAYERS)]
    Pipeline(steps).run(graph, bytes_of=stored_bytes)
    emission = require(graph)
    (tmp_path / "out").mkdir()
    emit(emission, graph.sources, tmp_path / "out")
    assert emission.architecture == type(model).__name__
    assert emission.config["text_config"]["intermediate_size"] == 32
    reloaded, before = load_model(tmp_path / "out"), model.state_dict()
    with torch.no_grad():
        assert distance(reloaded(input_ids=IDS), run(graph, {"input_ids": IDS})) <= TOLERANCE
    others = {key for key in before if any(key.startswith(f"{path}.") for path in graph.origin.apart)}
    assert others and all(torch.equal(reloaded.state_dict()[key], before[key]) for key in others)


def test_what_holds_the_language_model_alone_says_so():
    (note,) = emission_of(capture(MULTIMODAL["llava"]()), "generated").notes
    assert "it holds nothing of model.vision_tower, model.multi_modal_projector" in note


def test_a_config_that_says_the_sizes_of_texts_at_its_top_is_written_smaller(tmp_path):
    """As those of Qwen2-VL that are published: only pictures have a config of their own."""
    MULTIMODAL["qwen2_vl"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config.pop("text_config"), **config}))
    graph = capture(tmp_path)
    Pipeline([Prune(where="mlp", keep=0.5, align=32, score="magnitude")]).run(graph)
    emission = require(graph)
    assert emission.architecture == "Qwen2VLForConditionalGeneration" and emission.config["intermediate_size"] == 32


def test_a_stream_that_others_write_to_keeps_its_width_in_the_class(tmp_path):
    MULTIMODAL["llava"]().save_pretrained(tmp_path)
    graph = capture(tmp_path)
    Pipeline([Prune(what="hidden", keep=0.75, align=8, score="magnitude")]).run(graph)
    emission = emission_of(graph)
    assert emission.files and any("it holds nothing of model.vision_tower" in note for note in emission.notes)


def test_sizes_that_other_parts_share_are_not_changed(tmp_path):
    """The connector of Idefics 2 is as wide as the language model's MLPs."""
    idefics2().save_pretrained(tmp_path)
    graph = capture(tmp_path)
    Pipeline([Prune(where="mlp", keep=0.5, align=32, score="magnitude")]).run(graph)
    with pytest.raises(TargetError, match="no stock model class"):
        require(graph)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_positions_of_several_axes_are_those_of_a_text(name, tmp_path):
    """Rotations are lifted, so that ONNX models and generated code go on from a cache."""
    graph = capture(MULTIMODAL[name]())
    assert len(graph.nodes_named("rope")) == 4 and len(graph.nodes_named("rope_table")) == 1
    ids = IDS.repeat(1, 2)[:, :11]
    check_decoding(graph, written(graph, tmp_path / "onnx"), ids, chunks=True)
    model = generated(graph, tmp_path / "own")
    with torch.no_grad():
        assert distance(model(input_ids=ids), run(graph, {"input_ids": ids})) <= TOLERANCE


class Axes(nn.Module):
    """Angles for three axes of positions, of which pairs are picked; ``apart`` counts the second axis differently."""

    def __init__(self, picks: list[int], *, apart: bool) -> None:
        super().__init__()
        self.picks, self.apart = picks, apart
        self.register_buffer("rates", torch.linspace(1, 0.1, 6))

    def forward(self, x: Tensor) -> Tensor:
        row = torch.arange(x.shape[1], device=x.device)[None, None]
        rows = torch.cat([row, row + 1, row]) if self.apart else row.expand(3, 1, -1)
        angles = rows[..., None].float() * self.rates
        return x + torch.cat([angles.cos()[axis, ..., 2 * i : 2 * i + 2] for i, axis in enumerate(self.picks)], -1)


@pytest.mark.parametrize(("picks", "apart", "left"), [((0, 1, 2), False, 0), ((0, 2), False, 2), ((0, 1, 2), True, 3)])
def test_only_whole_tables_of_axes_that_count_alike_are_one(picks, apart, left):
    module, x = Axes([*picks], apart=apart).eval(), torch.randn(2, 5, 2 * len(picks))
    graph = capture(module, inputs={"x": x})
    assert len([node for node in graph.nodes_named("slice") if node.attr("axis")]) == left
    (output,) = run(graph, {"x": x}).values()
    torch.testing.assert_close(output, module(x), rtol=0, atol=TOLERANCE)


class Rolled(nn.Module):
    """Tables of one of three axes that count alike, rolled over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", torch.linspace(1, 0.1, 6))

    def forward(self, x: Tensor) -> Tensor:
        row = torch.arange(x.shape[1], device=x.device)[None].expand(3, -1)
        table = (row[..., None].float() * self.rates).cos()[0]
        return x + torch.cat([table[1:], table[:1]], 0)


def test_a_roll_over_tokens_is_no_choice_of_axes():
    module, x = Rolled().eval(), torch.randn(2, 5, 6)
    (output,) = run(capture(module, inputs={"x": x}), {"x": x}).values()
    torch.testing.assert_close(output, module(x), rtol=0, atol=TOLERANCE)


def test_the_gptq_layout_goes_by_the_names_of_modules(tmp_path):
    """Which the checkpoint has others for; what reads pictures stays dense."""
    MULTIMODAL["llava"]().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    graph = capture(tmp_path / "model")
    Pipeline([Quantize(group=16, bits=4, where="mlp")]).run(graph)
    emission = require(graph, "gptq")
    (tmp_path / "out").mkdir()
    emit(emission, graph.sources, tmp_path / "out")
    dense = list(emission.config["quantization_config"]["dynamic"])
    assert any("vision_tower" in name for name in dense) and not any("gate_proj" in name for name in dense)
    with torch.no_grad():
        theirs = load_model(tmp_path / "out")(input_ids=IDS)
    assert distance(theirs, run(graph, {"input_ids": IDS})) <= 2**-8
