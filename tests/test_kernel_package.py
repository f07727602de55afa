"""Kernels beside a checkpoint: the folder loads by its path, its digests hold, binaries are compiled once."""

import base64
import hashlib
import importlib.util
import json
import logging
import shutil
import sys
from functools import partial

import pytest
import torch
from triton.compiler import CompilationError

from backends.binaries.package import unique, with_imports, write_package
from backends.kernels import low_rank_linear, rms_norm
from backends.kernels.binary import Binaries, DriverError, specialised
from backends.kernels.launch import INTERPRETED, digest_of
from backends.torch_module.packing import KERNELS as FILES
from compiler.errors import TargetError

KERNELS = ("rms_norm", "low_rank_linear", "cached_decode")


def inputs(rows, device="meta", width=256):
    x, weight = torch.randn(rows, width, device=device), torch.ones(width, device=device)
    return x, x.clone(), weight, 1e-5


def loaded(folder, monkeypatch):
    """As Hugging Face's loader imports a variant: by its path, under its id."""
    metadata = json.loads((folder / "metadata.json").read_text())
    spec = importlib.util.spec_from_file_location(metadata["id"], folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, metadata["id"], module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "kernels"
    launches = [launch for rows in (2, 16, 17, 32) for launch in rms_norm.plan(*inputs(rows)).launches]
    write_package(folder, "small-model", KERNELS, dict.fromkeys(("sm_80", "sm_90", "gfx942"), unique(launches)))
    return folder


def test_variants_import_by_path_and_compute(package, monkeypatch):
    module = loaded(package / "build" / "torch-cpu", monkeypatch)
    assert sorted(module.__all__) == sorted(KERNELS)
    x, down, up = torch.randn(3, 8), torch.randn(4, 8), torch.randn(6, 4)
    assert torch.equal(module.low_rank_linear(x, down, up, None), low_rank_linear.reference(x, down, up, None))


@pytest.mark.parametrize("backend", ["cpu", "cuda", "rocm"])
def test_digests_are_of_every_file(package, backend):
    folder = package / "build" / f"torch-{backend}"
    metadata = json.loads((folder / "metadata.json").read_text())
    files = {path.name for path in folder.glob("*.*") if path.name != "metadata.json"}
    assert metadata["backend"] == {"type": backend}
    assert (
        set(metadata["digest"]["files"])
        == files
        > {"__init__.py", "launch.py", "binary.py", "decoding.py", "rms_norm.py"}
    )
    for file, digest in metadata["digest"]["files"].items():
        assert base64.b64decode(digest) == hashlib.sha256((folder / file).read_bytes()).digest()


def test_binaries_are_shared_by_launches_of_one_specialisation(package):
    """The number of rows is the grid's: all launches are one kernel, and each target has it once."""
    entries = json.loads((package / "aot" / "manifest.json").read_text())["binaries"]
    assert [entry["target"] for entry in entries] == ["sm_80", "sm_90", "gfx942"]
    assert {entry["key"] for entry in entries} == {specialised(rms_norm.plan(*inputs(5)).launches[0]).key}
    for entry in entries:
        code = (package / "aot" / entry["file"]).read_bytes()
        assert code.startswith(b"\x7fELF") and hashlib.sha256(code).hexdigest() == entry["digest"]
        assert entry["hidden"] >= 0 and entry["shared"] > 0 and entry["registers"] > 0


@pytest.mark.parametrize("kind", ["kernel", "assembler"])
def test_what_does_not_compile_is_named_with_its_target(kind, tmp_path, monkeypatch):
    import triton

    def failing(*_, **__):
        raise error

    error = RuntimeError("no ptxas\nof any kind") if kind == "assembler" else CompilationError("", None, "no sum")
    said = "no ptxas" if kind == "assembler" else "no sum"
    monkeypatch.setattr(triton, "compile", failing)
    launches = {"sm_80": unique(rms_norm.plan(*inputs(2)).launches)}
    with pytest.raises(TargetError) as found:
        write_package(tmp_path / "kernels", "small-model", KERNELS, launches)
    assert found.value.cause.endswith(f"sm_80: {said}") and "rms_norm" in found.value.where


def test_other_types_widths_and_addresses_are_other_specialisations():
    def key(x, *others):
        return specialised(rms_norm.plan(x, *others).launches[0]).key

    x, residual, weight, epsilon = inputs(2)
    found = {
        key(x, residual, weight, epsilon),
        key(x, None, weight, epsilon),
        key(x.half(), residual.half(), weight, epsilon),
        key(*inputs(2, width=250)),
        key(x, residual, torch.empty(257, device="meta")[1:], epsilon),
    }
    assert len(found) == 5


class Driver:
    """Stands for a GPU's driver: keeps what it is handed."""

    target, device = "sm_90", 0
    refuses = False

    def __init__(self):
        self.done = []

    def load(self, code, kernel, shared):
        if self.refuses:
            raise DriverError("CUDA driver: no kernel image")
        self.done.append((kernel, hashlib.sha256(code).hexdigest(), shared))
        return kernel

    def launch(self, function, grid, entry, parameters):
        self.done.append((function, grid, len(parameters)))


def lying_in(folder, name):
    path = folder / name
    return str(path) if path.exists() else None


def found_in(folder, driver=None):
    """The binaries of ``folder``, as the code of a checkpoint that it was written with finds them."""
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    binaries = Binaries(digest, lambda: driver or Driver())
    binaries.lie(partial(lying_in, folder))
    return binaries


def launch_of(rows=5, **sizes):
    return rms_norm.plan(*inputs(rows, "cpu", **sizes)).launches[0]


@pytest.fixture
def folder(package, tmp_path):
    return shutil.copytree(package / "aot", tmp_path / "aot")


def test_a_binary_is_checked_loaded_once_and_launched(folder, caplog):
    driver, caplog.handler.level = Driver(), logging.INFO
    binaries = found_in(folder, driver)
    with caplog.at_level(logging.INFO):
        assert binaries.run(launch_of(5)) and binaries.run(launch_of(6)) and binaries.has(launch_of(7))
    entry = next(e for e in json.loads((folder / "manifest.json").read_text())["binaries"] if e["target"] == "sm_90")
    passed = sum(kind != "constexpr" for kind in entry["signature"].values()) + entry["hidden"]
    loaded = (entry["kernel"], entry["digest"], entry["shared"])
    assert driver.done == [loaded, (entry["kernel"], (5,), passed), (entry["kernel"], (6,), passed)]
    assert [record.getMessage().endswith("the checkpoint's binary") for record in caplog.records] == [True]


def test_what_has_no_binary_is_left_to_triton_and_said_once(folder, caplog):
    binaries = found_in(folder)
    assert not any(binaries.run(launch_of(width=100)) for _ in range(3)) and not binaries.has(launch_of(width=100))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "there is no binary, Triton compiles it" in caplog.text


@pytest.mark.parametrize("file", ["sm_90", "manifest.json"])
def test_a_damaged_file_is_refused(folder, file):
    binaries = found_in(folder)
    damaged = next((folder / file).glob("*")) if file == "sm_90" else folder / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(RuntimeError, match="is not the file that the checkpoint was written with"):
        binaries.run(launch_of())


def test_without_the_folder_the_code_or_the_driver_triton_compiles(folder, caplog):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["sources"]) == {f"{name}.py" for name in with_imports(KERNELS)} - {"aot.py"}
    refusing = Driver()
    refusing.refuses = True
    assert not found_in(folder, refusing).run(launch_of())
    assert "CUDA driver: no kernel image" in caplog.text
    manifest["sources"]["rms_norm.py"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert not found_in(folder).run(launch_of())
    assert "rms_norm.py was changed after the binaries were made" in caplog.text
    away = found_in(folder)
    away.lie(lambda name: None)
    assert not away.run(launch_of()) and "not beside it" in caplog.text
    assert not Binaries("").run(launch_of())


def test_binaries_are_the_same_bytes_again(package, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    launches = {"sm_80": unique([launch_of()])}
    write_package(tmp_path / "again", "small-model", KERNELS, launches)
    (again,) = (tmp_path / "again" / "aot" / "sm_80").iterdir()
    assert again.read_bytes() == (package / "aot" / "sm_80" / again.name).read_bytes()


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="binaries run on a GPU alone")
def test_binaries_equal_the_reference_on_a_gpu(tmp_path):
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    down, up = torch.randn(256, 1024, device="cuda") / 32, torch.randn(1024, 256, device="cuda") / 16
    plans = {rms_norm: inputs(5, "cuda"), low_rank_linear: (torch.randn(3, 1024, device="cuda"), down, up, None)}
    made = {kernel: kernel.plan(*values) for kernel, values in plans.items()}
    launches = unique(launch for plan in made.values() for launch in plan.launches)
    binaries = Binaries(write_package(tmp_path, "small-model", KERNELS, {target: launches}))
    binaries.lie(partial(lying_in, tmp_path / "aot"))
    for kernel, plan in made.items():
        assert all(binaries.run(launch) for launch in plan.launches)
        torch.testing.assert_close(plan.result, kernel.reference(*plans[kernel]), rtol=1e-4, atol=1e-4)
    assert not binaries.run(rms_norm.plan(*inputs(5, "cuda", width=100)).launches[0])


def test_operations_differ_where_a_file_that_is_imported_does(tmp_path):
    """Checkpoints with different versions of a kernel can be loaded side by side."""
    names = set()
    for version in ("one", "other", "other again"):
        folder = tmp_path / version
        shutil.copytree(FILES, folder, ignore=shutil.ignore_patterns("__pycache__"))
        with (folder / "kept.py").open("a") as file:
            file.write(f"\n# {version.split()[0]}\n")
        names.add(digest_of(folder / "packed_linear.py"))
    assert len(names) == 2
