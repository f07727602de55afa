"""Second moments at products with weights, and the cost of an error that they predict."""

from __future__ import annotations

import pytest
import torch

from compiler.calibration import gradients
from compiler.calibration import moments as m
from compiler.calibration import sweep as sweeps
from compiler.calibration.fidelity import Fidelity
from compiler.calibration.products import matrix_shape, products
from compiler.calibration.slopes import slopes
from compiler.calibration.sweep import sweep
from compiler.frontend import capture
from compiler.ir.execute import read_param, run
from compiler.ir.layers import copy_of
from compiler.weights.expr import load
from compiler.weights.spill import Progress, SpillSource
from tests.captures import graph_of
from tests.families import FAMILIES


def batches(name, count=6, tokens=20):
    return [FAMILIES[name].inputs(batch=2, tokens=tokens, seed=seed) for seed in range(count)]


def measured(name, directory=None, **options):
    graph = graph_of(name)
    params = list(products(graph))
    return graph, params, m.measure(graph, params, batches(name), Progress(directory), **options)


@pytest.mark.parametrize("name", ["gpt2", "vit", "whisper", "mixtral", "gpt_oss"])
def test_moments_predict_outputs_of_every_product(name):
    """E|W x|^2 is tr(W C W^T), and E[W x] is W E[x]: for linear maps, kernels and experts of every kind."""
    graph, params, statistics = measured(name)
    outputs = {node.output: node for param in params for node in products(graph)[param] if node.op.name != "experts"}
    sums = {value: [0.0, 0.0, 0] for value in outputs}

    def see(value, tensor):
        if value in outputs:
            node = outputs[value]
            bias = 0 if node.optional_input(2) is None else read_param(graph, node.input(2))
            rows = (tensor.movedim(1, -1) if node.op.name == "conv" else tensor).double() - bias
            rows = rows.reshape(-1, rows.shape[-1])
            sums[value][0] += rows.square().sum()
            sums[value][1] += rows.sum(0)
            sums[value][2] += len(rows)

    for batch in batches(name):
        run(graph, batch, observe=see)
    for value, (square, total, count) in sums.items():
        param = outputs[value].input(1)
        if len(param.users) > 1:
            continue
        found, weight = statistics.of(param), read_param(graph, param).double().flatten(1)
        assert found.count == count
        torch.testing.assert_close((weight @ found.second * weight).sum(), square / count, rtol=1e-5, atol=0)
        torch.testing.assert_close(weight @ found.mean, total / count, rtol=1e-4, atol=1e-5)
        spread = found.second.diagonal() * (1 + 1e-5)
        assert (found.mean.abs() <= found.magnitude * (1 + 1e-5)).all() and (found.magnitude.square() <= spread).all()
        assert (spread <= found.largest.square() * (1 + 1e-4)).all()


def one_token(name, seed=3):
    return FAMILIES[name].inputs(batch=1, tokens=1, seed=seed)


def changed(graph, param, error):
    """A copy of ``graph`` in which ``param`` is off by ``error``."""
    copied = copy_of(graph)
    spill = SpillSource()
    copied.sources = {**graph.sources, "changed": spill}
    value = read_param(graph, param) + error.reshape(param.expr.shape).float()
    key = spill.add(param.name, value)
    copied.params[param.name].expr = load("changed", key, spill.types[key])
    return copied


@pytest.mark.parametrize(("name", "size"), [("llama", 2e-3), ("mixtral", 2e-3), ("clip_text", 1e-3)])
def test_the_cost_of_an_error_is_the_divergence_it_brings(name, size):
    """On one token nothing is taken to be independent: only the drawing of labels (or signs) is left to chance."""
    graph = graph_of(name)
    token = one_token(name)
    params = [param for param in products(graph) if "layers.1" in param.name and "router" not in param.name]
    statistics = m.measure(graph, params, [token], Progress(), gradients=[token] * 150, seed=1)
    fidelity = Fidelity(graph, [token])
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for param in params:
        shape = matrix_shape(param)
        error = size * torch.randn(shape, generator=generator, dtype=torch.float64)
        moments = statistics.of(param)
        predicted = m.cost(error if moments.second.ndim == 3 else error[0], moments)
        if predicted.ndim:  # an error in one expert that the token visits
            expert = int(predicted.argmax())
            error[torch.arange(len(error)) != expert] = 0
            predicted = predicted[expert]
        if predicted > 1e-9:  # queries and keys do not matter where there is one token
            found = fidelity.distance(changed(graph, param, error))
            assert 0.6 < found / float(predicted) < 1.6, param.name
            checked += 1
    assert checked >= 2


