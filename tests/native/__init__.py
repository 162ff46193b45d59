"""The C++ internals of the CPU kernels as a Python module, built on first use.

Every instruction set gets a copy of its file in csrc/cpu with the probes in the place of the kernels, so that
target pragma, vector width and tile sizes cannot differ from the library's.
"""

from __future__ import annotations

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
from pathlib import Path
from types import ModuleType

import ninja
import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra -g0"


def compiler() -> list[str]:
    """The command that runs the C++ compiler, chosen as setup.py does."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = named or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not found:
        raise RuntimeError("tests/native needs a C++ compiler; install one (apt install g++) or set CXX")
    return found


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
        f"build harness.o: compile {str(HERE / 'harness.cpp').replace(' ', '$ ').replace(':', '$:')}",
        "  optimize = -O1",
    ]
    for isa in ISAS:
        lines += [f"build {isa}.o: compile {isa}.cpp", f"  optimize = -O3 -DFASTAC_PROBES={isa}"]
    return "\n".join([*lines, f"build {library}: link {objects}", f"default {library}", ""])


def build() -> Path:
    """The built module in build/native, under a name that stands for all it was made from."""
    cxx = compiler()
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=True).stdout
    library = "harness" + sysconfig.get_config_var("EXT_SUFFIX")
    files = sorted(
        p for p in [*HERE.iterdir(), *(ROOT / "csrc").rglob("*")] if p.suffix in (".cpp", ".h", ".py")
    )
    key = hashlib.sha256(repr((version, cxx, pybind11.__version__, library, str(ROOT))).encode())
    for file in files:
        key.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    folder = ROOT / "build" / "native" / key.hexdigest()[:16]
    if not (folder / library).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own and moved when complete, so that two runs at a time do not meet.
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            for isa in ISAS:
                (Path(temporary) / f"{isa}.cpp").write_text(probe_source(isa))
            (Path(temporary) / "build.ninja").write_text(ninja_file(cxx, library))
            command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", temporary]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}")
            folder.mkdir(exist_ok=True)
            (Path(temporary) / library).replace(folder / library)
    return folder / library


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
