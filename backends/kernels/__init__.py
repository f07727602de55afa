"""Kernels, one file each, which a checkpoint can carry: they import torch, Triton where it is, and `launch`.

Each file has

    reference(...)   what is computed, in torch, on any device; everything else is held to it
    plan(...)        the launches that compute it on a GPU, as data
    outside(...)     why inputs lie outside the plan's envelope, or None
    KERNEL(...)      the operation of torch, named as the file: a CPU path, the plan on a GPU, the reference elsewhere

and the table of tile sizes that the plan chooses from.
"""
