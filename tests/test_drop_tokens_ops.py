"""The operations by which tokens go: what is chosen, merged and put back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from compiler.ir.ops import op_named
from compiler.ir.types import TensorType


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(0, 2**16))
def test_the_largest_scores_and_both_ends_remain(data, tokens, seed):
    keep, prefix = data.draw(st.integers(1, tokens)), data.draw(st.integers(0, 3))
    suffix = data.draw(st.integers(0, 3))
    scores = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed))
    index, rest = op_named("token_select").eval(scores, keep=keep, prefix=prefix, suffix=suffix)
    for row in range(2):
        kept, gone = index[row].tolist(), rest[row].tolist()
        assert sorted([*kept, *gone]) == list(range(tokens)) and kept == sorted(kept) and gone == sorted(gone)
        fixed = {i for i in range(tokens) if i < prefix or i >= tokens - suffix}
        free = [i for i in kept if i not in fixed]
        assert len(fixed) > keep or fixed <= set(kept)
        assert not gone or all(scores[row, i] >= scores[row, j] for i in free for j in gone if j not in fixed)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 13), st.integers(0, 2**16))
def test_pairs_that_are_most_alike_are_merged(data, tokens, seed):
    prefix, suffix = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    pairs = max(0, tokens - prefix - suffix) // 2
    merged = data.draw(st.integers(0, pairs))
    metric = torch.randn(1, tokens, 5, generator=torch.Generator().manual_seed(seed))
    own = op_named("token_match").eval(metric, keep=tokens - merged, prefix=prefix, suffix=suffix)
    (kept,), (gone,), (into,) = (value.tolist() for value in own)
    assert sorted([*kept, *gone]) == list(range(tokens)) and kept == sorted(kept)
    unit = F.normalize(metric[0], dim=-1)
    targets, sources = (list(range(prefix + start, tokens - suffix, 2)) for start in range(2))
    best = {i: max(float(unit[i] @ unit[j]) for j in targets) for i in sources}
    assert set(gone) <= set(sources)
    assert all(best[i] >= best[j] - 1e-6 for i in gone for j in set(sources) - set(gone))
    for place, slot in zip(gone, into, strict=True):
        assert kept[slot] in targets and float(unit[place] @ unit[kept[slot]]) >= best[place] - 1e-6


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 9), seed=st.integers(0, 2**16), extra=st.booleans())
def test_merging_keeps_the_weighted_sum_and_restoring_takes_it_back(tokens, seed, extra):
    generator = torch.Generator().manual_seed(seed)
    keep = int(torch.randint(1, tokens + 1, (), generator=generator))
    x = torch.randn(2, tokens, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(2, tokens, generator=generator, dtype=torch.float64) + 0.1
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(2)])
    index, rest = order[:, :keep].sort(-1).values, order[:, keep:].sort(-1).values
    into = None if extra else torch.randint(0, keep, rest.shape, generator=generator)
    if extra and not rest.shape[1]:
        return
    merged, total = op_named("token_merge").eval(x, weight, index, rest, into)
    torch.testing.assert_close((merged * total[..., None]).sum(1), (x * weight[..., None]).sum(1))
    torch.testing.assert_close(total.sum(1), weight.sum(1))
    whole = op_named("token_restore").eval(x, merged, index, None if extra else rest, into)
    torch.testing.assert_close(whole.gather(1, index[..., None].expand(-1, -1, 3)), merged[:, :keep])
    if into is not None:
        gone = whole.gather(1, rest[..., None].expand(-1, -1, 3))
        torch.testing.assert_close(gone, merged.gather(1, into[..., None].expand(-1, -1, 3)))


@pytest.mark.parametrize("rows", ["first", "last", "all"])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_are_what_attention_gives_each_key(rows, causal):
    query, key = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 7, 6)
    options = {"scale": 0.4, "causal": causal}
    values = torch.eye(7).expand(2, 2, 7, 7)
    weights = op_named("attention").eval(query, key, values, None, None, None, window=0, softcap=0.0, **options)
    expected = {"first": weights[:, :1], "last": weights[:, -1:], "all": weights[:, ::2]}[rows].mean((1, 2))
    if rows == "first" and causal:
        with pytest.raises(ValueError, match="its own key alone"):
            op_named("token_scores").infer([TensorType(torch.float32, query.shape)] * 2, {"rows": rows, **options})
        return
    found = op_named("token_scores").eval(query, key, rows=rows, step=2, **options)
    torch.testing.assert_close(found, expected)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 14), size=st.integers(1, 6), keep=st.integers(1, 14), seed=st.integers(0, 2**16))
def test_blocks_stay_or_go_as_one_but_for_the_last_that_stays(tokens, size, keep, seed):
    scores = torch.randn(2, tokens, generator=torch.Generator().manual_seed(seed))
    means = op_named("token_blocks").eval(scores, size=size)
    for first in range(0, tokens, size):
        own = scores[:, first : first + size].mean(1, keepdim=True)
        torch.testing.assert_close(means[:, first : first + size], own.expand(-1, min(size, tokens - first)))
    index, _ = op_named("token_select").eval(means, keep=min(keep, tokens), prefix=0, suffix=0)
    for row in index.tolist():
        taken = [[place for place in row if place // size == block] for block in range(-(-tokens // size))]
        assert sum(0 < len(own) < min(size, tokens - block * size) for block, own in enumerate(taken)) <= 1
        assert all(own == list(range(block * size, block * size + len(own))) for block, own in enumerate(taken))
