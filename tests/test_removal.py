"""Removing indices of coupling groups: equal to zeroing them, in float64 to rounding, on every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compiler.errors import PassError
from compiler.frontend import capture
from compiler.ir.coupling import CouplingGroup, coupling_groups
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.ir.ops import op_named
from compiler.ir.types import TensorType
from compiler.ir.verify import signature, verify
from compiler.rewrite.removal import remove, reorder
from tests.captures import graph_of, plan_of
from tests.families import FAMILIES
from tests.graphs import GROUPS, HEAD, HEADS, tiny_llama, tokens
from tests.removed import double, outputs, zero

ROUNDING = 64 * torch.finfo(torch.float64).eps


def free(graph: Graph) -> list[CouplingGroup]:
    """The groups that may be pruned, in an order that copies of a graph share."""
    found = [g for g in coupling_groups(graph) if g.size > 1 and not (g.frozen or g.chosen or g.normed)]
    return sorted(found, key=lambda g: [(m.param.name, m.axis, m.stride) for m in g.members])


def assert_removing_is_zeroing(graph: Graph, inputs: dict[str, torch.Tensor]) -> int:
    """For each free group without its second index. Returns how many there are."""
    for number, group in enumerate(free(graph)):
        kept = [index for index in range(group.size) if index != 1]
        pruned, zeroed = copy_of(graph), copy_of(graph)
        expected = signature(pruned)
        remove(pruned, {free(pruned)[number]: kept})
        verify(pruned, expected)
        zero(zeroed, free(zeroed)[number], kept)
        found, wanted = outputs(pruned, inputs), outputs(zeroed, inputs)
        for name, value in wanted.items():
            assert (found[name] - value).abs().max() <= ROUNDING * value.abs().max(), group.members
    return len(free(graph))


@pytest.mark.parametrize("name", FAMILIES)
def test_removing_an_index_of_any_free_group_is_zeroing_it(name):
    family = FAMILIES[name]
    graph = double(graph_of(family.name))
    assert assert_removing_is_zeroing(graph, family.inputs(batch=1, tokens=5)) >= 2


class Separable(nn.Module):
    """A block as in MobileNet, behind a normalisation over the batch."""

    def __init__(self, width: int, inner: int, groups: int) -> None:
        super().__init__()
        self.widen, self.norm = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.mix = nn.Conv2d(inner, inner, 3, padding=1, groups=groups)
        self.narrow = nn.Conv2d(inner, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(torch.relu(self.mix(torch.relu(self.norm(self.widen(x))))))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.layers = nn.ModuleList([Separable(8, 12, 12), Separable(8, 12, 4), Separable(8, 10, 1)])
        self.last, self.inner, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6 * 4 * 4, 20), nn.Linear(20, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.relu(self.inner(torch.relu(self.last(x)).flatten(1))))


def test_a_convolutional_net_loses_channels_that_reach_from_maps_to_flat_features():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 12, 12)
    graph = double(capture(Convolutional().eval(), inputs={"image": image}))
    members = {(m.param.name, m.axis, m.stride) for g in free(graph) for m in g.members}
    assert {("last.weight", 0, 1), ("inner.weight", 1, 16)} <= members
    assert {("layers.0.mix.weight", 0, 1), ("layers.0.norm.running_var", 0, 1)} <= members
    assert assert_removing_is_zeroing(graph, {"image": image}) >= 6


class Basic(nn.Module):
    """A block as in ResNet: maps that lose half of their places get a shortcut of their own."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        same = width == out and stride == 1
        self.down = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.down(x))


