"""The writer: files that others load, the same bytes however the work is cut, bounded working sets."""

import json
import random
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compiler.errors import CheckpointError, OutputError
from compiler.executor import Local
from compiler.ir.types import TensorType
from compiler.weights.checkpoint import open_checkpoint
from compiler.weights.evaluate import evaluate, working_set
from compiler.weights.expr import load
from compiler.weights.layout import layout
from compiler.weights.ops import basic
from compiler.weights.ops.quant import pack_bits, quantise
from compiler.weights.source import MemorySource
from compiler.weights.tasks import plan
from compiler.weights.tensorfile import DTYPES
from compiler.weights.writer import write
from tests.jobs import peak_of_a_job

INDEX = "model.safetensors.index.json"


def model(rows=8, layers=3):
    """Sources and tensors of a small quantised model: packed codes, scales, plain weights, shapes."""
    generator = torch.Generator().manual_seed(rows)
    weights = {f"layers.{i}.w": torch.randn(rows, 16, generator=generator).bfloat16() for i in range(layers)}
    weights["embed"] = torch.randn(3 * rows, 16, generator=generator).bfloat16()
    source = MemorySource(weights)
    tensors = {"embed": load("model", "embed", source.types["embed"])}
    for name in list(weights)[:-1]:
        quantised = quantise(load("model", name, source.types[name]), 4, 8, symmetric=False, scale_dtype=torch.bfloat16)
        codes, scale, zero = quantised.args
        tensors[f"{name}.packed"] = pack_bits(codes, 4)
        tensors[f"{name}.scale"] = scale
        tensors[f"{name}.zero"] = pack_bits(zero, 4, axis=-2)
        tensors[f"{name}.shape"] = basic.literal([rows, 16], dtype=torch.int64)
    return {"model": source}, tensors


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_written_tensors_are_loaded_by_safetensors(tmp_path):
    sources, tensors = model()
    (file,) = write(tensors, sources, tmp_path)
    loaded = load_file(file.path)
    assert file.size == file.path.stat().st_size
    assert set(loaded) == set(tensors)
    for name, value in zip(tensors, evaluate(list(tensors.values()), sources), strict=True):
        assert torch.equal(loaded[name], value), name


