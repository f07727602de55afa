"""What a run may use, and what a plan says that it will use."""

import pytest
import torch

from compiler.cli import main
from compiler.instrument import rss
from compiler.means import SMALLEST_BUDGET, WORKER_MEMORY, open_means
from compiler.plan import make_plan
from compiler.recipe import Recipe
from tests.small import write_folder, write_recipe

ROOM = 128 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("means"))


def recipe(folder, run):
    return Recipe.load(write_recipe(folder, rest=f"run: {{{run}}}\n"))


def test_memory_that_earlier_work_gave_back_is_free(folder):
    torch.ones(1 << 30, dtype=torch.uint8)
    with open_means(recipe(folder, f"memory: {(rss() + ROOM) // 10**6}MB")) as means:
        assert means.budget >= SMALLEST_BUDGET


def test_a_plan_counts_the_workers(folder):
    alone = make_plan(recipe(folder, "executor: local")).peak_memory
    spread = make_plan(recipe(folder, "executor: processes, workers: 8")).peak_memory
    assert abs(spread - alone - 8 * WORKER_MEMORY) < WORKER_MEMORY


def test_a_plan_refuses_memory_that_is_too_little(folder, capsys):
    path = write_recipe(folder, rest="run: {memory: 10MB}\n", name="small.yaml")
    assert main(["plan", str(path)]) == 1
    assert "`memory` leaves nothing to work with" in capsys.readouterr().err
