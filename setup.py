"""Build of fastac: the metadata is in pyproject.toml, the C++ and CUDA extensions are here.

Environment variables:
    FASTAC_NATIVE=0     build no C++: a pure-Python wheel with the reference (and, on a GPU, Triton) backends
    FASTAC_CUDA         1: build the CUDA kernels, or stop where nvcc is missing; 0: leave them out. If unset
                        they are built where nvcc is found (in $CUDA_HOME, on the path, in /usr/local/cuda)
    FASTAC_CUDA_ARCHS   the GPUs they are compiled for, such as "80;90"; the last one's PTX serves newer GPUs.
                        If unset, those of sm_80, 86, 89, 90, 100 and 120 that nvcc knows
    FASTAC_SANITIZE=1   build with AddressSanitizer and UndefinedBehaviorSanitizer (see `make sanitize`)
    FASTAC_BUILD_JOBS   how many files are compiled at a time (default: the processors, at most 4)
    CXX                 the C++ compiler (default: c++, g++ or clang++, the first one found)
    NVCC_APPEND_FLAGS   more options of nvcc, which reads it itself
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
CUDA_LIBRARY, CUDA_ARCHS = "fastac._C_cuda", "80;86;89;90;100;120"


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


def find_nvcc() -> str | None:
    """The CUDA compiler; CUDA_HOME, if set, says which of several."""
    home = os.environ.get("CUDA_HOME")
    folders = [Path(home, "bin")] if home else []
    folders += [Path(folder) for folder in os.get_exec_path() if folder]
    return shutil.which("nvcc", path=os.pathsep.join(map(str, [*folders, "/usr/local/cuda/bin"])))


def wants_cuda() -> bool:
    """Whether the CUDA kernels are built."""
    if "FASTAC_CUDA" not in os.environ:
        return switch("FASTAC_NATIVE", "1") and not switch("FASTAC_SANITIZE", "0") and find_nvcc() is not None
    if not switch("FASTAC_CUDA", "0"):
        return False
    if not switch("FASTAC_NATIVE", "1"):
        raise SystemExit("fastac: FASTAC_CUDA=1 and FASTAC_NATIVE=0 contradict each other")
    if find_nvcc() is None:
        raise SystemExit(
            "fastac: no nvcc found in $CUDA_HOME/bin, on the path or in /usr/local/cuda/bin; install the "
            "CUDA toolkit, or set FASTAC_CUDA=0"
        )
    return True


def cuda_archs(nvcc: str) -> list[str]:
    """The GPUs to compile for: what is asked for, or of the usual ones those that this nvcc knows."""
    text = os.environ.get("FASTAC_CUDA_ARCHS")
    if text is None:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout
        archs = [arch for arch in CUDA_ARCHS.split(";") if f"sm_{arch}" in known.split()]
        if not archs:
            usual = ", sm_".join(CUDA_ARCHS.split(";"))
            raise SystemExit(
                f"fastac: {nvcc} compiles for none of sm_{usual}; install a newer CUDA toolkit, or set "
                "FASTAC_CUDA=0"
            )
        return archs
    archs = [arch for arch in re.split(r"[;, ]+", text.strip()) if arch]
    if not archs or not all(re.fullmatch(r"([89]\d|1\d\d)[af]?", arch) for arch in archs):
        raise SystemExit(
            f'fastac: FASTAC_CUDA_ARCHS must list GPUs from 80 on, such as "80;90", got {text!r}'
        )
    return archs


def cuda_targets(archs: list[str]) -> list[str]:
    """The options that tell nvcc what to compile for.

    The kernels use what sm_80 and, for clusters, sm_90 brought: two translations to PTX serve all.
    """

    def virtual(arch: str) -> str:
        return "80" if arch in ("80", "86", "87", "88", "89") else "90" if arch.isdecimal() else arch

    codes: dict[str, list[str]] = {}
    for arch in sorted(archs, key=lambda arch: (int(arch.rstrip("af")), arch)):
        codes.setdefault(virtual(arch), []).append(f"sm_{arch}")
    codes[max(codes, key=lambda v: (v.isdecimal(), int(v.rstrip("af"))))].append("ptx")
    return [
        f"-gencode=arch=compute_{v},code=[{','.join(c.replace('ptx', f'compute_{v}') for c in names)}]"
        for v, names in codes.items()
    ]


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
    """Compiles changed files only, several at a time, and links to no C++ interface of torch.

    torch's own BuildExtension links the C++ libraries whose ABI changes from release to release, and needs
    Python's headers; a library that only registers operators needs neither. Objects stay in build/objects,
    outside pip's temporary folders, so that a second `pip install` compiles nothing.
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        (build_cuda if ext.name == CUDA_LIBRARY else build_cpp)(ext.sources, target)
        print(f"fastac: linked {target.name}", flush=True)


def shared_flags() -> list[str]:
    """What both compilers are told."""
    return [
        "-std=c++17",
        "-O3",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION:#018x}ULL",
        "-Icsrc",
        "-isystem",
        str(torch_folder() / "include"),
    ]


