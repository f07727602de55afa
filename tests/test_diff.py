"""What a comparison of two runs says of their passes."""

from __future__ import annotations

from compiler import Recipe, compress
from compiler.diff import diff
from tests.small import write_folder, write_recipe


def test_two_quantised_runs_differ_by_scheme_and_error(tmp_path):
    folder = write_folder(tmp_path)
    calibration = "calibration: {data: text.txt, samples: 2, length: 16}\n"
    for name, options in {"a": "{bits: 4, group: 16}", "b": "{bits: 3, group: 16, method: gptq, where: mlp}"}.items():
        recipe = write_recipe(folder, f"[quantize: {options}]", calibration, f"{name}.yaml")
        compress(Recipe.load(recipe), folder / name)
    shown = diff(str(folder / "a"), str(folder / "b"), values=False)
    up = "quantize model.layers.0.mlp.up_proj.weight: int4, symmetric, groups of 16 -> int3, symmetric, groups of 16"
    assert f"~ {up}, relative error 0." in shown
    assert "- quantize model.layers.0.self_attn.q_proj.weight: int4, symmetric, groups of 16" in shown
    assert "what passes did, and the error it made: the same" in diff(
        str(folder / "a"), str(folder / "a"), values=False
    )
