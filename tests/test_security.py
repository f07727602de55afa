"""What strangers may hand over, and what it may not do: docs/security.md says the same in words, line by line."""

import getpass
import itertools
import json
import os
import pickle
import signal
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compiler.errors import CheckpointError, CompressError, DataError, RecipeError
from compiler.evaluate.items import read_items
from compiler.evaluate.loading import load_extractor, load_model, load_tokenizer
from compiler.evaluate.texts import stretches
from compiler.frontend.capture import capture
from compiler.frontend.subject import config_from_dict
from compiler.job import compress
from compiler.recipe import Recipe
from compiler.weights.checkpoint import open_checkpoint
from compiler.weights.gguf_header import read_gguf_header
from compiler.weights.tensorfile import read_header
from compiler.weights.tokens import tokens_of
from tests.small import write_folder, write_model, write_recipe

SECONDS = 20
HUGE = 1 << 60
INDEX = "model.safetensors.index.json"


@contextmanager
def at_once():
    """Fails what waits or goes on for ever, and what asks for memory by the terabyte."""

    def stop(number, frame):
        pytest.fail(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "tiny")


def edit(file: Path, **changes):
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**values, **changes}))


def plant(directory: Path) -> Path:
    """Modules in ``directory`` that leave a mark when they run; returns where the mark would be."""
    mark = directory.parent / "ran"
    text = f"open({str(mark)!r}, 'w')\nclass Evil: pass\n"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil", "processing_evil"):
        (directory / f"{name}.py").write_text(text)
    return mark


# --- code ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_checkpoint_does_not_run(model, tmp_path, known):
    mark = plant(model)
    kinds = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit(model / "config.json", auto_map=kinds, **({} if known else {"model_type": "evil"}))
    for read in (capture, load_model):
        with pytest.raises(CompressError) if not known else suppressed():
            read(model)
    with suppressed():
        load_tokenizer(model)
    assert not mark.exists()


@contextmanager
def suppressed():
    """Nothing, or an error of ours: a known class is read without the code."""
    try:
        yield
    except CompressError as error:
        assert error.cause


