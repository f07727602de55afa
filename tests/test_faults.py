"""A full disk, an unwritable target, a damaged input: one clear error each, and what is done is not lost."""

import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compiler.errors import CheckpointError, OutputError
from compiler.executor import Local
from compiler.output import OutputDirectory
from compiler.weights import writer
from compiler.weights.checkpoint import open_checkpoint
from compiler.weights.expr import load
from compiler.weights.ops import basic
from compiler.weights.source import MemorySource
from compiler.weights.writer import write

ROOT = Path(__file__).parent.parent


def job(size=64):
    source = MemorySource({f"t{i}": torch.full((size,), float(i)) for i in range(4)})
    return {name: load("model", name, type) for name, type in source.types.items()}, {"model": source}


def isolated(script, *arguments):
    """Run ``script`` in a private mount namespace, where it may mount small file systems."""
    command = ["unshare", "-rm", sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def may_mount():
    probe = "mount -t tmpfs -o size=64k tmpfs /mnt"
    return subprocess.run(["unshare", "-rm", "sh", "-c", probe], capture_output=True, check=False).returncode == 0


FULL_DISK = """
    import subprocess, sys
    from pathlib import Path
    import torch
    from compiler.errors import OutputError
    from compiler.weights import writer
    from tests.test_faults import job

    target, checked = Path(sys.argv[1]), sys.argv[2] == "checked"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", target], check=True)
    tensors, sources = job(size=8192)
    if not checked:
        writer._check_space = lambda files, directory: None
    try:
        writer.write(tensors, sources, target, journal=target.parent / "journal")
    except OutputError as error:
        print(error)
    subprocess.run(["mount", "-o", "remount,size=1m", target], check=True)
    writer.write(tensors, sources, target, journal=target.parent / "journal")
    print((target / "model.safetensors").stat().st_size)
"""


@pytest.mark.skipif(not may_mount(), reason="this machine does not let tests mount a small file system")
@pytest.mark.parametrize("noticed, words", [("checked", "the disk is too full: "), ("late", "No space left on device")])
def test_a_full_disk_is_one_error_and_more_space_lets_the_run_go_on(tmp_path, noticed, words):
    (tmp_path / "disk").mkdir()
    outcome = isolated(FULL_DISK, tmp_path / "disk", noticed)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("error[output]: ")
    assert words in outcome.stdout
    assert "what is finished is reused" in outcome.stdout
    assert int(outcome.stdout.split()[-1]) > 4 * 8192 * 4


def test_a_limit_on_file_sizes_is_one_error(tmp_path):
    """Space cannot even be reserved."""
    tensors, sources = job(size=4096)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OutputError, match="File too large"):
            write(tensors, sources, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    write(tensors, sources, tmp_path)


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(tmp_path, monkeypatch):
    """A file system that cannot reserve space: the disk fills while tensors are written."""
    tensors, sources = job()
    genuine, budget = os.pwrite, [3]

    def pwrite(descriptor, data, position):
        budget[0] -= 1
        if budget[0] < 0:
            raise OSError(28, os.strerror(28))
        return genuine(descriptor, data, position)

    options = {"journal": tmp_path / "journal", "safe_bytes": 1, "executor": Local(1)}
    (tmp_path / "files").mkdir()
    monkeypatch.setattr(writer.os, "pwrite", pwrite)
    with pytest.raises(OutputError, match="No space left on device"):
        write(tensors, sources, tmp_path / "files", **options)
    monkeypatch.undo()
    seen = []
    write(tensors, sources, tmp_path / "files", on_progress=lambda done, total: seen.append(done), **options)
    assert seen[0] == 2 * 256


@pytest.mark.parametrize("parent", ["file", "missing-root"])
def test_a_target_that_cannot_be_written_is_one_error(tmp_path, parent):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "out" if parent == "file" else Path("/proc/nothing/out")
    with pytest.raises(OutputError, match="cannot write to") as error, OutputDirectory(target, "job"):
        pass
    assert "choose a directory that you may write to" in str(error.value)


def test_a_writer_without_permission_is_one_error(tmp_path):
    tensors, sources = job()
    with pytest.raises(OutputError, match="cannot write: ") as error:
        write(tensors, sources, tmp_path / "missing")
    assert str(tmp_path / "missing") in str(error.value)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({f"t{i}": torch.full((1000,), float(i)) for i in range(4)}, path / "model.safetensors")
    return path


def test_a_shard_that_shrinks_while_it_is_read_is_one_error(checkpoint, tmp_path):
    opened = open_checkpoint(checkpoint)
    tensors = {name: load("model", name, type) for name, type in opened.types.items()}
    os.truncate(checkpoint / "model.safetensors", 9000)
    (tmp_path / "files").mkdir()
    options = {"journal": tmp_path / "journal", "safe_bytes": 1, "executor": Local(1)}
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: it ends at byte 9000"):
        write(tensors, {"model": opened}, tmp_path / "files", **options)


def test_a_shard_that_vanishes_is_one_error(checkpoint, tmp_path):
    opened = open_checkpoint(checkpoint)
    tensors = {"t0": basic.scale(load("model", "t0", opened.types["t0"]), 2.0)}
    fingerprint = opened.fingerprint()
    shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match=r"cannot read model.safetensors: No such file"):
        opened.read("t0")
    assert fingerprint != ""
    with pytest.raises(CheckpointError, match=r"cannot read model.safetensors"):
        write(tensors, {"model": opened}, tmp_path)


def test_an_error_in_one_thread_stops_the_run(tmp_path):
    values = {f"t{i}": torch.full((64,), float(i)) for i in range(200)}
    values["t3"][5] = float("nan")
    source = MemorySource(values)
    tensors = {name: load("model", name, type) for name, type in source.types.items()}
    seen = []
    with pytest.raises(CheckpointError, match="tensor t3 holds NaN"):
        write(tensors, {"model": source}, tmp_path, on_progress=lambda done, total: seen.append(done))
    assert max(seen) == 3 * 256
