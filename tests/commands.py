"""What the tests of commands share: a tiny model with its finished output, and a call of the command."""

from collections.abc import Callable
from pathlib import Path

import pytest

from compiler.cli import main
from compiler.weights.tensorfile import read_header
from tests.small import write_folder, write_recipe

FOUR_BITS = "[gqa-to-mla, quantize: {bits: 4, group: 16, skip: [lm_head]}]"
EVALUATE = "evaluate: {data: text.txt, samples: 2, length: 16}\n"


def finished_folder(folder: Path) -> Path:
    """``folder`` with a tiny model, a text, a recipe, and the recipe's finished output ``out``."""
    write_folder(folder)
    assert main([str(write_recipe(folder, FOUR_BITS, EVALUATE)), "-o", str(folder / "out"), "--quiet"]) == 0
    return folder


def caller(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """What runs the command with some arguments and returns (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def tensor_bytes(directory: Path) -> int:
    """Bytes of all tensors in the safetensors files of ``directory``."""
    headers = [read_header(file) for file in directory.glob("*.safetensors")]
    return sum(stored.type.nbytes for header in headers for stored in header.values())
