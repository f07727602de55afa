"""report.html: one self-contained page, light or dark as the reader's system is, on any width."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compiler.console import human_bytes, human_count
from compiler.ir.layers import layer_of
from compiler.report.grid import (
    bits_class,
    bits_of,
    curve_picture,
    error_picture,
    inside_layer,
    kept_picture,
    matrix_picture,
)
from compiler.report.lock import recipe_text
from compiler.report.picture import layer_picture
from compiler.report.text import (
    Document,
    comparison,
    evaluated_on,
    loading_places,
    short_name,
    skips,
    spelt,
    verification_sentence,
)

FOLDER = Path(__file__).parent
BITS = {"bits2": "2", "bits4": "4", "bits8": "8", "bits16": "16", "bits32": "32"}
QUALITY = {
    "perplexity": "perplexity",
    "kl": "KL to the original",
    "agreement": "same top token",
    "cosine": "cosine to the original",
}
EXPONENT = re.compile(r"[\d.]+e-\d+")
Tile = Mapping[str, str]


def page(document: Document) -> str:
    """The page of a run. Everything in it is in report.json as well."""
    return render(
        "page.html.jinja",
        kicker="compress-model report",
        verified=verification_sentence(document),
        conditions=evaluated_on(document).replace("`", ""),
        command=f"compress-model recipe.yaml -o {_file_name(document)}",
        command_note="recipe.yaml is what follows; compress/recipe.lock.yaml has the hashes of all that went into it.",
        **_common(document),
    )


def plan_page(document: Document) -> str:
    """The page of a plan, which has no verification and no evaluation."""
    return render(
        "page.html.jinja",
        kicker="compress-model plan: nothing was computed",
        verified="Counted from the model's config and the headers of its files alone.",
        conditions="Quality is measured when the recipe is run.",
        command="compress-model recipe.yaml -o out",
        command_note="recipe.yaml is what follows.",
        **_common(document),
    )


def render(template: str, **values: Any) -> str:
    """A template of this folder filled in; all texts are escaped but pictures made here."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["unbroken"] = _unbroken
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(style=drawn(style), **values) + "\n"


def _unbroken(text: str) -> Any:
    """``text``, escaped, in which no line ends within a number with an exponent."""
    import markupsafe

    return markupsafe.Markup(EXPONENT.sub(r'<span class="unbroken">\g<0></span>', str(markupsafe.escape(text))))


def drawn(svg: str) -> Any:
    """A picture, or the style, as it is."""
    from markupsafe import Markup

    return Markup(svg)


def _common(document: Document) -> dict[str, Any]:
    output, matrices = document["output"], document.get("matrices", {"before": [], "after": []})
    return {
        "title": f"{short_name(document['recipe']['model'])}, compressed",
        "subtitle": (
            f"{document['inputs']['model']['architecture']} to {output['architecture']}, "
            f"{human_bytes(output['tensor_bytes'])} of weights"
        ),
        "tiles": list(_tiles(document)),
        "comparison": comparison(document),
        "matrix_picture": drawn(matrix_picture(matrices["before"], matrices["after"])),
        "matrices": list(_matrices(matrices["before"], matrices["after"])),
        "bits": [(kind, text) for kind, text in BITS.items() if kind in _bits(matrices["after"])],
        "sizes": list(_sizes(matrices["before"], matrices["after"])),
        "layer_picture": drawn(layer_picture(*(_layers(document["layers"][which]) for which in ("before", "after")))),
        "steps": list(_step_rows(document)),
        "passes": [_pass(entry) for entry in document["passes"]],
        "trials": list(_trials(document)),
        "warnings": [(entry["name"], warning) for entry in document["passes"] for warning in entry["warnings"]],
        "loads_in": loading_places(document),
        "skipped": list(_skipped(document)),
        "recipe": recipe_text(document["recipe"]),
        "versions": ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
    }


def _bits(matrices: Sequence[Document]) -> set[str]:
    return {bits_class(bits_of(matrix)) for matrix in matrices if inside_layer(matrix["name"])}


def _layers(sizes: Mapping[str, int]) -> Mapping[str, int]:
    """Bytes by layer, without those outside of layers where there are layers: they are among the sizes above."""
    return {scope: size for scope, size in sizes.items() if scope} or sizes


def _file_name(document: Document) -> str:
    return Path(str(document["recipe"]["model"])).stem + "-compressed"


