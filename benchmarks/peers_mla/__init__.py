"""Published conversions of attention caches, reimplemented to be measured beside ours.

Each module offers ``convert(model, windows, rank, rope_dim, seed)``, which changes a transformers model in place and
returns it, its two halves ``calibrate(model, windows, rope_dim)`` and ``apply(model, calibrated, rank, rope_dim)``, the
second for any number of ranks in turn, and ``size(shape, rank, rope_dim)``: what its method stores.

No stock class computes what these methods emit, so their arithmetic happens inside the original attention and their
caches are counted, not measured.
"""
