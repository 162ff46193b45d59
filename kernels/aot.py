"""Compile the kernels without a GPU: `python -m fastac.kernels.aot`.

The table that is printed has a line for each configuration of `aot_jobs`, and the exit status is 1 if one of
them breaks a rule of `failures`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .aot_jobs import LIMIT, SOFTMAX_WEIGHT_LIMIT, TARGETS, Job, of_target

# Compiling


@dataclass
class Row:
    """What became of one job on one target."""

    target: str
    job: Job
    registers: int = 0
    spills: int = 0  # instructions that store or load spilled registers
    stack: int = 0  # bytes
    shared: int = 0  # bytes
    tensor_memory: int = 0  # columns
    matrix: dict[str, int] = field(default_factory=dict)  # mnemonic -> occurrences
    seconds: float = 0.0
    error: str = ""

    def record(self) -> dict[str, Any]:
        """For JSON."""
        j = self.job
        return {
            "target": self.target,
            "kernel": j.kernel,
            "dtype": j.dtype,
            "default": j.default,
            "tile": j.tile,
            "warps": j.warps,
            "stages": j.stages,
            "flags": j.flags,
            "registers": self.registers,
            "spills": self.spills,
            "stack_bytes": self.stack,
            "shared_bytes": self.shared,
            "tensor_memory_columns": self.tensor_memory,
            "matrix_instructions": self.matrix,
            "seconds": round(self.seconds, 2),
            "error": self.error,
            "failures": failures(self),
        }


def failures(row: Row) -> list[str]:
    """The rules that the row breaks. AMD GPUs need no more than a binary."""
    target = TARGETS[row.target]
    if row.error:
        return [f"does not compile: {row.error}"]
    if target.backend != "cuda":
        return []
    found = []
    if row.job.default and (row.spills or row.stack):
        found.append(f"spills: {row.spills} instructions, {row.stack} bytes of stack")
    if row.shared > target.shared:
        found.append(f"needs {row.shared} bytes of shared memory, the chip has {target.shared}")
    if row.tensor_memory > target.tensor_memory:
        found.append(
            f"needs {row.tensor_memory} columns of tensor memory, the chip has {target.tensor_memory}"
        )
    if row.job.needs_matrix and not row.matrix:
        found.append(f"has no matrix instruction ({', '.join(target.matrix)})")
    return found


def compile_job(job: Job, name: str) -> Row:
    """Compile a job for the target of this name and look at the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target, row = TARGETS[name], Row(name, job)
    said: list[str] = []
    began = time.perf_counter()
    try:
        kernel = getattr(importlib.import_module(f"{__package__}.{_module(job.kernel)}"), job.kernel)
        gpu = GPUTarget(target.backend, target.arch, target.warp_size)
        backend = make_backend(gpu)
        places = {parameter: i for i, (parameter, _) in enumerate(job.signature)}
        source = ASTSource(
            fn=kernel,
            signature=dict(job.signature),
            constexprs={(places[k],): v for k, v in job.constants},
            attrs={(places[k],): backend.parse_attr(v) for k, v in job.attributes},
        )
        options = {"num_warps": job.warps, "num_stages": job.stages}
        with _stderr(said):
            binary = triton.compile(source, target=gpu, options=options)
        row.shared = binary.metadata.shared
        row.tensor_memory = getattr(binary.metadata, "tmem_size", None) or 0
        (_inspect_cuda if target.backend == "cuda" else _inspect_hip)(row, binary.asm)
    except Exception as error:  # whatever the compiler raises is a line of the table
        row.error = _explain(error, "".join(said))
    row.seconds = time.perf_counter() - began
    return row


def _module(kernel: str) -> str:
    """Where a kernel is."""
    if kernel.startswith("softmax_weight_"):
        return "softmax_weight"
    return "reduce" if kernel == "backward_reduce" else kernel.split("_")[0]


def _explain(error: BaseException, said: str) -> str:
    """One line: the innermost cause, of which the end matters, and what the compiler wrote."""
    while error.__cause__ is not None:
        error = error.__cause__
    parts = [f"{type(error).__name__}: {str(error)[-200:]}"]
    parts += re.findall(r"error: .*|note: .*|Assertion .*", said)
    return " | ".join(" ".join(part[:250].split()) for part in parts)


@contextlib.contextmanager
def _stderr(said: list[str]) -> Iterator[None]:
    """Put into the list what is meanwhile written to file descriptor 2, where the compiler speaks."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as stream:
        os.dup2(stream.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            stream.seek(0)
            said.append(stream.read())


def _inspect_cuda(row: Row, asm: dict[str, Any]) -> None:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])

        def run(tool: str, option: str) -> str:
            done = subprocess.run([tools / tool, option, cubin], capture_output=True, text=True, check=True)
            return done.stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", run("cuobjdump", "-res-usage"))
        if usage is None:
            raise RuntimeError("cuobjdump printed no register count")
        row.registers, row.stack = int(usage[1]), int(usage[2])
        count_sass(row, run("nvdisasm", "-c"))


def count_sass(row: Row, sass: str) -> None:
    """Fill in the spills and the matrix instructions from what nvdisasm prints."""
    row.spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    counts = {m: len(re.findall(rf"\b{m}\b", sass)) for m in TARGETS[row.target].matrix}
    row.matrix = {m: n for m, n in counts.items() if n}


def _inspect_hip(row: Row, asm: dict[str, Any]) -> None:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", asm["amdgcn"])
        if found is None:
            raise RuntimeError(f"the assembly names no {name}")
        return int(found[1])

    row.registers, row.spills = value("vgpr_count"), value("vgpr_spill_count")
    row.stack = value("private_segment_fixed_size")
    count = len(re.findall(r"\bv_mfma_", asm["amdgcn"]))
    row.matrix = {"v_mfma": count} if count else {}


def compile_all(found: Sequence[tuple[Job, str]], workers: int, chunk: int = 64) -> Iterator[Row]:
    """Compile in `workers` processes; rows come as they are ready."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context)
    try:
        for begin in range(0, len(found), chunk):
            lost: list[tuple[Job, str]] = []
            futures = {pool.submit(compile_job, *f): f for f in found[begin : begin + chunk]}
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    lost.append(futures[future])
            if lost:
                # A compiler that aborts takes along the jobs that waited: one at a time, then.
                pool.shutdown()
                for one, name in lost:
                    with ProcessPoolExecutor(1, context) as alone:
                        try:
                            yield alone.submit(compile_job, one, name).result()
                        except BrokenProcessPool:
                            yield Row(name, one, error="the compiler ended its process")
                pool = ProcessPoolExecutor(workers, context)
    finally:
        pool.shutdown(cancel_futures=True)


