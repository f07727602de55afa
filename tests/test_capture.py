"""Law 1: a captured model computes what transformers computes. And what capture promises beside that."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.errors import CaptureError
from compiler.frontend.capture import capture, fold_layers, trace_all
from compiler.frontend.subject import subject_of
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.text import difference, print_graph
from compiler.weights.evaluate import evaluate
from tests.families import FAMILIES

# Families whose arithmetic is kept step by step. The others differ where a weight is read in another layout, a
# scale moves into the attention, or a windowed attention goes to another kernel of torch.
BIT_EQUAL = {
    "llama", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "granite", "smollm3", "gpt_neox", "bert", "roberta", "vit",
    "deit", "dinov2", "clip_vision", "clip_text", "siglip_text", "mixtral", "qwen3_moe", "deepseek_v3",
}  # fmt: skip
TOLERANCE = 1e-5

# Operations that only stand in a graph when a rule failed to lift them.
UNLIFTED = {"rsqrt", "cos", "sin", "pow"}


def error_of(graph: Graph, model: Any, inputs: dict[str, Tensor]) -> float:
    """The largest deviation of any output, relative to that output's scale."""
    with torch.no_grad():
        wanted = model(**inputs)
    found = run(graph, inputs)
    assert found
    return max(
        ((found[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp_min(1e-12)).item() for name in found
    )


@pytest.fixture(scope="module")
def captured() -> Callable[[str], tuple[Any, Graph]]:
    known: dict[str, tuple[Any, Graph]] = {}

    def get(name: str) -> tuple[Any, Graph]:
        if name not in known:
            model = FAMILIES[name].build(seed=1)
            known[name] = (model, capture(model))
        return known[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_transformers_computes(name: str, captured: Any) -> None:
    model, graph = captured(name)
    bound = 0.0 if name in BIT_EQUAL else TOLERANCE
    for batch, tokens in ((3, 11), (1, 1), (2, 7)):
        assert error_of(graph, model, FAMILIES[name].inputs(batch, tokens, seed=batch)) <= bound


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_operations_are_lifted(name: str, captured: Any) -> None:
    _, graph = captured(name)
    names = {node.op.name for node in graph.nodes}
    assert not names & UNLIFTED
    attentions = graph.nodes_named("attention", "latent_attention")
    assert len(attentions) == {"t5": 6, "whisper": 6}.get(name, 2)
    fused = [value for node in attentions for value in node.inputs[:3] if value and value.node]
    assert all(value.node.op.name != "transpose" for value in fused)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_layers_of_a_kind_stand_for_all(name: str) -> None:
    config = FAMILIES[name].config(layers=5)
    whole, folded = subject_of(config, None, None), subject_of(config, None, None)
    expected = print_graph(trace_all(whole), weights=True, fold=False)
    found = fold_layers(folded)
    assert found is not None or name == "modernbert"  # every kind of its five layers occurs at most twice
    if found is not None:
        assert print_graph(found, weights=True, fold=False) == expected


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "smollm3"])
def test_kinds_that_alternate_stand_for_all_however_deep(name: str) -> None:
    config = FAMILIES[name].config(layers=19)
    whole, found = trace_all(subject_of(config, None, None)), fold_layers(subject_of(config, None, None))
    assert found is not None
    assert difference(whole, found) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "t5", "vit"])
def test_capture_is_deterministic(name: str) -> None:
    texts = {print_graph(capture(FAMILIES[name].config()), weights=True) for _ in range(2)}
    assert len(texts) == 1


def test_outputs_of_deep_layers_are_those_layers_outputs() -> None:
    from transformers import Dinov2Backbone, Dinov2Config

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
    model = Dinov2Backbone(Dinov2Config(num_hidden_layers=6, out_indices=[4, 6], **sizes)).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 24, 24)}
    with torch.no_grad():
        wanted = model(**inputs).feature_maps
    found = run(capture(model), inputs)
    for index, feature in enumerate(wanted):
        assert (found[f"feature_maps.{index}"] - feature).abs().max() <= TOLERANCE * feature.abs().max()


def test_an_operation_between_deep_layers_is_kept() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.layers):
                x = layer(x) + (1 if index == 3 else 0)
            return x

    module, x = Chain().eval(), torch.randn(4, 6)
    graph = capture(module, inputs={"x": x})
    with torch.no_grad():
        assert torch.allclose(run(graph, {"x": x})["output"], module(x), rtol=0, atol=TOLERANCE)


def test_an_unknown_operation_ends_a_capture_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = import_module("compiler.frontend.capture")
    monkeypatch.setattr(frontend, "trace_all", lambda subject: pytest.fail("everything was traced again"))
    module = nn.Sequential()
    module.layers = nn.ModuleList(Inner() for _ in range(4))
    module.forward = lambda x: module.layers[3](module.layers[2](module.layers[1](module.layers[0](x))))
    with pytest.raises(CaptureError, match="sort"):
        capture(module.eval(), inputs={"x": torch.zeros(2, 3)})


