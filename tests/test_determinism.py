"""The same bits for any number of threads and in every run, per instruction set."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, assert_equal, check_case, make_case, make_lengths, pack, run
from tested_backends import Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = {"ids": lambda v: str(v).removeprefix("torch.")}


def bags(dtype: torch.dtype) -> dict[str, Case]:
    """Many sets, few sets, one long bag (its rows are split over threads), ragged ones with a long set."""
    long = make_case(B=1, L=5000, M=67, N=5, dtype=dtype)
    uneven = torch.tensor([1, 2000, 0, 30, 31, 500, 3])
    return {
        "many sets": make_case(B=61, L=25, M=67, N=17, dtype=dtype),
        "many sets, mask": make_case(B=61, L=25, M=67, N=17, dtype=dtype, layout="mask", empty=True),
        "large weight": make_case(B=3, L=40, M=700, N=70, dtype=dtype),
        "three sets": make_case(B=3, L=100, M=131, N=33, dtype=dtype, weighting="position_bias"),
        "long bag": long,
        "long bag, many units": make_case(B=1, L=5000, M=420, N=41, dtype=dtype),
        "long bag, scores": make_case(B=1, L=5000, M=67, N=5, dtype=dtype, weighting="scores"),
        "long bag, average": make_case(B=1, L=5000, M=67, N=5, dtype=dtype, weighting="average"),
        "long bag, packed": pack(long, torch.tensor([4990]), trailing=10),
        "uneven, packed": pack(make_case(B=7, L=2000, M=35, N=9, dtype=dtype), uneven, trailing=2),
        "uneven, scores": pack(make_case(B=7, L=2000, M=35, N=9, dtype=dtype, weighting="scores"), uneven),
        "uneven, lengths": make_case(B=7, L=500, M=35, N=9, dtype=dtype).replace(
            lengths=make_lengths(7, 500)
        ),
    }


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_bitwise_equal_for_any_thread_count(native: Backend, dtype: torch.dtype) -> None:
    for name, case in bags(dtype).items():
        dy = case.dy()
        first = inference = None
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results = run(native, case, dy)
            alone = run(native, case)
            if first is None or inference is None:
                first, inference = results, alone
            assert_equal(results, first, f"between 1 and {threads} threads ({name})")
            assert_equal(alone, inference, f"at inference, between 1 and {threads} threads ({name})")


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_bitwise_equal_from_run_to_run(native: Backend, dtype: torch.dtype) -> None:
    torch.set_num_threads(8)
    for name in ("many sets, mask", "long bag", "uneven, packed", "uneven, scores"):
        case = bags(dtype)[name]
        dy = case.dy()
        first = run(native, case, dy)
        for repeat in range(1, 6):
            again = case.replace(**{n: t.clone() for n, t in case.floats().items()})
            assert_equal(run(native, again, dy.clone()), first, f"in run {repeat} ({name})")


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_frozen_features_are_deterministic(native: Backend, dtype: torch.dtype) -> None:
    for name in ("many sets", "long bag", "uneven, packed"):
        case = bags(dtype)[name]
        dy = case.dy()
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(run(native, case, dy, ("weight", "alpha", "beta")))
        assert_equal(found[1], found[0], f"between 1 and 3 threads ({name})")


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_a_long_bag_is_accurate(cpp: Backend, dtype: torch.dtype) -> None:
    """The parts of a bag are combined by log-sum-exp; the largest scores lie in one part only."""
    case = make_case(B=1, L=5000, M=67, N=5, dtype=dtype, weighting="scores")
    assert case.scores is not None
    scores = case.scores.clone()
    scores[:, :, 4321:] += 20
    check_case(cpp, case.replace(scores=scores), all_terms=True)
    check_case(cpp, make_case(B=1, L=5000, M=67, N=5, dtype=dtype), all_terms=True)


def test_a_long_bag_with_a_part_of_minus_infinity(cpp: Backend) -> None:
    case = make_case(B=1, L=5000, M=35, N=4, weighting="scores")
    assert case.scores is not None
    for start, stop in ((0, 4000), (1000, 5000), (100, 4900)):
        scores = case.scores.clone()
        scores[:, :, start:stop] = -float("inf")
        check_case(cpp, case.replace(scores=scores), all_terms=True)
        mask = torch.ones(1, 5000, dtype=torch.bool)
        mask[:, start:stop] = False
        check_case(cpp, case.replace(mask=mask), all_terms=True)


def test_thread_counts_are_really_used() -> None:
    """The control of the tests above: a sum split by the number of threads does differ in its last bits."""
    x = torch.randn(1_000_003)
    sums = {n: float(sum(part.sum() for part in x.chunk(n))) for n in (1, 2, 3, 8)}
    assert len(set(sums.values())) > 1
