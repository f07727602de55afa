"""Law 1: a captured model computes what transformers computes. And what capture promises beside that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compiler.frontend.capture import capture, fold_layers, trace_all
from compiler.frontend.subject import subject_of
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.text import difference, print_graph
from compiler.weights.evaluate import evaluate
from tests.captures import graph_of
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
            known[name] = (FAMILIES[name].build(seed=1), graph_of(name, seed=1))
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


TWO_KINDS = {"gemma2", "gemma3", "cohere2", "smollm3", "modernbert", "t5", "gpt_oss", "deepseek_v2", "deepseek_v3"}
"""Families whose layers are of two kinds."""
LIKE_OTHERS = {"mistral", "qwen2", "olmo2", "granite", "roberta", "deit", "siglip_vision", "siglip_text", "deepseek_v2"}
"""Families whose layers are put together as those of another family."""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LIKE_OTHERS])
def test_two_layers_of_a_kind_stand_for_all(name: str) -> None:
    config = FAMILIES[name].config(layers=5 if name in TWO_KINDS else 3)
    whole, folded = subject_of(config, None, None), subject_of(config, None, None)
    expected = print_graph(trace_all(whole), weights=True, fold=False)
    found = fold_layers(folded)
    assert found is not None or name == "modernbert"  # every kind of its five layers occurs at most twice
    if found is not None:
        assert print_graph(found, weights=True, fold=False) == expected


def test_kinds_that_alternate_stand_for_all_however_deep() -> None:
    config = FAMILIES["gemma3"].config(layers=9)
    whole, found = trace_all(subject_of(config, None, None)), fold_layers(subject_of(config, None, None))
    assert found is not None
    assert difference(whole, found) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "t5", "vit"])
def test_capture_is_deterministic(name: str) -> None:
    """Of live modules too, which compute what their class does."""
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    graphs = [capture(model) for _ in range(2)]
    assert len({print_graph(graph, weights=True) for graph in graphs}) == 1
    expected = run(graph_of(name), inputs)
    assert all(torch.equal(value, expected[output]) for output, value in run(graphs[0], inputs).items())


def test_a_class_of_one_config_is_traced_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By itself or in a checkpoint; another config and live modules, which may hold anything, are traced."""
    family = FAMILIES["gpt2"]
    first = print_graph(capture(family.config(dtype="float32")))
    family.build().save_pretrained(tmp_path)
    times = count_traces(monkeypatch)
    assert print_graph(capture(family.config(dtype="float32"))) == print_graph(capture(tmp_path)) == first
    assert not times
    capture(family.config(dtype="float32", scale_attn_weights=False))
    capture(family.build())
    assert len(times) == 2


def count_traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with every trace."""
    found: list[str] = []
    real = torch.export.export

    def export(module: nn.Module, *args: Any, **options: Any) -> Any:
        found.append(type(module).__name__)
        return real(module, *args, **options)

    monkeypatch.setattr(torch.export, "export", export)
    return found


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


def test_the_page_on_families_names_all_of_them() -> None:
    page = (Path(__file__).parent.parent / "docs" / "families.md").read_text()
    for family in FAMILIES.values():
        assert family.architecture in page or f"{family.name}," in page or f", {family.name}" in page
