"""Language models that read pictures or sound as well: compressed for texts, the other parts stay as they are."""

from __future__ import annotations

import pytest
import torch

from backends.safetensors import emit, require
from compiler.evaluate.loading import load_model
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.pipeline import Pipeline
from compiler.target import emission_of
from passes.prune import Prune
from passes.quantize import Quantize
from tests.emitted import TOLERANCE, distance, stored_bytes
from tests.multimodal import MULTIMODAL, VOCABULARY

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
    written, before = load_model(tmp_path / "out"), model.state_dict()
    with torch.no_grad():
        assert distance(written(input_ids=IDS), run(graph, {"input_ids": IDS})) <= TOLERANCE
    others = {key for key in before if any(key.startswith(f"{path}.") for path in graph.origin.apart)}
    assert others and all(torch.equal(written.state_dict()[key], before[key]) for key in others)


def test_what_holds_the_language_model_alone_says_so():
    (note,) = emission_of(capture(MULTIMODAL["llava"]()), "generated").notes
    assert "it holds nothing of model.vision_tower, model.multi_modal_projector" in note
