"""Models of pictures: other sizes of pictures than their config's, and image files as data."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate

from backends.onnx import OnnxEmission
from backends.onnx import propose as propose_onnx
from backends.safetensors import emit, require
from compiler.cli import main
from compiler.datafiles import check_kind, fingerprint, image_files, kind_of, taken
from compiler.errors import CaptureError, DataError
from compiler.evaluate import evaluate_model
from compiler.evaluate.images import MEAN, SPREAD
from compiler.evaluate.photographs import photographs
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


class Twice(nn.Module):
    """One parameter, used in two ways that each make a table of it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.table, self.other = nn.Parameter(torch.randn(1, 6, 4, 4)), nn.Parameter(torch.randn(1, 2, 4, 4))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.table[:, :2], self.table[:, 2:4]
        if self.way == "parts":
            made = [interpolate(part, size=(8, 8), mode="bilinear") for part in (first, second)]
        elif self.way == "modes":
            made = [interpolate(first, size=(8, 8), mode=mode) for mode in ("bilinear", "bicubic")]
        else:
            made = [torch.cat([first, self.other], 2), torch.cat([first, second], 2)]
        return x + made[0] - 2 * made[1]


@pytest.mark.parametrize("way", ["parts", "modes", "joined"])
def test_tables_of_one_parameter_are_told_apart(way):
    module = Twice(way).eval()
    x = torch.randn(1, 2, 8, 4 if way == "joined" else 8)
    (output,) = run(capture(module, inputs={"x": x}), {"x": x}).values()
    torch.testing.assert_close(output, module(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", [torch.clamp, torch.mul])
def test_a_number_that_is_read_out_is_no_constant(way):
    class ReadsOut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("limit", torch.tensor(0.1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return way(x, self.limit.item())

    with pytest.raises(CaptureError, match="a number that is computed"):
        capture(ReadsOut().eval(), inputs={"x": torch.randn(2, 3)})


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


def test_a_live_model_is_captured_for_pictures_of_another_size(model):
    size = model.config.image_size // 2
    assert capture(model, image=size).inputs["pixel_values"].shape[2:] == (size, size)
    with pytest.raises(CaptureError, match="say already how large"):
        capture(model, image=size, inputs={"pixel_values": torch.zeros(1, 3, size, size)})


def test_a_model_of_text_takes_no_pictures(tmp_path):
    with pytest.raises(CaptureError, match="takes no pictures"):
        of_size(FAMILIES["llama"].build(seed=1), 32, tmp_path)


# --- pictures as data ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Six pictures of several kinds and shapes, one in a folder of its own, beside what is no picture."""
    (tmp_path / "more").mkdir()
    (tmp_path / "notes.txt").write_text("no picture")
    source = torch.Generator().manual_seed(0)
    for name, mode, shape in (
        ("0.png", "RGB", (40, 50, 3)),
        ("1.jpg", "RGB", (30, 30, 3)),
        ("2.png", "L", (20, 60)),
        ("3.bmp", "RGB", (33, 32, 3)),
        ("4.png", "RGBA", (40, 40, 4)),
        ("more/5.webp", "RGB", (64, 48, 3)),
    ):
        pixels = torch.randint(256, shape, generator=source, dtype=torch.uint8).numpy()
        Image.fromarray(pixels, mode).save(tmp_path / name)
    return tmp_path


def test_image_files_are_pictures(folder):
    assert kind_of(folder, "pictures") == "pictures" and [path.name for path in image_files(folder)][-1] == "5.webp"
    before = fingerprint(folder)
    (folder / "1.jpg").unlink()
    assert fingerprint(folder) != before
    check_kind(taken(["pixel_values"]), folder, "ViT")
    with pytest.raises(DataError, match="takes no pictures"):
        check_kind(taken(["input_ids"]), folder, "Llama")


def test_pictures_without_a_preprocessor(folder, tmp_path):
    """The middle of each, with the mean and spread of ImageNet; the same for the same seed."""
    found, again, other = (photographs(tmp_path, folder, 4, seed, (24, 32), (24, 32)) for seed in (0, 0, 1))
    assert all(pixels.shape == (1, 3, 24, 32) for pixels in found)
    assert all(map(torch.equal, found, again)) and not all(map(torch.equal, found, other))
    spread = torch.tensor(SPREAD).view(1, 3, 1, 1)
    assert all(bool(((pixels * spread + torch.tensor(MEAN).view(1, 3, 1, 1)) > -1e-6).all()) for pixels in found)


def test_pictures_of_the_models_own_preprocessor(folder, tmp_path):
    (tmp_path / "model").mkdir()
    own = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(own))
    (pixels, *_) = photographs(tmp_path / "model", folder, 6, 0, (16, 16), (16, 16))
    (unasked, *_) = photographs(tmp_path / "model", folder, 6, 0, None, (32, 32))
    assert torch.equal(unasked, pixels)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    assert torch.equal(pixels, processor(Image.open(folder / "0.png"), return_tensors="pt")["pixel_values"])
    with pytest.raises(DataError, match=r"16 x 16.*takes 32 x 32") as error:
        photographs(tmp_path / "model", folder, 1, 0, (32, 32), (32, 32))
    assert error.value.remedy == "write `inputs: {image: 16}` in the recipe"
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps({**own, "image_std": [0.0] * 3}))
    with pytest.raises(DataError, match="numbers that are not finite"):
        photographs(tmp_path / "model", folder, 1, 0, (16, 16), (16, 16))


def test_what_is_no_picture(folder, tmp_path):
    with pytest.raises(DataError, match="6 pictures where 7 are asked for"):
        photographs(tmp_path, folder, 7, 0, (8, 8), (8, 8))
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot read the picture"):
        photographs(tmp_path, folder, 6, 0, (8, 8), (8, 8))


def test_random_pictures_are_of_the_size_asked_for(model, tmp_path):
    """What was made for smaller pictures is measured on these, beside the original, which resizes its table."""
    size = model.config.image_size // 2
    graph = of_size(model, size, tmp_path / "source")
    (tmp_path / "written").mkdir()
    emit(require(graph), graph.sources, tmp_path / "written")
    asked = {"against": tmp_path / "source", "samples": 2, "image": size}
    found = evaluate_model(tmp_path / "written", **asked)
    assert found.metrics["relative-error"].value < TOLERANCE
    assert (found.inputs["kind"], found.inputs["image"]) == ("pictures", size)


def test_a_model_of_text_is_not_measured_on_pictures(tmp_path):
    FAMILIES["llama"].build(seed=1).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="takes no pictures"):
        evaluate_model(tmp_path, image=16)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_eight_bits(mode, tmp_path):
    Image.new(mode, (9, 9)).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match="not one of eight bits"):
        photographs(tmp_path, tmp_path, 1, 0, (8, 8), (8, 8))


