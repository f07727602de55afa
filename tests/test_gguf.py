"""GGUF files: damage is named, what is read equals what transformers loads, the tokenizer is upstream's."""

import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.errors import CheckpointError
from compiler.weights.checkpoint import bind, open_checkpoint
from compiler.weights.evaluate import evaluate
from compiler.weights.gguf import shortest_floats
from compiler.weights.gguf_header import read_gguf_header

FORMATS = gguf.GGMLQuantizationType
SMOLLM2 = Path(os.environ.get("COMPRESS_MODEL_SMOLLM2", "models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))

COMMON = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1e5,
}
LAYER = {
    "attn_norm": (64,),
    "ffn_norm": (64,),
    "attn_q": (64, 64),
    "attn_k": (32, 64),
    "attn_v": (32, 64),
    "attn_output": (64, 64),
}
DENSE = {**LAYER, "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
EXPERTS = {
    **LAYER,
    "attn_q_norm": (16,),
    "attn_k_norm": (16,),
    "ffn_gate_inp": (4, 64),
    "ffn_gate_exps": (4, 768, 64),
    "ffn_up_exps": (4, 768, 64),
    "ffn_down_exps": (4, 64, 768),
}
GEMMA2 = {**DENSE, "post_attention_norm": (64,), "post_ffw_norm": (64,)}
MODELS = {
    "llama": (DENSE, {}),
    "qwen3moe": (EXPERTS, {"expert_count": 4, "expert_used_count": 2, "attention.key_length": 16}),
    "gemma2": (GEMMA2, {"attention.key_length": 16, "attention.sliding_window": 8}),
}


def value_of(writer, key, value):
    {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)


def make_file(path, architecture="llama", formats=(FORMATS.Q8_0, FORMATS.Q4_1, FORMATS.F16), untied=True):
    """A tiny model with random tensors; matrices take ``formats`` in turn."""
    layer, more = MODELS[architecture]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**COMMON, **more}.items():
        value_of(writer, f"{architecture}.{key}", value)
    value_of(writer, f"{architecture}.vocab_size", 96)
    shapes = {"token_embd": (96, 64), "output_norm": (64,)} | ({"output": (96, 64)} if untied else {})
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    generator = np.random.default_rng(0)
    for index, (name, shape) in enumerate(shapes.items()):
        data = generator.standard_normal(shape, dtype=np.float32)
        format = FORMATS.F32 if len(shape) == 1 else formats[index % len(formats)]
        raw = data.astype(np.float16) if format == FORMATS.F16 else gguf.quants.quantize(data, format)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded_by_transformers(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.state_dict()


def bound(checkpoint):
    config = transformers.AutoConfig.for_model(**checkpoint.config)
    with torch.device("meta"):
        model = getattr(transformers, checkpoint.architecture)(config)
    return bind(checkpoint, model)


def check_against_transformers(path):
    checkpoint = open_checkpoint(path)
    exprs, expected = bound(checkpoint), loaded_by_transformers(path)
    assert set(exprs) == set(expected)
    for name, expr in exprs.items():
        (value,) = evaluate([expr], {"model": checkpoint})
        assert torch.equal(value, expected[name]), name
        key, last = expr.attr("key"), expr.shape[0]
        assert torch.equal(checkpoint.read_rows(key, last // 3, last), value[last // 3 :]), name


@pytest.mark.parametrize(
    "architecture, untied", [("llama", True), ("llama", False), ("qwen3moe", True), ("gemma2", False)]
)
def test_tensors_equal_what_transformers_loads(tmp_path, architecture, untied):
    check_against_transformers(make_file(tmp_path / "tiny.gguf", architecture, untied=untied))


@pytest.mark.parametrize("format", [FORMATS.F32, FORMATS.BF16, FORMATS.Q4_0, FORMATS.Q5_0, FORMATS.Q5_1])
def test_every_block_format_equals_what_transformers_loads(tmp_path, format):
    check_against_transformers(make_file(tmp_path / "tiny.gguf", formats=(format,)))


def test_the_config_is_that_of_the_original(tmp_path):
    checkpoint = open_checkpoint(make_file(tmp_path / "tiny.gguf"))
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in checkpoint.config
    assert json.loads(json.dumps(checkpoint.config)) == checkpoint.config


def test_a_fingerprint_follows_the_content(tmp_path):
    prints = [
        open_checkpoint(make_file(tmp_path / f"{i}.gguf", untied=untied)).fingerprint()
        for i, untied in enumerate((True, True, False))
    ]
    assert prints[0] == prints[1] != prints[2]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_floats_are_the_shortest_that_round_to_the_same_float32(value):
    shortest = shortest_floats({"x": [value]})["x"][0]
    assert np.float32(shortest) == np.float32(value)
    assert len(repr(shortest)) <= len(repr(value))


def test_only_float32_values_are_shortened():
    assert shortest_floats({"a": 9.999999747378752e-06, "b": 0.1, "c": "0.1", "d": [None, 3]}) == {
        "a": 1e-05,
        "b": 0.1,
        "c": "0.1",
        "d": [None, 3],
    }


def cut(data, position, replacement):
    return data[:position] + replacement + data[position + len(replacement) :]


DAMAGES = [
    (lambda d: d[:-1], "truncated: tensor .* ends at byte"),
    (lambda d: d[:100], "ends inside its header"),
    (lambda d: d[:2], "claims 4 bytes, but has 2"),
    (lambda d: b"GGML" + d[4:], "does not begin with GGUF"),
    (lambda d: cut(d, 4, struct.pack("<I", 9)), "GGUF version 9"),
    (lambda d: cut(d, 8, struct.pack("<Q", 2**60)), "claims 1152921504606846976 entries"),
    (lambda d: cut(d, 16, struct.pack("<Q", 2**60)), "claims 1152921504606846976 entries"),
    (lambda d: cut(d, 24, struct.pack("<Q", 2**40)), "claims 1099511627776 entries"),
    (lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), "blk.0.attn_q.weight stands in it twice"),
    (lambda d: _record(d, b"output_norm.weight", format=200), "unknown block format 200"),
    (lambda d: _record(d, b"output_norm.weight", format=8, dim=33), "does not divide into blocks of 32"),
    (lambda d: _record(d, b"output_norm.weight", rank=9), "has 9 dims"),
    (lambda d: _record(d, b"output_norm.weight", offset=0), "overlaps"),
    (lambda d: _record(d, b"output_norm.weight", dim=2**40), "truncated|overlaps"),
]


def _record(data, name, rank=1, dim=64, format=0, offset=None):
    """Change the record of a vector."""
    start = data.index(name) + len(name)
    old = struct.unpack("<IQIQ", data[start : start + 24])
    return cut(data, start, struct.pack("<IQIQ", rank, dim, format, old[3] if offset is None else offset))


@pytest.mark.parametrize("damage, reason", DAMAGES, ids=[reason for _, reason in DAMAGES])
def test_a_damaged_file_is_refused(tmp_path, damage, reason):
    path = make_file(tmp_path / "tiny.gguf")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=reason) as error:
        open_checkpoint(path)
    assert "tiny.gguf" in str(error.value)


@given(position=st.integers(0, 3000), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_never_escapes_as_another_kind_of_error(tmp_path_factory, position, value):
    path = make_file(tmp_path_factory.mktemp("fuzz") / "tiny.gguf")
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data)
    try:
        header = read_gguf_header(path)
    except CheckpointError:
        return
    assert all(0 < blocks.start <= blocks.stop <= len(data) for blocks in header.tensors.values())


def test_a_part_of_a_split_file_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"part.gguf is one of 3 parts"):
        open_checkpoint(tmp_path / "part.gguf")


def test_code_beside_the_file_is_never_run(tmp_path):
    path = make_file(tmp_path / "tiny.gguf")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    mapped = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(mapped))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"transformers cannot read the tokenizer of tiny.gguf"):
        open_checkpoint(path).save_tokenizer(tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_lists_in_lists_have_a_limit(tmp_path):
    nested = struct.pack("<Q1sI", 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQB", 0, 1, 0)
    (tmp_path / "deep.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + nested)
    with pytest.raises(CheckpointError, match="lists in lists"):
        open_checkpoint(tmp_path / "deep.gguf")


def test_an_unknown_architecture_is_refused(tmp_path):
    path = make_file(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lemma"))
    with pytest.raises(CheckpointError, match="transformers cannot read the config of"):
        open_checkpoint(path)


def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path):
    """A table of rotary factors, say: leaving it out would change what the model computes."""
    path = make_file(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_norm.weight", b"blk.1.rope_freq.weigh"))
    with pytest.raises(CheckpointError, match=r"has no place for tensor blk.1.rope_freq"):
        dict(open_checkpoint(path).types)


@pytest.mark.real
def test_smollm2_equals_transformers_to_the_last_bit():
    check_against_transformers(SMOLLM2)


@pytest.mark.real
def test_smollm2_tokenizer_splits_digits(tmp_path):
    checkpoint = open_checkpoint(SMOLLM2)
    written = {file.name for file in checkpoint.save_tokenizer(tmp_path)}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= written
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("In 1984, 12 of 365 days").input_ids
    assert tokenizer.decode(ids) == "In 1984, 12 of 365 days"
    assert all(sum(letter.isdigit() for letter in tokenizer.decode([i])) <= 1 for i in ids)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system")
