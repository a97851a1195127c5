"""Numerics of the narrow formats in plain torch: the reference that kernels are tested against."""
