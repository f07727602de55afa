"""The shared allocator: within the budget, and as good as trying everything."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.allocate import Option, allocate
from compiler.errors import PassError

options = st.builds(Option, st.integers(1, 20), st.floats(0, 1, width=32))
places = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=4)


def totals(places, chosen):
    picked = [own[index] for own, index in zip(places, chosen, strict=True)]
    return sum(option.cost for option in picked), sum(option.loss for option in picked)


@settings(max_examples=60, deadline=None)
@given(places, st.integers(0, 40))
def test_no_choice_within_the_budget_loses_less(places, spare):
    budget = sum(min(option.cost for option in own) for own in places) + spare
    cost, loss = totals(places, allocate(places, budget))
    everything = [totals(places, choice) for choice in product(*(range(len(own)) for own in places))]
    assert cost <= budget
    assert loss <= min(other for used, other in everything if used <= budget) + 1e-6


def test_a_budget_that_nothing_fits_is_refused():
    with pytest.raises(PassError, match="below what the cheapest choice everywhere costs"):
        allocate([[Option(3, 0.0)], [Option(4, 0.0), Option(5, 1.0)]], 6)
