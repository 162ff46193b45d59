"""The tool behind `make cuda`, on excerpts of what cuobjdump prints."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

USAGE = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Zforward:
  REG:142 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:704 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Zsums:
  REG:28 STACK:16 SHARED:32 LOCAL:0 CONSTANT[0]:800 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90

Resource usage:
 Function _Zforward:
  REG:150 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:704 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
Fatbin elf code:
================
arch = sm_80

	code for sm_80
		Function : _Zforward
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;       /* 0x00000a00ff017624 */
                                                                                 /* 0x000fe400078e00ff */
        /*06a0*/               @P0 LDG.E.64 R2, [R2.64] ;                        /* 0x0000000a02020981 */
        /*06b0*/              @!P1 STG.E.128 [R2.64], R4 ;                       /* 0x0000000a02020981 */
        /*3940*/                   LDGSTS.E.BYPASS.128.ZFILL [R41], [R44.64], P0 ;  /* 0x000000002c297fae */
        /*3950*/                   LDG.E.LTC128B.64 R2, [R2.64] ;                /* 0x0000000a02020981 */
        /*3960*/                   HMMA.16816.F32 R4, R8, R12, R4 ;              /* 0x0000000c0804723c */
        /*3970*/              @UP0 UBLKCP.S.G [UR4], [UR6], UR8 ;                /* 0x000000080400 */
        /*3980*/                   NOP ;                                         /* 0x0000000000007918 */
		Function : _Zsums
        /*0000*/                   STL [R1], R4 ;                                /* 0x0000000401007387 */
        /*0010*/                   LDL R4, [R1] ;                                /* 0x0000000001047983 */
        /*0020*/                   EXIT ;                                        /* 0x000000000000794d */

Fatbin elf code:
================
arch = sm_90
		Function : _Zforward
        /*12340*/                  EXIT ;                                        /* 0x000000000000794d */
		Function : _Zunknown
        /*0000*/                   STL [R1], R4 ;                                /* 0x0000000401007387 */
"""
FORWARD = (
    "void fastac::cuda::entry<fastac::cuda::ForwardBlocks<c10::Half, 32, 64> >"
    "(fastac::cuda::ForwardBlocks<c10::Half, 32, 64>::Arguments)"
)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_report", ROOT / "scripts" / "cuda_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_report"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_counts(tool: ModuleType) -> None:
    kernels = list(tool.read_usage(USAGE.splitlines()))
    assert [(k.arch, k.symbol, k.registers, k.stack, k.shared) for k in kernels] == [
        ("sm_80", "_Zforward", 142, 0, 0),
        ("sm_80", "_Zsums", 28, 16, 32),
        ("sm_90", "_Zforward", 150, 0, 0),
    ]
    tool.count_sass(kernels, SASS.splitlines())
    forward, sums, newer = kernels
    assert (forward.instructions, forward.accesses, forward.wide, forward.bulk) == (7, 4, 2, 1)
    assert (forward.matrix, forward.spills) == ({"HMMA": 1}, 0)
    assert (sums.instructions, sums.spills, sums.matrix) == (3, 2, {})
    assert (newer.instructions, newer.spills) == (1, 0)  # an unknown function is nobody's


def test_names(tool: ModuleType) -> None:
    assert tool.short(FORWARD) == "ForwardBlocks<Half, 32, 64>"
    backward = FORWARD.replace("Forward", "Backward").replace("64>", "64, (fastac::cuda::Pass)2>")
    assert tool.short(backward) == "BackwardBlocks<Half, 32, 64, first>"


def test_report(tool: ModuleType) -> None:
    kernels = list(tool.read_usage(USAGE.splitlines()))
    tool.count_sass(kernels, SASS.splitlines())
    names = ("ForwardBlocks<Half>", "BackwardSums<Half>", "ForwardBlocks<float>")
    for kernel, name in zip(kernels, names, strict=True):
        kernel.name = name
    text, status = tool.report(kernels)
    assert status == 1
    assert "FAILS sm_80 BackwardSums<Half>: spills: 2 instructions, 16 bytes of stack" in text
    line = next(line for line in text.splitlines() if "ForwardBlocks" in line)
    assert re.sub(" +", " ", line) == "sm_80 ForwardBlocks<Half> 142 0/0 B 0 B 7 4 50 % 1 1 HMMA (14 %)"
    assert text.endswith("3 kernels for 2 GPUs, 1 failed")
    good, status = tool.report([kernels[0], kernels[2]])
    assert (status, good.splitlines()[-1]) == (0, "2 kernels for 2 GPUs, all good")
    assert tool.report([])[1] == 1  # an empty library is no success


def test_half_types_need_matrix_instructions(tool: ModuleType) -> None:
    kernel = tool.Kernel("sm_80", "_Z", "BackwardReduce<BFloat16>")
    assert kernel.failures() == ["has no matrix instruction"]
    assert tool.Kernel("sm_80", "_Z", "ForwardCombine<BFloat16>").failures() == []
    assert tool.Kernel("sm_80", "_Z", "BackwardReduce<float>").failures() == []


def test_kernels_for_clusters_need_bulk_copies_where_there_are_clusters(tool: ModuleType) -> None:
    name = "BackwardCluster<BFloat16, 4, 64>"
    assert tool.Kernel("sm_89", "_Z", name).failures() == []  # compiled away
    assert tool.Kernel("sm_90", "_Z", name, matrix={"HMMA": 1}).failures() == ["has no bulk copy"]
    assert tool.Kernel("sm_120", "_Z", name, bulk=1).failures() == ["has no matrix instruction"]
    assert tool.Kernel("sm_100", "_Z", name, bulk=1, matrix={"HMMA": 1}).failures() == []
    assert len(tool.Kernel("sm_90", "_Z", name, bulk=1, matrix={"HMMA": 1}, stack=8).failures()) == 1


PLANTED = """
template <class Kernel> __global__ void __launch_bounds__(1024, 2) entry(float* p) {
  float kept[COUNT];
  #pragma unroll
  for (int i = 0; i < COUNT; ++i) kept[i] = p[1024 * i + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < COUNT; ++i) p[1024 * i + threadIdx.x] = kept[COUNT - 1 - i] * kept[i];
}
struct ForwardBlocks;
template __global__ void entry<ForwardBlocks>(float*);
"""


@pytest.mark.parametrize(("count", "status"), [(8, 0), (96, 1)])
def test_a_planted_spill_is_found(
    tool: ModuleType, count: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 values fit the 32 registers of a thread, 96 do not; nvcc itself says nothing of it."""
    nvcc = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if nvcc is None or tool.tools() is None:
        pytest.skip("needs nvcc, cuobjdump and nvdisasm")
    source, compiled = tmp_path / "planted.cu", tmp_path / "planted.o"
    source.write_text(PLANTED)
    command = [nvcc, "-arch=sm_80", f"-DCOUNT={count}", "-c", str(source), "-o", str(compiled)]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert tool.main([str(compiled)]) == status
    said = capsys.readouterr().out
    assert bool(re.search(r"FAILS sm_80 ForwardBlocks: spills: [1-9]\d* instructions", said)) == bool(status)
    assert said.endswith(f"1 kernels for 1 GPUs, {'1 failed' if status else 'all good'}\n")


def test_what_cannot_be_read(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if tool.tools() is None:
        assert tool.main([str(tmp_path / "none.so")]) == 2
        assert "not found" in capsys.readouterr().err
        return
    assert tool.main([str(tmp_path / "none.so")]) == 2
    assert "there is no file" in capsys.readouterr().err