class Residual(nn.Module):
    """A small ResNet, with the pooling of its stem and of its head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.pool, self.mean = nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)
        self.layers = nn.Sequential(Basic(8, 8, 1), Basic(8, 16, 2), Basic(16, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(image))))
        return self.head(self.mean(self.layers(x)).flatten(1))


def residual_net() -> Residual:
    """With statistics and scales that are not neutral."""
    torch.manual_seed(0)
    net = Residual()
    net(torch.randn(8, 3, 32, 32))
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    return net.eval()


def test_a_residual_net_loses_channels_of_its_stages_and_of_what_its_blocks_hold_inside():
    net, image = residual_net(), torch.randn(2, 3, 32, 32)
    graph = capture(net, inputs={"image": image})
    torch.testing.assert_close(run(graph, {"image": image})["output"], net(image))
    members = [{(m.param.name, m.axis) for m in g.members} for g in free(graph)]
    stem, stage = (
        {("stem.weight", 0), ("layers.0.conv2.weight", 0)},
        {("layers.1.down.0.weight", 0), ("head.weight", 1)},
    )
    assert any(stem <= own for own in members) and any(stage <= own for own in members)
    assert assert_removing_is_zeroing(double(graph), {"image": image}) == 5


def test_several_factors_of_one_axis_are_removed_at_once():
    graph = double(tiny_llama(layers=1))
    pruned, zeroed = copy_of(graph), copy_of(graph)
    for made in (pruned, zeroed):
        groups = [g for g in free(made) if any("q_proj" in m.param.name for m in g.members)]
        assert sorted(group.size for group in groups) == [GROUPS, HEADS // GROUPS]
        kept = {group: [1] for group in groups}
        if made is pruned:
            remove(made, kept)
        else:
            for group in groups:
                zero(made, group, [1])
    (attention,) = pruned.nodes_named("attention")
    assert attention.input(0).shape == ("B", 1, "T", HEAD)
    torch.testing.assert_close(
        outputs(pruned, tokens())["logits"], outputs(zeroed, tokens())["logits"], rtol=ROUNDING, atol=ROUNDING
    )


def test_heads_reordered_within_their_groups_compute_the_same():
    graph = double(tiny_llama(layers=1))
    before = outputs(graph, tokens())["logits"]
    outer, inner = (
        next(g for g in free(graph) if {("q_proj", s)} <= {(m.param.name.split(".")[-2], m.stride) for m in g.members})
        for s in (2 * HEAD, HEAD)
    )
    reorder(outer, inner, [[1, 0], [0, 1]])
    torch.testing.assert_close(outputs(graph, tokens())["logits"], before, rtol=ROUNDING, atol=ROUNDING)


def test_what_is_frozen_normed_or_chosen_from_is_refused_with_the_reason():
    graph = tiny_llama(layers=1)
    groups = coupling_groups(graph)
    for group, reason in (
        (next(g for g in groups if g.frozen), "cannot be pruned: `"),
        (next(g for g in groups if g.normed and not g.frozen), "averages over positions of this axis"),
    ):
        with pytest.raises(PassError, match=reason):
            remove(graph, {group: [0]})
    experts = plan_of("mixtral")
    chosen = next(g for g in coupling_groups(experts) if "experts" in g.chosen)
    with pytest.raises(PassError, match="chooses among positions"):
        remove(experts, {chosen: [0, 1]})
    with pytest.raises(PassError, match="nothing would remain"):
        remove(graph, {free(graph)[0]: []})


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        (("B", "T", 48), ("B", "T", 4, 12), "a0 a1 (f3s12 f3s1) -> a0 a1 f3s12 f3s1"),
        (("B", "T", 48), ("B*T", 48), "x0! x1! f3s1 -> y0! f3s1"),
        (("B", 6, 4, 4), ("B", 96), "a0 f4s16 f4s4 f4s1 -> a0 (f4s16 f4s4 f4s1)"),
        ((12,), (1, 12, 1, 1), "f1s1 -> y0! f1s1 () ()"),
        ((6, 4), (4, 6), "f2x0! f2x1! -> f2y0! f2y1!"),
    ],
)
def test_axes_of_a_reshape_correspond_where_their_factors_nest(before, after, rule):
    types = [TensorType(torch.float32, before)], [TensorType(torch.float32, after)]
    assert op_named("reshape").axis_rule(*types, {"shape": after}) == rule
