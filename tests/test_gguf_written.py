"""GGUF files that are written: readers find the graph's weights, and the model computes what the graph computes."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import BertModel

from backends.gguf import emit
from compiler.errors import CheckpointError, TargetError
from compiler.evaluate.parity import verify_gguf
from compiler.frontend import capture
from compiler.ir.execute import read_param, run
from compiler.pipeline import Pipeline
from compiler.target import emission_of, gguf_emission
from compiler.weights.gguf_header import read_gguf_header
from passes import Quantize
from tests.captures import saved
from tests.families import FAMILIES

WIDTHS = {"hidden_size": 64, "intermediate_size": 96}
GEMMA = {"query_pre_attn_scalar": 256, "head_dim": 256}  # what transformers' reader takes for granted
FAMILY_OPTIONS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"moe_intermediate_size": 768, "norm_topk_prob": True, "head_dim": 128},
    "gemma2": GEMMA,
    "gemma3": {**GEMMA, "layer_types": ["sliding_attention"] * 2},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LONG = {"max_position_embeddings": 64}


def written(name, directory, passes=(), **changes):
    """A family's graph after ``passes``, and the file that is written for it."""
    _, graph = saved(name, **{**WIDTHS, **changes})
    Pipeline(passes).run(graph)
    emission = gguf_emission(graph)
    emit(emission, graph.sources, directory)
    return graph, directory / "model.gguf", emission


@pytest.mark.parametrize("name", FAMILY_OPTIONS)
def test_the_file_is_the_graph(name, tmp_path):
    graph, file, _ = written(name, tmp_path, [Quantize(type="q5_1")], **FAMILY_OPTIONS[name])
    inputs = FAMILIES[name].inputs()
    ours, again = run(graph, inputs), run(capture(file), inputs)
    for key, value in ours.items():
        scale = value.abs().max()
        assert (again[key] - value).abs().max() <= 32 * torch.finfo(torch.float32).eps * scale


def test_transformers_loads_it(tmp_path):
    graph, file, _ = written("llama", tmp_path, [Quantize(type="q4_0")])
    found = verify_gguf(graph, file, memory=1 << 30)
    assert found.performed and found.error <= found.tolerance


@pytest.mark.parametrize("rotary", [LINEAR, LLAMA3, YARN], ids=lambda rotary: rotary["rope_type"])
def test_scaled_rotary_embedding_is_never_left_out_in_silence(rotary, tmp_path):
    """As transformers' reader of GGUF files does."""
    graph, file, _ = written("llama", tmp_path, rope_parameters=rotary, **LONG)
    assert "does not read the scaled rotary embedding" in verify_gguf(graph, file, memory=1 << 30).skipped
    with pytest.raises(CheckpointError, match="does not read the scaled rotary embedding"):
        capture(file)


def test_its_owner_reads_it(tmp_path):
    graph, file, emission = written(
        "llama", tmp_path, [Quantize(where="mlp", type="q4_0"), Quantize(where="attention", type="q8_0")]
    )
    reader = gguf.GGUFReader(file)
    assert {tensor.name for tensor in reader.tensors} == set(emission.tensors)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0" and kinds["blk.1.attn_k.weight"] == "Q8_0"
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    header = read_gguf_header(file)
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["tokenizer.ggml.model"] == "none"
    up = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    values = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type))
    param = next(param for key, param in graph.params.items() if key.endswith("layers.0.mlp.up_proj.weight"))
    assert torch.equal(values, read_param(graph, param))