@given(st.lists(st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=3)), min_size=1))
@settings(max_examples=60, deadline=None)
def test_any_mixture_of_dtypes_and_shapes_survives(tmp_path_factory, kinds):
    directory = tmp_path_factory.mktemp("mixture")
    values = {f"t{i}": torch.ones(shape, dtype=torch.uint8).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    source = MemorySource(values)
    tensors = {name: load("model", name, type) for name, type in source.types.items()}
    write(tensors, {"model": source}, directory)
    loaded = load_file(directory / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in loaded.items()} == {n: (t.dtype, t.shape) for n, t in values.items()}
    assert all(
        torch.equal(loaded[name].reshape(-1).view(torch.uint8), values[name].reshape(-1).view(torch.uint8))
        for name in values
    )


@pytest.mark.parametrize("budget, threads", [(1 << 30, 1), (1 << 30, 2), (1500, 1), (1500, 2), (1, 2)])
def test_the_bytes_do_not_depend_on_how_the_work_is_cut(tmp_path, budget, threads):
    sources, tensors = model()
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    write(tensors, sources, tmp_path / "whole", shard_bytes=600, executor=Local(1))
    write(tensors, sources, tmp_path / "cut", shard_bytes=600, budget=budget, executor=Local(threads))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_bytes_do_not_depend_on_how_the_source_is_sharded(tmp_path):
    """Read from one file, or from shards that hold the tensors in any order."""
    weights = {f"t{i}": torch.full((40, 16), float(i)).bfloat16() for i in range(12)}
    names = random.Random(0).sample(sorted(weights), len(weights))
    shards = {f"model-{i}.safetensors": names[i::5] for i in range(5)}
    for kind in ("one", "many"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text("{}")
    save_file(weights, tmp_path / "one" / "model.safetensors")
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, tmp_path / "many" / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (tmp_path / "many" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for kind in ("one", "many"):
        checkpoint = open_checkpoint(tmp_path / kind)
        tensors = {
            name: basic.scale(load("model", name, checkpoint.types[name]), 0.5) for name in sorted(checkpoint.types)
        }
        (tmp_path / f"from-{kind}").mkdir()
        write(tensors, {"model": checkpoint}, tmp_path / f"from-{kind}")
    assert contents(tmp_path / "from-one") == contents(tmp_path / "from-many")


def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    peaks: list[int] = []
    for layers in (8, 32):
        model, out = tmp_path / f"model{layers}", tmp_path / f"out{layers}"
        model.mkdir()
        out.mkdir()
        (model / "config.json").write_text("{}")
        weights = {f"layers.{i}.w": torch.full((2048, 2048), float(i), dtype=torch.bfloat16) for i in range(layers)}
        save_file(weights, model / "model.safetensors")
        peaks.append(peak_of_a_job(model, out))
    assert max(peaks) < 96 << 20
    assert peaks[1] - peaks[0] < 32 << 20  # 24 layers more are 192 MB more to read


def test_shards_hold_what_the_index_says(tmp_path):
    sources, tensors = model()
    files = write(tensors, sources, tmp_path, shard_bytes=700)
    index = json.loads((tmp_path / INDEX).read_text())
    assert {file.path.name for file in files} == {*index["weight_map"].values(), INDEX}
    assert index["metadata"]["total_size"] == sum(expr.type.nbytes for expr in tensors.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert all(sum(e.type.nbytes for e in shard.tensors.values()) <= 768 for shard in layout(tensors, 700))


def test_more_shards_than_a_process_may_have_open(tmp_path):
    source = MemorySource({f"t{i}": torch.full((8,), float(i)) for i in range(90)})
    tensors = {name: load("model", name, type) for name, type in source.types.items()}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        files = write(tensors, {"model": source}, tmp_path, shard_bytes=32)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(files) == 91


def test_complex_weights_are_looked_at_too(tmp_path):
    source = MemorySource({"c": torch.tensor([1.0, complex(0, float("nan"))])})
    with pytest.raises(CheckpointError, match="tensor c holds NaN"):
        write({"c": load("model", "c", source.types["c"])}, {"model": source}, tmp_path)


def test_progress_counts_every_byte(tmp_path):
    sources, tensors = model()
    seen = []
    write(tensors, sources, tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(expr.type.nbytes for expr in tensors.values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_parts_of_one_weight_are_made_together():
    """Codes, scales and zero points need the weight; it is read once."""
    _, tensors = model(layers=1)
    made = [{piece.name for piece in task.pieces} for task in plan(tensors, 1 << 30)]
    assert {"layers.0.w.packed", "layers.0.w.scale", "layers.0.w.zero"} in made


def test_tasks_fit_the_budget():
    """A tensor that is large for the budget is made in ranges of rows, which together are all its rows."""
    weight = load("model", "w", TensorType(torch.bfloat16, (4096, 64)))
    codes, scale = quantise(weight, 4, 32, scale_dtype=torch.bfloat16).args
    tensors = {"packed": pack_bits(codes, 4), "scale": scale, "half": basic.cast(weight, torch.float16)}
    whole, budget = working_set(list(tensors.values())), 60_000
    tasks = plan(tensors, budget)
    assert whole > 10 * budget
    assert all(working_set([piece.expr for piece in task.pieces]) <= budget for task in tasks)
    for name, expr in tensors.items():
        rows = [(piece.start, piece.expr.shape[0]) for task in tasks for piece in task.pieces if piece.name == name]
        assert [start for start, _ in rows] == [sum(count for _, count in rows[:i]) for i in range(len(rows))]
        assert sum(count for _, count in rows) == expr.shape[0]
    assert [task.completes for task in tasks if task.completes] == [tuple(tensors)]


def test_what_cannot_be_cut_cheaply_is_made_whole():
    """Rows of a transposed read each need all of it."""
    flipped = basic.transpose(load("model", "w", TensorType(torch.float32, (256, 256))))
    assert len(plan({"t": flipped}, 1000)) == 1


def test_tied_names_and_scalars(tmp_path):
    source = MemorySource({"s": torch.tensor(3.0), "e": torch.ones(0, 4)})
    tensors = {name: load("model", name, type) for name, type in source.types.items()}
    write({**tensors, "again": tensors["s"]}, {"model": source}, tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded["again"] == loaded["s"] == 3
    assert loaded["e"].shape == (0, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_named(tmp_path, bad, dtype):
    damaged = torch.ones(50, 16, dtype=dtype)
    damaged[37, 5] = bad
    source = MemorySource({"good": torch.ones(50, 16, dtype=dtype), "damaged": damaged})
    good, other = (load("model", name, source.types[name]) for name in ("good", "damaged"))
    tensors = {"sum": basic.add(good, other)}
    with pytest.raises(CheckpointError, match="tensor damaged holds NaN or infinite values") as error:
        write(tensors, {"model": source}, tmp_path)
    assert "model" in str(error.value)


def test_damage_shows_through_quantisation(tmp_path):
    weight = torch.ones(8, 16)
    weight[3, 3] = float("nan")
    source = MemorySource({"w": weight})
    quantised = quantise(load("model", "w", source.types["w"]), 4, 8, scale_dtype=torch.float32)
    tensors = {"w.packed": pack_bits(quantised.args[0], 4), "w.scale": quantised.args[1]}
    with pytest.raises(CheckpointError, match="tensor w holds NaN"):
        write(tensors, {"model": source}, tmp_path)


def test_overflow_is_told_from_damage(tmp_path):
    source = MemorySource({"w": torch.full((4,), 1e30)})
    with pytest.raises(OutputError, match="computing tensor w gave NaN or infinite values, its inputs are finite"):
        write({"w": basic.cast(load("model", "w", source.types["w"]), torch.float16)}, {"model": source}, tmp_path)


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(OutputError, match="no tensor to write"):
        layout({})
    with pytest.raises(OutputError, match=r"safetensors cannot hold"):
        layout({"x": load("model", "x", TensorType(torch.complex128, (2,)))})
