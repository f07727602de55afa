"""Recordings of speech as what a model of speech takes."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from compiler.datafiles import recordings
from compiler.errors import DataError

RATES = 1_000, 1_000_000  # samples a second; a damaged header claims any number, and resampling takes as much memory


def speech_features(extractor: Any, data: Path, samples: int, seed: int) -> list[Tensor]:
    """Audio features [1, bands, frames] of ``samples`` clips, those that ``seed`` picks, in the order of the files.

    A clip is a recording, or as much of a longer one as the model hears at once. Raises DataError where there are
    too few, and where a file is no recording.
    """
    clips = [clip for path in recordings(data) for clip in _clips(path, extractor)]
    if len(clips) < samples:
        raise DataError(
            f"there are {len(clips)} clips of speech where {samples} are asked for",
            remedy=f"write `samples: {len(clips)}`, or add recordings" if clips else "name a directory of .wav files",
            where=str(data),
            option="samples" if clips else "",
        )
    picked = sorted(random.Random(seed).sample(range(len(clips)), samples))
    return [_features(extractor, clips[index]) for index in picked]


def _clips(path: Path, extractor: Any) -> list[Any]:
    """The recording in ``path`` at the extractor's rate, cut where it is longer than what is heard at once."""
    wave, most = read_wave(path, extractor.sampling_rate), int(extractor.n_samples)
    return [wave[start : start + most] for start in range(0, len(wave), most)]


def clip_features(extractor: Any, path: Path) -> list[Tensor]:
    """Audio features [1, bands, frames] of a recording, of each of the clips that it is cut into."""
    return [_features(extractor, clip) for clip in _clips(path, extractor)]


def _features(extractor: Any, clip: Any) -> Tensor:
    return extractor(clip, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features


def read_wave(path: Path, rate: int) -> Any:
    """The recording in a ``.wav`` file as a float32 array [samples] of ``rate`` a second, channels averaged.

    Raises DataError when the file is no recording.
    """
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of chunks of the file that hold no sound
            found: tuple[int, Any] = wavfile.read(path)
    except Exception as reason:  # of a damaged header scipy makes errors of many kinds
        raise DataError(f"cannot read the recording: {reason}", where=str(path), remedy="give .wav files") from reason
    given, wave = found
    if not RATES[0] <= given <= RATES[1]:
        cause = f"the recording has {given} samples a second, which is not from {RATES[0]} to {RATES[1]}"
        raise DataError(cause, where=str(path), remedy="fetch or record it again")
    if not len(wave):
        raise DataError("the recording is empty", where=str(path), remedy="remove it from the recordings")
    wave = _as_float(wave)
    wave = wave.mean(axis=1) if wave.ndim == 2 else wave
    return wave if given == rate else resample_poly(wave, rate, given).astype(np.float32)


def _as_float(wave: Any) -> Any:
    """Samples between -1 and 1."""
    if wave.dtype.kind == "f":
        return wave.astype(np.float32)
    limits = np.iinfo(wave.dtype)
    middle = 0 if limits.min else (limits.max + 1) / 2
    return ((wave - middle) / (limits.max + 1 - middle)).astype(np.float32)