def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch):
    """What a bundle on disk holds is not measured again, and other data is other bundles."""
    gradients = batches("llama", 2)
    _, params, first = measured("llama", tmp_path, gradients=gradients)
    next(iter(sorted(tmp_path.glob("gradient-*")))).unlink()
    next(iter(sorted(tmp_path.glob("inputs-*")))).unlink()
    seen = []
    monkeypatch.setattr(m, "sweep", lambda *args: (seen.append(stage) or stage for stage in sweep(*args)))
    _, again, second = measured("llama", tmp_path, gradients=gradients)
    for old, new in zip(params, again, strict=True):
        for before, after in zip(vars(first.of(old)).values(), vars(second.of(new)).values(), strict=True):
            torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert len(seen) <= 3
    files = len(list(tmp_path.iterdir()))
    measured("llama", tmp_path)
    assert len(list(tmp_path.iterdir())) > files


def test_gradients_in_parts_are_those_in_one(monkeypatch):
    """Memory decides in how many passes gradients are measured, and how wide M is, not what is found."""
    given = batches("llama", 2)
    _, params, whole = measured("llama", gradients=given)
    monkeypatch.setattr(gradients, "GRADIENT_BYTES", 20_000)
    monkeypatch.setattr(gradients, "FULL_WIDTH", 50)
    _, again, parts = measured("llama", gradients=given)
    for one, other in zip(params, again, strict=True):
        full, found = whole.of(one).gradient, parts.of(other).gradient
        expected = full if len(full) <= 50 else full.diagonal()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(full.abs().max()))


def test_experts_count_their_own_tokens():
    _, params, statistics = measured("mixtral")
    stacks = [param for param in params if param.type.rank == 3]
    assert len(stacks) == 4
    for param in stacks:
        moments = statistics.of(param)
        assert moments.second.shape == (4, param.shape[2], param.shape[2])
        assert moments.count.sum() == 6 * 2 * 20 * 2
        assert (moments.count == moments.count.round()).all()


@pytest.mark.parametrize("name", ["gpt2", "whisper", "mixtral"])
def test_moments_at_a_stage_are_those_of_all_stages(name):
    graph, params, statistics = measured(name)
    known = products(graph)
    for stage in sweep(graph, batches(name)):
        own = [param for param in params if known[param][0] in stage.nodes and len(known[param]) == 1]
        for param, found in m.at_stage(graph, stage, own).items():
            expected = statistics.of(param)
            for part in ("count", "mean", "second"):
                torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-6, atol=1e-9)


def test_vectors_that_come_in_few_at_a_time_count_alike():
    """Sums wait for enough vectors, and what still waits at the end is counted as well."""
    vectors = torch.randn(2 * m.BLOCK + 77, 24, generator=torch.Generator().manual_seed(0))
    counts = torch.rand(len(vectors), generator=torch.Generator().manual_seed(1))
    for own in (None, counts):
        found = []
        for size in (300, len(vectors)):
            sums = m.Sums(1, 24, magnitudes=True)
            for start in range(0, len(vectors), size):
                part = slice(start, start + size)
                sums.add(iter([(0, vectors[part])]), None if own is None else own[part])
            found.append(sums.bundle())
        weights = torch.ones(len(vectors)).double() if own is None else own.double()
        expected = (vectors.double().T * weights) @ vectors.double() / weights.sum()
        for bundle in found:
            torch.testing.assert_close(bundle["second"][0], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                bundle["mean"][0], weights @ vectors.double() / weights.sum(), rtol=1e-5, atol=1e-6
            )


def test_narrow_products_are_those_of_wide_ones_to_their_precision(monkeypatch):
    """Large linear maps multiply in bfloat16, so that moments of what follows move by no more than that rounds."""
    graph, given = graph_of("llama"), batches("llama")
    monkeypatch.setattr(sweeps, "NARROW_NUMBERS", 1)
    monkeypatch.setattr(sweeps, "has_narrow_products", lambda: True)
    found = []
    for exact in (True, False):
        values = [values for stage in sweep(graph, given, exact=exact) for values in stage.values(stage.outputs())]
        found.append([tensor for each in values for tensor in each.values()])
    differences = [float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True) if a.is_floating_point()]
    assert all(tensor.dtype == twin.dtype for tensor, twin in zip(*found, strict=True))
    assert 0 < max(differences) < 16 * torch.finfo(torch.bfloat16).eps


def test_slopes_are_sums_of_weights_times_their_gradients_of_every_sample():
    """|sum of w dL/dw| over what reads a channel, for each sample of a batch, L being the signed sum of outputs."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).eval()
    given = [{"input": torch.randn(3, 5, 6)} for _ in range(2)]
    graph = capture(net, inputs=given[0])
    (last,) = [param for param in products(graph) if param.type.static_shape == (4, 8)]
    found = slopes(graph, [last], given, Progress(None))[last]
    source, wanted, energy = torch.Generator().manual_seed(0), torch.zeros(8), 0.0
    for batch in given:
        signs = torch.randint(0, 2, (3, 5, 4), generator=source) * 2 - 1
        for sample, sign in zip(batch["input"], signs, strict=True):
            net.zero_grad()
            (net(sample) * sign).sum().backward()
            wanted += (net[2].weight * net[2].weight.grad).sum(0).abs().detach()
        energy += float(net(batch["input"]).detach().double().square().sum()) / 2
    torch.testing.assert_close(found, wanted.double() / energy, rtol=1e-5, atol=0)
