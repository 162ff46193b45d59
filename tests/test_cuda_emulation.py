"""The emulation of CUDA: every instruction against a case in numpy, and planted mistakes it must report."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulation import HERE, Probes, build_probes, sanitizer_environment, torch_include
from native import ROOT

pytestmark = pytest.mark.xdist_group("cuda_emulation")  # what is built once is shared

SEEDS = (0, 1, 2, 3, 4)
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def probes() -> Probes:
    return Probes()


@pytest.fixture(params=SEEDS)
def scheduled(request: pytest.FixtureRequest, probes: Probes) -> Any:
    """The probes, under one schedule after the other."""
    with probes.schedule(request.param):
        yield probes


def aligned(array: Array) -> Array:
    """A copy whose data stand at a multiple of 64 bytes."""
    space = np.empty(array.nbytes + 64, np.uint8)
    start = -space.ctypes.data % 64
    copy = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run(probes: Probes, name: str, *arrays: Array, **launch: int) -> None:
    assert all(a.flags.c_contiguous for a in arrays)
    probes.run(name, *(a.ctypes.data for a in arrays), **launch)


def lanes() -> tuple[Array, Array]:
    """g and t of every lane."""
    return np.arange(32) // 4, np.arange(32) % 4


def half_bits(values: Array, kind: str) -> Array:
    """16-bit elements as uint16: float16, or the upper half of float32."""
    if kind == "half":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def pairs(first: Array, second: Array) -> Array:
    """Registers of two 16-bit elements, the first in the low half."""
    return first.astype(np.uint32) | second.astype(np.uint32) << 16


def accumulators(c: Array) -> Array:
    """(16, 8) as (32 lanes, 4 registers)."""
    g, t = lanes()
    return np.stack([c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]], 1)


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_multiply_add_of_half_types_has_the_documented_layout(scheduled: Probes, kind: str) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(-99, 100, (16, 16)), rng.integers(-99, 100, (16, 8))
    c = rng.integers(-999, 1000, (16, 8)).astype(np.float32)
    ah, bh = half_bits(a, kind), half_bits(b, kind)
    g, t = lanes()
    fragments = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
    a_registers = np.stack([pairs(ah[row, k], ah[row, k + 1]) for row, k in fragments], 1)
    b_registers = np.stack([pairs(bh[k, g], bh[k + 1, g]) for k in (2 * t, 2 * t + 8)], 1)
    out = np.ascontiguousarray(accumulators(c))
    run(scheduled, f"multiply_add_{kind}", a_registers, b_registers, out, number=2)
    np.testing.assert_array_equal(out, accumulators(c + 2 * (a @ b)))


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_multiply_add_takes_every_16_bit_number(probes: Probes, kind: str) -> None:
    """Subnormal numbers, infinities and NaN: each once as element (0, 0) of a, the rest is 0 and 1."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    chosen = bits[(bits & 0x7F) < 3] if kind == "half" else bits[::37]
    with np.errstate(invalid="ignore"):
        values = (
            chosen.astype(np.uint16).view(np.float16).astype(np.float32)
            if kind == "half"
            else (chosen << 16).view(np.float32)
        )
    one = int(half_bits(np.ones(1), kind)[0])
    b = np.zeros((32, 2), np.uint32)
    b[0, 0] = one  # row 0, column 0
    for number, value in zip(chosen, values, strict=True):
        a, out = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.float32)
        a[0, 0] = number
        run(probes, f"multiply_add_{kind}", a, b, out, number=1)
        np.testing.assert_array_equal(out[0, 0], value)
        assert not out[4:].any()  # the other rows


def test_load_matrices(scheduled: Probes) -> None:
    rows = np.random.default_rng(3).integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    out = np.zeros((2, 32, 4), np.uint32)
    run(scheduled, "load_matrices", rows, out, shared=512)
    g, t = lanes()
    for matrix in range(4):
        m = rows[matrix]
        np.testing.assert_array_equal(out[0, :, matrix], pairs(m[g, 2 * t], m[g, 2 * t + 1]))
        np.testing.assert_array_equal(out[1, :, matrix], pairs(m[2 * t, g], m[2 * t + 1, g]))


