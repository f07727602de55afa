"""What encoder-decoders are fed when they are calibrated and measured: recordings or texts, and their own words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from compiler.datafiles import check_kind, fingerprint, recordings, taken
from compiler.errors import DataError
from compiler.evaluate import evaluate_model
from compiler.evaluate.data import data_windows
from compiler.evaluate.loading import load_extractor, load_model
from compiler.evaluate.speech import read_wave, speech_features
from compiler.evaluate.texts import TextData
from tests.speech import RATE, write_speech, write_whisper
from tests.tiny import byte_tokenizer, write_text


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    return write_whisper(folder / "tiny"), write_speech(folder)


def t5(directory, **changes):
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **changes
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("length", [12, 512])
def test_the_decoder_of_a_model_of_speech_is_fed_what_the_model_writes(whisper, length):
    path, speech = whisper
    model = load_model(path)
    windows = data_windows(model, path, TextData(speech, samples=4, length=length))
    assert len(windows) == 4
    for window in windows:
        features, ids = window.arguments["input_features"], window.arguments["decoder_input_ids"]
        assert features.shape == (1, 8, 100) and ids.shape[0] == 1 and 2 <= ids.shape[1] <= min(length, 64)
        with torch.no_grad():
            logits = model(**window.arguments).logits
        suppressed = logits[0, :-1].clone()
        assert torch.equal(suppressed.argmax(-1), ids[0, 1:]), "each token is the likeliest after those before it"


@pytest.mark.parametrize("layers", [2, 3])
def test_the_decoder_of_a_model_of_text_is_fed_what_the_model_writes(layers, tmp_path):
    """Also of one deeper than its encoder, for which generate alone has no cache."""
    path, text = t5(tmp_path / "t5", num_decoder_layers=layers), write_text(tmp_path)
    model = load_model(path)
    windows = data_windows(model, path, TextData(text, samples=3, length=16))
    for window in windows:
        ids = window.arguments["decoder_input_ids"]
        assert window.arguments["input_ids"].shape == (1, 16) and ids[0, 0] == 0 and ids.shape[1] <= 16
        with torch.no_grad():
            assert torch.equal(model(**window.arguments).logits[0, :-1].argmax(-1), ids[0, 1:])


def test_the_same_seed_picks_the_same_clips_and_another_others(whisper):
    path, speech = whisper
    extractor = load_extractor(path, load_model(path).config)
    first, again, other = (speech_features(extractor, speech, 3, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_long_recordings_are_cut_and_none_of_them_is_lost(whisper, tmp_path):
    path, _ = whisper
    speech = write_speech(tmp_path, count=1, seconds=2.5)
    extractor = load_extractor(path, load_model(path).config)
    assert len(speech_features(extractor, speech, 3, 0)) == 3
    with pytest.raises(DataError, match="there are 3 clips of speech where 4 are asked for"):
        speech_features(extractor, speech, 4, 0)


@pytest.mark.parametrize(("dtype", "scale"), [(np.int16, 2**15), (np.int32, 2**31), (np.float32, 1), (np.uint8, 2**7)])
def test_a_recording_is_read_alike_in_every_format(tmp_path, dtype, scale):
    wave = np.sin(np.arange(RATE) / 10) * 0.5
    stored = wave * scale + (scale if dtype == np.uint8 else 0)
    wavfile.write(tmp_path / "x.wav", RATE, stored.astype(dtype))
    read = read_wave(tmp_path / "x.wav", RATE)
    assert read.dtype == np.float32 and np.abs(read - wave).max() <= 1 / min(scale, 2**24)


def test_recordings_of_other_rates_and_several_channels_sound_the_same(tmp_path):
    time = np.arange(48000) / 48000
    wave = (np.sin(2 * np.pi * 440 * time) * 2**14).astype(np.int16)
    wavfile.write(tmp_path / "x.wav", 48000, np.stack([wave, wave], 1))
    read = read_wave(tmp_path / "x.wav", RATE)
    inside = slice(200, -200)  # the filter rings at the ends
    wanted = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE) / 2
    assert np.abs(read - wanted)[inside].max() <= 2e-3


def test_what_is_no_recording_is_one_clear_error(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"RIFF no")
    with pytest.raises(DataError, match="cannot read the recording"):
        read_wave(tmp_path / "x.wav", RATE)
    wavfile.write(tmp_path / "y.wav", RATE, np.zeros(0, np.int16))
    with pytest.raises(DataError, match="the recording is empty"):
        read_wave(tmp_path / "y.wav", RATE)


@pytest.mark.parametrize("rate", [0, 999, 1_000_001, 2**32 - 5])
def test_rates_that_no_recording_has_are_refused(tmp_path, rate):
    wavfile.write(tmp_path / "x.wav", RATE, np.zeros(100, np.uint8))
    whole = bytearray((tmp_path / "x.wav").read_bytes())
    whole[24:28] = whole[28:32] = rate.to_bytes(4, "little")  # samples, and bytes, a second
    (tmp_path / "x.wav").write_bytes(whole)
    with pytest.raises(DataError, match="recording"):
        read_wave(tmp_path / "x.wav", RATE)


def test_features_of_another_shape_than_the_model_hears_are_refused(whisper, tmp_path):
    path = write_whisper(tmp_path / "longer", max_source_positions=60)
    with pytest.raises(DataError, match="audio features are 8 x 100 where the model takes 8 x 120"):
        load_extractor(path, load_model(path).config)


def test_data_of_the_wrong_kind_is_refused(whisper, tmp_path):
    _, speech = whisper
    text = write_text(tmp_path)
    check_kind(taken(["input_features", "decoder_input_ids"]), speech, "Whisper")
    check_kind(taken(["input_ids", "decoder_input_ids"]), text, "T5")
    for inputs, data, said in (
        (["input_ids"], speech, "a Model takes no speech, which `speech` is"),
        (["input_features"], text, "a Model takes no text, which `text.txt` is"),
        (["pixel_values"], text, "a Model takes no text"),
    ):
        with pytest.raises(DataError, match=said):
            check_kind(taken(inputs), data, "Model")


def test_a_directory_of_recordings_has_a_fingerprint_of_names_and_bytes(tmp_path):
    speech = write_speech(tmp_path, count=2, seconds=0.1)
    before = fingerprint(speech)
    assert [path.name for path in recordings(speech)] == ["0.wav", "1.wav"]
    (speech / "notes.txt").write_text("not heard")
    assert fingerprint(speech) == before
    (speech / "1.wav").rename(speech / "2.wav")
    assert fingerprint(speech) != before


def test_a_model_of_speech_is_measured_on_recordings(whisper, tmp_path):
    path, speech = whisper
    other = write_whisper(tmp_path / "other", seed=1)
    result = evaluate_model(other, against=path, data=speech, samples=3, length=10)
    assert set(result.metrics) == {"perplexity", "kl", "agreement"} and set(result.reference) == {"perplexity"}
    assert result.metrics["kl"].value > 0 and result.metrics["agreement"].value < 1
    assert result.metrics["perplexity"].value > result.reference["perplexity"].value
    assert result.inputs["data"] == fingerprint(speech)
    with pytest.raises(DataError, match="`bits-per-byte` is of causal language models on a text"):
        evaluate_model(other, against=path, data=speech, samples=3, metrics=["bits-per-byte"])
