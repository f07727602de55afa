"""Generated encoder-decoders: what is written from a graph computes and writes what the graph does."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from backends.safetensors import emit
from compiler.errors import TargetError
from compiler.evaluate import cache_size, load_model
from compiler.frontend.capture import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.target import emission_of
from tests.emitted import written_for
from tests.families import FAMILIES, VOCABULARY
from tests.latent import latent_graph
from tests.test_generated import GOLDEN, NEW_TOKENS, error, tolerance

START = 1
TRANSLATORS = {
    "bart": ("BartForConditionalGeneration", "BartConfig"),
    "marian": ("MarianMTModel", "MarianConfig"),
}


def translator(name: str):
    """A random model of ``TRANSLATORS`` whose encoder and decoder differ in their sizes."""
    model, config = (getattr(transformers, part) for part in TRANSLATORS[name])
    torch.manual_seed(0)
    sizes = {"d_model": 48, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 6, "decoder_attention_heads": 4, "encoder_layers": 3, "decoder_layers": 2}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = model(config(**sizes, **heads, **ids, decoder_start_token_id=START)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)
    return made


def graph_of(name: str, ranks: tuple[int, ...] = (), layers: int = 3) -> Graph:
    if name in TRANSLATORS:
        return capture(translator(name))
    graph = capture(FAMILIES[name].build(3, layers=layers))
    return latent_graph(graph, ranks, (0,) * len(ranks)) if ranks else graph


def inputs_of(name: str) -> dict[str, Tensor]:
    return FAMILIES["t5" if name in TRANSLATORS else name].inputs()


def encoded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the encoder gets."""
    return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}


def greedy(graph: Graph, given: dict[str, Tensor], count: int = NEW_TOKENS) -> Tensor:
    """Greedy tokens of the decoder by a whole forward of the graph for each."""
    ids = torch.full((len(next(iter(given.values()))), 1), START)
    for _ in range(count):
        logits = run(graph, {**given, "decoder_input_ids": ids})["logits"]
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids


def generated(model, given: dict[str, Tensor], **options) -> Tensor:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(**given, max_new_tokens=NEW_TOKENS, decoder_start_token_id=START, **options)


