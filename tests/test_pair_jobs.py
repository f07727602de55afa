"""The whole job on an encoder-decoder: calibrated on recordings, written with its own code, and measured."""

from __future__ import annotations

import torch

from compiler import Recipe, compress
from compiler.evaluate import cache_size, load_model
from compiler.evaluate.data import data_windows
from compiler.evaluate.texts import TextData
from tests.speech import write_speech, write_whisper

RECIPE = """\
model: tiny
calibration: {data: speech, samples: 5, length: 24}
passes:
  - gqa-to-mla: {cache: 50%}
evaluate: {data: speech, samples: 3, length: 16}
"""


def test_half_the_cache_of_a_speech_decoder(tmp_path):
    source, speech = write_whisper(tmp_path / "tiny"), write_speech(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    made = compress(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "out")
    output, (entry,) = made.document["output"], made.document["passes"]
    assert output["auto_class"] == "AutoModelForSpeechSeq2Seq"
    assert [skip["scope"].rpartition(".")[2] for skip in entry["skipped"]] == ["self_attn"] * 2 + ["encoder_attn"] * 2
    assert [site["scope"] for site in entry["rewritten"]] == [f"model.decoder.layers.{i}.self_attn" for i in (0, 1)]
    verification, evaluation = made.document["verification"], made.document["evaluation"]
    assert verification["performed"] and verification["error"] <= verification["tolerance"]
    assert evaluation["metrics"]["kl"]["value"] > 0
    assert evaluation["cache"]["values_per_token"] == evaluation["reference_cache"]["values_per_token"] / 2
    original, latent = load_model(source), load_model(tmp_path / "out", trust_remote_code=True)
    assert cache_size(latent).values_per_token == cache_size(original).values_per_token / 2
    (window,) = data_windows(latent, tmp_path / "out", TextData(speech, samples=1, length=16))
    with torch.no_grad():
        assert latent(**window.arguments).logits.isfinite().all()
