"""Kernels compiled ahead of time for GPUs that this machine does not have."""
