"""What the compiler made of the CUDA kernels: `python scripts/cuda_report.py fastac/_C_cuda.abi3.so`.

Prints a line per kernel and GPU: registers, spills, static shared memory, how many of the instructions that
access global memory move 16 bytes per thread, and how many instructions are matrix instructions. The exit
status is 1 if a kernel spills, or multiplies half types without matrix instructions; 2 if the tools are not
there. Needs cuobjdump, nvdisasm and c++filt.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MATRIX = ("HMMA", "DMMA", "IMMA", "HGMMA", "UTCHMMA")
GLOBAL = ("LDG", "STG", "LDGSTS")
BULK = ("UBLKCP",)
LOCAL = ("LDL", "STL")
PASSES = ("whole", "gram", "first", "second")  # csrc/cuda/backward.cuh
WITHOUT_PRODUCTS = ("ForwardCombine", "BackwardSums")
CLUSTER = ("ForwardCluster", "BackwardCluster")  # empty on GPUs without clusters
CLUSTERS_FROM = 90


@dataclass
class Kernel:
    """One kernel compiled for one GPU."""

    arch: str
    symbol: str
    name: str = ""
    registers: int = 0
    stack: int = 0  # bytes
    shared: int = 0  # bytes of static shared memory
    instructions: int = 0
    spills: int = 0  # instructions that access local memory
    accesses: int = 0  # instructions that access global memory
    wide: int = 0  # those of them that move 16 bytes per thread
    bulk: int = 0  # bulk copies, which move more
    matrix: dict[str, int] = field(default_factory=dict)  # mnemonic -> occurrences

    @property
    def capability(self) -> int:
        """10 major + minor."""
        return int(re.sub(r"\D", "", self.arch))

    @property
    def empty(self) -> bool:
        """Whether it is a kernel for clusters on a GPU that has none, where nothing launches it."""
        return self.name.startswith(CLUSTER) and self.capability < CLUSTERS_FROM

    def failures(self) -> list[str]:
        """The rules that it breaks."""
        if self.empty:
            return []
        found = []
        if self.spills or self.stack:
            found.append(f"spills: {self.spills} instructions, {self.stack} bytes of stack")
        half = "Half" in self.name or "BFloat16" in self.name
        if half and not self.matrix and not self.name.startswith(WITHOUT_PRODUCTS):
            found.append("has no matrix instruction")
        if self.name.startswith(CLUSTER) and not self.bulk:
            found.append("has no bulk copy")
        return found


def read_usage(lines: Iterable[str]) -> Iterator[Kernel]:
    """The kernels in what `cuobjdump --dump-resource-usage` prints."""
    arch = symbol = ""
    for line in lines:
        if found := re.match(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            yield Kernel(arch, symbol, "", int(found[1]), int(found[2]), int(found[3]))


def count_sass(kernels: Sequence[Kernel], lines: Iterable[str]) -> None:
    """Fill in the counts from what `cuobjdump -sass` prints."""
    known = {(k.arch, k.symbol): k for k in kernels}
    arch, kernel = "", None
    instruction = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)")
    for line in lines:
        if found := instruction.match(line):
            if kernel is None:
                continue
            mnemonic, options = found[1], found[2].split(".")
            kernel.instructions += mnemonic != "NOP"
            if mnemonic in GLOBAL:
                kernel.accesses += 1
                kernel.wide += "128" in options
            elif mnemonic in LOCAL:
                kernel.spills += 1
            elif mnemonic in BULK:
                kernel.bulk += 1
            elif mnemonic in MATRIX:
                kernel.matrix[mnemonic] = kernel.matrix.get(mnemonic, 0) + 1
        elif found := re.search(r"Function : (\S+)", line):
            kernel = known.get((arch, found[1]))
        elif found := re.match(r"arch = (sm_\w+)", line):
            arch, kernel = found[1], None


def short(demangled: str) -> str:
    """`ForwardBlocks<Half, 32, 64>` of the whole name of its entry point."""
    found = re.search(r"entry<(.*?)>\s*\(", demangled)
    name = found[1].strip() if found else demangled
    name = re.sub(r"\((?:fastac::cuda::)?Pass\)(\d)", lambda m: PASSES[int(m[1])], name)
    return re.sub(r"(?:fastac::cuda|c10)::", "", name).replace("(int)", "").replace(" >", ">")


def share(part: int, whole: int) -> str:
    """A percentage."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def table(kernels: Sequence[Kernel]) -> str:
    """The lines of all kernels under a header, GPU by GPU."""
    header = ["gpu", "kernel", "regs", "spills", "static", "code", "global", "16-byte", "bulk", "matrix", ""]
    rows = [header]
    for k in sorted(kernels, key=lambda k: (k.capability, k.arch, k.name)):
        matrix = sum(k.matrix.values())
        rows.append(
            [
                k.arch,
                k.name,
                str(k.registers),
                f"{k.spills}/{k.stack} B",
                f"{k.shared} B",
                str(k.instructions),
                str(k.accesses),
                share(k.wide, k.accesses),
                str(k.bulk),
                " ".join(f"{n} {m}" for m, n in k.matrix.items())
                + (f" ({share(matrix, k.instructions)})" if matrix else "none"),
                "FAILS" if k.failures() else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in padded)


def report(kernels: Sequence[Kernel]) -> tuple[str, int]:
    """What is printed, and the exit status."""
    failed = [(k, why) for k in kernels for why in k.failures()]
    parts = [table(kernels), *(f"FAILS {k.arch} {k.name}: {why}" for k, why in failed)]
    broken = len({id(k) for k, _ in failed})
    archs = len({k.arch for k in kernels})
    parts.append(f"{len(kernels)} kernels for {archs} GPUs, {f'{broken} failed' if broken else 'all good'}")
    return "\n".join(parts), 1 if failed or not kernels else 0


def tools() -> Path | None:
    """The folder of cuobjdump and nvdisasm: of the CUDA toolkit, else of Triton, which brings both."""
    folders = []
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        folders.append(Path(nvcc).resolve().parent)
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / "cuobjdump").is_file() and (folder / "nvdisasm").is_file():
            return folder
    return None


def inspect(library: Path, folder: Path) -> list[Kernel]:
    """All kernels in a library."""
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}

    def lines(option: str) -> Iterator[str]:
        command = [str(folder / "cuobjdump"), option, str(library)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            yield from process.stdout
        if process.returncode != 0:
            raise SystemExit(f"this command failed: {' '.join(command)}")

    kernels = list(read_usage(lines("--dump-resource-usage")))
    symbols = "\n".join(k.symbol for k in kernels)
    names = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True).stdout
    for kernel, name in zip(kernels, names.splitlines(), strict=True):
        kernel.name = short(name)
    count_sass(kernels, lines("-sass"))
    return kernels


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python scripts/cuda_report.py", description=__doc__)
    parser.add_argument("library", type=Path, help="a library or object file with CUDA kernels")
    arguments = parser.parse_args(argv)
    folder = tools()
    if folder is None or shutil.which("c++filt") is None:
        missing = "cuobjdump, nvdisasm or c++filt not found: pip install triton, apt install binutils"
        print(missing, file=sys.stderr)
        return 2
    if not arguments.library.is_file():
        print(f"there is no file {arguments.library}", file=sys.stderr)
        return 2
    text, status = report(inspect(arguments.library, folder))
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
