"""Evaluation and calibration: numbers against their definitions, sweeps against full runs."""

import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.calibration.sweep import sweep, token_batches
from compiler.errors import CheckpointError, DataError
from compiler.evaluate import compare_speed, evaluate_model, generate, kv_cache, load_model
from compiler.evaluate.estimates import estimate
from compiler.evaluate.metrics import METRICS
from compiler.evaluate.metrics.base import Scored
from compiler.evaluate.texts import TextData, token_windows
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.types import TensorType
from compiler.weights.expr import load
from compiler.weights.source import MemorySource
from tests.tiny import TEXT, byte_tokenizer, write_text

LLAMA = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
DEEPSEEK = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
    "max_position_embeddings": 128,
}


def save(directory, model, tokenizer=True):
    model.save_pretrained(directory)
    if tokenizer:
        byte_tokenizer().save_pretrained(directory)
    return directory


def llama(seed, **changes):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save(root / "a", llama(0)), save(root / "b", llama(1)), write_text(root)


def measured(models, **changes):
    ours, theirs, text = models
    return evaluate_model(ours, **{"against": theirs, "data": text, "samples": 4, "length": 32, **changes})


def logits_by_hand(models, which):
    ids = TextData(models[2], 4, 32, 0).windows(byte_tokenizer())
    with torch.no_grad():
        return ids, load_model(models[which])(ids).logits.double()


def test_perplexity_and_bits_per_byte_are_what_they_say(models):
    ids, logits = logits_by_hand(models, 0)
    picked = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    found = measured(models).metrics
    assert found["perplexity"].value == pytest.approx(math.exp(-picked.mean()), rel=1e-6)
    # One token is one byte here.
    assert found["bits-per-byte"].value == pytest.approx(-picked.mean().item() / math.log(2), rel=1e-6)


def test_divergence_and_agreement_are_what_they_say(models):
    _, ours = logits_by_hand(models, 0)
    _, theirs = logits_by_hand(models, 1)
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    found = measured(models).metrics
    assert found["kl"].value == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert found["agreement"].value == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()


def test_a_model_does_not_differ_from_itself(models):
    result = measured(models, against=models[0], metrics=["kl", "agreement", "cosine", "relative-error"])
    assert [result.metrics[name].value for name in ("kl", "agreement", "relative-error")] == [0, 1, 0]
    assert result.metrics["cosine"].value == pytest.approx(1, abs=1e-12)


def test_the_result_holds_both_sides_and_is_json(models):
    result = measured(models)
    assert json.loads(json.dumps(result.to_dict()))["positions"] == result.positions
    assert result.positions == 4 * 32
    assert result.reference.keys() == {"perplexity", "bits-per-byte"}
    assert result.cache == result.reference_cache


def test_the_same_seed_gives_the_same_numbers(models):
    first, again, other = measured(models), measured(models), measured(models, seed=1)
    assert first.metrics == again.metrics
    assert first.metrics != other.metrics


def test_progress_counts_every_window_of_both_models(models):
    seen = []
    measured(models, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 8) for n in range(1, 9)]


def test_the_interval_holds_the_value_and_narrows_with_windows(models):
    few, many = (measured(models, samples=n).metrics["perplexity"] for n in (2, 16))
    assert few.low <= few.value <= few.high
    assert many.low < many.value < many.high


def test_cache_is_measured_on_the_live_cache(models, tmp_path):
    size = kv_cache(models[0])
    assert (size.values_per_token, size.bytes_per_token) == (2 * 2 * 2 * 8, 2 * 2 * 2 * 8 * 4)
    torch.manual_seed(0)
    latent = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**DEEPSEEK))
    assert kv_cache(save(tmp_path / "mla", latent)).values_per_token == 2 * (16 + 8)