def test_layers_that_use_their_index_are_all_traced() -> None:
    family = FAMILIES["gpt2"]
    model = family.build(seed=2, layers=4, scale_attn_by_inverse_layer_idx=True)
    graph = capture(model)
    assert [node.attr("scale") for node in graph.nodes_named("attention")] == pytest.approx(
        [12**-0.5 / (index + 1) for index in range(4)]
    )
    assert error_of(graph, model, family.inputs(2, 6, seed=0)) <= TOLERANCE


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2", "t5", "opt", "modernbert", "deepseek_v3", "gpt2"])
def test_a_padding_mask_is_an_input(name: str) -> None:
    family = FAMILIES[name]
    model = family.build(seed=3)
    graph = capture(model, inputs=_padded(family.inputs(2, 9, seed=1)))
    inputs = _padded(family.inputs(3, 12, seed=2))
    with torch.no_grad():
        wanted = model(**inputs).logits
    found = run(graph, inputs)["logits"]
    keep = inputs["attention_mask"].bool() if name != "t5" else torch.ones(found.shape[:2], dtype=torch.bool)
    assert (found[keep] - wanted[keep]).abs().max() <= TOLERANCE * wanted.abs().max()


def _padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 6:] = 0
    return {**inputs, "attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True])
def test_a_window_that_only_the_mask_has_is_kept(padded: bool) -> None:
    import transformers

    sizes = {"hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 24, "num_attention_heads": 4,
             "num_key_value_heads": 2, "shared_expert_intermediate_size": 24}  # fmt: skip
    config = transformers.Qwen2MoeConfig(
        **sizes, num_hidden_layers=2, vocab_size=96, num_experts=4, num_experts_per_tok=2, use_sliding_window=True,
        sliding_window=4, layer_types=["sliding_attention", "full_attention"], use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(0, 96, (2, 12))}
    inputs = _padded(inputs) if padded else inputs
    graph = capture(model, inputs=inputs)
    assert [node.attr("window") for node in graph.nodes_named("attention")] == [4, 0]
    with torch.no_grad():
        wanted = model(**inputs).logits
    keep = inputs["attention_mask"].bool() if padded else torch.ones(2, 12, dtype=torch.bool)
    assert (run(graph, inputs)["logits"][keep] - wanted[keep]).abs().max() <= TOLERANCE * wanted.abs().max()


# --- parameters ----------------------------------------------------------------------------------------------


def test_tied_weights_are_one_parameter() -> None:
    graph = capture(FAMILIES["llama"].config(tie_word_embeddings=True))
    table = graph.params["model.embed_tokens.weight"]
    assert table.aliases == ("lm_head.weight",)
    assert {node.op.name for node in table.users} == {"embedding", "linear"}
    assert "lm_head.weight" not in graph.params


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "deepseek_v3", "modernbert"])
def test_rotary_frequencies_have_their_values_without_a_checkpoint(name: str) -> None:
    model, graph = FAMILIES[name].build(), capture(FAMILIES[name].config())
    buffers = dict(model.named_buffers())
    transient = [param for param in graph.params.values() if not param.persistent]
    assert transient
    for param in transient:
        (value,) = evaluate([param.expr], {})
        assert torch.equal(value, buffers[param.name])


def test_a_config_says_what_is_stored() -> None:
    graph = capture(FAMILIES["deepseek_v3"].config(dtype="bfloat16"))
    stored = {param.name: param.storage for param in graph.params.values() if param.persistent}
    assert stored.pop("model.layers.1.mlp.gate.e_score_correction_bias") == torch.float32
    assert set(stored.values()) == {torch.bfloat16}
    assert {param.type.dtype for param in graph.params.values()} == {torch.float32}


def test_no_weight_is_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from compiler.weights.checkpoint import DirectoryCheckpoint

    family = FAMILIES["qwen3_moe"]
    model = family.build(seed=4)
    model.save_pretrained(tmp_path)
    with monkeypatch.context() as patched:
        for name in ("read", "read_rows"):
            patched.setattr(DirectoryCheckpoint, name, lambda *args: pytest.fail("a weight was read"))
        graph = capture(tmp_path)
    assert graph.origin.architecture == family.architecture
    assert error_of(graph, model, family.inputs(2, 6, seed=1)) == 0.0


def test_fused_projections_are_apart() -> None:
    graph = capture(FAMILIES["phi3"].config())
    sizes = {name: param.shape for name, param in graph.params.items() if ".layers.0." in name and ".weight." in name}
    assert sizes == {
        "model.layers.0.self_attn.qkv_proj.weight.0": (48, 48),
        "model.layers.0.self_attn.qkv_proj.weight.1": (24, 48),
        "model.layers.0.self_attn.qkv_proj.weight.2": (24, 48),
        "model.layers.0.mlp.gate_up_proj.weight.0": (80, 48),
        "model.layers.0.mlp.gate_up_proj.weight.1": (80, 48),
    }


# --- modules that are no transformers models -----------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.first, self.second = nn.LayerNorm(width), nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.register_buffer("gain", torch.rand(width))
        self.register_buffer("shift", torch.rand(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.first(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.second(x)))) * self.gain + self.shift


