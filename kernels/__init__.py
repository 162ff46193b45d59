"""Triton kernels of fastac, installed as `fastac.kernels`.

`plan` says what a call launches and imports no Triton; `launch` imports the kernels, and with them Triton.
"""
