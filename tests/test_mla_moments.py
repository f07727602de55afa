"""What calibration measures of an attention, beside the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compiler.calibration.sweep import sweep
from compiler.ir.facts import attention_sites
from compiler.ir.graph import Graph
from passes.gqa_to_mla.moments import Moments, measure
from passes.gqa_to_mla.source import Source, compressible
from passes.gqa_to_mla.turns import RIDGE
from tests.test_gqa_to_mla import VOCABULARY, Decoder
from tests.truncation import (
    batches,
    complex_heads,
    reduced,
    relative_square,
    token_ids,
    weight_of,
)


def seen_values(graph: Graph, source: Source, given) -> list[dict[str, Tensor]]:
    """Per sample, the heads before and after rotation and the rotary table, float64."""
    node, table = source.site.node, list(source.table.outputs) if source.table is not None else []
    wanted = [source.query, source.key, source.value, node.input(0), node.input(1), *table]
    samples = []
    stage = next(stage for stage in sweep(graph, given) if node in stage.nodes)
    for values in stage.values(wanted):
        query, key, value, turned, turned_key, *tables = (values[part].double() for part in wanted)
        for index in range(len(query)):
            own = [part.expand(index + 1, -1, -1)[index] for part in tables]
            angle = torch.complex(*own) if own else torch.zeros(query.shape[2], 0, dtype=torch.complex128)
            heads = {"q": query, "k": key, "v": value, "turned": turned, "turned_key": turned_key}
            samples.append({name: part[index] for name, part in heads.items()} | {"angle": angle})
    return samples


def defined_moments(source: Source, samples: list[dict[str, Tensor]], weight: Tensor) -> Moments:
    """The moments as their definitions say, one query at a time."""
    site, heads, groups = source.site, source.heads, source.groups
    columns = weight.double().reshape(-1, heads, source.value_dim)
    norms, width = columns.square().sum((0, 2)), source.cached
    double = {"dtype": torch.float64}
    turned: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(heads)]
    total = torch.zeros(heads, **double)
    queries, collision = torch.zeros(heads, source.head_dim, source.head_dim, **double), torch.zeros(heads, **double)
    keys, values, key_mean = (torch.zeros(*shape, **double) for shape in ((width, width), (width, width), (width,)))
    tokens = 0
    for seen in samples:
        y = torch.cat([seen[name].transpose(0, 1).flatten(1) for name in "kv"], 1)
        tokens += len(y)
        for head in range(heads):
            group = head * groups // heads
            for s in range(len(y)):
                first = max(0, s - site.window + 1) if site.window else 0
                near = slice(first, s + 1)
                scores = seen["turned_key"][group, near] @ seen["turned"][head, s] * site.scale
                bent = torch.tanh(scores / site.softcap) if site.softcap else torch.zeros_like(scores)
                a = (bent * site.softcap if site.softcap else scores).softmax(0)
                value = seen["v"][group, near]
                moved = (value - a @ value) @ columns[:, head].T
                w = (a * (1 - bent.square())).square() * moved.square().sum(1)
                query, mean = seen["q"][head, s], a @ y[near]
                total[head] += w.sum()
                queries[head] += w.sum() * torch.outer(query, query)
                collision[head] += a.square().sum()
                values += norms[head] * torch.outer(mean, mean)
                keys += (w[:, None] * y[near]).T @ y[near]
                key_mean += w @ y[near]
                product = complex_heads(source, query) * complex_heads(source, seen["k"][group, near]).conj()
                turned[head].append((w, product, product * seen["angle"][s] * seen["angle"][near].conj()))
    constants = [nearest_constants(*map(torch.cat, zip(*own, strict=True))) for own in turned]
    return Moments(
        phasor=torch.view_as_real(torch.stack([constant for constant, _ in constants])),
        frozen=torch.stack([missed for _, missed in constants]),
        queries=queries / tokens,
        keys=keys / total.sum(),
        key_mean=key_mean / total.sum(),
        values=values / (norms.sum() * tokens),
        outputs=torch.einsum("xhi,xhj->hij", columns, columns),
        collision=collision / tokens,
    )


def nearest_constants(w: Tensor, u: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Of the score's products u and rotated r [N, pairs], the ridge least squares for c in Re(u c) = Re(r)."""
    size = (w[:, None] * u.abs().square()).sum(0)
    mean = (w[:, None] * u.conj() * r).sum(0) / size
    rows = torch.stack((u.real, -u.imag), -1)
    gram = torch.einsum("n,npi,npj->pij", w, rows, rows) + RIDGE * size[:, None, None] * torch.eye(2)
    right = torch.einsum("n,npi,np->pi", w, rows, r.real) + RIDGE * size[:, None] * torch.view_as_real(mean)
    constant = torch.view_as_complex(torch.linalg.solve(gram, right).contiguous())
    missed = (w[:, None] * ((u * constant).real - r.real).square()).sum(0)
    return constant, missed / (w[:, None] * r.real.square()).sum(0)


MEASURED = {
    "grouped": {},
    "window": {"window": 4},
    "cap": {"softcap": 2.0},
    "scaled table, biases": {"table_scale": 1.3, "pairs": 3, "bias": "k v"},
    "one group, narrow values": {"groups": 1, "value_dim": 8, "layout": "interleaved", "bias": "v"},
}


@pytest.mark.parametrize("shape", MEASURED.values(), ids=MEASURED.keys())
def test_moments_are_what_their_definitions_say(shape):
    """Samples of different lengths, and two in one batch; in the second layer, behind the first."""
    graph = Decoder(**shape).graph
    given = [token_ids(2, 11, 5, VOCABULARY), token_ids(1, 7, 6, VOCABULARY)]
    source = compressible(attention_sites(graph)[1])
    weight = weight_of(graph, source)
    wanted = defined_moments(source, seen_values(graph, source, given), weight)
    stage = next(stage for stage in sweep(graph, given) if source.site.node in stage.nodes)
    for name, found in vars(measure(stage, source, weight)).items():
        expected = getattr(wanted, name)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), name  # |W (v - o)|^2 cancels in float32


def test_a_head_that_the_output_projection_drops_leaves_no_nan():
    decoder = Decoder()
    weight = decoder.tensors["layers.0.attention.o.weight"]
    weight[:, :16] = 0
    decoder.tensors["layers.1.attention.o.weight"].zero_()
    before = decoder.outputs()
    reduced(decoder.graph, batches(vocabulary=VOCABULARY), rank=24, rope_dim=16)
    assert relative_square(decoder.outputs(), before) < 0.1