# The command line


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "target": lambda r: r.target,
    "kernel": lambda r: r.job.kernel,
    "dtype": lambda r: r.job.dtype,
    "tile": lambda r: " ".join(f"{k}{v}" for k, v in r.job.tile.items()),
    "warps": lambda r: str(r.job.warps),
    "stages": lambda r: str(r.job.stages),
    "regs": lambda r: str(r.registers),
    "spills": lambda r: f"{r.spills}/{r.stack} B",
    "shared": lambda r: str(r.shared),
    "matrix": lambda r: " ".join(f"{k} {v}" for k, v in r.matrix.items()) or "none",
    "s": lambda r: f"{r.seconds:.1f}",
    "flags": lambda r: " ".join([*r.job.flags, *([] if r.job.default else ["(autotune)"])]),
    "": lambda r: "FAILS" if failures(r) else "",
}


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """These columns of the rows as text under a header."""
    lines = [list(columns), *([_COLUMNS[c](r) for c in columns] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def report(rows: Sequence[Row]) -> tuple[str, int]:
    """What is printed, one table per target and the failures behind it; and the exit status."""
    parts = []
    for name in dict.fromkeys(r.target for r in rows):
        mine, target = [r for r in rows if r.target == name], TARGETS[name]
        kind = "compiled, never run" if target.backend == "hip" else "compiled"
        seconds = sum(r.seconds for r in mine)
        parts.append(
            f"== {name}: {len(mine)} configurations {kind}, {seconds:.0f} s of compiling, at most "
            f"{target.shared} bytes of shared memory"
        )
        parts.append(table(mine, [c for c in _COLUMNS if c != "target"]))
    failed = [(r, why) for r in rows for why in failures(r)]
    for r, why in failed:
        tile = _COLUMNS["tile"](r)
        parts.append(
            f"FAILS {r.target} {r.job.kernel} {r.job.dtype} {tile}, {r.job.warps} warps, "
            f"{r.job.stages} stages, {_COLUMNS['flags'](r)}: {why}"
        )
    broken = len({id(r) for r, _ in failed})
    parts.append(
        f"{len(rows)} configurations, {broken} failed" if broken else f"{len(rows)} configurations, all good"
    )
    return "\n".join(parts), 1 if failed else 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastac.kernels.aot",
        description="Compile the Triton kernels for GPUs that need not be there.",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every configuration and those that FASTAC_AUTOTUNE=1 tries; "
        f"else at most {LIMIT + SOFTMAX_WEIGHT_LIMIT} per target",
    )
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), help="only this target (repeatable)"
    )
    parser.add_argument("--kernel", action="append", metavar="NAME", help="only this kernel (repeatable)")
    parser.add_argument("--jobs", type=_positive, default=min(os.cpu_count() or 1, 8), help="processes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the table there")
    parser.add_argument("--list", action="store_true", help="name the configurations and compile none")
    return parser.parse_args(argv)


def _unready() -> str | None:
    """Why nothing can be compiled here, None if it can."""
    interpreter = os.environ.get("TRITON_INTERPRET", "")
    if interpreter.lower() in ("1", "true", "on", "yes", "y"):
        return f"TRITON_INTERPRET must not be set while compiling, it is {interpreter!r}"
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        return f'the kernels cannot be compiled, {error.name} is not installed: pip install "fastac[triton]"'
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; 0 if all is good, 1 if a rule is broken, 2 if nothing can be compiled here."""
    arguments = _arguments(argv)
    unready = _unready()
    if unready is not None:
        print(unready, file=sys.stderr)
        return 2
    found = []
    for name in arguments.target or TARGETS:
        mine = of_target(TARGETS[name], arguments.all)
        found += [(j, name) for j in mine if not arguments.kernel or j.kernel in arguments.kernel]
    if not found:
        print(f"no kernel is called {' or '.join(arguments.kernel)}", file=sys.stderr)
        return 2
    order = {f: i for i, f in enumerate(found)}
    rows = [Row(name, j) for j, name in found]
    text, status = "", 0
    if arguments.list:
        text = table(rows, ("target", "kernel", "dtype", "tile", "warps", "stages", "flags"))
    else:
        for row in compile_all(found, arguments.jobs):
            rows[order[row.job, row.target]] = row
        text, status = report(rows)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([r.record() for r in rows], indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
