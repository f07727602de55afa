"""The model card: README.md of an output directory."""

from __future__ import annotations

from collections.abc import Iterator

from compiler.console import human_bytes
from compiler.report.lock import recipe_text
from compiler.report.text import (
    Document,
    chosen_options,
    comparison,
    evaluated_on,
    folder_of,
    loading_places,
    short_name,
    skips,
    spelt,
    verification_sentence,
)


def model_card(document: Document) -> str:
    """The card as Markdown: what was done, how to load it, what was measured, what was left out, how to repeat it."""
    sections = (_head, _done, _load, _measured, _limits, _left_alone, _repeat)
    return "\n".join(line for section in sections for line in section(document)) + "\n"


def _head(document: Document) -> Iterator[str]:
    model = document["recipe"]["model"]
    yield "---"
    yield f"library_name: {'onnx' if folder_of(document['output']['target']) == 'onnx' else 'transformers'}"
    if "hub_id" in document["inputs"]["model"]:
        yield f"base_model: {document['inputs']['model']['hub_id']}"
    yield "tags: [compress-model]"
    yield "---"
    yield ""
    yield f"# {short_name(model)}, compressed"
    yield ""
    steps = [f"`{entry['name']}`" for entry in document["passes"]]
    done = f"by {', then by '.join(steps)}" if steps else "without changing what it computes"
    before, after = document["ledger"]["before"]["stored_bytes"], document["output"]["tensor_bytes"]
    source, result = document["inputs"]["model"]["architecture"], document["output"]["architecture"]
    kept = "the class is still" if source == result else "the class is now"
    yield (
        f"This is `{short_name(model)}`, rewritten {done} with compress-model; {kept} {result}. "
        f"Its weights take {human_bytes(after)}, where the original's take {human_bytes(before)}."
    )
    yield from _in_short(document["evaluation"])
    yield ""


def _in_short(found: Document | None) -> Iterator[str]:
    """One sentence on quality, where it was measured."""
    if found is None:
        return
    ours, theirs = found["metrics"].get("perplexity"), found["reference"].get("perplexity")
    if ours and theirs:
        noise = (found.get("changes", {}).get("perplexity") or {}).get("noise")
        said = ", a difference within noise" if noise == "within" else ""
        yield (
            f"Its perplexity on held-out data is {ours['value']:.4g}, where the original's is "
            f"{theirs['value']:.4g}{said}; more is [below](#before-and-after)."
        )


def _done(document: Document) -> Iterator[str]:
    yield "## What was done"
    yield ""
    for index, entry in enumerate(document["passes"], 1):
        exact = "The model computes the same as before it." if entry["exact"] else "It changes what the model computes."
        options = spelt(chosen_options(entry["name"], entry["options"]))
        places = len(entry["rewritten"])
        yield (
            f"{index}. `{entry['name']}`{f' with `{options}`' if options else ''} rewrote "
            f"{places} {'place' if places == 1 else 'places'}. {exact}"
        )
    if not document["passes"]:
        yield "Nothing but the file format."
    yield ""


def _load(document: Document) -> Iterator[str]:
    yield "## Loading it"
    yield ""
    yield "```python"
    yield from _session() if folder_of(document["output"]["target"]) == "onnx" else _from_pretrained(document["output"])
    yield "```"
    yield ""
    yield "Where it loads:"
    yield ""
    for place in loading_places(document):
        yield f"- {place}"
    yield ""


def _session() -> Iterator[str]:
    """How ONNX Runtime loads an output that is an ONNX model alone."""
    yield "from onnxruntime import InferenceSession"
    yield ""
    yield 'model = InferenceSession("path/to/this/directory/onnx/model.onnx")'


def _from_pretrained(output: Document) -> Iterator[str]:
    """How transformers loads an output, or the GGUF file that is all of it."""
    architecture = output["auto_class"] or output["architecture"]
    trust = ", trust_remote_code=True" if output["auto_class"] else ""
    tokenizer = any(name.startswith("tokenizer") for name in output["other_files"])
    yield f"from transformers import {'AutoTokenizer, ' if tokenizer else ''}{architecture}"
    yield ""
    inside, file = ("/gguf", ', gguf_file="model.gguf"') if folder_of(output["target"]) == "gguf" else ("", "")
    yield f'model = {architecture}.from_pretrained("path/to/this/directory{inside}"{file}{trust})'
    if tokenizer:
        yield 'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")'


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


def _limits(document: Document) -> Iterator[str]:
    yield "## What to keep in mind"
    yield ""
    if not all(entry["exact"] for entry in document["passes"]):
        yield (
            "- It does not answer exactly as the original does. The numbers above hold for the data they were measured "
            "on; other data, such as code or another language, may lose more. Try it on what you need it for."
        )
    if "calibration" in document["recipe"]:
        data = document["recipe"]["calibration"]["data"]
        yield f"- It was calibrated on `{data}`. What that does not show may have been taken for useless."
    yield "- What the original may be used for, its licence and its biases hold for this model too."
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
