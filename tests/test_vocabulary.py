"""Models with fewer tokens: logits that remain are what they were, and texts are cut into the same tokens."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compiler import Recipe, compress
from compiler.errors import CheckpointError, PassError, RecipeError
from compiler.evaluate import load_model
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.pipeline import Pipeline
from compiler.rewrite.vocabulary import keep_tokens, vocabulary_of
from compiler.target import emission_of
from compiler.weights.checkpoint import open_checkpoint
from compiler.weights.tokens import keep_tokens as keep_in_files
from compiler.weights.tokens import tokens_of
from passes.prune import Prune
from passes.prune.vocabulary import chosen
from tests.captures import graph_of, plan_of
from tests.families import FAMILIES
from tests.removed import double
from tests.tiny import TEXT, write_text

SENTENCE = "crows watch bottles of beer, while 4 crows drink from 99 bottles: schöne Bären trinken Bier; дно."
WORDS = SENTENCE.split()
CORPUS = [TEXT, *(" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS)))]
KINDS = ("BPE", "WordPiece", "Unigram")


def trained(kind: str, size: int = 400) -> PreTrainedTokenizerFast:
    """A tokenizer that has learnt ``size`` tokens at most, with tokens of its own at the end and around a text."""
    if kind == "BPE":
        tokenizer, special = Tokenizer(models.BPE()), ["<pad>", "<s>"]
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "WordPiece":
        tokenizer, special = Tokenizer(models.WordPiece(unk_token="<unk>")), ["<pad>", "<s>", "<unk>"]
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special)
    else:
        tokenizer, special = Tokenizer(models.Unigram()), ["<pad>", "<s>", "<unk>"]
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<end>"])
    numbered = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A <end>", special_tokens=numbered)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>", pad_token="<pad>")


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    """A tiny model with a trained tokenizer, and that tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), trained(request.param)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 7,  # rows that no token has
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=request.param == "BPE",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def part_of(folder, count: int, seed: int = 0) -> list[int]:
    """``count`` tokens that may stay when others go, counted in random data."""
    tokens = tokens_of(open_checkpoint(folder))
    seen = torch.randint(0, 100, (tokens.count,), generator=torch.Generator().manual_seed(seed))
    return chosen(tokens, seen, count)


@pytest.mark.parametrize("seed", range(3))
def test_texts_whose_tokens_remain_are_cut_into_the_same_ones(checkpoint, tmp_path, seed):
    before, least = AutoTokenizer.from_pretrained(checkpoint), len(part_of(checkpoint, 10**6))
    kept = part_of(checkpoint, least * 9 // 10, seed)
    open_checkpoint(checkpoint).save_tokenizer(tmp_path)
    keep_in_files(tmp_path, kept)
    after, same = AutoTokenizer.from_pretrained(tmp_path), 0
    assert len(after) == len(kept) and after.eos_token == "<end>" and after.pad_token == "<pad>"
    for text in [*WORDS, *TEXT.split(", "), "<pad> Bären", "quite other words"]:
        old, new = before(text)["input_ids"], after(text)["input_ids"]
        assert "BPE" not in str(checkpoint) or after.decode(new) == before.decode(old)
        if set(old) <= set(kept):
            assert [kept[token] for token in new] == old
            same += 1
    assert same > 5


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), part=st.floats(0.75, 1))
def test_what_stays_is_what_is_needed_and_seen_most(checkpoint, seed, part):
    tokens = tokens_of(open_checkpoint(checkpoint))
    seen = torch.randint(0, 50, (tokens.count + 9,), generator=torch.Generator().manual_seed(seed))
    kept = chosen(tokens, seen, int(part * tokens.count))
    assert kept == sorted(set(kept)) and len(kept) <= part * tokens.count
    assert tokens.needed <= set(kept) and max(kept) < tokens.count
    assert all(tokens.with_parts(token) <= set(kept) for token in kept)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "mixtral", "modernbert", "opt"])
