"""What goes together: each family's tiny model, planned with each pass, and who would load the result.

``python -m tests.matrix`` writes docs/matrix.md, ``--families llama bert`` shows the rows of these. A test holds some
rows of the page to what the code says.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from backends import onnx, safetensors, torch_module
from backends.safetensors import Refusal
from compiler.errors import CompressError
from compiler.ir.graph import Graph
from compiler.pipeline import Pass, Pipeline
from compiler.target import gguf_emission
from passes import AnySize, DropTokens, GqaToMla, LowRank, Prune, Quantize, Residual, Rotate, Smooth, Sparsify
from tests.captures import plan_of
from tests.families import FAMILIES

PAGE = Path(__file__).parent.parent / "docs" / "matrix.md"
PASSES: Mapping[str, tuple[Pass, ...]] = {
    "(none)": (),
    "any-size": (AnySize(),),
    "drop-tokens": (DropTokens(keep=0.5),),
    "gqa-to-mla": (GqaToMla(rank="full"),),
    "low-rank": (LowRank(keep=0.7),),
    "prune": (Prune(what=("channels",), keep=0.8, align=4),),
    "quantize int4": (Quantize(bits=4),),
    "quantize W8A8": (Quantize(bits=8, activations="int8"),),
    "quantize fp8": (Quantize(type="fp8"),),
    "residual": (Quantize(bits=4), Residual(add=0.2)),
    "rotate": (Rotate(),),
    "smooth": (Smooth(),),
    "sparsify": (Sparsify(),),
}
HEAD = """# Which pass goes with which family, and what loads the result

Made by `python -m tests.matrix` from the tiny models of the tests; a test holds rows of it to the code. **S**: a stock
class of transformers; **G**: code of its own, where no stock class holds it; **O**: ONNX Runtime (`ort-cpu`); **L**: a
GGUF file for llama.cpp; `-`: refused, for the reason below. Passes are taken with one setting each:
`low-rank: {keep: 70%}`, `prune: {what: channels, keep: 80%}`, `gqa-to-mla` in its exact form,
`drop-tokens: {keep: 50%}`. What is planned here is also run and reloaded by the tests of each pass, on the families
that its page names.

"""


@dataclass
class Row:
    """A family's cells, and why those that are empty are."""

    cells: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def row_of(family: str) -> Row:
    """All passes on one family."""
    row = Row()
    for title, steps in PASSES.items():
        graph = plan_of(family)
        try:
            Pipeline(steps).run(graph, planned=True, calibration=lambda graph: [])
        except CompressError as error:
            row.cells[title], row.reasons[title] = "-", _general(error.cause)
            continue
        row.cells[title] = loaders(graph)
    return row


def loaders(graph: Graph) -> str:
    """The letters of all that would load ``graph``."""
    stock = not isinstance(safetensors.propose(graph), Refusal)
    own = not stock and _works(torch_module.generate, graph)
    found = {"S": stock, "G": own, "O": _works(onnx.propose, graph), "L": _works(gguf_emission, graph)}
    return "".join(letter for letter, works in found.items() if works) or "graph only"


def _works(make: object, graph: Graph) -> bool:
    try:
        make(graph)
    except CompressError:
        return False
    return True


def _general(cause: str) -> str:
    """A reason without the places and numbers that one model has there."""
    cause = re.sub(r" \(\d+ more layers? .*\)$", "", cause)
    return re.sub(r"(?<=[ :])[\w]+(\.[\w]+){2,}", "…", cause)


def table(rows: Mapping[str, Row]) -> str:
    lines = [f"| family | {' | '.join(PASSES)} |", f"|---{'|---' * len(PASSES)}|"]
    lines += [f"| {name} | {' | '.join(row.cells[title] for title in PASSES)} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def reasons(rows: Mapping[str, Row]) -> str:
    """One line for each pass and reason, with the families that it holds for."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, row in rows.items():
        for title, reason in row.reasons.items():
            found[title, reason].append(name)
    lines = [f"- `{title}`, {', '.join(names)}: {reason}" for (title, reason), names in found.items()]
    return "\n## What is refused, and why\n\n" + "\n".join(lines) + "\n"


def page(families: Iterable[str]) -> str:
    rows = {name: row_of(name) for name in families}
    return HEAD + table(rows) + reasons(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*")
    wanted = parser.parse_args().families
    if wanted:
        print(page(wanted))  # noqa: T201
    else:
        PAGE.write_text(page(FAMILIES), encoding="utf-8")
