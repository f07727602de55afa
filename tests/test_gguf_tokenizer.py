"""Tokenizers in GGUF files: what llama.cpp cuts alike is written, all else is refused before any pass runs."""

from __future__ import annotations

import json
import shutil

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from backends.gguf.tokenizer import tokenizer_in
from compiler.errors import TargetError
from compiler.job import compress
from compiler.recipe import Recipe
from compiler.target import gguf_emission
from compiler.weights.checkpoint import open_checkpoint
from tests.captures import saved
from tests.llama_cpp import gpt2_tokenizer, word_pieces

PREFIX = "tokenizer.ggml.add_space_prefix"
PIECES = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3}
REPLACE, PREPEND = normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")


def save(directory, normalizer, pre_tokenizer, *, byte_fallback=True, extra=()):
    """A BPE tokenizer of four tokens, and ``extra`` ones that are added."""
    model = models.BPE(PIECES, [("▁", "a")], unk_token="<unk>", byte_fallback=byte_fallback)
    made = tokenizers.Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.add_special_tokens(list(extra))
    made.save(str(directory / "tokenizer.json"))
    return made


def metaspace(scheme, *, split=False):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


@pytest.mark.parametrize(
    "normalizer, pre_tokenizer",
    [
        (None, metaspace("first")),
        (None, metaspace("always")),
        (None, metaspace("never")),
        (normalizers.Sequence([PREPEND, REPLACE]), None),
        (REPLACE, None),
        (REPLACE, pre_tokenizers.Split(" ", "merged_with_previous")),
    ],
)
def test_a_space_is_put_in_front_where_the_tokenizer_does(normalizer, pre_tokenizer, tmp_path):
    made = save(tmp_path, normalizer, pre_tokenizer)
    assert tokenizer_in(tmp_path, len(PIECES)).metadata[PREFIX] == (made.encode("a").tokens == ["▁a"])


@pytest.mark.parametrize(
    "normalizer, pre_tokenizer",
    [
        (None, None),
        (None, metaspace("first", split=True)),
        (REPLACE, metaspace("first")),
        (normalizers.Sequence([normalizers.NFKC(), REPLACE]), None),
        (REPLACE, pre_tokenizers.Digits(individual_digits=True)),
    ],
)
def test_other_ways_to_make_pieces_are_refused(normalizer, pre_tokenizer, tmp_path):
    save(tmp_path, normalizer, pre_tokenizer)
    with pytest.raises(TargetError, match="BPE over pieces that are made by"):
        tokenizer_in(tmp_path, len(PIECES))


@pytest.mark.parametrize("single, name", [(True, "smollm"), (False, None)])
def test_digits_are_cut_one_by_one_or_not_at_all(single, name, tmp_path):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=single), level])
    save(tmp_path, None, steps, byte_fallback=False)
    if name is None:
        with pytest.raises(TargetError, match="pre-tokenizers Digits, ByteLevel"):
            tokenizer_in(tmp_path, len(PIECES))
    else:
        assert tokenizer_in(tmp_path, len(PIECES)).metadata["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    "options, taken",
    [
        ({}, True),
        ({"strip_accents": True}, True),
        ({"strip_accents": False}, False),
        ({"handle_chinese_chars": False}, False),
        ({"clean_text": False}, False),
        ({"lowercase": False}, False),
    ],
)
def test_word_pieces_of_uncased_bert_alone_are_written(options, taken, tmp_path):
    made = word_pieces()
    made.backend_tokenizer.normalizer = normalizers.BertNormalizer(**options)
    made.save_pretrained(tmp_path)
    if taken:
        assert tokenizer_in(tmp_path, len(made)).metadata["tokenizer.ggml.model"] == "bert"
    else:
        with pytest.raises(TargetError, match="another normalizer than that of uncased BERT"):
            tokenizer_in(tmp_path, len(made))


def test_added_tokens_without_a_row_are_left_out_and_said(tmp_path):
    save(tmp_path, REPLACE, None, extra=["<picture>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<picture>", "unk_token": "<unk>"}))
    found = tokenizer_in(tmp_path, len(PIECES))
    assert found.metadata["tokenizer.ggml.tokens"] == list(PIECES)
    assert len(found.metadata["tokenizer.ggml.scores"]) == len(PIECES)
    assert "<picture>" in found.notes[0] and "tokenizer.ggml.padding_token_id" not in found.metadata
    whole = tokenizer_in(tmp_path, len(PIECES) + 1)
    assert whole.notes == () and whole.metadata["tokenizer.ggml.padding_token_id"] == len(PIECES)


def test_other_tokens_without_a_row_are_refused_before_passes_run(tmp_path):
    source, graph = saved("llama")
    size = graph.origin.config["vocab_size"]
    shutil.copytree(source, tmp_path / "model")
    gpt2_tokenizer(size + 1).save_pretrained(tmp_path / "model")
    graph.sources["model"] = open_checkpoint(tmp_path / "model")
    with pytest.raises(TargetError, match=f"where the model has {size} tokens"):
        gguf_emission(graph)


def test_what_transformers_does_not_read_is_written_and_said_to_be_not_measured(tmp_path):
    source, graph = saved("granite", hidden_size=64, intermediate_size=96)
    shutil.copytree(source, tmp_path / "model")
    gpt2_tokenizer(graph.origin.config["vocab_size"]).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the inn and a thin thing. " * 200)
    (tmp_path / "recipe.yaml").write_text(
        "model: model\npasses: [quantize: {type: q4_0}]\nemit: [gguf]\n"
        "evaluate: {data: text.txt, samples: 1, length: 16}\n"
    )
    result = compress(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "out")
    assert (tmp_path / "out" / "gguf" / "model.gguf").is_file()
    assert result.document["evaluation"] is None
    assert "reader of GGUF files does not take it" in result.document["not_evaluated"]
    assert "was not measured: transformers' reader" in result.summary()
    assert "was not measured: transformers' reader" in (tmp_path / "out" / "README.md").read_text()
