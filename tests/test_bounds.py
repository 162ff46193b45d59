"""No kernel in C++ reads or writes out of bounds, whatever a direct operator call hands it."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, WEIGHTINGS, Case, fenced, make_case, pack
from tested_backends import Backend

from fastac import ops

FLOATS = ("x", "weight", "scores", "position_bias", "alpha", "beta")


def arguments(case: Case) -> dict[str, Any]:
    """The operators' arguments by name."""
    names = (*FLOATS, "lengths", "mask", "offsets", "eps")
    return {name: getattr(case, name) for name in names}


def inference(backend: Backend, case: Case) -> torch.Tensor:
    found: torch.Tensor = ops.operator(backend.name, "inference")(**arguments(case))
    return found


def forward(backend: Backend, case: Case) -> tuple[torch.Tensor, ...]:
    found: tuple[torch.Tensor, ...] = ops.operator(backend.name, "forward")(
        **arguments(case), save_scores=True
    )
    return found


def backward(
    backend: Backend, case: Case, saved: tuple[torch.Tensor, ...], dy: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    needs = sum(1 << i for i, name in enumerate(FLOATS) if getattr(case, name) is not None)
    rest = dict(zip(("y", "stats", "saved_scores"), saved, strict=True))
    dy = case.dy() if dy is None else dy
    found: tuple[torch.Tensor, ...] = ops.operator(backend.name, "backward")(
        dy, **arguments(case), **rest, needs=needs
    )
    return found


def wrong(case: Case, name: str) -> list[Any]:
    """Values of one argument that contradict the others. (A meta tensor is answered by the fake kernels.)"""
    t = getattr(case, name)
    found: list[Any] = [t[..., :-1], t[:-1], t[None]]
    if name == "weight":
        found += [t.to(torch.float64), t.to(torch.int64)]
    elif name not in FLOATS:  # scores, alpha, ... of another type are converted
        found += [t.to(torch.float32), t.to(torch.int32)]
    if name == "position_bias":
        found = [t[:-1], t[None]]
        found += [t[:, :22]] if case.offsets is None else []
    if name == "x":
        found = [t[None], t.flatten(), t.to(torch.int64), t[..., :0]]
        if case.weight is not None:
            found.append(t[..., :-1])
        if case.scores is not None or case.lengths is not None or case.mask is not None:
            found.append(t[:-1])
    if name == "offsets":
        found = [t[None], t.to(torch.float32), t.to(torch.int32), t[:0]]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_contradicting_arguments_are_refused(cpp: Backend, weighting: str, layout: str) -> None:
    case = make_case(weighting=weighting, layout=layout)
    saved = forward(cpp, case)
    for name in (*FLOATS, "lengths", "mask", "offsets"):
        if getattr(case, name) is None:
            continue
        for value in wrong(case, name):
            bad = case.replace(**{name: value})
            what = f"{name} {tuple(value.shape)} {value.dtype} {value.device}"
            for operator in ("inference", "forward", "backward"):
                try:
                    if operator == "inference":
                        inference(cpp, bad)
                    elif operator == "forward":
                        forward(cpp, bad)
                    else:
                        backward(cpp, bad, saved, case.dy())
                except RuntimeError:
                    continue
                pytest.fail(f"{operator} took {what}")


def test_both_or_too_many_variants_are_refused(cpp: Backend) -> None:
    case, other = make_case(), make_case(weighting="scores")
    ragged = {"lengths": torch.full((5,), 3), "mask": torch.ones(5, 23, dtype=torch.bool)}
    bad = [
        case.replace(scores=other.scores),
        case.replace(alpha=None),
        case.replace(beta=None),
        case.replace(**ragged),
        case.replace(lengths=ragged["lengths"], offsets=torch.tensor([0, 1, 2, 3, 4, 5])),
    ]
    for c in bad:
        with pytest.raises(RuntimeError):
            inference(cpp, c)
        with pytest.raises(RuntimeError):
            forward(cpp, c)


def test_saved_tensors_of_wrong_shape_are_refused(cpp: Backend) -> None:
    case = make_case(M=640, N=4)
    dy, saved = case.dy(), forward(cpp, case)
    for i in range(3):
        for bad in (saved[i][:-1], saved[i][..., :-1], saved[i].double()):
            changed = (*saved[:i], bad, *saved[i + 1 :])
            with pytest.raises(RuntimeError):
                backward(cpp, case, changed, dy)
    for bad_dy in (dy[:-1], dy[..., :-1], dy[:, :-1], dy.double(), dy.flatten(1)):
        with pytest.raises(RuntimeError):
            backward(cpp, case, saved, bad_dy)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_lengths_are_clamped(cpp: Backend, weighting: str) -> None:
    """Values are not checked by the operators: a length beyond L counts as L, a negative one as 0."""
    case = make_case(weighting=weighting)
    wild = case.replace(lengths=torch.tensor([2**40, -1, 23, 24, -(2**40)]))
    tame = case.replace(lengths=torch.tensor([23, 0, 23, 23, 0]))
    dy = case.dy()
    for ours, expected in zip(forward(cpp, wild)[:2], forward(cpp, tame)[:2], strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip(
        backward(cpp, wild, forward(cpp, wild), dy), backward(cpp, tame, forward(cpp, tame), dy), strict=True
    ):
        assert torch.equal(ours, expected)
    assert torch.equal(inference(cpp, wild), inference(cpp, tame))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_wild_offsets_stay_in_bounds(cpp: Backend, weighting: str) -> None:
    """Offsets out of range, or falling: no guard hit, no crash, and a finite answer where they rise.

    On the CPU it is finite in any case. A GPU's operators never see the values: rows that no set has, or two
    have, get any answer. What lies around the operands is NaN.
    """
    case = pack(make_case(weighting=weighting), torch.full((5,), 20))
    if case.position_bias is not None:
        case = case.replace(position_bias=torch.randn(11, 100))
    for offsets in (
        [0, 20, 40, 60, 80, 2**40],
        [-(2**40), 20, 40, 60, 80, 100],
        [0, 50, 40, 30, 20, 10],
        [100, 0] * 3,
    ):
        around = {name: fenced(t) for name, t in case.floats().items()}
        wild = case.replace(**around, offsets=torch.tensor(offsets))
        saved = forward(cpp, wild)
        found = (saved[0], inference(cpp, wild), *backward(cpp, wild, saved))
        rising = all(a <= b for a, b in itertools.pairwise([0, *offsets[1:]]))
        if rising or cpp.name == "cpu":
            assert all(t.isfinite().all() for t in found)


def test_packed_sets_longer_than_the_position_bias(cpp: Backend) -> None:
    """The longest set is data, so the operator cannot refuse it: it must not read past L_max either."""
    case = pack(make_case(weighting="position_bias"), torch.full((5,), 20))
    case = case.replace(position_bias=torch.randn(11, 6))
    try:
        saved = forward(cpp, case)
        backward(cpp, case, saved)
    except RuntimeError as error:
        assert "position_bias" in str(error)


def test_the_guard_sees_a_write_past_the_end(cpp: Backend) -> None:
    """The control of every guarded test: one foreign byte beyond an output, or before it, is counted."""
    for offset in ("end", "start"):
        y = cpp(make_case())
        nbytes = y.numel() * y.element_size()
        address = y.data_ptr() + (nbytes if offset == "end" else -1)
        before = ctypes.string_at(address, 1)[0]
        ctypes.memset(address, before ^ 0xFF, 1)
        guard = torch.ops.fastac.cpu_guard if cpp.name == "cpu" else torch.ops.fastac.emulated_guard
        assert guard(True) >= 1, offset
        assert guard(True) == 0, "the call clears the list"


def test_outputs_are_poisoned(cpp: Backend) -> None:
    """A kernel that forgets an element hands out NaN: everything the operators return was written by them."""
    for layout in LAYOUTS:
        case = make_case(layout=layout, empty=True)
        saved = forward(cpp, case)
        y, stats, _ = saved  # saved scores are kept for valid positions only
        for t in (y, stats[1:], *backward(cpp, case, saved)):
            assert t.isfinite().all()
        assert not stats[0].isnan().any()
