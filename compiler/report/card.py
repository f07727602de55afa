"""The model card: README.md of an output directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from compiler.report.lock import recipe_text
from compiler.report.text import Document, comparison, evaluated_on, skips, spelt, verification_sentence


def model_card(document: Document) -> str:
    """The card as Markdown: what was done, how to load it, what was measured, what was left out, how to repeat it."""
    sections = (_head, _done, _load, _measured, _left_alone, _repeat)
    return "\n".join(line for section in sections for line in section(document)) + "\n"


def _head(document: Document) -> Iterator[str]:
    model = document["recipe"]["model"]
    yield "---"
    yield "library_name: transformers"
    if "hub_id" in document["inputs"]["model"]:
        yield f"base_model: {document['inputs']['model']['hub_id']}"
    yield "tags: [compress-model]"
    yield "---"
    yield ""
    yield f"# {_name(model)}, compressed"
    yield ""
    steps = [entry["name"] for entry in document["passes"]]
    done = f"by {', then '.join(f'`{step}`' for step in steps)}" if steps else "without changing what it computes"
    yield (
        f"This is `{_name(model)}` ({document['inputs']['model']['architecture']}), rewritten {done}. "
        f"It is now a {document['output']['architecture']}."
    )
    yield ""


def _name(model: str) -> str:
    """A hub id as it is, a path's last part."""
    return PurePosixPath(model).name if model.startswith((".", "/")) or model.endswith(".gguf") else model


def _done(document: Document) -> Iterator[str]:
    yield "## What was done"
    yield ""
    for index, entry in enumerate(document["passes"], 1):
        exact = "computes the same function" if entry["exact"] else "changes what the model computes"
        options = spelt(entry["options"])
        places = len(entry["rewritten"])
        yield (
            f"{index}. `{entry['name']}`{f' with `{options}`' if options else ''}: "
            f"{places} {'place' if places == 1 else 'places'} rewritten; this step {exact}."
        )
    if not document["passes"]:
        yield "Nothing but the file format."
    yield ""


def _load(document: Document) -> Iterator[str]:
    yield "## Loading it"
    yield ""
    architecture = document["output"]["auto_class"] or document["output"]["architecture"]
    trust = ", trust_remote_code=True" if document["output"]["auto_class"] else ""
    tokenizer = any(name.startswith("tokenizer") for name in document["output"]["other_files"])
    yield "```python"
    yield f"from transformers import {'AutoTokenizer, ' if tokenizer else ''}{architecture}"
    yield ""
    inside, file = (
        ("/gguf", ', gguf_file="model.gguf"') if document["output"]["target"].startswith("gguf") else ("", "")
    )
    yield f'model = {architecture}.from_pretrained("path/to/this/directory{inside}"{file}{trust})'
    if tokenizer:
        yield 'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")'
    yield "```"
    yield ""
    yield "Where it loads:"
    yield ""
    for place in document["output"]["loads_in"]:
        yield f"- {place}"
    yield ""


def _measured(document: Document) -> Iterator[str]:
    yield "## Before and after"
    yield ""
    yield "| | before | after | change |"
    yield "|---|---:|---:|---:|"
    for row in comparison(document):
        yield f"| {' | '.join(row)} |"
    yield ""
    yield verification_sentence(document)
    yield evaluated_on(document)
    yield ""


def _left_alone(document: Document) -> Iterator[str]:
    yield "## What was left alone, and why"
    yield ""
    found = [(entry["name"], reason, places) for entry in document["passes"] for reason, places in skips(entry)]
    for name, reason, places in found:
        more = f" and {len(places) - 5} more" if len(places) > 5 else ""
        yield f"- `{name}` skipped {', '.join(f'`{place}`' for place in places[:5])}{more}: {reason}."
    if not found:
        yield "Nothing: every place that a step selected was rewritten."
    yield ""


def _repeat(document: Document) -> Iterator[str]:
    yield "## Making it again"
    yield ""
    yield f"compress-model {document['versions']['compress-model']} with this recipe makes the same bytes:"
    yield ""
    yield "```yaml"
    yield recipe_text(document["recipe"]).rstrip()
    yield "```"
    yield ""
    yield (
        "`compress/recipe.lock.yaml` holds the hashes of all inputs and the versions of all packages; "
        "`compress/report.html` shows every step and every layer."
    )