@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_dense_weights_keep_their_type(dtype, kind, tmp_path):
    _, file, _ = written("llama", tmp_path, dtype=dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.attn_q.weight"] == kind and kinds["output_norm.weight"] == "F32"


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("opt", {}, "GGUF files of `opt` are not written"),
        ("bert", {}, "has no tensor for"),
        ("qwen2", {"rope_parameters": LLAMA3, **LONG}, "has no rotary embedding of the type llama3"),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 2.0}, **LONG}, "other factors than YaRN's"),
        ("llama", {"hidden_act": "relu"}, "has no `hidden_act: relu`"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "scaled by something else"),
        ("gemma3", GEMMA, "full attention in every 6th"),
        ("qwen3_moe", {"norm_topk_prob": False}, "has no `norm_topk_prob: False`"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(name, changes, reason, tmp_path):
    with pytest.raises(TargetError, match=reason):
        written(name, tmp_path, **changes)


def test_other_codes_and_other_files_are_refused(tmp_path):
    with pytest.raises(TargetError, match="quantised in a way that is no block format"):
        written("llama", tmp_path, [Quantize(bits=4, group=16)])
    graph, _, _ = written("llama", tmp_path, [Quantize(type="q4_0")])
    with pytest.raises(TargetError, match=r"block format of GGUF files"):
        emission_of(graph)


def test_a_window_that_llama_cpp_leaves_out_is_said(tmp_path):
    _, _, emission = written("mistral", tmp_path, sliding_window=5)
    assert "a window of 5" in emission.loads_in[1]


QWEN3_WINDOW = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWED = {"mixtral": {}, "qwen3": QWEN3_WINDOW, "qwen3_moe": {"use_sliding_window": True, "norm_topk_prob": True}}


@pytest.mark.parametrize("name", WINDOWED)
def test_other_windows_are_refused_where_they_change_what_is_computed(name, tmp_path):
    changes = {**WINDOWED[name], "max_position_embeddings": 64}
    with pytest.raises(TargetError, match="has no window, and attention of the model has one of 5 tokens"):
        written(name, tmp_path, sliding_window=5, **changes)
    _, _, emission = written(name, tmp_path, sliding_window=64, **changes)
    assert "a window of 64" in emission.loads_in[1]


def test_windows_that_llama_cpp_reads_are_no_note(tmp_path):
    _, _, emission = written("gemma2", tmp_path, **GEMMA)
    assert emission.notes == () and emission.sizes["gemma2.attention.sliding_window"] == 5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The file that says how a checkpoint pools, and the checkpoint's graph."""
    folder = tmp_path_factory.mktemp("encoder")
    BertModel(FAMILIES["bert"].build(3, layers=1).config).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    return folder / "1_Pooling" / "config.json", capture(folder)


SAID = {
    '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false}': (1, ""),
    '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}': (None, "mean_tokens and cls_token"),
    '{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}': (None, "mean_tokens and max_tokens"),
    '{"pooling_mode_max_tokens": true}': (None, "max_tokens"),
    '{"pooling_mode_mean_tokens": false}': (None, "no `pooling_mode_` of 1_Pooling/config.json is true"),
    "{}": (None, "no `pooling_mode_` of 1_Pooling/config.json is true"),
}


@pytest.mark.parametrize("said", SAID)
def test_one_way_of_pooling_is_written_and_others_are_noted(said, encoder):
    path, graph = encoder
    path.write_text(said)
    number, noted = SAID[said]
    emission = gguf_emission(graph)
    assert emission.sizes.get("bert.pooling_type") == number
    assert [noted in note for note in emission.notes if "one vector" in note] == [True] * bool(noted)


@pytest.mark.parametrize("said", [b'{"pooling_mode', b"[1]", b"null", b"\xff\xfe"])
def test_damaged_pooling_is_refused_with_its_place(said, encoder):
    path, graph = encoder
    path.write_bytes(said)
    with pytest.raises(CheckpointError) as error:
        gguf_emission(graph)
    assert error.value.where == str(path) and error.value.remedy


def test_pooling_that_is_no_file_is_refused_with_its_place(encoder):
    path, graph = encoder
    path.unlink(missing_ok=True)
    path.mkdir()
    try:
        with pytest.raises(CheckpointError) as error:
            gguf_emission(graph)
    finally:
        path.rmdir()
    assert error.value.where == str(path) and error.value.remedy


@pytest.mark.parametrize("count", [1, 3])
def test_a_header_says_how_many_kinds_of_tokens_there_are(count):
    emission = gguf_emission(capture(BertModel(FAMILIES["bert"].config(type_vocab_size=count)).eval()))
    assert emission.sizes["tokenizer.ggml.token_type_count"] == count
    assert emission.tensors["token_types.weight"].type.static_shape[0] == count