@pytest.mark.parametrize("mask", [1, 16, 31])
def test_shuffles_and_votes(scheduled: Probes, mask: int) -> None:
    rng = np.random.default_rng(4)
    source, values = rng.integers(0, 32, 32).astype(np.int32), rng.integers(6, 1000, 32)
    values[7] = 1 << 40  # more than 32 bits
    values[9] = 5
    out = np.zeros((8, 2, 32), np.int64)
    run(scheduled, "shuffles", source, values, out, number=mask)
    for warp in range(2):
        v = values + warp
        np.testing.assert_array_equal(out[0, warp], v[source])
        np.testing.assert_array_equal(out[1, warp], v[source].astype(np.int32))
        np.testing.assert_array_equal(out[2, warp], v[source].astype(np.uint32))
        np.testing.assert_array_equal(out[3, warp], v[source].astype(np.float32))
        np.testing.assert_array_equal(out[4, warp], v[source])
        np.testing.assert_array_equal(out[5, warp], v[np.arange(32) ^ mask])
        assert set(out[6, warp].tolist()) == {sum(1 << i for i in range(32) if v[i] % 3 == 0)}
    assert set(out[7].ravel().tolist()) == {1}  # one thread of the first warp has 5, none has -1


def test_arithmetic(probes: Probes) -> None:
    x = np.random.default_rng(5).uniform(0, 20, 256).astype(np.float32)
    x[:3] = [0, 1, np.inf]
    single, double = np.zeros((4, 256), np.float32), np.zeros((3, 256))
    single[0] = x
    run(probes, "arithmetic", single, double, number=256)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(single[1], np.exp(wide).astype(np.float32), rtol=1.2e-7)
    np.testing.assert_array_equal(single[2], np.sqrt(wide).astype(np.float32))
    np.testing.assert_array_equal(single[3], x / np.float32(3))
    np.testing.assert_allclose(double[0], np.exp(wide), rtol=1e-15)
    np.testing.assert_array_equal(double[1], np.sqrt(wide))
    np.testing.assert_array_equal(double[2], wide / 3)


def test_global_memory_and_the_order_of_blocks(scheduled: Probes) -> None:
    counter, order = np.zeros(1, np.int32), np.zeros(20, np.int32)
    numbers, out = aligned(np.arange(1, 5, dtype=np.float32)), np.zeros((20, 4), np.float32)
    run(scheduled, "global_memory", counter, order, numbers, out, grid=20)
    assert counter[0] == 20
    assert sorted(order.tolist()) == list(range(20))
    np.testing.assert_array_equal(out, np.tile(np.float32([21, 2, 3, 4]), (20, 1)))


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_fill_with_zeros_and_come_at_their_wait(scheduled: Probes, size: int) -> None:
    source = aligned(np.arange(1, 32 * size + 1, dtype=np.int64).astype(np.uint8).reshape(32, size))
    count = (np.arange(32) % (size + 1)).astype(np.int32)
    out = np.zeros((4, 32, size), np.uint8)
    run(scheduled, f"copy_async_{size}", source, count, out)
    expected = np.where(np.arange(size) < count[:, None], source, 0)
    assert np.all(out[0] == 0xFF), "a copy came before its wait"
    np.testing.assert_array_equal(out[1], expected)
    assert np.all(out[2] == 0xFF), "a wait for one group let the next one come"
    np.testing.assert_array_equal(out[3], source)
    launch = scheduled.launches()[-1]
    assert launch.copies == 64 and launch.copied_bytes == int(count.sum()) + 32 * size