def compile_stale(command: list[str], version: str, sources: list[str], name: str) -> list[Path]:
    """Compile what has changed; `command` lacks the files. Returns the objects, relative to the project.

    A change of compiler, flags or torch makes other objects, it never mixes them with the old ones. Relative
    names keep the objects of a copied tree good.
    """
    made_with = (version, command[1:], importlib.metadata.version("torch"))
    key = hashlib.sha256(repr(made_with).encode()).hexdigest()[:12]
    folder = Path("build", "objects", f"{name}-{key}")
    objects = [folder / Path(source).relative_to("csrc").with_suffix(".o") for source in sources]
    stale = [
        (source, obj)
        for source, obj in zip(sources, objects, strict=True)
        if not (ROOT / obj).with_suffix(".d").exists()
        or not up_to_date(ROOT / obj, dependencies((ROOT / obj).with_suffix(".d")))
    ]

    def compile_one(source: str, obj: Path) -> None:
        (ROOT / obj).parent.mkdir(parents=True, exist_ok=True)
        partial = obj.with_suffix(f".{os.getpid()}.o")
        depfile = ["-MMD", "-MF", str(obj.with_suffix(".d")), "-MT", str(obj)]
        print(f"fastac: compiling {source}", flush=True)
        run([*command, *depfile, "-c", source, "-o", str(partial)])
        (ROOT / partial).replace(ROOT / obj)

    jobs = int(os.environ.get("FASTAC_BUILD_JOBS", min(os.cpu_count() or 1, 4)))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: compile_one(*pair), stale))
    return objects


def link(command: list[str], target: Path) -> None:
    """Link to a file beside the target first, so that a process never meets half a library."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    run([*command, "-o", str(partial)])
    partial.replace(target)


def said_by(command: list[str]) -> str:
    """What a compiler prints about itself, without its name: c++ and g++ are often one compiler."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split(maxsplit=1)[1]


def build_cpp(sources: list[str], target: Path) -> None:
    """The CPU half, fastac/_C.abi3.so."""
    cxx = compiler()
    flags = [
        *shared_flags(),
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-Wall",
        "-Wextra",
        f"-DPy_LIMITED_API={PY_LIMITED_API:#010x}",
    ]
    sanitize = []
    if switch("FASTAC_SANITIZE", "0"):
        # vptr needs the run-time types of torch's classes, which the stable ABI does not show.
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        flags += [*sanitize, "-O1", "-g", "-fno-omit-frame-pointer"]
    else:
        flags.append("-g0")
    objects = compile_stale([*cxx, *flags], said_by(cxx), sources, platform.machine())
    # libtorch_cpu.so is the one libtorch name in NEEDED. Without it the aoti_torch_* symbols are missing,
    # as torch loads its libraries privately. The name carries no version and is the same in CPU, CUDA and
    # ROCm builds, and only C symbols of the stable ABI are taken from it, so one binary serves every
    # torch from 2.10 on. No search path is stored: torch is imported first, and the loader finds the
    # library by its name among those already loaded.
    undefined = [] if sanitize else ["-Wl,-z,defs"]
    libraries = ["-Wl,--as-needed", *undefined, f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"]
    link([*cxx, "-shared", *sanitize, *map(str, objects), *libraries], target)


def build_cuda(sources: list[str], target: Path) -> None:
    """The CUDA half, fastac/_C_cuda.abi3.so, for every torch with CUDA from 2.10 on; this one may lack it."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("fastac: nvcc has vanished")
    cxx = compiler()
    host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *cxx[1:]]
    compilers = [nvcc, "-ccbin", cxx[0]]
    flags = [*shared_flags(), "-DUSE_CUDA", "-Xcompiler", ",".join(host), *cuda_targets(cuda_archs(nvcc))]
    version = said_by([nvcc]) + said_by(cxx) + os.environ.get("NVCC_APPEND_FLAGS", "")
    objects = compile_stale([*compilers, *flags], version, sources, f"cuda-{platform.machine()}")

    # The one symbol of libtorch_cuda.so that is needed comes from a stub of that name, so that the result
    # does not depend on the torch installed here. The CUDA runtime is linked statically and kept inside.
    stub = Path("build", "objects", "stub")
    (ROOT / stub).mkdir(parents=True, exist_ok=True)
    (ROOT / stub / "torch_cuda.c").write_text("void aoti_torch_get_current_cuda_stream(void) {}\n")
    stub_library = stub / "libtorch_cuda.so"
    source = ["-x", "c", str(stub / "torch_cuda.c")]
    run([*cxx, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", *source, "-o", str(stub_library)])
    libraries = ["-Xlinker=--no-as-needed", str(stub_library), "-Xlinker=--as-needed"]
    libraries += [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"]
    kept = ["-Xlinker=-z,defs", "-Xlinker=--exclude-libs,ALL"]
    command = [*compilers, "-shared", "-cudart", "static", "-nodlink", *kept, *map(str, objects), *libraries]
    link(command, target)


def run(command: list[str]) -> None:
    """Runs a compiler in the project's root; a failure ends the build with the command that failed."""
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        hint = " (FASTAC_CUDA=0 builds without CUDA)" if Path(command[0]).name == "nvcc" else ""
        raise SystemExit(f"fastac: this command failed{hint}: {shlex.join(command)}")


def extensions() -> list[Extension]:
    nvcc = find_nvcc() if wants_cuda() else None
    if not switch("FASTAC_NATIVE", "1"):
        return []
    if sys.platform != "linux":
        raise SystemExit(f"fastac: the C++ part supports Linux, not {sys.platform}; set FASTAC_NATIVE=0")

    def found(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))

    built = [
        Extension(
            "fastac._C",
            sources=found("csrc/*.cpp") + found("csrc/cpu/*.cpp"),
            depends=found("csrc/*.h") + found("csrc/cpu/*.h"),
            language="c++",
            py_limited_api=True,
        )
    ]
    if nvcc is not None:
        cuda_archs(nvcc)  # complains before anything is compiled
        built.append(
            Extension(
                CUDA_LIBRARY,
                sources=found("csrc/cuda/*.cu"),
                depends=found("csrc/cuda/*.cuh") + found("csrc/cuda/*.h"),
                py_limited_api=True,
            )
        )
    return built


native = extensions()
setup(
    ext_modules=native,
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}} if native else {},
)
