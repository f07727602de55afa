"""Data that recipes name: a text file, recordings of speech (a ``.wav`` file or a directory of them), or pictures: a
directory of image files, alone or each with a text beside it, or of labelled ones in idx files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from compiler.errors import DataError

SUFFIX = ".wav"
CAPTIONED = "pictures with texts"
TAKES = {"input_ids": "text", "input_features": "speech", "pixel_values": "pictures"}
INSTEAD = {
    "text": "name a text file",
    "speech": "name a directory of recordings (.wav)",
    "pictures": "name a directory of image files (.png, .jpg)",
    CAPTIONED: "name a directory of image files, each with its text beside it (cat.png, cat.txt)",
    "": "leave it out: there is no data for this kind of model",
}
PARTS = ("train", "t10k")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")


def taken(inputs: Iterable[str]) -> str:
    """What a model takes whose inputs have these names: ``text``, ``speech``, ``pictures`` or ``pictures with texts``;
    "" where it is none of these."""
    kinds = [TAKES[name] for name in inputs if name in TAKES]
    return CAPTIONED if {"text", "pictures"} <= {*kinds} else next(iter(kinds), "")


def kind_of(data: Path, takes: str) -> str:
    """What ``data`` stands for; of a directory of several kinds what a model ``takes``."""
    if not data.is_dir() and data.suffix.lower() not in (SUFFIX, *IMAGES):
        return "text"
    found = {
        "pictures": has_labelled(data) or image_files(data),
        CAPTIONED: data.is_dir() and captioned_files(data),
        "speech": recordings(data),
    }
    kinds = [kind for kind, files in found.items() if files] or ["speech"]
    return takes if takes in kinds else kinds[0]


def checked_data(data: Path) -> Path:
    """``data``. Raises DataError when nothing is there."""
    if not data.exists():
        raise DataError("there is no such file or directory", where=str(data), remedy="check the path of the data")
    return data


def check_kind(takes: str, data: Path, model: str) -> None:
    """Raises DataError when ``data`` is not of the kind that the class ``model`` ``takes``."""
    given = kind_of(data, takes)
    if takes != given:
        raise DataError(f"a {model} takes no {given}, which `{data.name}` is", remedy=INSTEAD[takes])


def recordings(data: Path) -> list[Path]:
    """The recordings that ``data`` stands for, those of a directory and all below it in the order of their paths."""
    return _files(data, (SUFFIX,))


def image_files(data: Path) -> list[Path]:
    """The image files that ``data`` stands for, those of a directory and all below it in the order of their paths."""
    return _files(data, IMAGES)


def captioned_files(data: Path) -> list[Path]:
    """The image files below ``data`` that have a text beside them."""
    return [path for path in image_files(data) if caption_file(path).is_file()]


def caption_file(image: Path) -> Path:
    """Where the text of an image file is: ``cat.txt`` of ``cat.png``, or ``cat.TXT`` where that is not there."""
    found = (image.with_suffix(suffix) for suffix in (".txt", ".TXT"))
    return next((path for path in found if path.is_file()), image.with_suffix(".txt"))


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
    texts = map(caption_file, captioned_files(data))
    files = sorted({*recordings(data), *image_files(data), *texts, *labelled})
    lines = [f"{path.relative_to(data).as_posix()} {_sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
