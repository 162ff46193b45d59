"""Kernels of csrc/cuda in libraries that execute them on the CPU, built on first use by the C++ compiler.

`build` compiles sources together with the emulation; `Emulation` steers the one inside a built library: which
schedule it follows, and what its launches did. FASTAC_EMULATION_SEED is the seed at the start, else 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

from native import ROOT, asked, build_once, compiler, escaped

HERE = Path(__file__).resolve().parent
EMULATION = [HERE / "emulation.cpp", HERE / "instructions.cpp"]
FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -march=native -ffp-contract=fast -DFASTAC_EMULATED"
    " -Wall -Wextra -Wno-unknown-pragmas"
)
ADDRESS = "-fsanitize=address -fno-omit-frame-pointer -g1"
SANITIZE = f"{ADDRESS} -fsanitize=undefined -fno-sanitize=vptr -fno-sanitize-recover=all"


@functools.cache
def machine(cxx: tuple[str, ...]) -> str:
    """What -march=native means here, and the compiler's version: its predefined macros."""
    return asked(cxx, "-march=native", "-x", "c++", "-E", "-dM", os.devnull)


def torch_include() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "include"


def build(
    name: str,
    sources: Sequence[Path],
    *,
    definitions: Sequence[str] = (),
    include: Sequence[Path] = (),
    system_include: Sequence[Path] = (),
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
    optimize: str = "-O1",
    depends: Sequence[Path] | None = None,
    sanitize: bool | None = None,
) -> Path:
    """The library made of `sources` (.cu or .cpp) and the emulation, in build/emulation.

    definitions are without -D; depends are the headers that the sources include, None means all of csrc;
    link is what follows the objects on the linker's command line. sanitize builds with AddressSanitizer and
    UndefinedBehaviorSanitizer, None means FASTAC_SANITIZE=1. Torch's and csrc's headers are always found.
    """
    if sanitize is None:
        sanitize = os.environ.get("FASTAC_SANITIZE") == "1"
    cxx = compiler()
    checks = SANITIZE if sanitize else ""
    folders = [*include, ROOT / "csrc", ROOT / "csrc" / "cuda", HERE]
    system = [*system_include, torch_include()]
    options = [f"-I{p}" for p in folders] + [o for p in system for o in ("-isystem", str(p))]
    options += [f"-D{d}" for d in definitions] + list(flags)
    compile_ = f"{shlex.join(cxx)} {FLAGS} $optimize {shlex.join(options)}"
    lines = [
        "rule compile",
        f"  command = {compile_} -x c++ -c $in -o $out",
        "rule link",
        f"  command = {shlex.join(cxx)} -shared {checks} $in {shlex.join(link)} -o $out",
    ]
    objects = []
    for source in [*EMULATION, *sources]:
        objects.append(f"{source.stem}.o")
        ours = f"-O1 {ADDRESS}" if sanitize else "-O3"
        lines += [f"build {objects[-1]}: compile {escaped(source.resolve())}"]
        lines += [f"  optimize = {ours if source in EMULATION else f'{optimize} {checks}'}"]
    if len(set(objects)) != len(objects):
        raise ValueError(f"sources of {name} with the same name: {objects}")
    library = f"{name}.so"
    lines += [f"build {library}: link {' '.join(objects)}", f"default {library}", ""]
    headers = sorted((ROOT / "csrc").rglob("*")) if depends is None else depends
    files = [p for p in [*HERE.iterdir(), *headers] if p.suffix in (".h", ".cuh")] + [*EMULATION, *sources]
    return build_once("emulation", library, "\n".join(lines), files, machine(tuple(cxx)))


def sanitizer_environment() -> dict[str, str]:
    """What a process needs in its environment to load a library built with `sanitize`."""
    names = ("libasan.so", "libubsan.so")
    libraries = [asked(compiler(), f"-print-file-name={name}").strip() for name in names]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "FASTAC_SANITIZE": "1"}


@dataclass(frozen=True)
class Launch:
    """What one launch did. Warps count mma and ldmatrix, threads cp.async and bulk copies, blocks syncs."""

    name: str
    grid: int
    cluster: int
    threads: int
    shared_bytes: int
    matrix_products: int
    matrix_loads: int
    copies: int
    copied_bytes: int
    bulk_loads: int
    bulk_loaded_bytes: int
    bulk_stores: int
    bulk_stored_bytes: int
    syncs: int
    cluster_syncs: int
    switches: int


class Emulation:
    """The emulation in a built library."""

    def __init__(self, library: Path) -> None:
        self.functions = ctypes.CDLL(str(library))
        self.functions.fastac_emulation_seed.argtypes = [ctypes.c_uint64]
        self.functions.fastac_emulation_seed.restype = ctypes.c_uint64
        self.functions.fastac_emulation_launches.argtypes = [ctypes.c_bool]
        self.functions.fastac_emulation_launches.restype = ctypes.c_int64
        self.functions.fastac_emulation_launch.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
        self.functions.fastac_emulation_launch.restype = ctypes.c_char_p
        self.seed: int = self.functions.fastac_emulation_seed(0)
        self.functions.fastac_emulation_seed(self.seed)

    @contextlib.contextmanager
    def schedule(self, seed: int) -> Iterator[None]:
        """Launches follow the schedule of this seed, 0 is in order."""
        before = self.functions.fastac_emulation_seed(seed)
        self.seed = seed
        try:
            yield
        finally:
            self.functions.fastac_emulation_seed(before)
            self.seed = before

    def forget(self) -> None:
        self.functions.fastac_emulation_launches(True)

    def launches(self) -> list[Launch]:
        """The launches that ended well since `forget`, the last 4096 of them."""
        numbers = (ctypes.c_int64 * (len(fields(Launch)) - 1))()
        found = []
        for i in range(self.functions.fastac_emulation_launches(False)):
            name = self.functions.fastac_emulation_launch(i, numbers)
            found.append(Launch(name.decode(), *numbers))
        return found


def build_probes(sanitize: bool | None = None) -> Path:
    headers = [ROOT / "csrc" / "cuda" / name for name in ("ptx.cuh", "launch.cuh")]
    return build("probes", [HERE / "probes.cpp"], depends=headers, sanitize=sanitize)


class Probes(Emulation):
    """The kernels of probes.cpp, which test the emulation."""

    def __init__(self) -> None:
        super().__init__(build_probes())
        self.functions.fastac_probe.argtypes = [
            ctypes.c_char_p,
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_int64,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
        ]
        self.functions.fastac_probe.restype = ctypes.c_char_p

    def run(
        self, name: str, *addresses: int, grid: int = 1, cluster: int = 1, shared: int = 4096, number: int = 0
    ) -> None:
        arrays = (ctypes.c_void_p * 4)(*addresses)
        error = self.functions.fastac_probe(name.encode(), grid, cluster, shared, arrays, number)
        if error is not None:
            raise RuntimeError(error.decode())