def test_code_of_a_checkpoint_is_neither_copied_nor_named(model, tmp_path):
    mark = plant(model)
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    compress(Recipe.load(write_recipe(tmp_path)), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.py")) and not mark.exists()
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_code_of_a_tokenizer_or_processor_does_not_run(model):
    mark = plant(model)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    edit(
        model / "preprocessor_config.json",
        auto_map={"AutoFeatureExtractor": "processing_evil.Evil"},
        feature_extractor_type="Evil",
    )
    with suppressed():
        load_tokenizer(model)
    with at_once(), pytest.raises(CompressError):
        load_extractor(model, config_from_dict(json.loads((model / "config.json").read_text())))
    assert not mark.exists()


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_never_loaded(model, tmp_path, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for read in (open_checkpoint, capture, load_model):
        with pytest.raises(CheckpointError):
            read(model)
    assert not (tmp_path / "ran").exists()


def test_chat_templates_are_run_in_a_sandbox(model):
    from backends.onnx.runner import in_template

    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    edit(model / "tokenizer_config.json", chat_template=escape)
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(Exception, match=r"unsafe|access"):
        load_tokenizer(model).apply_chat_template(messages, tokenize=False)
    with pytest.raises(Exception, match=r"unsafe|access"):
        in_template(model, "hello")


def test_a_recipe_cannot_allow_code(tmp_path):
    write_folder(tmp_path)
    for text in ("trust-remote-code: true\n", "run: {trust-remote-code: true}\n", "run: {trust_remote_code: true}\n"):
        with pytest.raises(RecipeError):
            Recipe.load(write_recipe(tmp_path, rest=text))


def test_tags_of_yaml_make_nothing(tmp_path):
    with pytest.raises(RecipeError, match="tags are not allowed"):
        Recipe.load(write_recipe(tmp_path, passes=f"!!python/object/apply:os.mkdir [{tmp_path / 'ran'}]"))
    assert not (tmp_path / "ran").exists()


# --- paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../other.safetensors", "..\\x"])
def test_an_index_names_no_file_elsewhere(tmp_path, name):
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "model").mkdir()
    edit(tmp_path / "model" / "config.json", architectures=["LlamaForCausalLM"])
    edit(tmp_path / "model" / INDEX, weight_map={"w": name})
    with pytest.raises(CheckpointError, match="outside the directory"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json", "additional_chat_templates/a.jinja"])
def test_no_file_from_elsewhere_is_copied_into_an_output(model, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        compress(Recipe.load(write_recipe(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_to_itself_is_an_error_of_the_checkpoint(model, tmp_path):
    (model / "tokenizer.json").unlink(missing_ok=True)
    (model / "tokenizer.json").symlink_to(model / "tokenizer.json")
    with pytest.raises(CheckpointError, match="leads nowhere"):
        compress(Recipe.load(write_recipe(tmp_path)), tmp_path / "out")


def test_an_included_recipe_leads_nowhere_else(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "other.yaml").write_text("model: tiny\n")
    with pytest.raises(RecipeError, match="leaves the recipe's directory"):
        Recipe.load(write_recipe(tmp_path / "inner", rest="include: ../other.yaml\n"))


def test_links_at_the_place_of_the_work_are_not_followed(tmp_path):
    write_folder(tmp_path)
    recipe = Recipe.load(write_recipe(tmp_path))
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(CompressError):
        compress(recipe, tmp_path / "out")
    assert (tmp_path / "mine").read_text() == "mine"


def test_tensors_of_an_onnx_model_lie_beside_it(tmp_path):
    onnx = pytest.importorskip("onnx")
    from backends.onnx.check import session

    (tmp_path / "secret").write_bytes(struct.pack("<4f", 1, 2, 3, 4))
    (tmp_path / "model").mkdir()
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=1)
    weight.external_data.add(key="location", value="../secret")
    made = onnx.helper.make_node("Identity", ["w"], ["y"])
    result = onnx.helper.make_tensor_value_info("y", 1, [4])
    graph = onnx.helper.make_graph([made], "g", [], [result], [weight])
    made = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)])
    (tmp_path / "model" / "model.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(Exception, match=r"external|directory|path"):
        session(tmp_path / "model" / "model.onnx")


# --- bombs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [[HUGE], [1 << 31, 1 << 31], [HUGE, 0]])
def test_a_header_that_claims_terabytes_is_refused_unread(tmp_path, shape):
    size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
    text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size or 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with at_once(), pytest.raises(CheckpointError, match="damaged"):
        read_header(tmp_path / "model.safetensors")


def test_a_length_of_terabytes_is_refused_unread(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", HUGE) + bytes(64))
    with at_once(), pytest.raises(CheckpointError, match="its header claims"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("place", ["tensors", "entries", "text", "list", "dims"])
def test_a_gguf_header_that_claims_terabytes_is_refused_unread(tmp_path, place):
    text = struct.pack("<Q", 1) + b"a"
    claims = {
        "tensors": struct.pack("<QQ", HUGE, 0),
        "entries": struct.pack("<QQ", 0, HUGE),
        "text": struct.pack("<QQ", 0, 1) + struct.pack("<Q", HUGE),
        "list": struct.pack("<QQ", 0, 1) + text + struct.pack("<IIQ", 9, 10, HUGE),
        "dims": struct.pack("<QQ", 1, 0) + text + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0),
    }
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + claims[place] + bytes(64))
    with at_once(), pytest.raises(CheckpointError, match="damaged"):
        read_gguf_header(tmp_path / "model.gguf")


@pytest.mark.parametrize("text", [b"[" * 10**6, b'{"a":' * 10**6, b'{"hidden_size": 1' + b"0" * 10**6 + b"}"])
def test_deep_documents_and_long_numbers_are_refused(model, text):
    (model / "config.json").write_bytes(text)
    with at_once(), pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "claim",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**30},
        {"num_labels": 10**9},
        {"vocab_size": 10**9},
        {"max_position_embeddings": 10**15},
        {"hidden_size": 10**12},
        {"head_dim": 10**12},
    ],
    ids=str,
)
def test_a_config_that_claims_the_impossible_is_refused_before_anything_is_made(model, claim):
    """Numbers that take no memory by themselves are refused where the weights do not fit them."""
    edit(model / "config.json", layer_types=None, **claim)
    with at_once(), suppressed():
        graph = capture(model)
        assert list(claim) == ["max_position_embeddings"] and graph.params


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "model.safetensors"])
def test_files_without_end_are_refused(model, name):
    """A device, a pipe, and a file of a terabyte, of which nothing is on the disk."""
    if name == INDEX:
        (model / "model.safetensors").unlink()
    for make in (lambda file: file.symlink_to("/dev/zero"), os.mkfifo, lambda file: sparse(file, 1 << 40)):
        (model / name).unlink(missing_ok=True)
        make(model / name)
        with at_once(), pytest.raises(CheckpointError):
            tokens_of(open_checkpoint(model))


