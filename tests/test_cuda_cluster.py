"""The cluster kernels, executed by the emulation and compared with the formulas in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

import cuda_operators
import helpers
import pytest
import torch
from cuda_emulation import HERE, Emulation, build
from tested_backends import Backend

import fastac

Tensor = torch.Tensor


class Probe:
    """The kernels of cluster_probe.cpp, and their emulation."""

    def __init__(self) -> None:
        file = build("cluster_probe", [HERE / "cluster_probe.cpp"], optimize="-O2")
        self.library = ctypes.CDLL(str(file))
        self.emulation = Emulation(file)

    def run(self, name: str, numbers: list[int]) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        error = function((ctypes.c_int64 * len(numbers))(*numbers))
        if error is not None:
            raise RuntimeError(error.decode())


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe()


@dataclass
class Case:
    """A call: x is (B, L, M), or (T, M) with offsets; every set's valid positions are in `valid`."""

    lengths: list[int]
    M: int
    N: int
    dtype: torch.dtype = torch.bfloat16
    layout: str = "lengths"
    weighting: str = "linear"
    bias: bool = False
    shift: bool = True
    single: bool = False  # small operands in float32
    features: str = "plain"
    L: int = 0
    seed: int = 0
    eps: float = 1e-12
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        B, N, M = len(self.lengths), self.N, self.M
        L = self.L = max(self.L, *self.lengths)
        x = torch.randn(B, L, M, generator=g)
        if self.features == "offset":
            x = 4 + torch.randn(B, L, M, generator=g) / 16
        elif self.features == "log_softmax":
            x = torch.log_softmax(3 * x, -1)
        self.x = x.to(self.dtype)
        self.weight = (torch.randn(N, M, generator=g) / M**0.5).to(self.dtype)
        small = torch.float32 if self.single else self.dtype
        self.scores = (2 * torch.randn(B, N, L, generator=g)).to(small)
        self.position_bias = torch.randn(N, L, generator=g).to(small) if self.bias else None
        self.alpha = torch.randn(N, generator=g).to(small)
        self.beta = torch.randn(N, generator=g).to(small)
        if self.features == "offset":
            self.beta = (-4 * self.alpha.float() + self.beta.float() / 16).to(small)
        self.dy = torch.randn(B, N, M, generator=g).to(self.dtype)
        self.valid = torch.arange(L) < torch.tensor(self.lengths)[:, None]
        if self.layout == "mask":
            shuffled = torch.rand(B, L, generator=g).argsort(-1)
            self.valid = self.valid.gather(1, shuffled)
        self.x[~self.valid] = torch.nan
        self.scores.transpose(1, 2)[~self.valid] = torch.nan
        self.packed = self.x[self.valid] if self.layout == "packed" else self.x
        self.packed_scores = (
            self.scores.transpose(1, 2)[self.valid].T.contiguous() if self.layout == "packed" else self.scores
        )

    @property
    def rows(self) -> int:
        return self.packed.shape[0] if self.layout == "packed" else self.packed.shape[0] * self.L

    def given(self) -> Tensor:
        """Scores (B, N, L) in float64, of which W x^T is not part."""
        B = len(self.lengths)
        zero = torch.zeros(B, self.N, self.L, dtype=torch.float64)
        if self.weighting == "scores":
            return self.scores.double()
        return zero if self.position_bias is None else zero + self.position_bias.double()

    def numbers(self, keep: list[Tensor]) -> list[int]:
        """The operands as cluster_probe.cpp reads them; `keep` has to live as long."""
        packed = self.layout == "packed"
        linear = self.weighting == "linear"
        offsets = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()])
        operands = [
            self.packed,
            self.weight if linear else None,
            int(self.single),
            self.packed_scores if self.weighting == "scores" else None,
            self.position_bias,
            self.alpha if self.shift else None,
            self.beta if self.shift else None,
            torch.tensor(self.lengths) if self.layout == "lengths" else None,
            self.valid.to(torch.uint8) if self.layout == "mask" else None,
            offsets if packed else None,
            len(self.lengths),
            self.rows if packed else self.L,
            self.rows,
            self.M,
            self.N,
            self.L if self.bias else 0,
            0 if packed else self.L * self.M,
            self.M,
            0 if packed else self.N * self.L,
            self.rows if packed else self.L,
            round(self.eps * 1e12),
            ("padded", "lengths", "mask", "packed").index(self.layout),
            ("average", "scores", "linear").index(self.weighting),
            int(self.shift),
        ]
        return [address(o, keep) for o in operands]