def test_a_read_before_the_wait_is_nan(scheduled: Probes) -> None:
    source, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    run(scheduled, "read_of_copy", source, out, number=0)
    np.testing.assert_array_equal(out, source[::-1])
    run(scheduled, "read_of_copy", source, out, number=1)
    assert np.isnan(out).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_bulk_loads_through_two_buffers(scheduled: Probes, rows: int) -> None:
    source = aligned(np.random.default_rng(6).integers(0, 100, (rows, 64)).astype(np.float32))
    out = np.zeros((2, 64), np.float32)
    run(scheduled, "bulk_pipeline", source, out, number=rows)
    np.testing.assert_array_equal(out[0], source.sum(0))
    assert np.isnan(out[1, 0]), "a bulk copy came before its wait"
    launch = scheduled.launches()[-1]
    assert launch.bulk_loads == 2 * rows and launch.bulk_loaded_bytes == source.nbytes


def test_bulk_store_reads_and_writes_as_late_as_it_may(scheduled: Probes) -> None:
    out, seen = aligned(np.zeros(32, np.float32)), np.zeros(2, np.float32)
    numbers = np.arange(32, dtype=np.float32)
    run(scheduled, "bulk_store", out, seen, number=0)
    np.testing.assert_array_equal(out, numbers)
    assert np.isnan(seen[0]) and seen[1] == 0
    run(scheduled, "bulk_store", out, seen, number=1)
    assert out[0] == 77, "the store read its source before it had to"
    run(scheduled, "bulk_store", out, seen, number=2)
    np.testing.assert_array_equal(out, numbers)
    assert np.isnan(seen).all(), "the store was written before the end, without a wait"
    launch = scheduled.launches()[-1]
    assert launch.bulk_stores == 1 and launch.bulk_stored_bytes == 128