def _tiles(document: Document) -> Iterator[Tile]:
    """The few numbers that a reader looks for first."""
    before, after, output = document["ledger"]["before"], document["ledger"]["after"], document["output"]
    yield _change("weights", before["stored_bytes"], output["tensor_bytes"], human_bytes)
    yield _change("parameters", before["parameters"], after["parameters"], human_count)
    yield _change("FLOPs a token", before["flops_per_token"], after["flops_per_token"], human_count)
    if before["cache_bytes_per_token"]:
        yield _change("cache a token", before["cache_bytes_per_token"], after["cache_bytes_per_token"], human_bytes)
    for name, title in QUALITY.items():
        found = (document["evaluation"] or {"metrics": {}})["metrics"].get(name)
        if found is not None:
            note = "" if found["low"] == found["high"] else f"{found['low']:.4g} to {found['high']:.4g}"
            theirs = document["evaluation"]["reference"].get(name)
            yield {"name": title, "value": f"{found['value']:.4g}", "note": _was(theirs) or note}


def _was(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"was {found['value']:.4g}"


def _change(name: str, before: float, after: float, show: Any) -> Tile:
    change = f", {100 * (after / before - 1):+.1f}\N{NO-BREAK SPACE}%" if before else ""
    note = "as before" if after == before else f"was {show(before)}{change}".replace(" ", "\N{NO-BREAK SPACE}", 2)
    return {"name": name, "value": show(after), "note": note}


def _matrices(before: Sequence[Document], after: Sequence[Document]) -> Iterator[Sequence[str]]:
    old, new = ({matrix["name"]: matrix for matrix in each} for each in (before, after))
    for name in {**old, **new}:
        shapes = [_shape(each.get(name)) for each in (old, new)]
        sizes = [human_bytes(each[name]["stored_bytes"]) if name in each else "" for each in (old, new)]
        yield (name, *shapes[0], *shapes[1], *sizes)


def _shape(matrix: Document | None) -> tuple[str, str]:
    return ("", "") if matrix is None else (" x ".join(map(str, matrix["shape"])), f"{bits_of(matrix):.3g}")


def _sizes(before: Sequence[Document], after: Sequence[Document]) -> Iterator[Tile]:
    """Bytes of matrices by the part of a layer that they are in, or by their name outside of layers."""
    totals: dict[str, list[int]] = {}
    for which, each in enumerate((before, after)):
        for matrix in each:
            totals.setdefault(_part(matrix["name"]), [0, 0])[which] += matrix["stored_bytes"]
    most = max((size for pair in totals.values() for size in pair), default=1) or 1
    for name, (old, new) in sorted(totals.items(), key=lambda item: -item[1][0]):
        yield {
            "name": name,
            "before": human_bytes(old),
            "after": human_bytes(new),
            "before_width": f"{100 * old / most:.1f}",
            "after_width": f"{100 * new / most:.1f}",
        }


def _part(name: str) -> str:
    layer = layer_of(name)
    if layer is None or not inside_layer(name):
        return name.removesuffix(".weight").rpartition(".")[2]
    inside = name.removeprefix(layer.scope).lstrip(".").split(".")
    return f"layers: {inside[0]}"


def _step_rows(document: Document) -> Iterator[Sequence[str]]:
    yield ("the model", *_ledger(document["ledger"]["before"]), "", "")
    for entry in document["passes"]:
        exact = "yes" if entry["exact"] else "no"
        yield (entry["name"], *_ledger(entry["after"]), str(len(entry["rewritten"])), exact)


def _ledger(ledger: Document) -> tuple[str, ...]:
    return (
        human_count(ledger["parameters"]),
        human_bytes(ledger["stored_bytes"]),
        human_count(ledger["flops_per_token"]),
        human_bytes(ledger["cache_bytes_per_token"]),
    )


def _pass(entry: Document) -> dict[str, Any]:
    return {
        "name": entry["name"],
        "options": spelt(entry["options"]),
        "places": [f"{rewrite['scope']}: {rewrite['what']}" for rewrite in entry["rewritten"]],
        "kept": drawn(kept_picture(entry["rewritten"])),
        "curves": drawn(curve_picture(entry["curves"])),
        "errors": drawn(error_picture(entry["rewritten"])),
    }


def _trials(document: Document) -> Iterable[Sequence[str]]:
    for entry in document["passes"]:
        for trial in entry["trials"]:
            yield trial["what"], entry["name"], f"{trial['distance']:.4g}", "chosen" if trial["chosen"] else ""


def _skipped(document: Document) -> Iterable[Sequence[str]]:
    for entry in document["passes"]:
        for reason, places in skips(entry):
            yield entry["name"], str(len(places)), f"{reason}: {', '.join(places)}"
