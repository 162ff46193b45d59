"""Small shapes, forward and backward, for compute-sanitizer: `python -m benchmarks.gpu_probe cuda`."""

from __future__ import annotations

import functools
import sys

import torch

import fastac

from .gpu_checkout import find_kernels

# B, L, M, N: within one block, or cluster, and beyond it, primes, one unit
SHAPES = ((3, 25, 128, 8), (2, 67, 131, 33), (3, 1, 50, 1))


def probe(device: str, backend: str) -> int:
    """Run all shapes in two dtypes: padded, packed, packed with a bound, given scores; count the calls."""
    calls = 0
    for dtype in (torch.float32, torch.bfloat16):
        for b, length, m, n in SHAPES:

            def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.randn(*shape, device=device).to(dtype).requires_grad_()

            x, weight, scores = normal(b, length, m), normal(n, m), normal(b, n, length)
            packed, alpha, beta = normal(b * length, m), normal(n), normal(n)
            lengths = torch.tensor([length, 0, 1][:b], device=device)
            offsets = torch.arange(b + 1, device=device) * length
            cluster = functools.partial(fastac.attention_cluster, backend=backend)
            pool = functools.partial(fastac.attention_pool, backend=backend)
            for y, leaves in (
                (cluster(x, weight, alpha, beta, lengths=lengths), (x, weight, alpha, beta)),
                (cluster(packed, weight, offsets=offsets), (packed, weight)),
                (cluster(packed, weight, offsets=offsets, max_length=length), (packed, weight)),
                (pool(x, scores, alpha, beta), (x, scores, alpha, beta)),
            ):
                torch.autograd.grad(y, leaves, torch.randn_like(y))
                calls += 1
    return calls


if __name__ == "__main__":
    find_kernels()
    made = probe("cuda", sys.argv[1])
    torch.cuda.synchronize()
    print(f"probe: done, {made} calls", flush=True)
