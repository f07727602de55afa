"""Stacks of blocks: one more is never worse, every size computes as the graph cut there, and no more is read."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from backends.torch_module import as_computed
from backends.torch_module.packing import STACK, packed
from compiler.errors import PassError, TargetError
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.pipeline import Pipeline
from compiler.plan import bytes_in_file
from compiler.target import emission_of, gguf_emission, gptq_emission
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import Expr, apply, load
from compiler.weights.ops.stack import block_bytes, read_block, stack
from compiler.weights.source import MemorySource
from passes import AnySize, Quantize
from passes.any_size.decompose import Aim, decomposed
from tests.captures import graph_of, plan_of
from tests.families import FAMILIES
from tests.test_generated import error, tolerance, written

BLOCKS = 3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_little_more_than_the_best_factor_serves_the_blocks_behind(monkeypatch: pytest.MonkeyPatch):
    aim = Aim(random(96, 96), torch.eye(96, dtype=torch.float64), torch.ones(96, dtype=torch.float64))
    _, ours = decomposed(aim, 1, 4)
    monkeypatch.setattr("passes.any_size.decompose.STRETCH", 1.0)
    _, greedy = decomposed(aim, 1, 4)
    assert ours[1] < 1.06 * greedy[1] and ours[4] < 0.8 * greedy[4]


@st.composite
def aims(draw: st.DrawFn) -> Aim:
    """Matrices of any sizes, of inputs that may span less than all directions, and rows that may not matter."""
    rows, columns, seed = draw(st.integers(1, 20)), draw(st.integers(1, 21)), draw(st.integers(0, 99))
    inputs = random(draw(st.integers(0, 2 * columns)), columns, seed=seed).double()
    costs = random(rows, seed=seed + 1).double().clamp_min(0)
    scale = 10.0 ** draw(st.integers(-4, 2))
    return Aim(scale * random(rows, columns, seed=seed + 2), inputs.T @ inputs / max(1, len(inputs)), costs)


@settings(max_examples=40, deadline=None)
@given(aim=aims(), rank=st.integers(1, 3))
def test_a_block_more_never_costs_more(aim: Aim, rank: int):
    """Of any row; and blocks are read as they were stored."""
    blocks, lost = decomposed(aim, rank, 4)
    assert all(after <= before for before, after in pairwise(lost))
    left, second = aim.matrix, aim.damped()
    before = (left @ second * left).sum(1, dtype=torch.float64)
    for block in blocks:
        stored = block.stored()
        assert stored.nbytes == block_bytes(*left.shape, rank)
        again = read_block(stored, *left.shape, rank)
        assert torch.equal(again.values(), block.values())
        left = left - block.values()
        after = (left @ second * left).sum(1, dtype=torch.float64)
        assert (after <= before).all()
        before = after


def first_blocks(value: Expr, count: int) -> Expr:
    """The stack of the first ``count`` blocks of the stack ``value``."""
    attrs = {**dict(value.attrs), "worth": value.attr("worth")[:count]}
    return apply("dequantize_stack", value.args[:count], attrs)


def test_first_blocks_are_what_is_summed():
    aim = Aim(random(12, 13), torch.eye(13, dtype=torch.float64), torch.ones(12, dtype=torch.float64))
    blocks, _ = decomposed(aim, 2, 4)
    source = MemorySource({str(k): block.stored() for k, block in enumerate(blocks)})
    exprs = [load("m", key, source.types[key]) for key in source.types]
    whole = stack(exprs, (12, 13), 2, [4.0, 3.0, 2.0, 1.0], torch.float32)
    total = torch.zeros(12, 13)
    for count in range(5):
        (found,) = evaluate([first_blocks(whole, count)], {"m": source}) if count else (total,)
        torch.testing.assert_close(found, total)
        total = total + (blocks[count].values() if count < 4 else 0)
    assert error(total, aim.matrix) < 0.3


def test_signs_make_up_for_each_other_where_inputs_go_together():
    basis, _ = torch.linalg.qr(random(64, 64).double())
    second = basis / torch.arange(1, 65) @ basis.mT
    matrix, ones = random(24, 64, seed=2), torch.ones(24, dtype=torch.float64)
    plain, _ = decomposed(Aim(matrix, torch.eye(64, dtype=torch.float64), ones), 1, 2)
    _, lost = decomposed(Aim(matrix, second, ones), 1, 2)
    left = matrix.double() - sum(block.values() for block in plain)
    assert lost[-1] < 0.8 * float((left @ second * left).sum()) / 2


def stacked(name: str, **options: Any) -> Graph:
    """The graph of a family with all linear maps as blocks, tied tables too."""
    graph, family = graph_of(name), FAMILIES[name]
    windows = [{k: v for k, v in family.inputs(seed=seed).items() if k in graph.inputs} for seed in range(2)]
    step = AnySize(**{"blocks": BLOCKS, "tied": "share", **options})
    Pipeline([step]).run(graph, calibration=lambda _: windows)
    return graph


def at_size(directory: Path, memory: int | str) -> Any:
    config = json.loads((directory / "config.json").read_text())
    auto = next(name for name in reversed(config["auto_map"]) if name != "AutoConfig")
    options = {"trust_remote_code": True, "dtype": torch.float32, "memory": memory}
    return getattr(transformers, auto).from_pretrained(directory, **options).eval()


def counts_of(model: Any) -> dict[str, int]:
    """How many blocks each stacked module holds."""
    return {name: module.blocks for name, module in model.named_modules() if hasattr(module, "hold")}


def held(model: Any) -> int:
    """The bytes of the tensors that the file has, tied ones once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def cut(graph: Graph, counts: dict[int, int]) -> Graph:
    """``graph`` in float32 with the first blocks of each of its stacks, by their place among all."""
    found = copy_of(as_computed(graph))
    zeros = dict[str, torch.Tensor]()
    for place, param in enumerate(stacks_of(graph)):
        twin = found.params[param.name]
        if counts[place]:
            twin.expr = first_blocks(twin.expr, counts[place])
        else:
            zeros[param.name] = torch.zeros(twin.expr.shape)
            twin.expr = load("zeros", param.name, twin.expr.type)
    found.sources = {**found.sources, "zeros": MemorySource(zeros)}
    return found


