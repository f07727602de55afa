"""The same inputs give the same output: from the lock file, and with other numbers of threads within a bound."""

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from compiler.job import compress
from compiler.recipe import Recipe
from tests.small import write_folder, write_recipe
from tests.torture.subjects import CALIBRATION, contents, difference

BOUND = 1e-5
"""Of the norm of a tensor."""
PASSES = {
    "nearest": ("[quantize: {bits: 4, group: 16}]", ""),
    "low-rank": ("[low-rank: {keep: 70%}]", CALIBRATION),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("same"))


def made(folder, name, passes, rest=""):
    return compress(Recipe.load(write_recipe(folder, passes, rest, f"{name}.yaml")), folder / name).path


def test_the_recipe_of_a_lock_file_gives_the_same_bytes(folder):
    steps = [
        "gqa-to-mla: {cache: 50%}",
        "heal: {layer-tokens: 512, tokens: 512}",
        "quantize: {bits: 4, skip: [lm_head]}",
    ]
    out = made(folder, "first", f"[{', '.join(f'{{{step}}}' for step in steps)}]", CALIBRATION)
    lock = YAML(typ="safe", pure=True).load((out / "compress" / "recipe.lock.yaml").read_text())
    with (folder / "again.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(lock["recipe"], file)
    again = compress(Recipe.load(folder / "again.yaml"), folder / "again").path
    assert difference(contents(out), contents(again)) == ""


@pytest.mark.parametrize("name", PASSES)
def test_another_number_of_threads_gives_the_same_weights(folder, name):
    """Sums in another order: equal where nothing is measured, within rounding where choices rest on measurements."""
    one = load_file(made(folder, f"{name}-1", *PASSES[name]) / "model.safetensors")
    torch.set_num_threads(2)
    try:
        two = load_file(made(folder, f"{name}-2", *PASSES[name]) / "model.safetensors")
    finally:
        torch.set_num_threads(1)
    assert one.keys() == two.keys()
    for key, value in one.items():
        wide = value.double()
        assert (wide - two[key].double()).norm() <= (BOUND if PASSES[name][1] else 0) * wide.norm(), key
