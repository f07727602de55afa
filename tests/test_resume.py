"""Interrupted at any instant, a run leaves the finished output or something it can go on from."""

import random
import time

import pytest
import torch
from safetensors.torch import save_file

from compiler import job
from compiler.errors import OutputError
from compiler.executor import Local
from compiler.output import OutputDirectory
from compiler.recipe import Recipe
from compiler.weights.expr import load
from compiler.weights.journal import Journal
from compiler.weights.source import MemorySource
from compiler.weights.spill import Progress
from compiler.weights.writer import write
from tests.jobs import LAYERS, run_job, run_recipe, start
from tests.small import write_folder, write_recipe

KILLS, WHOLE_KILLS = 20, 3


class Stop(Exception):
    """Raised where a run is to be interrupted."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.w": torch.randn(64, 256, generator=generator).bfloat16() for i in range(LAYERS)}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run_job(checkpoint, out)
    return contents(out)


def test_killed_at_random_instants_the_final_bytes_are_the_same(checkpoint, undisturbed, tmp_path):
    pause = 0.01  # stretches the job, so that instants fall into every part of it
    start(run_job, checkpoint, tmp_path / "warm").join()
    begun = time.monotonic()
    start(run_job, checkpoint, tmp_path / "timed", None, pause).join()
    duration = time.monotonic() - begun
    instants = random.Random(0)
    reused = 0
    for attempt in range(KILLS):
        out, log = tmp_path / f"out{attempt}", tmp_path / f"log{attempt}"
        process = start(run_job, checkpoint, out, log, pause)
        time.sleep(instants.uniform(0, duration))
        process.kill()
        process.join()
        if out.exists():
            assert contents(out) == undisturbed  # visible means complete
            continue
        run_job(checkpoint, out, log)
        assert contents(out) == undisturbed
        reused += int(log.read_text().split()[-1]) > 0
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(f".out{attempt}.")] == []
    assert reused >= KILLS // 4


WHOLE = {
    "exact": ("[gqa-to-mla, {quantize: {bits: 4, group: 16, skip: [lm_head]}}]", ""),
    "calibrated": ("[gqa-to-mla: {cache: 50%}]", "calibration: {data: text.txt, samples: 4, length: 32}\n"),
}


@pytest.mark.parametrize(("passes", "rest"), WHOLE.values(), ids=WHOLE.keys())
def test_a_whole_job_killed_and_run_again_gives_the_same_output(passes, rest, tmp_path):
    """Every file but the timings is the same, to the byte, and the output is never seen incomplete."""
    recipe = write_recipe(write_folder(tmp_path), passes, rest)
    begun = time.monotonic()
    start(run_recipe, recipe, tmp_path / "timed").join()
    duration = time.monotonic() - begun
    expected = untimed(tmp_path / "timed")
    instants = random.Random(1)
    for attempt in range(WHOLE_KILLS):
        out = tmp_path / f"out{attempt}"
        process = start(run_recipe, recipe, out)
        time.sleep(instants.uniform(0, duration))
        process.kill()
        process.join()
        if not out.exists():
            again = start(run_recipe, recipe, out)
            again.join()
            assert again.exitcode == 0
        assert untimed(out) == expected


def test_a_run_that_stopped_in_its_reports_reports_the_same(tmp_path, monkeypatch):
    recipe = Recipe.load(write_recipe(write_folder(tmp_path)))

    def stop(findings, directory):
        (directory / "README.md").write_text("half of a")
        raise Stop

    monkeypatch.setattr(job, "write_reports", stop)
    with pytest.raises(Stop):
        job.compress(recipe, tmp_path / "out")
    monkeypatch.undo()
    job.compress(recipe, tmp_path / "out")
    job.compress(recipe, tmp_path / "whole")
    assert untimed(tmp_path / "out") == untimed(tmp_path / "whole")


def untimed(directory):
    return {name: data for name, data in contents(directory).items() if not name.endswith("timings.json")}


@pytest.mark.parametrize("stop_after", range(0, LAYERS + 1, 4))
def test_interrupted_between_tensors_work_is_reused(checkpoint, undisturbed, tmp_path, stop_after):
    weights = MemorySource({f"t{i}": torch.full((8, 8), float(i)) for i in range(LAYERS)})
    tensors = {name: load("model", name, type) for name, type in weights.types.items()}
    steps, seen = [], []

    def stop(done, total):
        steps.append(done)
        if len(steps) > stop_after:
            raise Stop

    options = {"journal": tmp_path / "journal", "safe_bytes": 1, "executor": Local(1)}
    (tmp_path / "files").mkdir()
    with pytest.raises(Stop):
        write(tensors, {"model": weights}, tmp_path / "files", on_progress=stop, **options)
    write(tensors, {"model": weights}, tmp_path / "files", on_progress=lambda d, t: seen.append(d), **options)
    assert seen[0] == max(0, stop_after - 1) * 256
    assert len(seen) == LAYERS - max(0, stop_after - 1) + 1
    (tmp_path / "again").mkdir()
    write(tensors, {"model": weights}, tmp_path / "again")
    assert contents(tmp_path / "files") == contents(tmp_path / "again")


def test_another_checkpoint_is_not_taken_for_the_same(tmp_path):
    """The journal of a run on other weights is not trusted, even where names and shapes agree."""
    (tmp_path / "files").mkdir()
    for value in (1.0, 2.0):
        source = MemorySource({"w": torch.full((4,), value)})
        tensors = {"w": load("model", "w", source.types["w"])}
        write(tensors, {"model": source}, tmp_path / "files", journal=tmp_path / "journal")
    other = tmp_path / "other"
    other.mkdir()
    write(tensors, {"model": source}, other)
    assert contents(tmp_path / "files") == contents(other)


@pytest.mark.parametrize("spoil", ["removed", "truncated", "other"])
def test_files_that_changed_are_not_reused(tmp_path, spoil):
    source = MemorySource({"w": torch.full((4,), 2.0)})
    tensors = {"w": load("model", "w", source.types["w"])}
    (tmp_path / "files").mkdir()
    (file,) = write(tensors, {"model": source}, tmp_path / "files", journal=tmp_path / "journal")
    good = file.path.read_bytes()
    spoiled = {"removed": None, "truncated": good[:-3], "other": b"x" * len(good)}[spoil]
    file.path.unlink()
    if spoiled is not None:
        file.path.write_bytes(spoiled)
    write(tensors, {"model": source}, tmp_path / "files", journal=tmp_path / "journal")
    assert file.path.read_bytes() == good


def test_a_torn_journal_loses_only_its_last_line(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, "job")
    journal.begin([])
    journal.add(["a", "b"])
    journal.add(["c"])
    path.write_text(path.read_text()[:-3])
    assert Journal(path, "job").finished == {"a", "b"}
    assert Journal(path, "another").finished == frozenset()
    resumed = Journal(path, "job")
    resumed.begin(["b", "c"])
    resumed.add(["d"])
    assert Journal(path, "job").finished == {"b", "d"}


def test_a_damaged_line_or_bundle_is_done_again(tmp_path):
    journal = Journal(tmp_path / "journal", "job")
    journal.begin([])
    journal.add(["layers.1"])
    (tmp_path / "journal").write_text((tmp_path / "journal").read_text().replace("layers.1", "layers.7"))
    assert Journal(tmp_path / "journal", "job").finished == frozenset()
    progress = Progress(tmp_path)
    progress.save("solved", {"w": torch.arange(64.0)})
    (file,) = tmp_path.glob("solved*")
    assert torch.equal(progress.load("solved")["w"], torch.arange(64.0))
    file.write_bytes(file.read_bytes()[:-40] + b"x" + file.read_bytes()[-39:])
    assert progress.load("solved") is None


def test_an_output_appears_complete_or_not_at_all(tmp_path):
    with OutputDirectory(tmp_path / "out", "job") as output:
        (output.files / "weights").write_text("w")
        assert not (tmp_path / "out").exists()
        output.commit()
    assert (tmp_path / "out" / "weights").read_text() == "w"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_output_is_taken_up_again(tmp_path):
    with pytest.raises(Stop), OutputDirectory(tmp_path / "out", "job") as output:
        (output.files / "half").write_text("w")
        (output.state / "journal").write_text("w")
        raise Stop
    assert not (tmp_path / "out").exists()
    resumed = OutputDirectory(tmp_path / "out", "job")
    assert resumed.resumed
    with resumed as output:
        assert (output.files / "half").read_text() == "w"
    assert not OutputDirectory(tmp_path / "out", "another job").resumed


def test_two_runs_on_one_output_exclude_each_other(tmp_path):
    with (
        OutputDirectory(tmp_path / "out", "job"),
        pytest.raises(OutputError, match="another run is writing"),
        OutputDirectory(tmp_path / "out", "another job"),
    ):
        pass
    with OutputDirectory(tmp_path / "out", "another job") as output:
        assert output.files.is_dir()


def test_an_existing_output_is_never_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"), OutputDirectory(tmp_path / "out", "job"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_a_finished_job_says_so(tmp_path):
    with OutputDirectory(tmp_path / "out", "job") as output:
        output.commit()
    assert OutputDirectory(tmp_path / "out", "job").finished
    with pytest.raises(OutputError, match="made by this very job"), OutputDirectory(tmp_path / "out", "job"):
        pass
    with pytest.raises(OutputError, match="exists already"), OutputDirectory(tmp_path / "out", "another"):
        pass


def test_work_of_abandoned_jobs_goes_when_the_output_is_made(tmp_path):
    for name, key in (("out", "0" * 16), ("out.v2", "1" * 16)):
        with OutputDirectory(tmp_path / name, key):
            pass
    with OutputDirectory(tmp_path / "out", "2" * 16) as output:
        assert len(list(tmp_path.glob(".out.*.partial"))) == 3
        output.commit()
    assert {path.name for path in tmp_path.iterdir()} == {"out", f".out.v2.{'1' * 16}.partial"}
