"""Between checkpoint tensors and model parameters, in both directions, for every family."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compiler.errors import CheckpointError
from compiler.weights.checkpoint import bind, open_checkpoint, unbind
from compiler.weights.conversion import TracedTensor
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import load
from compiler.weights.source import MemorySource
from tests.families import FAMILIES


def meta(family):
    with torch.device("meta"):
        return getattr(transformers, family.architecture)(family.config())


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A family, a random model of it, and the checkpoint that transformers writes for it."""
    family = FAMILIES[request.param]
    model = family.build()
    path = tmp_path_factory.mktemp(family.name)
    model.save_pretrained(path)
    return family, model, open_checkpoint(path)


def test_bound_weights_equal_what_transformers_loads(saved):
    family, model, checkpoint = saved
    bound = bind(checkpoint, meta(family))
    expected = model.state_dict()
    assert list(bound) == list(expected)
    for name, value in zip(bound, evaluate(list(bound.values()), {"model": checkpoint}), strict=True):
        assert torch.equal(value, expected[name]), name


def test_unbound_weights_equal_what_transformers_saves(saved):
    family, model, checkpoint = saved
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    source = MemorySource(state)
    stored = unbind({name: load("model", name, type) for name, type in source.types.items()}, meta(family))
    assert set(stored) == set(checkpoint.types)
    for name, value in zip(stored, evaluate(list(stored.values()), {"model": source}), strict=True):
        assert torch.equal(value, checkpoint.read(name)), name


def test_unbinding_undoes_binding(saved):
    """Down to the expression: every tensor that comes out is a plain read of the tensor that went in."""
    family, model, checkpoint = saved
    bound = {n: e for n, e in bind(checkpoint, meta(family)).items() if n not in model.all_tied_weights_keys}
    for name, expr in unbind(bound, meta(family)).items():
        assert expr == load("model", name, checkpoint.types[name]), name


@pytest.fixture
def llama(tmp_path):
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    return tmp_path


def change_file(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"
FAULTS = [
    (lambda t: t.pop(NORM), r"the checkpoint lacks 1 tensor: model.norm.weight"),
    (lambda t: [t.pop(k) for k in list(t) if ".mlp." in k], r"lacks 6 tensors: .*mlp.* and 1 more"),
    (lambda t: t.update({"model.extra": torch.ones(2)}), "LlamaForCausalLM has no place for 1 tensor: model.extra"),
    (lambda t: t.update({NORM: torch.ones(2)}), r"tensor model.norm.weight has the shape \[2\], the model's is \[48\]"),
    (lambda t: t.update({"norm.weight": t[NORM].clone()}), "is stored twice"),
]


@pytest.mark.parametrize("change, reason", FAULTS, ids=[reason for _, reason in FAULTS])
def test_tensors_that_do_not_fit_the_model_are_refused(llama, change, reason):
    change_file(llama, change)
    with pytest.raises(CheckpointError, match=reason):
        bind(open_checkpoint(llama), meta(FAMILIES["llama"]))


def test_missing_experts_are_named(tmp_path):
    FAMILIES["mixtral"].build().save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.pop(next(k for k in tensors if "experts.1.w1" in k)))
    with pytest.raises(CheckpointError, match="experts"):
        bind(open_checkpoint(tmp_path), meta(FAMILIES["mixtral"]))


def test_old_buffers_and_prefixes_are_accepted(llama):
    """As transformers does: a rotary table from an old release, and names without the base model's prefix."""

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        tensors["norm.weight"] = tensors.pop(NORM)

    change_file(llama, change)
    bound = bind(open_checkpoint(llama), meta(FAMILIES["llama"]))
    assert bound[NORM].attr("key") == "norm.weight"


def test_tied_weights_share_an_expression(tmp_path):
    model = FAMILIES["llama"].build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(FAMILIES["llama"].config(tie_word_embeddings=True))
    bound = bind(open_checkpoint(tmp_path), empty)
    assert bound["lm_head.weight"] == bound["model.embed_tokens.weight"]


def test_an_operation_that_cannot_be_traced_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="unsupported operation"):
        torch.linalg.svd(TracedTensor(load("model", "x", MemorySource({"x": torch.eye(2)}).types["x"])))


def test_traced_tensors_follow_torch():
    """The operations that converters use, on a traced tensor and on a real one."""
    real = torch.arange(24.0).reshape(2, 3, 4)
    source = MemorySource({"x": real})
    traced = TracedTensor(load("model", "x", source.types["x"]))
    steps = {
        "view": lambda x: x.view(6, -1).t(),
        "transpose": lambda x: x.transpose(-1, 0).reshape(4, 6).contiguous(),
        "permute": lambda x: x.permute(2, 0, 1).flatten(),
        "chunk": lambda x: x.chunk(2, dim=-1)[1],
        "split": lambda x: x.split([1, 2], dim=1)[1],
        "unbind": lambda x: x.unbind(1)[2],
        "index": lambda x: x[1, ..., None, ::2],
        "squeeze": lambda x: x[:1].squeeze(0).unsqueeze(-1),
        "stack": lambda x: torch.stack([x, x + x], dim=-2),
        "cat": lambda x: torch.cat([x, x.flip(2)], dim=-1),
        "scalar": lambda x: (x * 2 + 1 - 0.5) / 4,
        "cast": lambda x: x.to(torch.bfloat16).clone(),
    }
    for name, step in steps.items():
        outcome = step(traced)
        expected = step(real)
        assert outcome.shape == expected.shape, name
        assert torch.equal(evaluate([outcome.expr], {"model": source})[0], expected), name


def test_the_model_is_left_alone(llama):
    model = meta(FAMILIES["llama"])
    bind(open_checkpoint(llama), model)
    assert all(type(p) is torch.nn.Parameter and p.is_meta for p in model.parameters())
    assert json.loads((llama / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def write_tied(path, head):
    """A tiny Llama whose config ties its head to its embedding, while the file holds both."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(path)
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + head
    save_file(state, path / "model.safetensors")
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def test_tied_weights_that_are_stored_twice_are_one(tmp_path):
    model = write_tied(tmp_path, head=0.0)
    bound = bind(open_checkpoint(tmp_path), model)
    assert bound["lm_head.weight"] == bound["model.embed_tokens.weight"]


def test_tied_weights_whose_values_differ_are_refused(tmp_path):
    model = write_tied(tmp_path, head=1.0)
    with pytest.raises(CheckpointError, match="their stored values differ") as error:
        bind(open_checkpoint(tmp_path), model)
    assert "tie_word_embeddings" in error.value.remedy


def test_weights_in_eight_bits_without_their_scales_are_refused(tmp_path):
    model = write_tied(tmp_path, head=0.0)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no quantization_config"):
        bind(open_checkpoint(tmp_path), model)
