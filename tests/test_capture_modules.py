"""Modules that are no transformers models are captured too; what cannot be says why, and where."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.errors import CaptureError
from compiler.frontend.capture import capture
from compiler.ir.execute import run
from tests.families import FAMILIES
from tests.test_capture import TOLERANCE, error_of


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


class Buckets(nn.Module):
    """Signs, numbers rounded up and lengths of vectors."""

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        return {
            "sign": torch.sign(x),
            "sign of integers": torch.sign(ids - 3),
            "up": torch.ceil(x * 7),
            "unit": x / x.norm(dim=-1, keepdim=True),
            "length": torch.linalg.vector_norm(x),
        }


def test_signs_numbers_rounded_up_and_lengths_are_captured() -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    x[0, :3] = torch.tensor([0.0, 1 / 7, -2 / 7])
    given = {"x": x, "ids": torch.arange(6).repeat(5, 1)}
    module = Buckets().eval()
    found = run(capture(module, inputs=given), given)
    for name, wanted in module(**given).items():
        torch.testing.assert_close(found[name], wanted, rtol=TOLERANCE, atol=0)


class Order(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.gather(1, torch.argsort(x > 0, dim=1)) if self.of_flags else torch.argsort(x, dim=0)

    def __init__(self, of_flags: bool) -> None:
        super().__init__()
        self.of_flags = of_flags


def test_orders_are_captured_of_flags_too_and_refused_along_an_unknown_length() -> None:
    x = torch.tensor([[1.0, -1.0], [2.0, -3.0], [4.0, -0.5]])
    (found,) = run(capture(Order(True).eval(), inputs={"x": x}), {"x": x}).values()
    assert torch.equal(found, x.flip(1))
    with pytest.raises(CaptureError, match="whose length is not known"):
        capture(Order(False).eval(), inputs={"x": x})


def test_a_norm_of_another_order_is_refused() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.vector_norm(x, ord=1, dim=-1)

    with pytest.raises(CaptureError, match="a norm of order 1 is not"):
        capture(Sizes().eval(), inputs={"x": torch.ones(2, 3)})


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


def test_an_attention_that_reads_its_mask_itself_is_refused() -> None:
    """Its scores would be those of all tokens, were the mask left out as it is for attention of ours."""
    from transformers import BloomConfig

    config = BloomConfig(n_layer=1, hidden_size=16, n_head=2, vocab_size=20)
    with pytest.raises(CaptureError, match="reads its mask itself") as caught:
        capture(config, architecture="BloomForCausalLM")
    assert "attention" in (caught.value.where or "") and "attention interface" in caught.value.remedy


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


def test_an_unknown_operation_ends_a_capture_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = import_module("compiler.frontend.capture")
    monkeypatch.setattr(frontend, "trace_all", lambda subject: pytest.fail("everything was traced again"))
    module = nn.Sequential()
    module.layers = nn.ModuleList(Inner() for _ in range(4))
    module.forward = lambda x: module.layers[3](module.layers[2](module.layers[1](module.layers[0](x))))
    with pytest.raises(CaptureError, match="sort"):
        capture(module.eval(), inputs={"x": torch.zeros(2, 3)})


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


class Written(nn.Module):
    """A tensor of six channels of which some are written to."""

    def __init__(self, place: object) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[..., self.place] = y[..., self.place] * 3 + 1
        return y


PLACES = [0, -1, -6, *(slice(a, b, c) for a in (None, -4, 4, 100) for b in (None, -1, 9) for c in (None, 2))]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_writes_to_any_part_of_an_axis_are_followed(place):
    module, x = Written(place).eval(), torch.randn(2, 3, 6)
    (output,) = run(capture(module, inputs={"x": x}), {"x": x}).values()
    torch.testing.assert_close(output, module(x), rtol=0, atol=0)


@pytest.mark.parametrize("heads", [2, 7])
def test_heads_that_lie_behind_the_tokens_are_rotated(heads):
    """Gemma 4's: [B, T, heads, width]; as many heads as tokens tell nobody which axis is which."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 8}
    more = {"global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
    config = transformers.Gemma4TextConfig(
        **sizes,
        **more,
        num_attention_heads=heads,
        num_key_value_heads=1,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    model, ids = transformers.Gemma4ForCausalLM(config).eval(), torch.arange(14).reshape(2, 7)
    graph = capture(model)
    assert {node.input(0).shape[1] for node in graph.nodes_named("rope")} == {heads, 1}
    assert error_of(graph, model, {"input_ids": ids}) <= TOLERANCE
