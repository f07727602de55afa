"""Data that recipes name: a text file, recordings of speech (a ``.wav`` file or a directory of them), or pictures: a
directory of image files, or of labelled ones in idx files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from compiler.errors import DataError

SUFFIX = ".wav"
TAKES = {"input_ids": "text", "input_features": "speech", "pixel_values": "pictures"}
INSTEAD = {
    "text": "name a text file",
    "speech": "name a directory of recordings (.wav)",
    "pictures": "name a directory of image files (.png, .jpg)",
    "": "leave it out: there is no data for this kind of model",
}
PARTS = ("train", "t10k")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")


def kind_of(data: Path, main_input: str) -> str:
    """``speech``, ``pictures`` or ``text``: what ``data`` stands for; of a directory of several what a model takes
    that has this ``main_input``."""
    if not data.is_dir() and data.suffix.lower() not in (SUFFIX, *IMAGES):
        return "text"
    found = {"pictures": has_labelled(data) or image_files(data), "speech": recordings(data)}
    kinds = [kind for kind, files in found.items() if files] or ["speech"]
    return TAKES[main_input] if TAKES.get(main_input) in kinds else kinds[0]


def checked_data(data: Path) -> Path:
    """``data``. Raises DataError when nothing is there."""
    if not data.exists():
        raise DataError("there is no such file or directory", where=str(data), remedy="check the path of the data")
    return data


def check_kind(inputs: Iterable[str], data: Path, model: str) -> None:
    """Raises DataError when ``data`` is not of the kind that a model takes whose inputs have these names."""
    main = next((name for name in inputs if name in TAKES), "")
    takes, given = TAKES.get(main, ""), kind_of(data, main)
    if takes != given:
        raise DataError(f"a {model} takes no {given}, which `{data.name}` is", remedy=INSTEAD[takes])


def recordings(data: Path) -> list[Path]:
    """The recordings that ``data`` stands for, those of a directory and all below it in the order of their paths."""
    return _files(data, (SUFFIX,))


def image_files(data: Path) -> list[Path]:
    """The image files that ``data`` stands for, those of a directory and all below it in the order of their paths."""
    return _files(data, IMAGES)


def _files(data: Path, suffixes: Sequence[str]) -> list[Path]:
    files = data.rglob("*") if data.is_dir() else [data]
    return sorted(path for path in files if path.suffix.lower() in suffixes and path.is_file())


def has_labelled(data: Path) -> bool:
    """Whether ``data`` is a directory of pictures in idx files."""
    return data.is_dir() and any(path.is_file() for part in PARTS for path in picture_files(data, part))


def picture_files(data: Path, part: str) -> tuple[Path, Path]:
    """The idx files of a part's pictures and labels, compressed (``.gz``) where only that is there."""
    plain = (data / f"{part}-images-idx3-ubyte", data / f"{part}-labels-idx1-ubyte")
    images, labels = (path if path.is_file() else path.with_name(f"{path.name}.gz") for path in plain)
    return images, labels


def fingerprint(data: Path) -> str:
    """The sha256 of a file's bytes; of files in a directory that of their paths in it and their own sha256s."""
    if not data.is_dir():
        return _sha256(data)
    labelled = [path for part in PARTS for path in picture_files(data, part) if path.is_file()]
    files = sorted({*recordings(data), *image_files(data), *labelled})
    lines = [f"{path.relative_to(data).as_posix()} {_sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
