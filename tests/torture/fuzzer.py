"""`python -m tests.torture.fuzzer KIND OUTCOMES CORPUS [OPTION]`: atheris on one reader, in a process of its own.

Options are those of libFuzzer. OUTCOMES gets a letter for every input. Needs atheris, which is no dependency.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

INSTRUMENTED = ["compiler.recipe", "compiler.weights.gguf_header", "compiler.weights.tensorfile"]
"""Whose lines lead the fuzzer; they are imported by ``main``, so that atheris can count them."""


def main() -> None:
    """Feed the reader of a kind until the options of libFuzzer say to stop, or a defect is found."""
    import atheris

    kind, outcomes, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=INSTRUMENTED):
        from compiler.recipe import Recipe
        from compiler.weights.gguf_header import read_gguf_header
        from compiler.weights.tensorfile import read_header
    readers: dict[str, Callable[[Path], Any]] = {
        "safetensors": read_header,
        "GGUF": read_gguf_header,
        "recipe": Recipe.load,
    }
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, Path(outcomes).open("wb", buffering=0) as log:
        atheris.Setup([sys.argv[0], *arguments], _attempt(readers[kind], Path(folder) / "input.yaml", log.write))
        atheris.Fuzz()


def _attempt(read: Callable[[Path], Any], file: Path, note: Callable[[bytes], Any]) -> Callable[[bytes], None]:
    """What is done with each input. Raises whatever is no error of ours, and errors of ours without a remedy."""
    from compiler.errors import CompressError

    def attempt(data: bytes) -> None:
        file.write_bytes(data)
        try:
            read(file)
            note(b"a")
        except CompressError as error:
            if not error.remedy:
                raise
            note(b"r")

    return attempt


if __name__ == "__main__":
    main()
