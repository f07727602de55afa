"""Published conversions of attention caches, reimplemented to be measured beside ours.

Each module offers ``convert(model, windows, rank, rope_dim, seed)``, which changes a transformers model in place and
returns it, and ``size(shape, rank, rope_dim)``: what its method stores. No stock class computes what these methods
emit, so their arithmetic happens inside the original attention and their caches are counted, not measured.
"""
