"""Checkpoints: headers are checked before anything is read, damage is named, what is read equals what was saved."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from compiler.errors import CaptureError, CheckpointError
from compiler.frontend.subject import build_on_meta, config_from_dict
from compiler.weights.checkpoint import open_checkpoint
from compiler.weights.tensorfile import DTYPES, header_bytes, read_header

INDEX = "model.safetensors.index.json"


def make_directory(path, shards=None, config=None):
    """A checkpoint directory: one file, or a shard for each of several dicts of tensors."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"architectures": ["LlamaForCausalLM"]}))
    shards = shards or [{"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int64)}]
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors")
        return path
    names = [f"model-{i}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, path / name)
    weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_read_as_it_was_saved(tmp_path, dtype):
    bits = torch.randint(0, 2 if dtype == torch.bool else 120, (3, 8 * dtype.itemsize), dtype=torch.uint8)
    tensor = bits.view(dtype)
    checkpoint = open_checkpoint(make_directory(tmp_path, [{"t": tensor}]))
    assert torch.equal(checkpoint.read("t").view(torch.uint8), bits)
    assert torch.equal(checkpoint.read_rows("t", 1, 3).view(torch.uint8), bits[1:])
    assert checkpoint.types["t"].dtype == dtype


def test_shards_are_one_checkpoint(tmp_path):
    shards = [{"a": torch.ones(2)}, {"b": torch.zeros(()), "c": torch.ones(0, 3)}]
    checkpoint = open_checkpoint(make_directory(tmp_path, shards))
    assert set(checkpoint.types) == {"a", "b", "c"}
    assert checkpoint.read("b").shape == ()
    assert checkpoint.read("c").shape == (0, 3)
    assert [file.name for file in checkpoint.files] == ["model-0.safetensors", "model-1.safetensors"]
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert set(checkpoint.digests()) == {"model-0.safetensors", "model-1.safetensors"}


def test_a_tensor_is_in_fresh_memory(tmp_path):
    checkpoint = open_checkpoint(make_directory(tmp_path))
    checkpoint.read("a").fill_(9)
    assert checkpoint.read("a").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_our_headers_are_read_by_safetensors(tmp_path):
    tensors = {"x": torch.arange(5.0), "y": torch.ones(2, 2, dtype=torch.bfloat16)}
    source = open_checkpoint(make_directory(tmp_path, [tensors]))
    file = tmp_path / "ours.safetensors"
    data = [tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors.values()]
    file.write_bytes(header_bytes(source.types) + b"".join(data))
    with safe_open(file, framework="pt") as opened:
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert {name: stored.type for name, stored in read_header(file).items()} == dict(source.types)


def test_fingerprints_follow_the_content(tmp_path):
    first = open_checkpoint(make_directory(tmp_path / "a"))
    copy = open_checkpoint(make_directory(tmp_path / "b"))
    changed = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int64)}
    other = open_checkpoint(make_directory(tmp_path / "c", [changed]))
    config = open_checkpoint(make_directory(tmp_path / "d", config={"architectures": ["GPT2LMHeadModel"]}))
    assert first.fingerprint() == copy.fingerprint()
    assert len({first.fingerprint(), other.fingerprint(), config.fingerprint()}) == 3


def test_an_edit_inside_a_tensor_changes_the_identity(tmp_path):
    """The fingerprint looks at the edges of tensors only."""
    path = make_directory(tmp_path, [{"w": torch.zeros(8192)}])
    before = open_checkpoint(path)
    identity, fingerprint = before.identity(), before.fingerprint()
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(16384)
        file.write(b"\x01")
    os.utime(path / "model.safetensors", ns=(1, 1))
    after = open_checkpoint(path)
    assert after.fingerprint() == fingerprint
    assert after.identity() != identity


def test_a_fingerprint_covers_the_tokenizer(tmp_path):
    path = make_directory(tmp_path)
    before = open_checkpoint(path).fingerprint()
    (path / "tokenizer_config.json").write_text("{}")
    assert open_checkpoint(path).fingerprint() != before


def test_links_out_of_the_checkpoint_are_refused(tmp_path):
    path = make_directory(tmp_path / "model")
    (tmp_path / "secret").write_text("secret")
    (path / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is a link"):
        open_checkpoint(path).save_tokenizer(tmp_path)


def test_links_to_the_blobs_of_a_hub_cache_are_followed(tmp_path):
    (tmp_path / "repo" / "snapshots").mkdir(parents=True)
    (tmp_path / "repo" / "blobs").mkdir()
    (tmp_path / "repo" / "blobs" / "1234").write_text("{}")
    path = make_directory(tmp_path / "repo" / "snapshots" / "main")
    (path / "normalizer.json").symlink_to("../../blobs/1234")
    (tmp_path / "out").mkdir()
    (copied,) = open_checkpoint(path).save_tokenizer(tmp_path / "out")
    assert copied.name == "normalizer.json" and copied.read_text() == "{}" and not copied.is_symlink()


@pytest.mark.parametrize("names", ["LlamaForCausalLM", {"a": 1}, [3], 7])
def test_architectures_of_another_kind_are_refused(tmp_path, names):
    with pytest.raises(CheckpointError, match=r"`architectures` in config.json is"):
        _ = open_checkpoint(make_directory(tmp_path, config={"architectures": names})).architecture


HEADERS = [
    (b"", "cannot be read"),
    (b"[]", "not an object"),
    (b"\xff{}", "cannot be read"),
    (b"[" * 100_000, "cannot be read"),
    (b'{"a":{},"a":{}}', "a stands in it twice"),
    ({"a": {"dtype": "F32", "shape": [2]}}, "entry of tensor a is incomplete"),
    ({"a": 3}, "entry of tensor a is incomplete"),
    ({"a": entry(shape="23")}, "tensor a has the shape"),
    ({"a": entry(shape=[-2], offsets=(0, 8))}, "tensor a has the shape"),
    ({"a": entry(shape=[True, 2])}, "tensor a has the shape"),
    ({"a": entry(offsets=(8, 0))}, "tensor a has the shape"),
    ({"a": entry(offsets=(-8, 0))}, "tensor a has the shape"),
    ({"a": entry(dtype="U32")}, "unsupported dtype U32"),
    ({"a": entry(dtype=["F32"])}, "unsupported dtype"),
    ({"a": entry(shape=[3])}, "12 bytes, but its offsets span 8"),
    ({"a": entry(shape=[2**62, 4])}, "but its offsets span 8"),
    ({"a": entry(), "b": entry(offsets=(4, 12))}, "tensor b overlaps a"),
    ({"a": entry(), "b": entry(offsets=(16, 24))}, "8 bytes between a and tensor b are unclaimed"),
    ({"a": entry(), "b": entry(offsets=(8, 16))}, "truncated"),
    ({"a": entry(shape=[1], offsets=(0, 4))}, "4 bytes after tensor a are unclaimed"),
]


@pytest.mark.parametrize("header, reason", HEADERS, ids=[reason for _, reason in HEADERS])
def test_a_header_that_lies_is_refused(tmp_path, header, reason):
    path = write_raw(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=reason) as error:
        read_header(path)
    assert "x.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "prefix, reason",
    [
        (b"", "only 0 bytes"),
        (b"1234", "only 4 bytes"),
        (struct.pack("<Q", 2**63), "its header claims 9223372036854775808 bytes"),
        (struct.pack("<Q", 100) + b"{}", "its header claims 100 bytes"),
    ],
)
def test_a_length_that_lies_is_refused(tmp_path, prefix, reason):
    (tmp_path / "x.safetensors").write_bytes(prefix)
    with pytest.raises(CheckpointError, match=reason):
        read_header(tmp_path / "x.safetensors")


@given(position=st.integers(0, 200), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_never_escapes_as_another_kind_of_error(tmp_path_factory, position, value):
    """Whatever one byte of the header becomes: either the header is refused, or every tensor can still be read."""
    directory = tmp_path_factory.mktemp("fuzz")
    file = make_directory(directory) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[min(position, len(data) - 1)] = value
    file.write_bytes(data)
    try:
        checkpoint = open_checkpoint(directory)
    except CheckpointError:
        return
    assert all(tuple(checkpoint.read(name).shape) == type.shape for name, type in checkpoint.types.items())


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


INDEX_FAULTS = [
    (lambda m: m.update(z="model-0.safetensors"), "tensor z is missing"),
    (lambda m: m.update(a="model-9.safetensors"), "names model-9.safetensors, which does not exist"),
    (lambda m: m.update(a="model-1.safetensors"), "places tensor a in model-1.safetensors, it lies in model-0"),
    (lambda m: m.update(z="../model-0.safetensors"), "outside the directory"),
    (lambda m: m.update(z="/etc/passwd"), "outside the directory"),
    (lambda m: m.update(z=3), "has no weight_map"),
]


@pytest.mark.parametrize("change, reason", INDEX_FAULTS, ids=[reason for _, reason in INDEX_FAULTS])
def test_an_index_that_lies_is_refused(tmp_path, change, reason):
    path = make_directory(tmp_path, [{"a": torch.ones(2), "c": torch.ones(2)}, {"b": torch.ones(2)}])
    edit_index(path, change)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    path = make_directory(tmp_path, [{"a": torch.ones(2), "c": torch.ones(1)}, {"a": torch.ones(2)}])
    with pytest.raises(CheckpointError, match=r"tensor a lies in two shards, model-0.* and model-1.*"):
        open_checkpoint(path)


def test_a_loop_of_links_is_refused(tmp_path):
    path = make_directory(tmp_path, [{"a": torch.ones(2)}, {"b": torch.ones(2)}])
    (path / "model-1.safetensors").unlink()
    (path / "model-1.safetensors").symlink_to(path / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read model-1.safetensors: Too many levels"):
        open_checkpoint(path)


def test_links_to_shards_are_followed(tmp_path):
    """A hub cache is a directory of links."""
    path = make_directory(tmp_path / "real")
    (tmp_path / "cache").mkdir()
    for file in path.iterdir():
        (tmp_path / "cache" / file.name).symlink_to(file)
    assert set(open_checkpoint(tmp_path / "cache").types) == {"a", "b"}


def test_a_file_truncated_after_opening_is_an_error(tmp_path):
    checkpoint = open_checkpoint(make_directory(tmp_path))
    os.truncate(tmp_path / "model.safetensors", 150)
    with pytest.raises(CheckpointError, match="inside a tensor"):
        for name in checkpoint.types:
            checkpoint.read(name)


def test_a_pickled_checkpoint_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="is a pickle") as error:
        open_checkpoint(tmp_path)
    assert "save_pretrained" in str(error.value)
    with pytest.raises(CheckpointError, match="is a pickle"):
        open_checkpoint(tmp_path / "pytorch_model.bin")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "nothing" / "here" / "at-all")
    with pytest.raises(CheckpointError, match=r"cannot read config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds neither"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        open_checkpoint(tmp_path / "notes.txt")


def test_a_directory_around_a_gguf_file_says_what_to_give(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"cannot read config.json") as error:
        open_checkpoint(tmp_path)
    assert f"give the file itself: {tmp_path / 'tiny.gguf'}" in str(error.value)


def test_a_hub_id_is_fetched_without_pickles_or_code(tmp_path, monkeypatch):
    path = make_directory(tmp_path / "snapshot")
    asked = {}

    def fetch(hub_id, allow_patterns):
        asked[hub_id] = allow_patterns
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert set(open_checkpoint("some-one/some.model").types) == {"a", "b"}
    assert not [pattern for pattern in asked["some-one/some.model"] if pattern.endswith(("py", "bin", "pt", "*"))]


def test_a_hub_id_that_cannot_be_fetched_is_one_error(monkeypatch):
    def fetch(hub_id, allow_patterns):
        raise RuntimeError("401 Client Error\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(
        CheckpointError, match=r"neither a path nor a model that could be fetched: 401 Client Error\nhelp"
    ):
        open_checkpoint("some-one/some.model")


def test_what_cannot_be_looked_at_is_one_error(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="checkpoint"):
        open_checkpoint(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="cannot read the checkpoint: File name too long"):
        open_checkpoint("x" * 5000)


def test_files_beside_the_weights_are_copied(tmp_path):
    path = make_directory(tmp_path / "in")
    (path / "1_Pooling").mkdir()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "merges.txt",
        "vocab.json",
        "README.md",
        "modules.json",
        "1_Pooling/config.json",
        "training_args.bin",
    ):
        (path / name).write_text(name)
    (tmp_path / "out").mkdir()
    written = open_checkpoint(path).save_tokenizer(tmp_path / "out")
    assert [str(file.relative_to(tmp_path / "out")) for file in written] == [
        "1_Pooling/config.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert (tmp_path / "out" / "vocab.json").read_text() == "vocab.json"


BAD_CONFIGS = [
    ({"hidden_size": "abc"}, "cannot make a model of this config"),
    ({"hidden_act": "sliu"}, "cannot make a model of this config"),
    ({"model_type": ["llama"]}, "does not know the model type"),
    ({"architectures": ["LlamaConfig"]}, "no model class `LlamaConfig`"),
]


@pytest.mark.parametrize("change, reason", BAD_CONFIGS)
def test_a_config_that_makes_no_model_is_one_error(change, reason):
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, **change}
    with pytest.raises(CaptureError, match=reason):
        build_on_meta(config_from_dict(values))


@pytest.mark.parametrize("metadata", [[], {"format": 1}, {"format": None}])
def test_metadata_that_other_readers_refuse(tmp_path, metadata):
    text = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="its metadata is not an object of texts"):
        read_header(tmp_path / "model.safetensors")