class Tagger(nn.Module):
    """A small transformer of nobody's library, with tied weights and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Block(32) for _ in range(3))
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return {"scores": self.head(x), "pooled": x.mean(1)}


class Picture(nn.Module):
    """Convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.deep, self.head = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.relu(self.deep(F.relu(self.norm(self.wide(image))))).mean((2, 3)))


def test_a_live_module_is_captured() -> None:
    torch.manual_seed(0)
    module = Tagger().eval()
    graph = capture(module, inputs={"ids": torch.zeros(1, 7, dtype=torch.int64)})
    assert graph.inputs["ids"].shape == ("B", "T")
    assert graph.params["table.weight"].aliases == ("head.weight",)
    assert error_of(graph, module, {"ids": torch.randint(0, 50, (3, 5))}) <= TOLERANCE


def test_a_convolutional_module_is_captured() -> None:
    torch.manual_seed(0)
    module, image = Picture().eval(), torch.randn(3, 3, 16, 16)
    graph = capture(module, inputs={"image": image[:1]})
    with torch.no_grad():
        wanted = module(image)
    assert (run(graph, {"image": image})["output"] - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0, 0.5), (0.25, 2.0)])
def test_sums_of_products_are_captured(beta: float, alpha: float) -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bias = torch.broadcast_to(x[:, :1, :1], (x.shape[0], 4, 4))
            return torch.baddbmm(bias, x.transpose(1, 2), x, beta=beta, alpha=alpha)

    x, module = torch.randn(3, 5, 4), Adds().eval()
    graph = capture(module, inputs={"x": x})
    assert torch.allclose(run(graph, {"x": x})["output"], module(x), rtol=0, atol=TOLERANCE)


def test_example_images_have_the_size_that_a_config_says() -> None:
    from transformers import CLIPConfig, ResNetConfig

    from compiler.frontend.sizes import image_shape

    assert image_shape(ResNetConfig(num_channels=1)) == (1, 224, 224)
    assert image_shape(CLIPConfig(vision_config={"image_size": 32})) == (3, 32, 32)


def test_an_attention_that_cannot_be_replaced_is_refused() -> None:
    from transformers import FalconConfig

    config = FalconConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=20)
    with pytest.raises(CaptureError, match="`FalconForCausalLM` cannot be replaced"):
        capture(config, architecture="FalconForCausalLM")


def test_in_place_writes_are_followed() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.new_zeros(x.shape)
            y[:, :2] = x[:, :2] * 2
            view = y[:, 1:3]
            view.add_(1)
            y.mul_(3)
            return view + y[:, 1:3]

    x = torch.randn(4, 5)
    module = Writes().eval()
    graph = capture(module, inputs={"x": x})
    assert torch.equal(run(graph, {"x": x})["output"], module(x))


def test_the_live_module_is_left_as_it_was() -> None:
    model = FAMILIES["llama"].build(layers=4)
    model.config.use_cache = True
    before = model.config._attn_implementation
    graph = capture(model)
    assert model.config.use_cache
    assert graph.origin.config == model.config.to_dict()
    assert model.config._attn_implementation == before
    assert all("forward" not in vars(child) for child in model.modules())
    assert not any(parameter.is_meta for parameter in model.parameters())


# --- what cannot be captured ---------------------------------------------------------------------------------


class Sorts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


@pytest.mark.parametrize(
    ("module", "part"),
    [
        (Sorts().eval(), "`aten.sort.default` is not in the graph's vocabulary\n --> inner"),
        (Branches().eval(), "torch cannot trace `Branches`"),
        (Counts().eval(), "writes to one of its parameters"),
        (Sorts(), "training mode"),
    ],
)
def test_what_cannot_be_captured_says_why_and_where(module: nn.Module, part: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(module, inputs={"x": torch.zeros(2, 3)})
    assert part in str(caught.value)


def test_a_trace_that_fails_says_so_in_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Branches().eval(), inputs={"x": torch.zeros(2, 3)})
    assert "\n" not in caught.value.cause
    assert "depend on the values" in caught.value.remedy
    assert capfd.readouterr().err == ""


def test_a_module_without_example_inputs_is_refused() -> None:
    with pytest.raises(CaptureError, match="needs example inputs"):
        capture(Sorts().eval())


def test_an_unknown_attention_mask_is_refused() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama4_text", num_hidden_layers=2, hidden_size=32, intermediate_size=16,
                                  intermediate_size_mlp=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                                  vocab_size=50, num_local_experts=2, pad_token_id=0)  # fmt: skip
    with pytest.raises(CaptureError, match="chunked_overlay"):
        capture(config, architecture="Llama4ForCausalLM")


def test_the_page_on_families_names_all_of_them() -> None:
    page = (Path(__file__).parent.parent / "docs" / "families.md").read_text()
    for family in FAMILIES.values():
        assert family.architecture in page or f"{family.name}," in page or f", {family.name}" in page