def address(operand: Tensor | int | None, keep: list[Tensor]) -> int:
    if operand is None:
        return 0
    if isinstance(operand, int):
        return operand
    assert operand.is_contiguous()
    keep.append(operand)
    return operand.data_ptr()


@dataclass
class Forward:
    y: Tensor
    stats: Tensor
    scores: Tensor  # of valid positions, (B, N, L)


def run_forward(probe: Probe, case: Case, ctas: int = 8, units: int = 64, clusters: int = 2) -> Forward:
    B, N, M = len(case.lengths), case.N, case.M
    y = torch.full((B, N, M), torch.nan, dtype=case.dtype)
    stats = torch.full((3, B, N), torch.nan)
    saved = torch.full((case.rows, N), torch.nan)
    keep: list[Tensor] = []
    call = [int(case.dtype == torch.float16), ctas, units, clusters]
    outputs = [address(t, keep) for t in (y, stats, saved)]
    probe.run("cluster_forward", [*call, *case.numbers(keep), *outputs])
    scores = torch.full((B, case.L, N), torch.nan)
    if case.layout == "packed":
        scores[case.valid] = saved
    else:
        scores = saved.view(B, case.L, N)
        assert scores[~case.valid].isnan().all()
    return Forward(y, stats, scores.transpose(1, 2))


def formulas(case: Case, x: Tensor, weight: Tensor, given: Tensor, alpha: Tensor, beta: Tensor):
    """y, ||u|| and scores of Eq. 2 to 7; x without NaN."""
    valid = case.valid[:, None, :]
    s = given.masked_fill(~valid, 0)
    if case.weighting == "linear":
        s = s + torch.einsum("nm,blm->bnl", weight, x)
    a = torch.softmax(s.masked_fill(~valid, -torch.inf), -1).nan_to_num(0)
    u = torch.einsum("bnl,blm->bnm", a, x)
    if not case.shift:
        return u, torch.zeros_like(u[..., 0]), s
    u = alpha[:, None] * u + beta[:, None]
    norm = u.norm(dim=-1)
    return u / (case.N**0.5 * norm.clamp_min(case.eps)[..., None]), norm, s


def expected(case: Case) -> Forward:
    x = case.x.double().masked_fill(~case.valid[..., None], 0)
    y, norm, s = formulas(
        case, x, case.weight.double(), case.given(), case.alpha.double(), case.beta.double()
    )
    masked = s.masked_fill(~case.valid[:, None, :], -torch.inf)
    greatest = masked.amax(-1)
    total = torch.exp(masked - greatest.nan_to_num(0, neginf=0)[..., None]).sum(-1)
    return Forward(y, torch.stack([greatest, total, norm]), s)


def close(got: Tensor, want: Tensor, relative: float) -> None:
    """Within `relative` of the largest value, and no NaN."""
    assert got.shape == want.shape
    scale = float(want[want.isfinite()].abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want.double(), rtol=relative, atol=relative * max(scale, 1e-30))


EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def check_forward(case: Case, got: Forward) -> None:
    want = expected(case)
    valid = case.valid[:, None, :].expand_as(want.scores)
    # y: its own rounding, and that of p
    close(got.y, want.y, (6 if case.features == "offset" else 3) * EPS[case.dtype])
    close(got.scores[valid], want.scores[valid], 2e-5)
    close(got.stats[0], want.stats[0], 2e-5)
    close(got.stats[1], want.stats[1], 2e-4)
    close(got.stats[2], want.stats[2], 3 * EPS[case.dtype])


