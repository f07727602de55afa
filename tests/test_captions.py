"""Pictures with texts beside them: what models get that compare both (CLIP, SigLIP)."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image

from compiler.cli import main
from compiler.datafiles import CAPTIONED, check_kind, fingerprint, kind_of, taken
from compiler.errors import DataError
from compiler.evaluate import evaluate_model
from compiler.evaluate.captions import captioned_calls
from compiler.evaluate.data import data_windows, graph_calls
from compiler.evaluate.loading import load_model
from compiler.evaluate.texts import TextData
from compiler.frontend import capture
from tests.small import write_recipe
from tests.tiny import byte_tokenizer, write_text

TEXT = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TEXT, "image_size": 16, "patch_size": 8}
COUNT = 11
WORDS = ["a", "very", "small", "picture", "of", "noise", "that", "no", "one", "has", "seen"]


def write_pairs(folder):
    folder.mkdir()
    source = torch.Generator().manual_seed(0)
    for index in range(COUNT):
        pixels = torch.randint(256, (20, 24, 3), generator=source, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(" ".join(WORDS[: index % len(WORDS) + 1]))
    Image.fromarray(pixels).save(folder / "alone.png")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**TEXT, "max_position_embeddings": 20, "projection_dim": 16, "eos_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 16})
    transformers.CLIPModel(config).save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    return folder, write_pairs(folder / "pairs")


def test_of_one_directory_each_model_takes_its_own(clip):
    folder, pairs = clip
    both = taken(["input_ids", "pixel_values"])
    assert both == CAPTIONED and taken(["pixel_values"]) == "pictures" and taken(["x"]) == ""
    assert kind_of(pairs, both) == CAPTIONED and kind_of(pairs, "pictures") == "pictures"
    check_kind("pictures", pairs, "ViT")
    with pytest.raises(DataError, match=r"a CLIPModel takes no text, which `text\.txt` is"):
        check_kind(both, write_text(folder), "CLIPModel")


def test_pairs_are_calls_of_several(clip):
    """Calibration and evaluation see the same pairs; texts are cut to what the model has positions for."""
    folder, pairs = clip
    data = TextData(pairs, samples=COUNT, length=512)
    calls = graph_calls(capture(folder / "tiny"), folder / "tiny", data)
    assert [len(call["pixel_values"]) for call in calls] == [len(call["input_ids"]) for call in calls] == [8, 3]
    assert all(call["input_ids"].shape[1] <= 20 and call["pixel_values"].shape[1:] == (3, 16, 16) for call in calls)
    windows = data_windows(load_model(folder / "tiny"), folder / "tiny", data)
    for call, window in zip(calls, windows, strict=True):
        assert all(torch.equal(call[name], window.arguments[name]) for name in ("input_ids", "pixel_values"))
    logits = load_model(folder / "tiny")(**windows[0].arguments).logits_per_image
    assert logits.shape == (8, 8)


def test_padding_that_is_read_is_as_long_as_the_model_was_trained_with(clip):
    folder, pairs = clip
    padded, read = byte_tokenizer(), byte_tokenizer()
    read.model_input_names = ["input_ids"]
    for tokenizer, widths in ((padded, {len("a very small")}), (read, {30})):
        made = captioned_calls(folder / "tiny", TextData(_first(pairs, 3), 3, 512), tokenizer, None, (16, 16), 30)
        assert {call["input_ids"].shape[1] for call in made} == widths
        (ids,) = (call["input_ids"] for call in made)
        assert ids[0, :1].tolist() == tokenizer("a")["input_ids"]
        assert (ids[0, 1:] == (tokenizer.pad_token_id or 0)).all()


def _first(pairs, count):
    folder = pairs.with_name(f"first-{count}")
    if not folder.exists():
        folder.mkdir()
        for index in range(count):
            for end in ("png", "txt"):
                (folder / f"{index}.{end}").write_bytes((pairs / f"{index}.{end}").read_bytes())
    return folder


def test_what_is_no_pair(clip, tmp_path):
    folder, pairs = clip
    with pytest.raises(DataError, match=f"{COUNT} pictures with texts where {COUNT + 1} are asked for"):
        captioned_calls(folder / "tiny", TextData(pairs, COUNT + 1, 32), byte_tokenizer(), None, (16, 16), 20)
    own = write_pairs(tmp_path / "pairs")
    before = fingerprint(own)
    (own / "0.txt").write_text("another")
    assert fingerprint(own) != before
    for content, said in ((b" \n", "is empty"), (b"\xff\xfe\xfa", "cannot read"), (b"a" * (1 << 21), "more than")):
        (own / "0.txt").write_bytes(content)
        with pytest.raises(DataError, match=said) as error:
            captioned_calls(folder / "tiny", TextData(own, COUNT, 32), byte_tokenizer(), None, (16, 16), 20)
        assert error.value.where == str(own / "0.txt") and error.value.remedy


def test_both_towers_are_compressed_by_a_recipe(clip, capsys, monkeypatch):
    folder, _ = clip
    monkeypatch.chdir(folder)
    data = "{data: pairs, samples: 10, length: 64}"
    rest = f"calibration: {data}\nevaluate: {data}\n"
    assert main([str(write_recipe(folder, "[{quantize: {bits: 4, group: 32, method: gptq}}]", rest)), "-o", "out"]) == 0
    assert "10 pictures with texts" in (folder / "out" / "README.md").read_text()
    written = rest.replace("64}", "64, written: 4}", 1)
    path = write_recipe(folder, "[{quantize: {bits: 4, group: 32, method: gptq}}]", written, name="own.yaml")
    assert main([str(path), "-o", "own"]) == 1
    assert "samples are written by models that continue texts" in capsys.readouterr().err


def test_one_model_alone_gives_nothing_to_measure(clip):
    folder, pairs = clip
    with pytest.raises(DataError, match="of a CLIPModel alone nothing is measured"):
        evaluate_model(folder / "tiny", data=pairs, samples=4, length=16)
