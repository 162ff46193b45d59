"""What the operator tests share: cases, peers, and the error bound.

A case is a set of operands. It is computed four times: by the backend under test, by `fastac.reference` in
float64 (the truth), by `plain` in the dtype of the case, and by `plain` in float32 with every result rounded
to that dtype. `check` bounds the error of the first by the errors of the last two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastac.reference

FLOATS = ("x", "weight", "scores", "position_bias", "alpha", "beta")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
WEIGHTINGS = ("fc1", "position_bias", "average", "scores")
LAYOUTS = ("padded", "lengths", "mask", "packed")
FEATURES = ("plain", "relu", "log_softmax", "offset", "cancel")

RATIO = 2.0
"""How many times a peer's error ours may be."""

NOISE = 6.0
"""How many times the effect of one unavoidable rounding ours may be: a sum over L has several."""

Results = dict[str, Tensor]


def generator() -> np.random.Generator:
    """Random numbers of numpy, seeded per test by conftest.py as torch's are."""
    return np.random.default_rng(int(torch.randint(2**31, ()).item()))


# Cases


@dataclasses.dataclass
class Case:
    """Operands of one call; names and shapes are those of `fastac.attention_cluster` and `attention_pool`."""

    x: Tensor
    weight: Tensor | None = None
    scores: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    position_bias: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None
    offsets: Tensor | None = None
    eps: float = 1e-12

    def operands(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def floats(self) -> dict[str, Tensor]:
        """The differentiable operands that are given."""
        return {name: t for name in FLOATS if (t := getattr(self, name)) is not None}

    def to(self, dtype: torch.dtype) -> Case:
        return dataclasses.replace(self, **{name: t.to(dtype) for name, t in self.floats().items()})

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    @property
    def batch(self) -> int:
        return self.x.size(0) if self.offsets is None else self.offsets.numel() - 1

    @property
    def cluster_size(self) -> int:
        if self.weight is not None:
            return self.weight.size(0)
        if self.scores is not None:
            return self.scores.size(0 if self.offsets is not None else 1)
        return 1 if self.alpha is None else self.alpha.numel()

    def dy(self) -> Tensor:
        """A random gradient of y, (B, N, M)."""
        return torch.randn(self.batch, self.cluster_size, self.x.size(-1), dtype=torch.float64).to(
            self.x.dtype
        )


def make_features(kind: str, B: int, L: int, M: int, dtype: torch.dtype) -> Tensor:
    """Local features (B, L, M) of a kind in `FEATURES`, or "centred": every set's mean taken off."""
    g = torch.randn(B, L, M, dtype=torch.float64)
    if kind == "relu":
        g = g.relu()
    elif kind == "log_softmax":
        g = g.log_softmax(-1)
    elif kind in ("offset", "cancel"):
        # Half types resolve 1/64 of the offset; float32 one part in 5000.
        g = 4 + g / 16 if dtype in HALF else 5 + 1e-3 * g
    elif kind == "centred":
        g = g - g.mean(1, keepdim=True)
    elif kind != "plain":
        raise ValueError(f"no features called {kind!r}")
    return g.to(dtype)


def make_lengths(B: int, L: int, *, empty: bool = True) -> Tensor:
    """Lengths (B,) in 0…L: one full set first, then random ones, the last of them empty if `empty`."""
    lengths = torch.randint(1, L + 1, (B,)) if L else torch.zeros(B, dtype=torch.int64)
    if B:
        lengths[0] = L
    if empty and B > 1:
        lengths[-1] = 0
    return lengths


DEFAULT_SIZES = {"B": 5, "L": 23, "M": 67, "N": 11}
INTERPRETED_SIZES = {"B": 3, "L": 11, "M": 29, "N": 5}
CLUSTER_SIZES = {"B": 5, "L": 23, "M": 72, "N": 11}
PAIR_SIZES = {"B": 5, "L": 23, "M": 147, "N": 11}
"""Sizes of a case that gives none: for most backends; for Triton's interpreter, which is slow; where the
cluster kernels of csrc/cuda are emulated, which take multiples of 8 features only; and for the CPU kernels
that sum pairs of bfloat16, which take more than 128 features."""

sizes_in_use = dict(DEFAULT_SIZES)


def make_case(
    *,
    B: int | None = None,
    L: int | None = None,
    M: int | None = None,
    N: int | None = None,
    dtype: torch.dtype = torch.float32,
    weighting: str = "fc1",
    shift: bool = True,
    layout: str = "padded",
    features: str = "plain",
    empty: bool = False,
) -> Case:
    """A random case. "cancel" features come with β = -α·offset, so that u is far smaller than α·z.

    A size that is not given is that of `DEFAULT_SIZES`, or of what the active backend has instead.
    """
    given = zip("BLMN", (B, L, M, N), strict=True)
    B, L, M, N = (sizes_in_use[name] if size is None else size for name, size in given)
    x = make_features(features, B, L, M, dtype)
    case = Case(x)
    if weighting in ("fc1", "position_bias"):
        case.weight = (torch.randn(N, M, dtype=torch.float64) / M**0.5).to(dtype)
    if weighting == "position_bias":
        case.position_bias = torch.randn(N, L + 3).to(dtype)
    if weighting == "scores":
        case.scores = torch.randn(B, N, L).to(dtype)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"no weighting called {weighting!r}")
    if shift:
        case.alpha = (torch.randn(N, dtype=torch.float64) * N**-0.25).to(dtype)
        case.beta = (torch.randn(N, dtype=torch.float64) * N**-0.25).to(dtype)
        if features == "cancel":
            case.alpha = (case.alpha.sign() * (0.5 + case.alpha.abs())).to(dtype)
            offset = 4 if dtype in HALF else 5
            case.beta = (-case.alpha.double() * offset).to(dtype)
    if layout == "lengths":
        case.lengths = make_lengths(B, L, empty=empty)
    elif layout == "mask":
        case.mask = torch.rand(B, L) < 0.7
        if L:
            case.mask[:, 0] = True
        if empty and B > 1:
            case.mask[-1] = False
    elif layout == "packed":
        case = pack(case, make_lengths(B, L, empty=empty), trailing=3)
    elif layout != "padded":
        raise ValueError(f"no layout called {layout!r}")
    return case


