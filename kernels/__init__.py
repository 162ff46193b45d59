"""Triton kernels of fastac, installed as `fastac.kernels`; this version has no Triton backend yet."""