def test_what_a_file_is_called_does_not_decide_how_it_is_read(tmp_path):
    (tmp_path / "drawing.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(DataError, match="cannot read the picture"):
        photographs(tmp_path, tmp_path, 1, 0, (8, 8), (8, 8))


def test_a_directory_of_several_kinds_is_what_the_model_takes(folder):
    before = fingerprint(folder)
    (folder / "speech.wav").write_bytes(b"RIFF")
    assert kind_of(folder, "speech") == "speech" and kind_of(folder, "pictures") == "pictures"
    with_sound = fingerprint(folder)
    (folder / "1.jpg").write_bytes(b"other")
    assert len({before, with_sound, fingerprint(folder)}) == 3
    check_kind(taken(["input_features"]), folder, "Whisper")


def test_a_bomb_is_not_unpacked(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size < 100_000
    with pytest.raises(DataError, match="9000 x 9000 is too large"):
        photographs(tmp_path, tmp_path, 1, 0, (8, 8), (8, 8))


def test_a_job_calibrated_and_measured_on_pictures(model, folder, tmp_path):
    """Of another size than the config's; a matrix is rounded by what enters it."""
    size = model.config.image_size // 2
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "recipe.yaml").write_text(f"""
model: source
inputs: {{image: {size}}}
calibration: {{data: {folder}, samples: 6}}
passes: [quantize: {{bits: 4, method: gptq, group: 16}}]
evaluate: {{data: {folder}, samples: 4, metrics: [cosine, relative-error]}}
""")
    assert main([str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "-q"]) == 0
    report = json.loads((tmp_path / "out" / "compress" / "report.json").read_text())
    assert report["evaluation"]["metrics"]["cosine"]["value"] > 0.9
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_size"] == size
