"""Options and fixtures that several test files share."""

import gc
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--accept", action="store_true", help="write the golden files anew instead of comparing")


MANY = 10_000_000  # objects that are out of the collector's sight: a gigabyte or two


@pytest.fixture(scope="module", autouse=True)
def settled():
    """What earlier files have left (tests, captured graphs) lives on: collections, of which each job makes some, need
    not go through it again and again."""
    if gc.get_freeze_count() > MANY:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def golden(request):
    """``golden(path, text)`` compares ``text`` with the file, or writes it under ``--accept``."""

    def check(path: Path, text: str) -> None:
        if request.config.getoption("--accept"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"{path} differs; look at it, then run pytest --accept"

    return check


@pytest.fixture(scope="session")
def captured():
    """``captured("llama")`` is that family's tiny graph, captured from its config once; tests must not change it."""
    from compiler.frontend.capture import capture
    from tests.families import FAMILIES

    graphs = {}

    def graph(name: str):
        if name not in graphs:
            graphs[name] = capture(FAMILIES[name].config(), architecture=FAMILIES[name].architecture)
        return graphs[name]

    return graph