CASES = {
    "kinetics": Case([25] * 3, 1536, 64, layout="padded"),
    "ragged": Case([25, 1, 0, 32, 7, 31, 2], 200, 64),
    "masked": Case([9, 0, 20, 3, 32, 1], 200, 50, torch.float16, layout="mask", L=32),
    "packed": Case([5, 0, 32, 1, 17, 25, 3], 136, 64, torch.float16, layout="packed"),
    "packed scores": Case([5, 0, 32, 1, 17], 64, 33, layout="packed", weighting="scores", single=True),
    "scores": Case([20, 25, 3, 0, 1], 200, 64, torch.float16, weighting="scores"),
    "average": Case([20, 25, 3, 0, 1], 64, 5, weighting="average"),
    "bias": Case([20, 25, 3, 0, 1], 64, 64, bias=True, single=True),
    "no shift": Case([20, 25, 3, 0, 1], 200, 64, torch.float16, shift=False),
    "one unit": Case([25, 3, 9], 64, 1),
    "one position": Case([1, 1, 1], 64, 64, torch.float16, layout="padded"),
    "eight features": Case([4, 2], 8, 64),
    "offset": Case([25, 32, 8], 200, 64, torch.float16, features="offset", single=True),
    "log_softmax": Case([25, 32, 8], 200, 64, features="log_softmax"),
    "eps": Case([25, 3, 0], 64, 8, eps=30.0),
}


@pytest.mark.parametrize("name", CASES)
def test_forward(probe: Probe, name: str) -> None:
    check_forward(CASES[name], run_forward(probe, CASES[name]))


@pytest.mark.parametrize(("ctas", "units", "clusters"), [(4, 64, 1), (4, 32, 2), (8, 32, 3), (8, 64, 9)])
def test_forward_forms(probe: Probe, ctas: int, units: int, clusters: int) -> None:
    case = Case([25, 1, 0, 32, 7, 31, 2, 3, 4], 264, 30)
    got = run_forward(probe, case, ctas, units, clusters)
    check_forward(case, got)


def test_forward_schedules(probe: Probe) -> None:
    """Other schedules, and another number of clusters, give the same bits."""
    case = Case([25, 0, 32, 7, 1, 9, 12], 200, 64, layout="mask")
    first = run_forward(probe, case, clusters=1)
    for seed in range(1, 5):
        with probe.emulation.schedule(seed):
            other = run_forward(probe, case, clusters=1 + seed % 3)
        for a, b in ((first.y, other.y), (first.stats, other.stats), (first.scores, other.scores)):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_forward_reads_x_once(probe: Probe) -> None:
    case = Case([25, 0, 32, 7], 1536, 64)
    probe.emulation.forget()
    run_forward(probe, case, clusters=1)
    (launch,) = probe.emulation.launches()
    assert launch.bulk_loaded_bytes == sum(case.lengths) * case.M * 2
    # W, once per launch
    assert launch.copied_bytes == case.N * case.M * 2
    # two per set, and one at the start and one before the first set
    assert launch.cluster_syncs == 2 + 2 * len(case.lengths)


@dataclass
class Backward:
    """Gradients; dS is that of the scores, 0 where excluded. Rows of x are (B, L) or packed."""

    dx: Tensor
    ds: Tensor
    dalpha: Tensor
    dbeta: Tensor
    dweight: Tensor


def run_backward(
    probe: Probe, case: Case, ctas: int = 8, units: int = 64, clusters: int = 2, recompute: bool = False
) -> Backward:
    B, N, M, L = len(case.lengths), case.N, case.M, case.L
    forward = expected(case)  # y is not needed, and what is saved is rounded once
    stats = forward.stats.float()
    saved = torch.full((B, L, N), torch.nan)
    saved[case.valid] = forward.scores.transpose(1, 2)[case.valid].float()
    saved = saved[case.valid] if case.layout == "packed" else saved.flatten(0, 1)
    keep: list[Tensor] = []
    dx = torch.full(case.packed.shape, torch.nan, dtype=case.dtype)
    given = case.weighting == "scores"
    dscores = torch.full_like(case.packed_scores, torch.nan) if given else None
    mix = torch.full((2, case.rows, N), torch.nan)
    pivots = torch.full((2, case.rows), torch.nan)
    dshift = torch.full((2, B, N), torch.nan)
    dweight = torch.full((N, M), torch.nan, dtype=case.dtype) if case.weighting == "linear" else None
    counters = torch.full((5,), 7, dtype=torch.int32)
    call = [int(case.dtype == torch.float16), ctas, units, clusters]
    outputs = (case.dy, stats, None if recompute else saved.contiguous(), dx, dscores, mix, pivots)
    last = (dshift if case.shift else None, counters, 4, dweight)
    numbers = [*call, *case.numbers(keep), *(address(o, keep) for o in (*outputs, *last))]
    probe.run("cluster_backward", numbers)
    assert counters.tolist() == [0, 0, 0, 0, 7]
    rows = case.valid if case.layout == "packed" else case.valid.flatten()
    ds = torch.zeros(B, L, N)
    flat = torch.zeros(B * L, N)
    flat[case.valid.flatten()] = mix[1] if case.layout == "packed" else mix[1][rows]
    ds = flat.view(B, L, N).transpose(1, 2)
    if dscores is not None:
        whole = torch.zeros(B, L, N, dtype=dscores.dtype)
        if case.layout == "packed":
            whole[case.valid] = dscores.T
        else:
            whole = dscores.transpose(1, 2)
        assert torch.equal(whole.transpose(1, 2), ds.to(dscores.dtype))
    return Backward(dx, ds, dshift[0].sum(0), dshift[1].sum(0), dweight)