def stacks_of(graph: Graph) -> list[Any]:
    return [param for param in graph.params.values() if (value := packed(param)) is not None and value.op == STACK]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "whisper"])
def test_every_size_computes_as_the_graph_cut_there(name: str, tmp_path: Path):
    """In no more memory than is given, with a block more where that fits, and the same again when it is saved."""
    graph = stacked(name)
    given_inputs = {key: value for key, value in FAMILIES[name].inputs().items() if key in graph.inputs}
    whole = written(graph, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stack, most = config["stack"], held(whole)
    assert most == stack["others"] + sum(stack["bytes"][number] for number in stack["order"])
    before: dict[str, int] = {}
    for part in (0.2, 0.6, 1.0):
        memory = int(stack["others"] + part * (most - stack["others"]))
        model = at_size(tmp_path / "out", memory)
        counts = counts_of(model)
        read = sum({stack["weights"][path]: count for path, count in counts.items()}.values())
        assert held(model) <= memory
        assert read == len(stack["order"]) or held(model) + stack["bytes"][stack["order"][read]] > memory
        assert all(counts[path] >= count for path, count in before.items())
        before = counts
        by_number = {stack["weights"][path]: count for path, count in counts.items()}
        own = cut(graph, by_place(graph, model, by_number, stack))
        with torch.no_grad():
            found = model(**given_inputs)
        for key, value in run(own, given_inputs).items():
            assert error(found[key], value) <= tolerance(graph)
    assert read == len(stack["order"])


def by_place(graph: Graph, model: Any, counts: dict[int, int], stack: dict[str, Any]) -> dict[int, int]:
    """Counts by the place of weights in ``graph``, told by their bytes."""
    (tmp,) = {Path(model.config.name_or_path)}
    tensors = load_file(tmp / "model.safetensors")
    known = {
        tensors[f"{path}.weight_block_0"].numpy().tobytes(): number
        for path, number in stack["weights"].items()
        if f"{path}.weight_block_0" in tensors
    }
    firsts = evaluate([packed(param).args[0] for param in stacks_of(graph)], graph.sources)
    return {place: counts[known[first.numpy().tobytes()]] for place, first in enumerate(firsts)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stack") / "out"
    written(stacked("llama"), directory)
    return directory


def test_what_memory_does_not_hold_is_not_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """And what is read lies in front of all else in the file."""
    read: set[str] = set()

    class Slices:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_slice(self, name: str) -> Any:
            return Slice(name, self.file.get_slice(name))

    class Slice:
        def __init__(self, name: str, part: Any) -> None:
            self.name, self.part = name, part

        def __getattr__(self, name: str) -> Any:
            return getattr(self.part, name)

        def __getitem__(self, index: Any) -> Any:
            read.add(self.name)
            return self.part[index]

    import transformers.modeling_utils as loading

    opened = loading.safe_open
    monkeypatch.setattr(loading, "safe_open", lambda *args, **options: Slices(opened(*args, **options)))
    stack = json.loads((checkpoint / "config.json").read_text())["stack"]
    model = at_size(checkpoint, stack["others"] + sum(stack["bytes"][number] for number in stack["order"][:20]))
    assert read == set(dict(model.named_parameters()))
    content = (checkpoint / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    assert max(ends[name] for name in read) == held(model) < max(ends.values())


def test_a_saved_part_is_the_same_bit_by_bit(checkpoint: Path, tmp_path: Path):
    model = at_size(checkpoint, "25%")
    model.save_pretrained(tmp_path / "part")
    first, again = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "part"))
    assert again.keys() < first.keys() and all(torch.equal(first[name], again[name]) for name in again)
    once_more = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "part", trust_remote_code=True)
    assert counts_of(once_more) == counts_of(model)


