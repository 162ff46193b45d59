"""Build of fastac: the metadata is in pyproject.toml, the C++ extension is here.

Environment variables:
    FASTAC_NATIVE=0     build no C++: a pure-Python wheel with the reference (and, on a GPU, Triton) backends
    FASTAC_SANITIZE=1   build with AddressSanitizer and UndefinedBehaviorSanitizer (see `make sanitize`)
    FASTAC_BUILD_JOBS   how many files are compiled at a time (default: the processors, at most 4)
    CXX                 the C++ compiler (default: c++, g++ or clang++, the first one found)
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)
# (major << 56) | (minor << 48), the encoding of torch/headeronly/version.h: nothing newer than 2.10 is used.
TORCH_TARGET_VERSION = (MINIMUM_TORCH[0] << 56) | (MINIMUM_TORCH[1] << 48)
PYTHON_TAG, PY_LIMITED_API = "cp310", 0x030A0000


def switch(name: str, default: str) -> bool:
    """The value of an environment variable that is 0 or 1."""
    value = os.environ.get(name, default)
    if value not in ("0", "1"):
        raise SystemExit(f"fastac: {name} must be 0 or 1, got {value!r}")
    return value == "1"


def torch_folder() -> Path:
    """The installed torch package; it is located, not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "fastac: torch was not found at build time; type `pip install torch`, then "
            "`pip install --no-build-isolation .` (pip hides installed packages without that option; "
            "FASTAC_NATIVE=0 builds without C++)"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_TORCH:
        raise SystemExit(f"fastac: torch >= 2.10 is needed, not {version}; type `pip install -U torch`")
    return Path(spec.origin).parent


def compiler() -> list[str]:
    """The command that runs the C++ compiler."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if command and shutil.which(command[0]):
            return command
    tried = " or ".join(command[0] for command in candidates if command)
    raise SystemExit(
        f"fastac: no C++ compiler found ({tried}); install one (`apt install g++`, `dnf install gcc-c++`) "
        "or set CXX; FASTAC_NATIVE=0 builds without C++"
    )


def dependencies(depfile: Path) -> list[Path]:
    """The files a compiled source read, from the make rule the compiler wrote beside the object."""
    rule = depfile.read_text().replace("\\\n", " ").split(":", 1)[1]
    return [ROOT / name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", rule.strip())]


def up_to_date(target: Path, sources: list[Path]) -> bool:
    """Whether `target` exists and is newer than every source, all of which exist."""
    if not target.exists():
        return False
    built = target.stat().st_mtime_ns
    return all(source.exists() and source.stat().st_mtime_ns <= built for source in sources)


class BuildExt(build_ext):
    """Compiles changed files only, several at a time, and links to libtorch_cpu and nothing else of torch.

    torch's own BuildExtension links the C++ libraries whose ABI changes from release to release, and needs
    Python's headers; a library that only registers operators needs neither. Objects stay in build/objects,
    outside pip's temporary folders, so that a second `pip install` compiles nothing.
    """

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        cxx = compiler()
        flags = [
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            "-ffp-contract=fast",
            "-Wall",
            "-Wextra",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION:#018x}ULL",
            f"-DPy_LIMITED_API={PY_LIMITED_API:#010x}",
            "-Icsrc",
            "-isystem",
            str(torch / "include"),
        ]
        if switch("FASTAC_SANITIZE", "0"):
            # vptr needs the run-time types of torch's classes, which the stable ABI does not show.
            sanitize = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
            flags += [*sanitize, "-O1", "-g", "-fno-omit-frame-pointer"]
        else:
            sanitize = []
            flags += ["-O3", "-g0"]

        # A change of compiler, flags or torch makes other objects, it never mixes them with the old ones. The
        # names are relative to the project, so that the objects of a copied tree stay good.
        said = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=True).stdout
        version = said.split(maxsplit=1)[1]  # without the name: c++ and g++ are often one compiler
        made_with = (version, cxx[1:], flags, importlib.metadata.version("torch"))
        key = hashlib.sha256(repr(made_with).encode()).hexdigest()[:12]
        folder = Path("build", "objects", f"{platform.machine()}-{key}")
        objects = [folder / Path(source).relative_to("csrc").with_suffix(".o") for source in ext.sources]
        stale = [
            (source, obj)
            for source, obj in zip(ext.sources, objects, strict=True)
            if not (ROOT / obj).with_suffix(".d").exists()
            or not up_to_date(ROOT / obj, dependencies((ROOT / obj).with_suffix(".d")))
        ]

        def compile_one(source: str, obj: Path) -> None:
            (ROOT / obj).parent.mkdir(parents=True, exist_ok=True)
            partial = obj.with_suffix(f".{os.getpid()}.o")
            depfile = ["-MMD", "-MF", str(obj.with_suffix(".d")), "-MT", str(obj)]
            print(f"fastac: compiling {source}", flush=True)
            run([*cxx, *flags, *depfile, "-c", source, "-o", str(partial)])
            (ROOT / partial).replace(ROOT / obj)

        jobs = int(os.environ.get("FASTAC_BUILD_JOBS", min(os.cpu_count() or 1, 4)))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda pair: compile_one(*pair), stale))

        # libtorch_cpu.so is the one libtorch name in NEEDED. Without it the aoti_torch_* symbols are missing,
        # as torch loads its libraries privately. The name carries no version and is the same in CPU, CUDA and
        # ROCm builds, and only C symbols of the stable ABI are taken from it, so one binary serves every
        # torch from 2.10 on. No search path is stored: torch is imported first, and the loader finds the
        # library by its name among those already loaded.
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        undefined = [] if sanitize else ["-Wl,-z,defs"]
        libraries = ["-Wl,--as-needed", *undefined, f"-L{torch / 'lib'}", "-ltorch_cpu"]
        run([*cxx, "-shared", *sanitize, *map(str, objects), *libraries, "-o", str(partial)])
        partial.replace(target)
        print(f"fastac: linked {target.name}", flush=True)


def run(command: list[str]) -> None:
    """Runs a compiler in the project's root; a failure ends the build with the command that failed."""
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise SystemExit(f"fastac: this command failed: {shlex.join(command)}")


def extensions() -> list[Extension]:
    if not switch("FASTAC_NATIVE", "1"):
        return []
    if sys.platform != "linux":
        raise SystemExit(f"fastac: the C++ part supports Linux, not {sys.platform}; set FASTAC_NATIVE=0")

    def found(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))

    return [
        Extension(
            "fastac._C",
            sources=found("csrc/*.cpp") + found("csrc/cpu/*.cpp"),
            depends=found("csrc/*.h") + found("csrc/cpu/*.h"),
            language="c++",
            py_limited_api=True,
        )
    ]


native = extensions()
setup(
    ext_modules=native,
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}} if native else {},
)
