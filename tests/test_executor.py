"""Work spread over processes and over Ray: the same results, errors as they are, and workers that may die."""

import os
import signal
import subprocess
import sys
import time
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from compiler.errors import DataError, ExecutorError, PassError
from compiler.executor import Local, in_order, open_executor, outcomes
from compiler.pipeline import Pipeline
from compiler.weights.checkpoint import open_checkpoint
from compiler.weights.source import MemorySource
from compiler.weights.writer import write
from tests.captures import graph_of
from tests.families import FAMILIES
from tests.jobs import tensors_of
from tests.matrix import PASSES
from tests.workers import Killing, interrupting, odd, refused, squared, squared_but_zero

WORKERS, LAYERS, KILLS = 2, 12, 3
SPREAD = ("processes", "ray")


@pytest.fixture(scope="module", params=("local", *SPREAD))
def executor(request):
    with open_executor(request.param, WORKERS) as found:
        yield found


@pytest.fixture(scope="module", params=SPREAD)
def spread(request):
    with open_executor(request.param, WORKERS) as found:
        yield found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.w": torch.randn(256, 512, generator=generator).bfloat16() for i in range(LAYERS)}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return open_checkpoint(path)


def written(checkpoint, directory, executor, **options):
    directory.mkdir()
    write(tensors_of(checkpoint), {"model": checkpoint}, directory, executor=executor, budget=2 << 20, **options)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_results_come_in_the_order_of_their_items(executor):
    assert list(in_order(executor, squared, range(20))) == [n * n for n in range(20)]


def test_what_a_worker_raises_is_raised_as_it_was(executor):
    with pytest.raises(DataError) as caught:
        list(in_order(executor, refused, [3]))
    error = caught.value
    assert (error.cause, error.remedy, error.where) == ("3 is refused", "take another", "a file")


def test_an_error_that_cannot_be_sent_is_told(spread):
    with pytest.raises(RuntimeError, match="Unspeakable: 3 twice"):
        list(in_order(spread, odd, [3]))


def test_workers_write_the_bytes_of_the_local_run(checkpoint, spread, tmp_path):
    expected = written(checkpoint, tmp_path / "local", Local(1), shard_bytes=200_000)
    assert written(checkpoint, tmp_path / "spread", spread, shard_bytes=200_000) == expected


def test_killed_workers_cost_nothing_but_time(checkpoint, spread, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    found = written(checkpoint, tmp_path / "killed", Killing(spread, marks, KILLS))
    assert found == written(checkpoint, tmp_path / "local", Local(1))
    assert len(list(marks.iterdir())) == KILLS + LAYERS  # every killed call was made again


def test_work_that_kills_every_worker_is_an_error(spread, tmp_path):
    with pytest.raises(ExecutorError, match="5 workers died of the same piece of work"):
        list(in_order(Killing(spread, tmp_path, 100), squared, [1]))


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutorError, match="needs Ray") as caught, open_executor("ray"):
        pass
    assert "pip install 'compress-model[ray]'" in caught.value.remedy


@pytest.mark.parametrize("reason", [ValueError, ConnectionError, RuntimeError])
def test_an_address_of_no_ray_cluster_is_named(reason, monkeypatch):
    def init(**options):
        raise reason("no such place")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    monkeypatch.setenv("RAY_ADDRESS", "foo")
    with pytest.raises(ExecutorError, match="no Ray cluster can be joined at foo: no such place"), open_executor("ray"):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "127.0.0.1:99999"])
def test_an_address_where_nobody_is_is_told_at_once(address, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=pytest.fail))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ExecutorError, match="no Ray cluster answers at"), open_executor("ray"):
        pass


def test_an_item_that_fails_does_not_stop_the_others(spread):
    first, *others = outcomes(spread, squared_but_zero, [0, 1, 2])
    assert isinstance(first.error, ExecutorError)
    assert [other.get() for other in others] == [1, 4]


@pytest.fixture
def interruptible():
    """What runs in a shell's background inherits that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_ends_its_workers_amid_their_work(spread, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        list(in_order(spread, interrupting, [(os.getpid(), tmp_path, number) for number in range(2)]))
    assert {path.name for path in tmp_path.iterdir()} == {"begun-0", "begun-1"}


RUN = """
import sys
from pathlib import Path
from compiler.executor import in_order
from compiler.executor.processes import Processes
from tests.workers import endless

list(in_order(Processes(2), endless, [Path(name) for name in sys.argv[1:]]))
"""


def test_workers_go_with_the_process_that_is_killed(tmp_path):
    """They hold its standard error, which ends when the last of them is gone."""
    marks = [tmp_path / "a", tmp_path / "b"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen([sys.executable, "-c", RUN, *marks], env=environment, stderr=subprocess.PIPE)
    while not all(mark.exists() for mark in marks) and run.poll() is None:
        time.sleep(0.05)
    run.kill()
    assert run.communicate(timeout=60)[1] == b""


def test_workers_import_nothing_from_where_they_are_started(tmp_path, monkeypatch):
    for name in ("json", "signal", "pickle"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    with open_executor("processes", 1) as executor:
        assert list(in_order(executor, squared, [2])) == [4]


def test_workers_that_the_system_does_not_give_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with (
        open_executor("processes", 1) as executor,
        pytest.raises(ExecutorError, match="no worker can be started: No such"),
    ):
        list(in_order(executor, squared, [2]))


@pytest.mark.parametrize("family", ["llama", "whisper"])
def test_what_every_pass_makes_is_written_the_same(family, spread, tmp_path):
    """Expressions of all passes, of which workers know nothing but what is sent to them."""
    tensors, sources = made_by_all(family)
    assert len(sources["spill"].types) > 5
    for name, executor in (("local", Local(1)), ("spread", spread)):
        (tmp_path / name).mkdir()
        write(tensors, sources, tmp_path / name, executor=executor, budget=64_000)
    assert (tmp_path / "spread" / "model.safetensors").read_bytes() == (
        tmp_path / "local" / "model.safetensors"
    ).read_bytes()


@cache
def made_by_all(family):
    """The weights that every pass of the matrix makes of a family, and what they are read from."""
    tensors, spilled = {}, {}
    for title, steps in PASSES.items():
        graph = graph_of(family)
        try:
            Pipeline(steps).run(graph, calibration=lambda _: [FAMILIES[family].inputs(seed=1)])
        except PassError:
            continue
        tensors |= {f"{title} {param.name}": param.expr for param in graph.params.values()}
        if "spill" in graph.sources:
            spilled |= {key: graph.sources["spill"].read(key) for key in graph.sources["spill"].types}
    return tensors, {"model": graph.sources["model"], "spill": MemorySource(spilled)}