def gradients(case: Case) -> Backward:
    x = case.x.double().masked_fill(~case.valid[..., None], 0).requires_grad_()
    weight, alpha, beta = (t.double().requires_grad_() for t in (case.weight, case.alpha, case.beta))
    given = case.given().masked_fill(~case.valid[:, None, :], 0).requires_grad_()
    y, _, _ = formulas(case, x, weight, given, alpha, beta)
    wanted = torch.autograd.grad(
        y, (x, given, alpha, beta, weight), case.dy.double(), allow_unused=True, materialize_grads=True
    )
    dx = wanted[0][case.valid] if case.layout == "packed" else wanted[0]
    return Backward(dx, *wanted[1:])


def check_backward(case: Case, got: Backward) -> None:
    want = gradients(case)
    eps = EPS[case.dtype]
    # x - rho is not exact for the few features far from rho that log_softmax has.
    close(got.ds, want.ds, eps / 4 if case.features == "log_softmax" else 2e-4)
    close(got.dx, want.dx, 4 * eps)
    if case.shift:
        close(got.dalpha, want.dalpha, 1e-3)
        close(got.dbeta, want.dbeta, 1e-3)
    if got.dweight is not None:
        close(got.dweight, want.dweight, 4 * eps)


@pytest.mark.parametrize("name", CASES)
def test_backward(probe: Probe, name: str) -> None:
    check_backward(CASES[name], run_backward(probe, CASES[name]))


@pytest.mark.parametrize(("ctas", "units", "clusters"), [(4, 64, 1), (4, 32, 2), (8, 32, 3), (8, 64, 9)])
def test_backward_forms(probe: Probe, ctas: int, units: int, clusters: int) -> None:
    case = Case([25, 1, 0, 32, 7, 31, 2, 3, 4], 264, 30)
    check_backward(case, run_backward(probe, case, ctas, units, clusters, recompute=True))


