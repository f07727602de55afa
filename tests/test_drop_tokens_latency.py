"""What is timed of operations by which tokens go computes what they compute, and models of fewer tokens take less."""

from __future__ import annotations

import pytest
import torch

from compiler.ir.execute import bind_dims
from compiler.ir.graph import Param
from compiler.latency import Latency, Table, task_of
from compiler.latency.onnx import Builder, lowered
from compiler.latency.onnx_tokens import TOKENS
from tests.families import FAMILIES
from tests.test_drop_tokens import dropped, observed

CHOICES = {
    "dropped": ("dinov2", {"score": "class"}),
    "by some": ("bert", {"every": 2}),
    "in blocks": ("bert", {"block": 3}),
    "alike": ("dinov2", {"merge": "bipartite"}),
    "one more": ("vit", {"merge": "extra"}),
    "of prompts": ("llama", {"score": "last"}),
    "grouped, by all": ("qwen3", {"score": "received", "site": "layer"}),
    "mlp": ("bert", {"merge": "bipartite", "skip": "mlp"}),
}


@pytest.mark.parametrize(("name", "options"), CHOICES.values(), ids=CHOICES)
def test_what_is_timed_computes_what_the_operation_computes(name, options):
    import onnxruntime

    _, reduced = dropped(name, depth=3, keep=0.6, **options)
    given = FAMILIES[name].inputs(batch=2, tokens=11)
    values, _ = observed(reduced, given)
    values |= {value: given[input] for input, value in reduced.inputs.items()}
    sizes, timed = bind_dims(reduced, given), set[str]()
    for node in reduced.nodes_named(*TOKENS):
        task = task_of(node, sizes, {})
        if task is None or any(isinstance(value, Param) for value in node.inputs):
            assert node.op.name == "token_take"  # of whole numbers, or of tables, which weights are
            continue
        build = Builder()
        names = ["" if value is None else build.feed(values[value].contiguous()) for value in node.inputs]
        session = onnxruntime.InferenceSession(build.model(lowered(build, task, names)))
        (found,) = session.run(None, build.feeds)
        expected = values[node.outputs[0]]
        torch.testing.assert_close(torch.from_numpy(found), expected.float(), rtol=1e-4, atol=1e-4, msg=str(task))
        timed.add(node.op.name)
    assert timed >= {"token_restore"} and timed & {"token_select", "token_match"}


@pytest.mark.parametrize("name", ["dinov2", "bert", "llama"])
def test_what_layers_take_follows_the_tokens_that_go_on(name):
    """By a table in which every multiplication takes as long."""
    table = Table({}, measure=lambda tasks: [task.products * 1e-9 for task in tasks])
    taken: list[float] = []
    for keep in (1.0, 0.7, 0.4):
        _, reduced = dropped(name, depth=3, keep=keep)
        latency = Latency(reduced, table, 2, 64)
        latency.prepare([])
        taken.append(latency.seconds({}))
    assert taken == sorted(taken, reverse=True) and taken[0] > taken[-1]