def pack(case: Case, lengths: Tensor, trailing: int = 0) -> Case:
    """The packed case of a padded one: x (T, M), scores (N, T), `trailing` rows of noise at the end."""
    keep = torch.arange(case.x.size(1)) < lengths[:, None]
    x = torch.cat([case.x[keep], torch.randn(trailing, case.x.size(2)).to(case.x.dtype)])
    scores = case.scores
    if scores is not None:
        noise = torch.randn(scores.size(1), trailing).to(scores.dtype)
        scores = torch.cat([scores.transpose(1, 2)[keep].T, noise], 1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return case.replace(x=x, scores=scores, offsets=offsets, lengths=None, mask=None)


def fenced(t: Tensor) -> Tensor:
    """The same numbers in the middle of a tensor of NaN."""
    whole = torch.full((t.numel() + 2 * 4096,), float("nan"), dtype=t.dtype)
    whole[4096:-4096] = t.flatten()
    return whole[4096:-4096].view(t.shape)


# The plain torch peer


def pad(
    x: Tensor,
    scores: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """x (B, L, M) and scores (B, N, L), excluded positions set to 0, and valid (B, L), from any layout."""
    if offsets is not None:
        sizes = offsets.diff()
        steps = torch.arange(int(sizes.max()) if sizes.numel() else 0)
        valid = steps < sizes[:, None]
        index = torch.where(valid, offsets[:-1, None] + steps, x.size(0))
        x = torch.cat([x, x.new_zeros(1, x.size(1))])[index]
        if scores is not None:
            scores = torch.cat([scores, scores.new_zeros(scores.size(0), 1)], 1)[:, index].transpose(0, 1)
        return x, scores, valid
    if mask is not None:
        valid = mask
    elif lengths is not None:
        valid = torch.arange(x.size(1)) < lengths[:, None]
    else:
        valid = torch.ones(x.shape[:2], dtype=torch.bool)
    x = torch.where(valid[..., None], x, 0)
    if scores is not None:
        scores = torch.where(valid[:, None], scores, 0)
    return x, scores, valid


def plain_parts(
    case: Case, jitter: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, the weights a (B, N, L), u (B, N, M), the norm (B, N, 1) and y, as one writes them in eager torch.

    `jitter` adds noise to u, relative to its terms |α·z| and |β|.
    """
    x, s, valid = pad(case.x, case.scores, case.lengths, case.mask, case.offsets)
    if case.weight is not None:
        s = (x @ case.weight.T).transpose(1, 2)
        if case.position_bias is not None:
            s = s + case.position_bias[:, : x.size(1)]
    elif s is None:
        s = x.new_zeros(x.size(0), case.cluster_size, x.size(1))
    excluded = ~valid[:, None] | (s == float("-inf"))
    nothing = excluded.all(-1, keepdim=True)
    a = torch.where(nothing, 0, s.masked_fill(excluded, float("-inf"))).softmax(-1)
    a = a.masked_fill(excluded, 0).to(x.dtype)
    z = a @ x
    if case.alpha is None or case.beta is None:
        return x, a, z, z.new_ones(*z.shape[:2], 1), z
    alpha, beta = case.alpha.to(x.dtype)[:, None], case.beta.to(x.dtype)[:, None]
    u = alpha * z + beta
    if jitter:
        noise = torch.randn(u.shape, generator=torch.Generator().manual_seed(seed), dtype=u.dtype)
        u = u + (jitter * noise * ((alpha * z).abs() + beta.abs())).detach()
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp(min=case.eps)
    return x, a, u, norm, u / (norm * case.cluster_size**0.5)


def plain(case: Case) -> Tensor:
    """y (B, N, M) in eager torch, in the dtype of x."""
    return plain_parts(case)[-1]


def truth(case: Case) -> Tensor:
    """y (B, N, M) by fastac.reference."""
    return dispatch(fastac.reference.attention_cluster, fastac.reference.attention_pool, case)


def dispatch(cluster: Callable[..., Tensor], pool: Callable[..., Tensor], case: Case, **more: Any) -> Tensor:
    """y by one of the two public functions, or of functions with their signatures."""
    rest = {name: getattr(case, name) for name in ("lengths", "mask", "offsets", "eps")} | more
    if case.scores is not None:
        return pool(case.x, case.scores, case.alpha, case.beta, **rest)
    return cluster(case.x, case.weight, case.alpha, case.beta, position_bias=case.position_bias, **rest)


# Running a case


def run(
    call: Callable[[Case], Tensor],
    case: Case,
    dy: Tensor | None = None,
    wanted: tuple[str, ...] | None = None,
) -> Results:
    """y and, if dy is given, the gradients ("dx", ...) of the operands in `wanted` (default: all given)."""
    if dy is None:
        with torch.no_grad():
            return {"y": call(case)}
    names = [n for n in case.floats() if wanted is None or n in wanted]
    leaves = {n: getattr(case, n).detach().requires_grad_() for n in names}
    y = call(case.replace(**leaves))
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(names, grads, strict=True)}


def peers(case: Case, dy: Tensor | None, wanted: tuple[str, ...] | None = None) -> list[Results]:
    """Plain torch in the dtype of x, and plain float32 torch with its results rounded to that dtype."""
    dtype = case.x.dtype
    found = [run(plain, case.to(dtype), dy, wanted)]
    if dtype in HALF:
        exact = run(plain, case.to(torch.float32), dy, wanted)
        found.append({name: t.to(dtype) for name, t in exact.items()})
    return found


def term_sizes(case: Case, dy: Tensor | None) -> Results:
    """Sums of the absolute values of the terms of each result, in float64: its scale before cancellation.

    A dot product of n terms is known to about eps · Σ|terms|, whatever is left of it after cancellation.
    """
    dtype, case = case.x.dtype, case.to(torch.float64)
    x, a, u, norm, y = plain_parts(case)
    N, x = case.cluster_size, x.abs()
    c = 1 / (norm * N**0.5) if case.alpha is not None else torch.ones_like(norm)
    alpha = case.alpha.abs()[:, None] if case.alpha is not None else torch.ones(N, 1, dtype=torch.float64)
    z = a @ x
    u = alpha * z + (case.beta.abs()[:, None] if case.beta is not None else 0)
    score = (x @ case.weight.abs().T).amax() if case.weight is not None and x.numel() else torch.zeros(())
    # A score known to eps·score makes a weight known to eps·score; half types have their scores in float32.
    loss = 1.0 if dtype in HALF else 1 + float(score)
    sizes = {"y": loss * c * u}
    if dy is None:
        return sizes
    dy = dy.double().abs()
    if case.alpha is None:
        du = dy
    else:
        unit = y.abs() * N**0.5
        kappa = 1 + torch.linalg.vector_norm(u, dim=-1, keepdim=True) / norm
        du = kappa * c * (dy + unit * (unit * dy).sum(-1, keepdim=True))
    du = loss * du
    e = (alpha * du) @ x.transpose(1, 2)
    ds = a * (e + (a * e).sum(-1, keepdim=True))
    sizes["dx"] = a.transpose(1, 2) @ (alpha * du)
    if case.weight is not None:
        sizes["dx"] = sizes["dx"] + ds.transpose(1, 2) @ case.weight.abs()
        sizes["dweight"] = torch.einsum("bnl,blm->nm", ds, x)
    sizes["dscores"] = ds
    sizes["dposition_bias"] = ds.sum(0)
    sizes["dbeta"] = du.sum((0, 2))
    sizes["dalpha"] = (du * z).sum((0, 2))
    if case.alpha is not None and case.beta is not None:  # or through β, where |α| >= |β|
        ratio = (case.beta / case.alpha).abs()
        through_beta = torch.where(ratio <= 1, ratio * sizes["dbeta"], 0)
        sizes["dalpha"] = torch.maximum(sizes["dalpha"], through_beta)
    return sizes


def rounding_noise(case: Case, dy: Tensor | None, exact: Results) -> Results:
    """What two unavoidable roundings do to each result, in float64: the floor for a u that cancels.

    u = α·z + β is rounded in the accumulation type, relative to |α·z| + |β|. Half types start their backward
    from y as it was rounded, which reaches dα and dβ, sums of B·M signed terms, through û(û·dY).
    """
    if case.alpha is None or case.beta is None:
        return {}
    dtype = case.x.dtype
    acc = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    wanted = tuple(name[1:] for name in exact if name != "y")
    case = case.to(torch.float64)
    dy = None if dy is None else dy.double()
    # The largest of three draws: one alone can be lucky where few terms make up a result.
    draws = [run(lambda c, s=seed: plain_parts(c, acc, s)[-1], case, dy, wanted) for seed in range(3)]
    noise = {
        name: torch.stack([moved[name] - t for moved in draws]).abs().amax(0) for name, t in exact.items()
    }
    if dtype not in HALF or dy is None:
        return noise
    x, a, _, norm, y = plain_parts(case)
    y = y.to(dtype).double()
    n = case.cluster_size
    du = dy - torch.where(norm > case.eps, n * y * (y * dy).sum(-1, keepdim=True), 0)
    du = du / (norm * n**0.5)
    if "dbeta" in exact:
        noise["dbeta"] = noise["dbeta"] + (du.sum((0, 2)) - exact["dbeta"]).abs()
    if "dalpha" in exact:
        direct = (du * (a @ x)).sum((0, 2))
        through_beta = torch.where(
            case.alpha.abs() >= case.beta.abs(), -case.beta * du.sum((0, 2)) / case.alpha, direct
        )
        both = torch.stack([direct, through_beta]) - exact["dalpha"]
        noise["dalpha"] = noise["dalpha"] + both.abs().amax(0)
    return noise


def rounded_y_noise(case: Case, dy: Tensor) -> Results:
    """What half types lose in each gradient where the backward takes û from y as it was rounded, in float64.

    Kernels of the Gram form take it from u, which they have unrounded.
    """
    dtype, case = case.x.dtype, case.to(torch.float64)
    if case.alpha is None or dtype not in HALF:
        return {}

    def projected(c: Case, rounded: bool) -> Tensor:
        """A y whose gradient is that of plain_parts' for this û."""
        *_, u, norm, y = (t.detach() if i > 2 else t for i, t in enumerate(plain_parts(c)))
        unit = (y.to(dtype).double() if rounded else y) * c.cluster_size**0.5
        away = torch.where(norm > c.eps, unit * (unit * u).sum(-1, keepdim=True), 0)
        return (u - away) / (norm * c.cluster_size**0.5)

    exact, lossy = (run(lambda c, r=r: projected(c, r), case, dy.double()) for r in (False, True))
    return {name: (lossy[name] - t).abs() for name, t in exact.items() if name != "y"}


def sum_sizes(case: Case, dy: Tensor) -> Results:
    """Twice the root sums of squares of the terms of dα and dβ, in float64: the measure of their noise.

    dβ = Σ dU·1 and dα = Σ dU·z, or -β/α·Σ dU·1 where |α| >= |β|: the two are equal, their terms are not.
    """
    case = case.to(torch.float64)
    if case.alpha is None or case.beta is None:
        return {}
    x, a, _, norm, y = plain_parts(case)
    dy = dy.double()
    du = (dy - case.cluster_size * y * (y * dy).sum(-1, keepdim=True)) / (norm * case.cluster_size**0.5)
    dbeta = du.square().sum((0, 2)).sqrt()
    direct = (du * (a @ x)).square().sum((0, 2)).sqrt()
    ratio = (case.beta / case.alpha).abs()
    return {
        "dalpha": 2 * torch.where(ratio <= 1, torch.maximum(direct, ratio * dbeta), direct),
        "dbeta": 2 * dbeta,
    }


# The bound


def _rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt()) if t.numel() else 0.0


def _largest(t: Tensor) -> float:
    return float(t.double().abs().max()) if t.numel() else 0.0


MEASURES: Mapping[str, tuple[Callable[[Tensor], float], Mapping[torch.dtype, float]]] = {
    # Name: (size of a tensor, rounding floor in units of eps(dtype) · size of the truth).
    # The root mean square of a rounding to nearest is about 0.2 eps, its maximum 0.5 eps: half types, whose
    # peer is already one such rounding, get little on top. Float32 and float64 get the noise of a sum over L,
    # whose order is the kernel's own: 4 eps, and four times that for the largest of some thousand values.
    "maximum": (
        _largest,
        {torch.float64: 16.0, torch.float32: 16.0, torch.bfloat16: 0.5, torch.float16: 0.5},
    ),
    "rms": (_rms, {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 0.1, torch.float16: 0.1}),
}


def check(
    ours: Results,
    exact: Results,
    others: list[Results],
    dtype: torch.dtype,
    *,
    terms: Results | None = None,
    noise: Results | None = None,
    floor: float = 1.0,
) -> None:
    """Assert error(ours) <= 2 · error(peer) + floor for every result and peer, in maximum and in rms.

    Args:
        ours: results of the backend under test, in the dtypes the user sees.
        exact: the same results in float64.
        others: the peers' results. One that is not finite is left out: it lends us no slack.
        dtype: dtype of x, whose eps is the unit of the floor.
        terms: sizes, by result, that the floor is relative to where they exceed the truth's own.
        noise: `NOISE` times this error, by result, is allowed on top (see `rounding_noise`).
        floor: factor on the floors of `MEASURES`.
    """
    if ours.keys() != exact.keys():
        raise AssertionError(f"results are {sorted(ours)}, must be {sorted(exact)}")
    eps = torch.finfo(dtype).eps
    wrong = []
    for name, t in exact.items():
        a = ours[name]
        if a.shape != t.shape:
            raise AssertionError(f"{name} has shape {tuple(a.shape)}, must be {tuple(t.shape)}")
        assert t.isfinite().all(), f"the truth of {name} is not finite"
        if not a.isfinite().all():
            raise AssertionError(f"{name} has {int((~a.isfinite()).sum())} of {a.numel()} values not finite")
        for measure, (size, floors) in MEASURES.items():
            error = size(a.double() - t)
            scale = max(size(t), size(terms[name]) if terms and name in terms else 0.0)
            least = floor * floors[dtype] * eps * scale
            least += NOISE * size(noise[name]) if noise and name in noise else 0.0
            for peer in others:
                if peer[name].isfinite().all():
                    bound = RATIO * size(peer[name].double() - t) + least
                    if not error <= bound:
                        wrong.append(
                            f"{name}: {measure} error {error:.3g} > {bound:.3g} (scale {size(t):.3g})"
                        )
            if not any(p[name].isfinite().all() for p in others) and not error <= least:
                wrong.append(f"{name}: {measure} error {error:.3g} > floor {least:.3g}, no finite peer")
    if wrong:
        raise AssertionError("\n".join(wrong))


def check_case(
    call: Callable[[Case], Tensor],
    case: Case,
    *,
    backward: bool = True,
    wanted: tuple[str, ...] | None = None,
    floor: float = 1.0,
    all_terms: bool = False,
) -> Results:
    """Run `case` through `call` and hold it against the truth and the peers; return its results.

    The gradients of α and β have one entry per unit, each a sum over B·M signed terms of which little may be
    left, so their floor is relative to the noise of such a sum. With `all_terms` the floor of every result is
    relative to the sum of its terms' absolute values: for tiny shapes, where a peer can be exact by luck.
    """
    dy = case.dy() if backward else None
    ours = run(call, case, dy, wanted)
    exact = run(truth, case.to(torch.float64), None if dy is None else dy.double(), wanted)
    sizes = term_sizes(case, dy)
    terms = sizes if all_terms or dy is None else sum_sizes(case, dy)
    noise = rounding_noise(case, dy, exact)
    check(ours, exact, peers(case, dy, wanted), case.x.dtype, terms=terms, noise=noise, floor=floor)
    for name, t in ours.items():
        expected = case.x.dtype if name == "y" else getattr(case, name[1:]).dtype
        assert t.dtype == expected, f"{name} is {t.dtype}, must be {expected}"
        noise = max(16 * torch.finfo(case.x.dtype).eps * _largest(sizes[name]), torch.finfo(t.dtype).tiny)
        assert _largest(t) > 0 or _largest(exact[name]) <= noise, f"{name} vanished"
    return ours


def assert_equal(ours: Results, others: Results, what: str = "") -> None:
    """Bitwise equality of every result, NaN excluded."""
    assert ours.keys() == others.keys()
    for name, t in ours.items():
        assert not t.isnan().any(), f"{name} is NaN {what}"
        assert torch.equal(t, others[name]), (
            f"{name} differs {what}: {int((t != others[name]).sum())} of {t.numel()} values, "
            f"at most by {_largest(t.double() - others[name].double()):.3g}"
        )


def assert_near(
    ours: Results,
    others: Results,
    dtype: torch.dtype,
    eps: float = 8.0,
    terms: Results | None = None,
    noise: Results | None = None,
) -> None:
    """Equality up to `eps` machine epsilons of `dtype`, relative to the largest value of each result.

    With `terms` (see `term_sizes`) two orders of summation are allowed for: `eps` epsilons of the accumulated
    type, relative to the terms, on top; and so is `NOISE` times `noise`.
    """
    assert ours.keys() == others.keys()
    acc = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for name, t in ours.items():
        assert t.shape == others[name].shape, f"{name}: {tuple(t.shape)} and {tuple(others[name].shape)}"
        error = _largest(t.double() - others[name].double())
        bound = eps * torch.finfo(dtype).eps * _largest(others[name])
        bound += eps * acc * _largest(terms[name]) if terms else 0.0
        bound += NOISE * _largest(noise[name]) if noise and name in noise else 0.0
        assert error <= bound, f"{name} differs by {error:.3g} > {bound:.3g}"