def sparse(file: Path, size: int) -> None:
    with file.open("wb") as opened:
        opened.truncate(size)


def test_aliases_of_yaml_do_not_multiply(tmp_path):
    lines = ["a: &a [x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in itertools.pairwise("abcdefghi")]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with at_once(), pytest.raises(RecipeError):
        Recipe.load(tmp_path / "recipe.yaml")


def test_a_recipe_as_long_as_a_book_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("# a\n" * 300_000)
    with at_once(), pytest.raises(RecipeError, match="that is no recipe"):
        Recipe.load(tmp_path / "recipe.yaml")


# --- calibration data ------------------------------------------------------------------------------------------


def test_texts_without_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    sparse(tmp_path / "endless", 1 << 40)
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "endless"):
        with at_once(), pytest.raises(DataError):
            list(stretches(path, 1))


def test_items_without_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with at_once(), pytest.raises(CompressError, match="no regular file"):
            list(read_items(path, {"question": str}, "choices"))


def test_a_recipe_names_no_device_as_data(tmp_path):
    write_folder(tmp_path)
    passes = "[quantize: {bits: 4, group: 16, method: gptq}]"
    with at_once(), pytest.raises(CompressError):
        compress(Recipe.load(write_recipe(tmp_path, passes, "calibration: {data: /dev/zero}\n")), tmp_path / "out")


def test_a_compressed_file_of_pictures_does_not_grow_without_end(tmp_path):
    import gzip

    from compiler.evaluate.images import read_idx

    path, whole = tmp_path / "train-images-idx3-ubyte.gz", 2**32 - 1
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(struct.pack(">IIII", 0x803, 1, whole, whole) + bytes(1 << 20))
    with at_once(), pytest.raises(DataError, match="more than"):
        read_idx(path, 3, 1)


# --- secrets ---------------------------------------------------------------------------------------------------


def test_outputs_say_nothing_about_the_machine(tmp_path, monkeypatch):
    """No token of the environment, no home, no user and no folder stands in any file that is written."""
    folder = write_folder(tmp_path / "private-folder")
    (tmp_path / "private-folder" / "tiny").rename(tmp_path / "private-folder" / "model-of-mine")
    secrets = {"HF_TOKEN": "hf_SecretOfTheHub", "AWS_SECRET_ACCESS_KEY": "SecretOfTheCloud", "USER": "private-user"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {folder / 'model-of-mine'}\npasses: [quantize: {{bits: 4, group: 16, method: gptq}}]\n"
        f"calibration: {{data: {folder / 'text.txt'}, samples: 2, length: 16}}\n"
        f"evaluate: {{data: {folder / 'text.txt'}, samples: 2, length: 16}}\n"
    )
    compress(Recipe.load(recipe), tmp_path / "out")
    hidden = [*secrets.values(), "private-folder", str(Path.home()) + "/"]
    hidden += [name for name in (getpass.getuser(), os.uname().nodename) if len(name) > 5]  # others stand in any text
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert [text for text in hidden if text.encode() in data] == [], path
