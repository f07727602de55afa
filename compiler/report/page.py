"""report.html: one self-contained page, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from compiler.console import human_bytes, human_count
from compiler.report.grid import curve_picture, kept_picture
from compiler.report.lock import recipe_text
from compiler.report.picture import layer_picture
from compiler.report.text import Document, comparison, skips, spelt, verification_sentence

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1a1d21, #e6e8eb); --paper: light-dark(#ffffff, #16181b);
  --soft: light-dark(#6b7280, #9aa1ab); --line: light-dark(#e3e6ea, #2c3036); --before: light-dark(#b8c0cc, #4b5563);
  --after: light-dark(#1f6feb, #58a6ff); }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 62rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td.words { white-space: normal; text-align: left; min-width: 16rem; }
code, pre { font: 13px/1.5 ui-monospace, monospace; } pre { overflow-x: auto; padding: .75rem 1rem;
  border: 1px solid var(--line); border-radius: 6px; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.before { fill: var(--before); } .after { fill: var(--after); } .dot { fill: var(--ink); }
.line { fill: none; stroke: var(--after); } .frame { fill: none; stroke: var(--line); }
summary { cursor: pointer; }
"""


def page(document: Document) -> str:
    """The page. Everything in it is in report.json as well."""
    title = f"{document['recipe']['model']}, compressed"
    sections = (_head, _comparison, _steps, _trials, _layers, _places, _warnings, _skipped, _recipe)
    body = "\n".join(line for section in sections for line in section(document))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _head(document: Document) -> Iterator[str]:
    output = document["output"]
    yield f"<h1>{escape(str(document['recipe']['model']))}, compressed</h1>"
    yield (
        f'<p class="soft">{escape(str(document["inputs"]["model"]["architecture"]))} to '
        f"{escape(output['architecture'])}, {human_bytes(output['tensor_bytes'])} of weights</p>"
    )
    yield f"<p>{escape(verification_sentence(document))}</p>"
    for place in output["loads_in"]:
        yield f'<p class="soft">{escape(place)}</p>'


def _comparison(document: Document) -> Iterator[str]:
    yield "<h2>Before and after</h2>"
    yield from _table(("", "before", "after", "change"), comparison(document))


def _steps(document: Document) -> Iterator[str]:
    yield "<h2>Step by step</h2>"
    yield from _table(
        ("step", "parameters", "stored", "FLOPs/token", "cache/token", "rewritten", "exact", "options"),
        _step_rows(document),
    )
    for entry in document["passes"]:
        places = [f"{rewrite['scope']}: {rewrite['what']}" for rewrite in entry["rewritten"]]
        yield f"<details><summary>{escape(entry['name'])}: {len(places)} rewritten</summary>"
        yield f"<pre>{escape(chr(10).join(places))}</pre></details>"


def _step_rows(document: Document) -> Iterator[Sequence[str]]:
    yield ("the model", *_ledger(document["ledger"]["before"]), "", "", "")
    for entry in document["passes"]:
        exact = "yes" if entry["exact"] else "no"
        yield (entry["name"], *_ledger(entry["after"]), str(len(entry["rewritten"])), exact, spelt(entry["options"]))


def _ledger(ledger: Document) -> tuple[str, ...]:
    return (
        human_count(ledger["parameters"]),
        human_bytes(ledger["stored_bytes"]),
        human_count(ledger["flops_per_token"]),
        human_bytes(ledger["cache_bytes_per_token"]),
    )


def _layers(document: Document) -> Iterator[str]:
    yield "<h2>Bytes by layer</h2>"
    yield '<p class="soft">Grey is before, blue is after.</p>'
    yield f'<div class="wide">{layer_picture(document["layers"]["before"], document["layers"]["after"])}</div>'


def _places(document: Document) -> Iterator[str]:
    for entry in document["passes"]:
        kept, curves = kept_picture(entry["rewritten"]), curve_picture(entry["curves"])
        if kept:
            yield f"<h2>What remains after {escape(entry['name'])}</h2>"
            yield '<p class="soft">A place and layer each; grey is what it held, blue is what it holds.</p>'
            yield f'<div class="wide">{kept}</div>'
        if curves:
            yield f"<h2>What {escape(entry['name'])} weighed</h2>"
            yield '<p class="soft">From left to right a place keeps more; the height is what it loses by prediction, '
            yield "each place on a scale of its own, and the dot is what it got.</p>"
            yield f'<div class="wide">{curves}</div>'


def _trials(document: Document) -> Iterator[str]:
    rows = [
        (trial["what"], entry["name"], f"{trial['distance']:.4g}", "chosen" if trial["chosen"] else "")
        for entry in document["passes"]
        for trial in entry["trials"]
    ]
    if rows:
        yield "<h2>Choices weighed on calibration data</h2>"
        yield from _table(("choice", "step", "distance from the original", ""), rows)


def _warnings(document: Document) -> Iterator[str]:
    rows = [(entry["name"], warning) for entry in document["passes"] for warning in entry["warnings"]]
    if rows:
        yield "<h2>Warnings</h2>"
        yield from _table(("step", "what"), rows)


def _skipped(document: Document) -> Iterator[str]:
    yield "<h2>Left alone, and why</h2>"
    rows = [
        (entry["name"], str(len(places)), f"{reason}: {', '.join(places)}")
        for entry in document["passes"]
        for reason, places in skips(entry)
    ]
    if rows:
        yield from _table(("step", "places", "why, and where"), rows)
    else:
        yield "<p>Nothing: every place that a step selected was rewritten.</p>"


def _recipe(document: Document) -> Iterator[str]:
    yield "<h2>Recipe</h2>"
    yield f"<pre>{escape(recipe_text(document['recipe']))}</pre>"
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    yield f'<p class="soft">{escape(versions)}</p>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield '<div class="wide"><table><thead><tr>' + "".join(f"<th>{escape(cell)}</th>" for cell in header)
    yield "</tr></thead><tbody>"
    for row in rows:
        cells = [
            f'<td class="words">{escape(cell)}</td>' if len(cell) > 40 else f"<td>{escape(cell)}</td>" for cell in row
        ]
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
