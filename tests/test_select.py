"""Selectors: what each form selects, and one clear error for everything that cannot be meant."""

from __future__ import annotations

import pytest

from compiler.errors import SelectorError
from compiler.ir.select import resolve
from compiler.pipeline import Pipeline
from passes import LowRank
from tests.captures import plan_of
from tests.graphs import INNER, WIDTH, tiny_llama


def names(selector, skip=()):
    return [param.name for param in resolve(tiny_llama(layers=3), selector, skip)]


def of_layers(*parts, layers=(0, 1, 2)):
    return [f"model.layers.{layer}.{part}.weight" for layer in layers for part in parts]


QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TABLE = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("selector", "skip", "expected"),
    [
        ("attention.query", (), of_layers("self_attn.q_proj")),
        ("attention", (), of_layers(*QKVO)),
        ("mlp", (), of_layers(*MLP)),
        ("embedding", (), [TABLE]),
        ("head", (), [TABLE]),
        ("linear", (), [TABLE, *of_layers(*QKVO, *MLP)]),
        ("linear", ("lm_head",), of_layers(*QKVO, *MLP)),
        ("linear", ("head", "mlp", "*.1.*"), of_layers(*QKVO, layers=(0, 2))),
        ("linear", ("router", "head"), of_layers(*QKVO, *MLP)),
        (["mlp.down", "*.k_proj.*"], (), of_layers("self_attn.k_proj", "mlp.down_proj")),
        ("layers.2", ("norm",), of_layers(*QKVO, *MLP, layers=(2,))),
        ("q_proj", (), of_layers("self_attn.q_proj")),
        ("model.norm.weight", (), ["model.norm.weight"]),
        ({"role": "mlp", "layers": "0-1"}, (), of_layers(*MLP, layers=(0, 1))),
        ({"role": ["mlp.up", "mlp.gate"], "layers": "0, 2"}, (), of_layers(*MLP[:2], layers=(0, 2))),
        ({"name": "*.mlp.*", "layers": 1}, (), of_layers(*MLP, layers=(1,))),
        ({"role": "linear", "shape": f"out>={INNER} and in=={WIDTH}"}, ("head",), of_layers(*MLP[:2])),
        ({"role": "linear", "shape": "not in % 16 == 0 or numel < 200"}, (), of_layers(*QKVO[1:3], MLP[2])),
        ({"role": "mlp", "expect": 9}, (), of_layers(*MLP)),
    ],
)
def test_selectors_select(selector, skip, expected):
    assert names(selector, skip) == expected


def test_vectors_have_no_out_and_in():
    assert names({"name": "*", "shape": "rank<2 or out>0"}) == names("linear")


@pytest.mark.parametrize(
    ("selector", "skip", "cause", "remedy"),
    [
        (
            "attention.qurey",
            (),
            "`attention.qurey` selects nothing in `tiny`",
            "did you mean `attention.query`? roles present: "
            "attention, attention.query, attention.key, attention.value, attention.output, mlp",
        ),
        ("experts", (), "`experts` selects nothing", "roles present: attention"),
        ("model.layers.7.*", (), "`model.layers.7.*` selects nothing", "roles present"),
        (["router", "conv"], (), "`[router, conv]` selects nothing", "roles present"),
        ("lm_heads", (), "`lm_heads` selects nothing", "did you mean `lm_head`?"),
        ("mlp", ("lm_haed",), "`skip: lm_haed` matches nothing in `tiny`", "did you mean `lm_head`?"),
        ("mlp", ("mlp.*", "mlp"), "`skip: mlp.*` matches nothing", ""),
        ("mlp.up", ("mlp",), "`mlp.up` selects 3 weights, but `skip` leaves none of them", ""),
        (
            {"role": "mlp", "expect": 8},
            (),
            "`{role: mlp, expect: 8}` selects 9 weights, not 8",
            "they are model.layers.0.mlp.gate",
        ),
        ({"role": "mpl"}, (), "there is no role `mpl`", "did you mean `mlp`?"),
        ({"role": "zzz"}, (), "there is no role `zzz`", "roles: attention"),
        ({"rol": "mlp"}, (), "a selector has no key `rol`", "did you mean `role`?"),
        ({"zzz": "mlp"}, (), "a selector has no key `zzz`", "it can have: role, name, layers, shape, expect"),
        ({"role": 3}, (), "`role` must be a text or a list of texts, not 3", ""),
        ({"name": ["a", 3]}, (), "`name` must be a text or a list of texts", ""),
        ({"role": "mlp", "layers": "0-"}, (), "`layers` must be like 0-11,20, not '0-'", ""),
        ({"role": "mlp", "layers": True}, (), "`layers` must be like 0-11,20, not True", ""),
        ({"role": "mlp", "layers": "3-9"}, (), "selects nothing", ""),
        ({"role": "mlp", "shape": "out > "}, (), "`shape` cannot be read: 'out > '", "write it like"),
        ({"role": "mlp", "shape": "wide > 3"}, (), "`shape` cannot be read", ""),
        ({"role": "mlp", "shape": "out.real > 3"}, (), "`shape` cannot be read", ""),
        ({"role": "mlp", "shape": "__import__('os')"}, (), "`shape` cannot be read", ""),
        ({"role": "mlp", "shape": "out % 0 == 1"}, (), "`shape` cannot be read", ""),
        ({"role": "mlp", "shape": 3.5}, (), "`shape` cannot be read", ""),
    ],
)
def test_what_cannot_be_meant_is_refused(selector, skip, cause, remedy):
    with pytest.raises(SelectorError) as raised:
        names(selector, skip)
    assert cause in raised.value.cause
    assert remedy in raised.value.remedy


@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize("share", ["none", "input"])
def test_factors_have_the_roles_of_what_they_stand_for(form, share):
    graph = plan_of("llama")
    wanted = {role: {param.name for param in resolve(graph, role)} for role in ("attention.query", "mlp", "head")}
    factors = LowRank(where={"name": "*.layers.*", "role": "linear"}, keep=0.7, form=form, share=share)
    Pipeline([factors]).run(graph, planned=True)
    for role, names in wanted.items():
        found = {param.name for param in resolve(graph, role)}
        halves = ("down", "up") if form == "pair" else ("pivots", "others")
        for name in names - {"lm_head.weight"}:
            assert any(f"{name.removesuffix('weight')}{half}.weight" in found for half in halves)
        linear = {param.name for param in resolve(graph, "linear")} - {"lm_head.weight"}
        assert linear == {param.name for param in resolve(graph, ["attention", "mlp"])}


def test_a_module_that_is_called_as_a_role_is_meant_by_its_name():
    with pytest.raises(SelectorError) as error:
        resolve(plan_of("qwen3_moe"), "mlp")
    assert error.value.remedy is not None and error.value.remedy.startswith("did you mean `*.mlp.*`?")