KINDS = {
    "t5": ("t5", ()),
    "bart": ("bart", ()),
    "marian": ("marian", ()),
    "whisper": ("whisper", ()),
    "whisper, latents": ("whisper", (12, -1, 8)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(kind)`` is a graph of ``KINDS``, and the directory of its generated checkpoint."""
    known = {}

    def make(kind: str):
        if kind not in known:
            directory = tmp_path_factory.mktemp("pair")
            graph = graph_of(*KINDS[kind])
            emit(emission_of(graph, "generated"), graph.sources, directory)
            known[kind] = graph, directory
        return known[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_generated_encoder_decoder_computes_and_writes_as_its_graph(kind, made, tmp_path):
    (graph, directory), inputs = made(kind), inputs_of(KINDS[kind][0])
    model, given = load_model(directory, trust_remote_code=True), encoded(inputs)
    with torch.no_grad():
        found = model(**inputs)
    for output, value in run(graph, inputs).items():
        assert error(found[output], value) <= tolerance(graph)
    expected = greedy(graph, given)
    assert torch.equal(generated(model, given), expected)
    assert torch.equal(generated(model, given, use_cache=False), expected)
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(generated(again, given), expected)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_beams_are_those_of_the_stock_class(name, made):
    """By the generation that all models have: Whisper's own puts its prompt before."""
    given = encoded(inputs_of(name))
    options = {"num_beams": 3, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
    models = FAMILIES[name].build(3, layers=3), load_model(made(name)[1], trust_remote_code=True)
    plain = transformers.GenerationMixin.generate
    theirs, ours = (plain(model, **given, **options, decoder_start_token_id=START) for model in models)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padding_is_not_seen(name, made):
    """Of the encoder on the right, of the decoder on the left."""
    model, inputs = load_model(made(name)[1], trust_remote_code=True), inputs_of(name)
    source, ids = inputs["input_ids"], inputs["decoder_input_ids"]
    longer = torch.cat((source, source[:, :3]), 1)
    seen = torch.cat((torch.ones_like(source), torch.zeros_like(source[:, :3])), 1)
    shifted = torch.cat((ids[:, :2], ids), 1)
    mask = torch.cat((torch.zeros_like(ids[:, :2]), torch.ones_like(ids)), 1)
    with torch.no_grad():
        alone = model(**inputs).logits
        padded = model(
            input_ids=longer, attention_mask=seen, decoder_input_ids=shifted, decoder_attention_mask=mask
        ).logits
    assert error(padded[:, 2:], alone) <= 1e-5


def test_the_decoder_caches_latents_and_the_encoders_keys_once(made):
    model, inputs = load_model(made("whisper, latents")[1], trust_remote_code=True), inputs_of("whisper")
    size = cache_size(model)
    assert size is not None and size.values_per_token == 12 + 2 * 48 + 8
    with torch.no_grad():
        whole = model(**inputs).logits
        outputs = model.model.encoder(inputs["input_features"])
        cache, steps = None, []
        for ids in inputs["decoder_input_ids"].split(4, dim=1):
            found = model(encoder_outputs=outputs, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            steps.append(found.logits)
            assert [layer.keys.shape[2] for layer in cache.cross_attention_cache.layers] == [15] * 3
    assert error(torch.cat(steps, 1), whole) <= 1e-5


@pytest.mark.parametrize(("ranks", "bytes_per_token"), [((16, 16, 16), 3 * (16 + 2)), ((), 3 * 2 * 4 * (12 + 2))])
def test_a_cache_of_few_bits(ranks, bytes_per_token, tmp_path):
    graph = graph_of("whisper", ranks)
    emit(emission_of(graph, cache_bits=8), graph.sources, tmp_path)
    model = load_model(tmp_path, trust_remote_code=True)
    size = cache_size(model)
    assert size is not None and size.bytes_per_token == bytes_per_token
    inputs = inputs_of("whisper")
    with torch.no_grad():
        assert error(model(**inputs).logits, run(graph, inputs)["logits"]) <= 0.05


@pytest.mark.parametrize("kind", ["t5", "whisper, latents"])
def test_it_learns_from_labels(kind, made):
    model, inputs = load_model(made(kind)[1], trust_remote_code=True).train(), inputs_of(KINDS[kind][0])
    labels = inputs["decoder_input_ids"]
    before = torch.cat((torch.full_like(labels[:, :1], model.config.decoder_start_token_id), labels[:, :-1]), 1)
    found = model(**encoded(inputs), labels=labels)
    again = model(**encoded(inputs), decoder_input_ids=before).logits
    expected = torch.nn.functional.cross_entropy(again.flatten(0, 1), labels.flatten())
    assert torch.allclose(found.loss, expected, rtol=1e-5)
    found.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("kind", ["t5", "whisper, latents"])
def test_the_code_is_short(kind, golden):
    name, ranks = KINDS[kind]
    graph = capture(FAMILIES[name].config(15), architecture=FAMILIES[name].architecture)
    graph = latent_graph(graph, ranks * 5, (0,) * 15) if ranks else graph
    emission = emission_of(graph, "generated")
    written = written_for(emission)
    for file, text in written.items():
        golden(GOLDEN / f"{name}{'_latent' if ranks else ''}" / file, text)
    assert max(len(text.splitlines()) for text in written.values()) < 600


def test_decoders_with_windows_are_refused():
    graph = graph_of("whisper", layers=2)
    first = next(node for node in graph.nodes_named("attention") if node.attr("causal"))
    windowed = graph.op("attention", first.inputs, {**first.attrs, "window": 4}, scope=first.scope, before=first)
    graph.replace(first.output, windowed)
    graph.erase(first)
    with pytest.raises(TargetError, match="a generated encoder-decoder has no windows"):
        emission_of(graph, "generated")