def test_backward_schedules(probe: Probe) -> None:
    case = Case([25, 0, 32, 7, 1, 9, 12], 200, 64, layout="mask")
    first = run_backward(probe, case, clusters=1, recompute=True)
    for seed in range(1, 5):
        with probe.emulation.schedule(seed):
            other = run_backward(probe, case, clusters=1 + seed % 3, recompute=True)
        for name in ("dx", "ds", "dalpha", "dbeta", "dweight"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name


# The operators, where the plan is followed


@pytest.fixture
def operators() -> Iterator[Emulation]:
    """The emulated operators on the GPU they have at first."""
    with Backend("cuda").active():
        yield cuda_operators.load()


def names(emulation: Emulation) -> list[str]:
    """The kernels launched since `forget`, without their template arguments."""
    return [launch.name.split("<")[0].split("::")[-1] for launch in emulation.launches()]


def kernels_of(emulation: Emulation, case: helpers.Case, dy: Tensor | None = None) -> list[str]:
    emulation.forget()
    helpers.run(Backend("cuda"), case, case.dy() if dy is None else dy)
    return names(emulation)


CLUSTERS = ["ForwardCluster", "BackwardCluster", "BackwardReduce"]
PORTABLE = ["ForwardBlocks", "BackwardBlocks", "BackwardReduce"]


@pytest.mark.parametrize("dtype", helpers.HALF, ids=str)
def test_one_clip_takes_one_launch(operators: Emulation, dtype: torch.dtype) -> None:
    case = helpers.make_case(B=1, L=25, M=1536, N=64, dtype=dtype)
    operators.forget()
    with torch.no_grad():
        Backend("cuda")(case)
    (launch,) = operators.launches()
    assert (launch.grid, launch.cluster) == (8, 8)
    assert "ForwardCluster" in launch.name
    assert kernels_of(operators, case) == CLUSTERS
    helpers.check_case(Backend("cuda"), case)


def test_which_calls_take_clusters(operators: Emulation) -> None:
    case = helpers.make_case(dtype=torch.bfloat16)
    assert kernels_of(operators, case) == CLUSTERS
    assert kernels_of(operators, case.to(torch.float32)) == PORTABLE
    assert kernels_of(operators, helpers.make_case(L=33, dtype=torch.bfloat16))[0] == "ForwardBlocks"
    for name, t in (("x", case.x), ("weight", case.weight)):
        assert t is not None
        shifted = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)
        assert kernels_of(operators, case.replace(**{name: shifted})) == PORTABLE
    dy = case.dy()
    across = dy.mT.contiguous().mT
    assert kernels_of(operators, case, across) == [CLUSTERS[0], *PORTABLE[1:]]
    every_second = case.x.repeat_interleave(2, 1)[:, ::2]
    assert kernels_of(operators, case.replace(x=every_second)) == CLUSTERS


@pytest.mark.parametrize("layout", helpers.LAYOUTS)
def test_bits_do_not_depend_on_the_room_for_clusters(operators: Emulation, layout: str) -> None:
    case = helpers.make_case(B=7, dtype=torch.float16, layout=layout, empty=True)
    bound = {"max_length": 23} if layout == "packed" else {}  # else any set might be long

    def call(c: helpers.Case) -> Tensor:
        return helpers.dispatch(fastac.attention_cluster, fastac.attention_pool, c, backend="cuda", **bound)

    dy, found = case.dy(), []
    for room in (1, 2, 3, 9):
        torch.ops.fastac.emulated_device(*cuda_operators.GPUS[90], room)
        operators.forget()
        found.append(helpers.run(call, case, dy))
        assert names(operators) == CLUSTERS
        assert [launch.grid for launch in operators.launches()[:2]] == [4 * min(room, 7)] * 2
    for other in found[1:]:
        helpers.assert_equal(other, found[0])


def test_more_rows_than_max_length_says(operators: Emulation) -> None:
    """The first 32 positions of a set count, the gradients of the others are 0."""
    case = helpers.make_case(B=3, L=40, dtype=torch.bfloat16, weighting="scores")
    packed = helpers.pack(case, torch.tensor([40, 3, 0]), trailing=2)
    assert packed.scores is not None
    parameters = (None, packed.alpha, packed.beta, None, None, packed.offsets, packed.eps)
    operands = (packed.x, None, packed.scores, *parameters)
    operators.forget()
    y, stats, saved = torch.ops.fastac.cuda_forward(*operands, False, 25)
    dy = case.dy()
    dx, _, dscores, *_ = torch.ops.fastac.cuda_backward(dy, *operands, y, stats, saved, 0b110101, 25)
    assert names(operators) == CLUSTERS
    assert case.scores is not None
    first = {"x": case.x[:, :32], "scores": case.scores[..., :32]}
    short = case.replace(**first, lengths=torch.tensor([32, 3, 0]))
    expected = helpers.run(Backend("cuda"), short, dy)
    helpers.assert_equal({"y": y}, {"y": expected["y"]})
    rows = [*range(32), *range(40, 43)]
    valid = torch.arange(32) < torch.tensor([32, 3, 0])[:, None]
    assert torch.equal(dx[rows], expected["dx"][valid])
    assert torch.equal(dscores[:, rows], expected["dscores"].transpose(1, 2)[valid].T)
    assert not dx[32:40].any()
    assert not dx[43:].any()
    assert not dscores[:, 32:40].any()
    assert not dscores[:, 43:].any()
