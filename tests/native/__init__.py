"""The C++ internals of the CPU kernels as a Python module, built on first use.

Every instruction set gets a copy of its file in csrc/cpu with the probes in the place of the kernels, so that
target pragma, vector width and tile sizes cannot differ from the library's.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import ninja
import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "avx512_bf16_dot")
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra -g0"


def compiler() -> list[str]:
    """The command that runs the C++ compiler, chosen as setup.py does."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = named or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not found:
        raise RuntimeError("tests/native needs a C++ compiler; install one (apt install g++) or set CXX")
    return found


def asked(cxx: Sequence[str], *arguments: str) -> str:
    """What the compiler answers."""
    environment = {**os.environ, "LD_PRELOAD": ""}
    command = [*cxx, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def probe_source(isa: str) -> str:
    """csrc/cpu/<isa>.cpp with probes instead of the kernels and of their table."""
    text = (ROOT / "csrc" / "cpu" / f"{isa}.cpp").read_text()
    body = '#include "kernel_probes.h"\n\n'
    text, replaced = re.subn(
        r'#include "kernels\.h".*?(?=^}  // namespace fastac$)', body, text, flags=re.S | re.M
    )
    if replaced != 1:
        raise RuntimeError(
            f'csrc/cpu/{isa}.cpp does not end with #include "kernels.h" and the table of its kernels'
        )
    first = '#include "kernels_begin.h"\n'
    if text.count(first) != 1:
        raise RuntimeError(f"csrc/cpu/{isa}.cpp does not include kernels_begin.h once")
    # The pragmas come after it: what probes.h needs is shared and must be compiled before them.
    return text.replace(first, f'{first}#include "probes.h"\n')


def escaped(path: Path) -> str:
    """A path as ninja wants it in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(cxx: list[str], library: str) -> str:
    include = [ROOT / "csrc", ROOT / "csrc" / "cpu", HERE]
    system = [pybind11.get_include(), sysconfig.get_path("include")]
    folders = " ".join([*(f"-I'{p}'" for p in include), *(f"-isystem '{p}'" for p in system)])
    objects = " ".join(["harness.o", *(f"{isa}.o" for isa in ISAS)])
    lines = [
        "rule compile",
        f"  command = {shlex.join(cxx)} {FLAGS} $optimize {folders} -c $in -o $out",
        "rule link",
        f"  command = {shlex.join(cxx)} -shared $in -o $out",
        f"build harness.o: compile {escaped(HERE / 'harness.cpp')}",
        "  optimize = -O1",
    ]
    for isa in ISAS:
        lines += [f"build {isa}.o: compile {isa}.cpp", f"  optimize = -O3 -DFASTAC_PROBES={isa}"]
    return "\n".join([*lines, f"build {library}: link {objects}", f"default {library}", ""])


def build_once(
    group: str,
    library: str,
    plan: str,
    files: Iterable[Path],
    key: str,
    generated: Mapping[str, str] | None = None,
) -> Path:
    """`library`, built in build/<group> by the ninja file `plan`.

    Its folder's name stands for all it was made from: the plan, `key`, the generated sources and the files.
    """
    texts = dict(generated or {}) | {"build.ninja": plan}
    digest = hashlib.sha256(repr((key, library, sorted(texts.items()))).encode())
    for file in sorted(set(files)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    folder = ROOT / "build" / group / digest.hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes of a test run, one builds
        if (folder / library).exists():
            return folder / library
        # In a folder of its own and moved when complete, so that a build that is broken off leaves nothing.
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            for name, text in texts.items():
                (Path(temporary) / name).write_text(text)
            command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", temporary]
            done = subprocess.run(
                command,
                env={**os.environ, "LD_PRELOAD": ""},  # which is for Python, under a sanitizer
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}")
            folder.mkdir(exist_ok=True)
            (Path(temporary) / library).replace(folder / library)
    return folder / library


def build() -> Path:
    """The built module in build/native."""
    cxx = compiler()
    library = "harness" + sysconfig.get_config_var("EXT_SUFFIX")
    folders = (HERE, ROOT / "csrc", ROOT / "csrc" / "cpu")
    files = [p for folder in folders for p in folder.iterdir() if p.suffix in (".cpp", ".h", ".py")]
    return build_once(
        "native",
        library,
        ninja_file(cxx, library),
        files,
        asked(cxx, "--version") + pybind11.__version__,
        {f"{isa}.cpp": probe_source(isa) for isa in ISAS},
    )


def load() -> ModuleType:
    """The module, built if its sources are new."""
    if "harness" not in sys.modules:
        spec = importlib.util.spec_from_file_location("harness", build())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["harness"] = module
    return sys.modules["harness"]