@pytest.mark.parametrize("size", [1, 2, 8])
def test_distributed_shared_memory(scheduled: Probes, size: int) -> None:
    out = np.zeros((3 * size, 3), np.int32)
    run(scheduled, "cluster", out, grid=3 * size, cluster=size)
    rank = np.arange(3 * size) % size
    np.testing.assert_array_equal(out[:, 0], 100 + (rank + 1) % size)
    np.testing.assert_array_equal(out[:, 1], 10 * size + rank)
    np.testing.assert_array_equal(out[:, 2], size * (size + 1) // 2)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_mbarriers_between_blocks(scheduled: Probes, size: int) -> None:
    """Arrivals at another block's mbarrier; what that block writes here is seen after waiting."""
    source = aligned(np.arange(2 * size * 64, dtype=np.float32).reshape(2 * size, 64))
    out = np.zeros((2 * size, 64), np.float32)
    run(scheduled, "cluster_barriers", source, out, grid=2 * size, cluster=size, number=3)
    factor = np.arange(2 * size, dtype=np.float32) % size + 3
    np.testing.assert_array_equal(out, source * factor[:, None])


def test_shared_memory_starts_as_nan_in_every_block(probes: Probes) -> None:
    out = np.zeros(999, np.uint8)
    run(probes, "first_look", out, grid=3, shared=999, number=999)
    assert np.all(out == 0xFF)


def test_schedules_show_a_race(probes: Probes) -> None:
    def results(number: int) -> list[bytes]:
        found = []
        for seed in SEEDS:
            out = np.zeros(128, np.float32)
            with probes.schedule(seed):
                run(probes, "neighbour", out, shared=512, number=number)
            found.append(out.tobytes())
        return found

    assert len(set(results(0))) == 1
    assert len(set(results(1))) == len(SEEDS)
    assert results(1) == results(1), "a seed does not repeat its schedule"


def test_schedules_shuffle_the_blocks(probes: Probes) -> None:
    orders = []
    for seed in SEEDS:
        counter, order = np.zeros(1, np.int32), np.zeros(20, np.int32)
        numbers, out = aligned(np.zeros(4, np.float32)), np.zeros((20, 4), np.float32)
        with probes.schedule(seed):
            run(probes, "global_memory", counter, order, numbers, out, grid=20)
        orders.append(order.tolist())
    assert orders[0] == list(range(20))
    assert len({tuple(o) for o in orders}) == len(SEEDS)


def test_launches_are_counted(probes: Probes) -> None:
    probes.forget()
    run(probes, "waiting", grid=4, cluster=2, shared=100, number=3)
    run(probes, "waiting", grid=0)
    (launch,) = probes.launches()
    assert launch.name.endswith("Waiting")
    assert (launch.grid, launch.cluster, launch.threads, launch.shared_bytes) == (4, 2, 128, 100)
    assert (launch.syncs, launch.cluster_syncs, launch.matrix_products) == (12, 6, 0)
    assert launch.switches >= 4 * 128 * 3


MISTAKES = {
    0: r"threads wait for others.*\n  block 0.*threads 0 to 36 in sync, thread 37 returned, threads 38 to",
    1: r"the block diverged",
    2: r"the warp diverged",
    3: r"threads wait for others.*\n  block 0.*threads 0 to 15 in shuffle, threads 16 to 63 in sync",
    4: r"threads wait for others.*\n  block 0.*in cluster_wait\n  block 1.*threads 0 to 63 returned",
    5: r"threads wait for others.*\n  block 0.*threads 0 to 63 in barrier_wait",
    6: r"threads wait for others.*\n  block 0.*thread 0 in barrier_wait, threads 1 to 63 returned",
    7: r"an mbarrier that was not initialised",
    8: r"more arrivals than its phase expects",
    9: r"copy_async: an address that is no multiple of 16",
    10: r"copy_async: an address that is no multiple of 8",
    11: r"load_matrices: an address that is no multiple of 16",
    12: r"bulk_load: an address that is no multiple of 16",
    13: r"bulk_store of 8 bytes",
    14: r"copy_async: outside the 4096 bytes",
    15: r"load_around_cache: an address that is no multiple of 8",
    16: r"returned while copies of it were under way",
    17: r"the block returned while bulk loads to it were under way",
    18: r"returned before its bulk stores had read shared memory",
    19: r"the block returned although thread \d+ of block 0 .* had mapped its shared memory|has returned",
    20: r"map: rank 2 of a cluster of 2",
    21: r"a shuffle from lane",
    22: r"cluster_wait without cluster_arrive",
    23: r"cluster_arrive twice",
    24: r"copy_async: an address that is no multiple of 16",
}


@pytest.mark.parametrize("number", MISTAKES)
def test_mistakes_are_reported(scheduled: Probes, number: int) -> None:
    space = aligned(np.zeros(1024, np.float32))
    message = r"(?s)Mistake.*" + MISTAKES[number]
    if scheduled.seed != 0:  # where the others are depends on the schedule
        message = message.split(r".*\n")[0]
        if number == 19:  # and whether they are still there
            return
    with pytest.raises(RuntimeError, match=message):
        run(scheduled, "mistake", space, grid=2, cluster=2, number=number)
    # What was left in the middle does not disturb the next launch.
    out = np.zeros(128, np.float32)
    run(scheduled, "neighbour", out, shared=512)
    np.testing.assert_array_equal(out, (np.arange(128) + 1) % 128)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"grid": 3, "cluster": 2}, "a multiple of the cluster"),
        ({"grid": 9, "cluster": 9}, "a cluster of 1 to 8 blocks"),
        ({"grid": 1 << 31}, "at most 2\\^31 - 1 blocks"),
        ({"shared": 228 * 1024}, "at most 227 KB"),
    ],
)
def test_launches_that_no_device_would_take(probes: Probes, launch: dict[str, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"Waiting: .*{message}"):
        run(probes, "waiting", **launch)


# What AddressSanitizer must say of each planted mistake.
OUT_OF_BOUNDS = {
    100: "READ of size 4",
    101: "heap-buffer-overflow",
    102: "READ of size 1",
    103: "heap-buffer-overflow",
    104: "use-after-poison",
}


def test_out_of_bounds_is_seen_under_the_sanitizer() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), **sanitizer_environment()}
    if not Path(environment["LD_PRELOAD"].split()[0]).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    build_probes(sanitize=True)
    code = """
import ctypes, sys
from cuda_emulation import Probes
libc, probes, number = ctypes.CDLL(None), Probes(), int(sys.argv[1])
libc.aligned_alloc.restype = ctypes.c_void_p
array = libc.aligned_alloc(ctypes.c_size_t(64), ctypes.c_size_t(256))
if number < 0:  # nothing wrong: clusters, a mistake that is reported and unwinds a fiber, and again
    for _ in range(2):
        probes.run("cluster", array, grid=4, cluster=4)
        try:
            probes.run("mistake", array, grid=2, cluster=2)
        except RuntimeError as error:
            print(error)
else:
    probes.run("mistake", array, grid=2, cluster=2, number=number)
"""
    processes = {
        number: subprocess.run(
            [sys.executable, "-c", code, str(number)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for number in (-1, *OUT_OF_BOUNDS)
    }
    clean = processes.pop(-1)
    assert clean.returncode == 0, clean.stderr
    assert clean.stdout.count("threads wait for others") == 2
    for number, process in processes.items():
        assert process.returncode != 0
        assert "ERROR: AddressSanitizer" in process.stderr, process.stderr
        assert OUT_OF_BOUNDS[number] in process.stderr, process.stderr
        assert "probes.cpp:" in process.stderr, process.stderr  # the line of the kernel


# The other side of ptx.cuh: what the device has instead


def declared(file: Path) -> dict[str, set[str]]:
    """The functions that a header offers to kernels: name to signatures, parameters' names included."""
    pattern = r"((?:template <[^\n]*>\n)?)FASTAC_DEVICE ([\w:\*]+(?: char\*)?) (\w+)\(([^{]*)\) \{"
    found: dict[str, set[str]] = {}
    for template, result, name, parameters in re.findall(pattern, file.read_text()):
        signature = f"{template}{result} {name}({' '.join(parameters.split())})"
        found.setdefault(name, set()).add(signature)
    return found


def test_the_emulation_declares_what_the_device_has() -> None:
    device, emulated = declared(ROOT / "csrc/cuda/ptx.cuh"), declared(HERE / "emulated_ptx.h")
    for name in ("shared_address", "global_address"):  # for the instructions' operands
        del device[name]
    for name in ("exchange", "load_rows"):  # shared by several instructions
        del emulated[name]
    assert len(device) > 30
    assert {name: emulated.get(name, set()) & signatures for name, signatures in device.items()} == device
    assert emulated.keys() == device.keys()


def test_every_instruction_has_a_probe() -> None:
    called = set(re.findall(r"\bptx::(\w+)", (HERE / "probes.cpp").read_text()))
    assert set(declared(HERE / "emulated_ptx.h")) - {"exchange", "load_rows"} - called == set()


FOLDERS = [f"{os.environ.get('CUDA_HOME', '')}/bin", *os.get_exec_path(), "/usr/local/cuda/bin"]
NVCC = shutil.which("nvcc", path=os.pathsep.join(FOLDERS))


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_probes_compile_for_a_device(arch: str, tmp_path: Path) -> None:
    """Every instruction in its inline PTX, assembled; sm_80 traps at what it lacks. Warnings are errors."""
    command = f"{NVCC} -std=c++17 -arch={arch} -cubin -Werror all-warnings -x cu".split()
    command += ["-I", str(ROOT / "csrc" / "cuda"), "-isystem", str(torch_include())]
    command += [str(HERE / "probes.cpp"), "-o", str(tmp_path / "probes.cubin")]
    environment = {**os.environ, "LD_PRELOAD": ""}  # which is for Python, under a sanitizer
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = (tmp_path / "probes.cubin").read_bytes()
    for probe in ("MultiplyAdd", "BulkPipeline", "ClusterBarriers", "Mistake"):
        assert probe.encode() in kernels
