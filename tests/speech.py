"""Tiny models of speech and recordings for them, for tests of what encoder-decoders are fed."""

from __future__ import annotations

from pathlib import Path

import torch
from scipy.io import wavfile
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from tests.tiny import byte_tokenizer

RATE = 16000


def write_whisper(directory: Path, seed: int = 0, layers: int = 2, **changes: object) -> Path:
    """A random float32 Whisper that hears one second, of 8 bands, with its feature extractor and a tokenizer."""
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "vocab_size": 256}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": 50, "max_target_positions": 64, "begin_suppress_tokens": None}
    options = {**sizes, **heads, **ids, **lengths, "encoder_layers": layers, "decoder_layers": layers, **changes}
    model = WhisperForConditionalGeneration(WhisperConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far enough from uniform that each position has a favourite token
    model.save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def write_speech(directory: Path, count: int = 6, seconds: float = 0.5, rate: int = RATE) -> Path:
    """``count`` recordings of three tones and noise each, 16 bits, in a new directory ``speech``."""
    folder = directory / "speech"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    time = torch.arange(int(seconds * rate)) / rate
    for index in range(count):
        tones = torch.rand(3, 1, generator=generator) * 3000 + 100
        wave = torch.sin(2 * torch.pi * tones * time).sum(0) / 4 + 0.02 * torch.randn(len(time), generator=generator)
        wavfile.write(folder / f"{index}.wav", rate, (wave * 32000).clamp(-32768, 32767).short().numpy())
    return folder