def test_generation_is_transformers_own_greedy_decoding(models):
    model, tokenizer = load_model(models[0]), byte_tokenizer()
    ids = tokenizer("crows", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    pieces = []
    answer = generate(models[0], "crows", 12, on_text=pieces.append)
    assert answer.tokens == len(pieces) == len(expected)
    assert tokenizer.decode(expected).startswith(answer.text)
    assert answer.text == "".join(pieces)


def test_speed_is_a_ratio_of_two_models_timed_in_turns(models):
    speed = compare_speed(models[0], models[1], length=16, new_tokens=4, rounds=1)
    assert min(speed.prefill, speed.decode, speed.reference_prefill, speed.reference_decode) > 0


def test_encoders_are_compared_by_their_states(tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    shapes = {"vocab_size": 256, "max_position_embeddings": 64}
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(**small, **shapes))
    save(tmp_path / "bert", bert)
    vit = transformers.ViTModel(transformers.ViTConfig(**small, image_size=32, patch_size=16))
    save(tmp_path / "vit", vit, tokenizer=False)
    text = write_text(tmp_path)
    texts = evaluate_model(tmp_path / "bert", against=tmp_path / "bert", data=text, samples=2, length=32)
    images = evaluate_model(tmp_path / "vit", against=tmp_path / "vit", samples=2)
    for result in (texts, images):
        assert result.metrics["relative-error"].value == 0
        assert result.cache is None


def test_encoder_decoders_are_compared_by_their_logits(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    save(tmp_path / "t5", transformers.T5ForConditionalGeneration(config))
    result = evaluate_model(tmp_path / "t5", against=tmp_path / "t5", samples=2, length=16)
    assert (result.metrics["kl"].value, result.metrics["agreement"].value) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": ["perplexiti"]}, "there is no metric `perplexiti`"),
        ({"metrics": ["kl"], "against": None}, "`kl` compares two models"),
        ({"metrics": ["perplexity"], "data": None}, "on a text"),
        ({"length": 500}, "longer than the 128"),
        ({"samples": 10_000}, "too short for 10000 windows"),
        ({"samples": 0}, "cannot take 0 windows"),
        ({"data": "missing.txt"}, "there is no such file"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_error(models, changes, said):
    with pytest.raises(DataError, match=said):
        measured(models, **changes)


def test_models_that_do_not_load_or_compare_are_one_clear_error(models, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read config.json"):
        measured(models, against=tmp_path)
    own = save(tmp_path / "own", llama(0))
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "code.Mine"}}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        measured(models, against=own)
    assert "--trust-remote-code" in caught.value.remedy
    wider = save(tmp_path / "wider", llama(0, vocab_size=300))
    with pytest.raises(DataError, match="cannot be compared"):
        measured(models, against=wider)
    wordless = save(tmp_path / "wordless", llama(0), tokenizer=False)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        measured(models, against=wordless)


@given(samples=st.integers(1, 8), length=st.integers(2, 200), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_windows_are_pieces_of_the_text_in_order_and_apart(tmp_path_factory, samples, length, seed):
    tokenizer, text = byte_tokenizer(), write_text(tmp_path_factory.mktemp("text"))
    windows = TextData(text, samples, length, seed).windows(tokenizer)
    assert windows.shape == (samples, length)
    size = len(TEXT) // samples  # read part by part, as if it were in memory
    parts = [TEXT[start : start + size] for start in range(0, samples * size, size)]
    assert torch.equal(windows, token_windows(parts, tokenizer, length, seed))
    end = 0
    for row in windows:
        at = TEXT.find(tokenizer.decode(row), end)
        assert at >= end
        end = at + length


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=20))
def test_estimates_are_ratios_of_sums(values):
    rows = np.array([(value, 2.0) for value in values])
    found = estimate(rows, METRICS["kl"].statistic, seed=0)
    assert found.value == pytest.approx(sum(values) / len(values) / 2)
    assert min(values) / 2 - 1e-9 <= found.low <= found.high <= max(values) / 2 + 1e-9


def test_divergence_survives_certain_predictions():
    certain = torch.full((3, 5), -math.inf)
    certain[:, 2] = 0
    assert METRICS["kl"].score(Scored(certain, certain.clone())) == {"": (0, 3)}


@pytest.fixture(autouse=True)
def collected_quickly():
    """Nothing that was alive before is looked at when garbage is collected: sweeps are, at every read."""
    gc.freeze()
    yield
    gc.unfreeze()


class Counting(MemorySource):
    """A source that knows how many of the tensors it has read are still alive, at most."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.alive, self.most, self.reads = weakref.WeakSet(), 0, 0

    def read(self, key):
        gc.collect()
        tensor = super().read(key)
        self.alive.add(tensor)
        self.most, self.reads = max(self.most, len(self.alive)), self.reads + 1
        return tensor


def stack(layers=4, width=8):
    """A residual stack: x + silu(x W1') W2' in each layer, between an embedding and a norm."""
    torch.manual_seed(0)
    tensors = {"embed": torch.randn(11, width)}
    for i in range(layers):
        tensors |= {f"layers.{i}.up": torch.randn(16, width), f"layers.{i}.down": torch.randn(width, 16)}
    graph = Graph("stack")
    graph.sources["model"] = source = Counting(tensors)
    params = {
        name: graph.add_param(name, load("model", name, TensorType(t.dtype, tuple(t.shape))))
        for name, t in tensors.items()
    }
    ids = graph.add_input("input_ids", TensorType(torch.int64, ("B", "T")))
    x = graph.op("embedding", [params["embed"], ids])
    for i in range(layers):
        scope = f"layers.{i}"
        up = graph.op("silu", [graph.op("linear", [x, params[f"layers.{i}.up"]], scope=scope)], scope=scope)
        down = graph.op("linear", [up, params[f"layers.{i}.down"]], scope=scope)
        x = graph.op("add", [x, down], scope=scope)
    graph.outputs["states"] = graph.op("rms_norm", [x], {"eps": 1e-6})
    return graph, source


def batches(graph):
    ids = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))
    return token_batches(graph, ids)


def test_a_sweep_sees_what_a_full_run_sees():
    graph, _ = stack()
    inputs = batches(graph)
    whole, swept = {}, {}
    for batch in inputs:
        run(graph, batch, observe=lambda value, tensor: whole.setdefault(value, []).append(tensor))
    scopes = []
    for stage in sweep(graph, inputs):
        scopes.append(stage.scope)
        inside = {value for node in stage.nodes for value in node.outputs}
        stage.observe(lambda v, t, inside=inside: swept.setdefault(v, []).append(t) if v in inside else None)
    assert scopes == ["", "layers.0", "layers.1", "layers.2", "layers.3", ""]
    assert swept.keys() == whole.keys()
    assert all(torch.equal(a, b) for value in whole for a, b in zip(whole[value], swept[value], strict=True))


def test_a_sweep_holds_one_layer_of_weights_and_reads_each_twice():
    graph, source = stack()
    for stage in sweep(graph, batches(graph)):
        stage.observe(lambda value, tensor: None)
    assert source.most <= 2
    assert source.reads == 2 * len(graph.params)


def test_a_sweep_that_reaches_every_node_passes_them_and_sees_what_a_full_run_sees():
    graph, _ = stack()
    inputs = batches(graph)
    whole, reached, left = {}, {}, list(graph.nodes)
    for batch in inputs:
        run(graph, batch, observe=lambda value, tensor: whole.setdefault(value, []).append(tensor))
    for stage in sweep(graph, inputs):
        for node in list(stage.nodes):
            stage.reach(node)
            assert stage.nodes[0] is left.pop(0)
            for values in stage.values([node.output]):
                reached.setdefault(node.output, []).append(values[node.output])
    assert not left
    made = [value for node in graph.nodes for value in node.outputs]
    assert all(torch.equal(a, b) for value in made for a, b in zip(whole[value], reached[value], strict=True))


def test_a_sweep_feeds_the_next_layer_with_the_rewritten_one():
    graph, _ = stack()
    entered = []
    for stage in sweep(graph, batches(graph)):
        if stage.scope == "layers.1":
            node = next(node for node in stage.nodes if node.op.name == "silu")
            graph.replace(node.output, graph.op("relu", [node.input(0)], scope=node.scope, before=node))
            graph.erase(node)
        if stage.scope == "layers.2":
            x = stage.nodes[0].input(0)
            stage.observe(lambda v, t, x=x: entered.append(t) if v is x else None)
    rewritten = []
    for batch in batches(graph):
        run(graph, batch, observe=lambda v, t: rewritten.append(t) if v is x else None)
    assert all(torch.equal(a, b) for a, b in zip(entered, rewritten, strict=True))


def test_a_text_cannot_calibrate_a_model_of_images():
    graph = Graph("images")
    graph.add_input("pixel_values", TensorType(torch.float32, ("B", 3, 32, 32)))
    with pytest.raises(DataError, match="inputs are pixel_values"):
        token_batches(graph, torch.zeros(1, 8, dtype=torch.int64))