def test_logits_that_remain_are_what_they_were(name):
    family = FAMILIES[name]
    before = double(graph_of(family.name))
    graph, (ids,) = double(graph_of(family.name)), before.inputs
    found = vocabulary_of(graph)
    kept = [token for token in range(found.size) if token % 3]
    keep_tokens(graph, found, kept)
    new = torch.randint(0, len(kept), (2, 9), generator=torch.Generator().manual_seed(0))
    (expected,) = run(before, {ids: torch.tensor(kept)[new]}).values()
    (found_logits,) = run(graph, {ids: new}).values()
    torch.testing.assert_close(found_logits, expected[..., kept], rtol=0, atol=1e-12)


def test_a_job_writes_the_class_with_fewer_tokens_and_its_tokenizer(checkpoint, tmp_path):
    write_text(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {checkpoint}\ncalibration: {{data: text.txt, samples: 4, length: 64}}\n"
        "passes: [{prune: {what: vocabulary, keep: 90%, align: 4}}, {quantize: {bits: 8, group: 32}}]\n"
    )
    made = compress(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "out").document
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    model, tokenizer = load_model(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made["verification"]["performed"] and config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert config["vocab_size"] % 4 == 0
    assert config["eos_token_id"] == [tokenizer.eos_token_id] and config["pad_token_id"] == tokenizer.pad_token_id
    numbers = made["passes"][0]["rewritten"][0]["numbers"]
    assert numbers["kept"] == config["vocab_size"] and numbers["calibration_kept"] > 0.9


def test_a_recipe_cannot_compare_token_by_token(checkpoint, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {checkpoint}\ncalibration: {{data: {write_text(tmp_path)}}}\nevaluate: {{data: text.txt}}\n"
        "passes: [{prune: {what: vocabulary, keep: 90%}}]\n"
    )
    with pytest.raises(RecipeError, match="cannot be compared with the original token by token") as caught:
        compress(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "out")
    assert caught.value.span is not None


def test_generated_code_has_the_new_numbers_too(checkpoint, tmp_path):
    graph = capture(checkpoint)
    ids = torch.arange(40)[None]
    Pipeline([Prune(what="vocabulary", keep=0.9, align=1)]).run(graph, calibration=lambda _: [{"input_ids": ids}])
    emission = emission_of(graph, "generated")
    assert emission.config["vocab_size"] == len(graph.tokens)
    assert graph.tokens[emission.config["bos_token_id"]] == AutoTokenizer.from_pretrained(checkpoint).bos_token_id


def test_what_cannot_lose_tokens_is_refused(tmp_path):
    prune = Prune(what="vocabulary", keep=0.5, align=1)
    with pytest.raises(PassError, match="takes input_ids, decoder_input_ids, and not tokens alone"):
        Pipeline([prune]).run(plan_of("t5"))
    graph = plan_of("llama")
    batches = [{"input_ids": torch.arange(30)[None]}]
    with pytest.raises(PassError, match="after all passes that calibrate"):
        Pipeline([prune, Prune(keep=0.5, align=8)]).run(graph, calibration=lambda _: batches)
    with pytest.raises(PassError, match="by how often they occur"):
        Prune(what=("vocabulary", "channels"), keep=0.5)
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Pipeline([prune]).run(capture(tmp_path), calibration=lambda _: batches)


def test_needed_tokens_are_an_error_where_fewer_are_to_stay(checkpoint):
    with pytest.raises(PassError, match="tokens must stay"):
        part_of(checkpoint, 5)


@pytest.mark.parametrize(
    ("options", "count"), [({"keep": 0.5}, 48), ({"keep": 40}, 40), ({"keep": 0.9, "of": "model"}, 0)]
)
def test_keep_is_a_part_of_the_rows_a_number_or_a_part_of_the_model(options, count):
    graph = plan_of("llama")
    (entry,) = Pipeline([Prune(what="vocabulary", align=1, **options)]).run(graph, planned=True).passes
    rows = graph.outputs["logits"].shape[-1]
    assert rows == count or (not count and rows < 96)
    if not count:
        each = (entry.before.parameters - entry.after.parameters) // (96 - rows)
        assert 0 <= 0.9 * entry.before.parameters - entry.after.parameters < each
    with pytest.raises(PassError, match="97 tokens cannot remain of 96"):
        Pipeline([Prune(what="vocabulary", keep=97)]).run(plan_of("llama"), planned=True)
