"""The metric of what removal costs, where gradients are few and of very different sizes."""

import pytest
import torch

from passes.prune.ranking import GRADIENT_RIDGE, in_metric


@pytest.mark.parametrize("count", [1, 2, 40, 400])
def test_few_gradients_summed_in_float32_are_a_metric(count):
    """Rounding in float32 leaves eigenvalues below zero, further than the ridge reaches."""
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 300, generator=source)
    gradient = (rows.T @ rows).double()
    weight = torch.randn(300, 20, generator=source, dtype=torch.float64)
    made = in_metric(weight, gradient)
    expected = weight.T @ gradient @ weight
    ridge = 1e3 * GRADIENT_RIDGE * gradient.diagonal().mean() * (weight.T @ weight).diagonal().max()
    torch.testing.assert_close(made.T @ made, expected, rtol=1e-4, atol=ridge.item())
