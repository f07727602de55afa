"""Models of pictures for another size of pictures than their config's, whose table of positions is resized once."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import interpolate

from backends.onnx import OnnxEmission
from backends.onnx import propose as propose_onnx
from backends.safetensors import emit, require
from compiler.errors import CaptureError
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from tests.families import FAMILIES

TOLERANCE = 1e-5


class Table(nn.Module):
    """A learnt table, resized and added to pictures."""

    def __init__(self, size: tuple[int, int], after: tuple[int, int], **how: object) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 3, *size))
        self.after, self.how = after, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + interpolate(self.table, size=self.after, **self.how)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("after", [(5, 9), (11, 2), (1, 1), (4, 6)])
def test_a_resized_table_is_a_table(mode, corners, antialias, after):
    module = Table((4, 6), after, mode=mode, align_corners=corners, antialias=antialias).eval()
    pixels = torch.randn(2, 3, *after)
    graph = capture(module, inputs={"x": pixels})
    assert [node.op.name for node in graph.nodes] == ["add"]
    (output,) = run(graph, {"x": pixels}).values()
    torch.testing.assert_close(output, module(pixels), rtol=0, atol=1e-5)


def test_what_is_computed_is_not_resized():
    class Resized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return interpolate(x, size=(3, 3), mode="bilinear")

    with pytest.raises(CaptureError, match="to resize what is computed"):
        capture(Resized().eval(), inputs={"x": torch.randn(1, 2, 4, 4)})


@pytest.fixture(scope="module")
def model():
    return FAMILIES["dinov2"].build(seed=1)


def of_size(model, size: int, folder) -> Graph:
    model.save_pretrained(folder)
    return capture(folder, image=size)


@pytest.mark.parametrize("factor", [0.5, 1, 1.5])
def test_pictures_of_another_size(model, factor, tmp_path):
    """The graph is what the class computes, and is written as the class with a table of that size."""
    size = int(factor * model.config.image_size)
    graph = of_size(model, size, tmp_path / "source")
    pixels = torch.randn(2, model.config.num_channels, size, size)
    with torch.no_grad():
        wanted = model(pixel_values=pixels).logits
    bound = TOLERANCE * float(wanted.abs().max())
    torch.testing.assert_close(run(graph, {"pixel_values": pixels})["logits"], wanted, rtol=0, atol=bound)
    emission = require(graph)
    assert emission.config["image_size"] == size
    (tmp_path / "written").mkdir()
    emit(emission, graph.sources, tmp_path / "written")
    written = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "written").eval()
    with torch.no_grad():
        torch.testing.assert_close(written(pixel_values=pixels).logits, wanted, rtol=0, atol=bound)
    assert isinstance(propose_onnx(graph, "ort-cpu"), OnnxEmission)


def test_a_model_of_text_takes_no_pictures(tmp_path):
    with pytest.raises(CaptureError, match="takes no pictures"):
        of_size(FAMILIES["llama"].build(seed=1), 32, tmp_path)
