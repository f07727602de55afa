"""What the launches of each kernel move, counted from their own addresses."""

import pytest

from backends.kernels.launch import INTERPRETED
from benchmarks.rooflines import counts, names

# Bytes of inputs and results that device memory must move, and bytes of scratch, over the least bytes, at most. What
# exceeds 1 are inputs that several launches read.
BOUNDS = {
    "bf16_codec": (1.01, 0.0),
    "cached_decode": (1.01, 0.4),
    "codebook_linear": (1.01, 3.2),
    "latent_decode": (1.01, 2.8),
    "low_rank_linear": (1.01, 0.15),
    "packed_dense": (1.01, 0.0),
    "packed_linear": (1.01, 3.5),
    "packed_swiglu": (1.01, 0.0),
    "rms_norm": (1.01, 0.0),
    "rms_norm_quantized": (1.01, 0.0),
    "sparse_linear": (1.01, 0.0),
    "token_match": (1.01, 0.15),
    "token_merge": (1.01, 0.0),
}


@pytest.mark.skipif(not INTERPRETED, reason="addresses are known in the interpreter")
@pytest.mark.parametrize("name", BOUNDS)
def test_memory_is_moved_about_once_and_results_are_stored_once(name):
    for count in counts(name):
        assert count.once, f"{name}, {count.case}: a result is not stored exactly once"
        touched, scratch = BOUNDS[name]
        assert count.touched <= touched * count.minimum, f"{name}, {count.case}: {count.cells}"
        assert count.scratch <= scratch * count.minimum, f"{name}, {count.case}: {count.cells}"


def test_every_kernel_is_counted():
    assert set(BOUNDS) == set(names())