@pytest.mark.parametrize("memory", ["most", "-3%", "nan", "30 percent", "%", -1])
def test_what_is_no_size_is_said(checkpoint: Path, memory: int | str):
    with pytest.raises(ValueError, match="is no size: say a number of bytes"):
        at_size(checkpoint, memory)


def test_too_little_memory_says_how_much_it_takes(checkpoint: Path):
    others = json.loads((checkpoint / "config.json").read_text())["stack"]["others"]
    with pytest.raises(ValueError, match=f"{others} are read in any case: give at least as many"):
        at_size(checkpoint, others - 1)
    assert set(counts_of(at_size(checkpoint, others)).values()) == {0}


def test_units(checkpoint: Path):
    stack = json.loads((checkpoint / "config.json").read_text())["stack"]
    sizes = {"0.05MB": 50000, "50K": 50000, "50KiB": 51200, "50000": 50000, "25%": stack["before"] / 4}
    for memory, wanted in sizes.items():
        assert counts_of(at_size(checkpoint, memory)) == counts_of(at_size(checkpoint, int(wanted)))


def test_a_block_that_is_lost_is_said(checkpoint: Path, tmp_path: Path):
    """Not made up, as transformers makes up what a file does not hold."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_block_0"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj\.weight_block_0 is not in the checkpoint"):
        at_size(tmp_path, "all")


def test_half_precision_holds_as_many_bytes(checkpoint: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.bfloat16)
    ids = FAMILIES["llama"].inputs()["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert error(logits.float(), at_size(checkpoint, "all")(ids).logits) < 32 * torch.finfo(torch.bfloat16).eps
    assert all(tensor.dtype == torch.uint8 for name, tensor in model.named_parameters() if "_block_" in name)


def test_plans_count_the_bytes_that_are_written():
    step = AnySize(blocks=2, metric="plain")
    sizes: list[int] = []
    for graph, planned in ((plan_of("llama"), True), (graph_of("llama"), False)):
        report = Pipeline([step]).run(graph, planned=planned, bytes_of=bytes_in_file())
        sizes.append(report.after.stored_bytes)
    assert sizes[0] == sizes[1]
    assert sizes[0] == emission_of(graph).nbytes


def test_the_report_has_every_weight_and_what_sizes_lose():
    graph = graph_of("qwen3_moe")
    (report,) = Pipeline([AnySize(blocks=2, metric="plain")]).run(graph).passes
    assert len(report.rewritten) == len(report.curves) == len(stacks_of(graph))
    assert {"is a router"} == {skip.reason for skip in report.skipped if skip.scope.endswith("mlp.gate.weight")}
    record = report.records["sizes"]
    assert sorted(record["bytes_of_blocks"]) == record["bytes_of_blocks"]
    assert sorted(record["predicted_loss"], reverse=True) == record["predicted_loss"]


def test_what_is_not_made_of_blocks_is_said():
    graph = graph_of("gemma2")
    (report,) = Pipeline([AnySize(metric="plain", blocks=1)]).run(graph).passes
    assert any("`tied: share`" in skip.reason for skip in report.skipped)
    with pytest.raises(PassError, match="none of the selected weights can be made of blocks"):
        Pipeline([AnySize(metric="plain")]).run(graph)
    Pipeline([Quantize(where="embedding", tied="share")]).run(graph)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda graph: emission_of(graph, "stock"), "stacks of blocks"),
        (lambda graph: gptq_emission(graph, "gptq"), "GPTQ"),
        (gguf_emission, "block format"),
    ],
)
def test_formats_of_others_refuse_blocks(make: Any, message: str):
    graph = graph_of("llama")
    Pipeline([AnySize(blocks=1, metric="plain")]).run(graph)
    with pytest.raises(TargetError, match=message):
        make(graph)


def test_a_rank_that_a_weight_does_not_have_is_said():
    graph = graph_of("llama")
    with pytest.raises(PassError, match=r"can be made of blocks: .* has no rank of 1000000000"):
        Pipeline([AnySize(blocks=1, rank=10**9, metric="plain")]).run(graph, planned=True)


def test_a_weight_without_finite_numbers_is_said():
    graph = graph_of("llama")
    param = next(param for param in graph.params.values() if param.name.endswith("up_proj.weight"))
    spoilt = torch.full(tuple(map(int, param.type.shape)), float("nan"))
    graph.sources["spoilt"] = MemorySource({param.name: spoilt})
    param.expr = load("spoilt", param.name, param.expr.type)
    with pytest.raises(PassError, match=f"{param.name}.*NaN"):
        Pipeline([AnySize(blocks=1, metric="plain")]).run(graph)
