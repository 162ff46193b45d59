"""What is shipped: the binary's symbols, the wheel outside the tree, builds that must stop, the README."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from typing import Any

import pytest
import torch

import fastac
from fastac import _cuda, _native

pytestmark = pytest.mark.xdist_group("packaging")  # what is built once is shared

ROOT = Path(__file__).resolve().parent.parent
CXX = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The finished process, whatever its status; FASTAC_* and PYTHONPATH are not passed on.

    Nothing here compiles CUDA kernels, which takes minutes.
    """
    inherited = {n: v for n, v in os.environ.items() if not n.startswith("FASTAC_") and n != "PYTHONPATH"}
    inherited["FASTAC_CUDA"] = "0"
    return subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


def succeed(command: list[str], cwd: Path, **environment: str) -> str:
    done = run(command, cwd, **environment)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def undefined_symbols(library: Path) -> list[str]:
    """Demangled names that the loader has to find elsewhere."""
    listing = succeed(["nm", "-D", "--undefined-only", "--demangle", str(library)], library.parent)
    return [line.split(maxsplit=1)[1] for line in listing.splitlines()]


def cpp_libtorch(names: list[str]) -> list[str]:
    """Those that belong to libtorch's C++ interface, whose ABI changes from release to release."""
    return [name for name in names if re.search(r"\b(at|c10|torch|caffe2)::", name)]


def python_api(names: list[str]) -> list[str]:
    """Those of the Python interpreter."""
    return [name for name in names if re.match(r"_?Py[A-Z_]", name)]


def test_detectors_fire() -> None:
    planted = [
        "at::_ops::mm::call(at::Tensor const&, at::Tensor const&)",
        "c10::detail::torchCheckFail(char const*, char const*, unsigned int, char const*)",
        "torch::Library::def(torch::FunctionSchema&&) &",
        "typeinfo for c10::Error",
        "std::vector<at::Tensor, std::allocator<at::Tensor> >::push_back(at::Tensor const&)",
    ]
    harmless = [
        "aoti_torch_empty_strided",
        "torch_library_impl",
        "std::runtime_error::what() const@GLIBCXX_3.4",
        "std::format::what()",
        "__cxa_throw@CXXABI_1.3",
    ]
    assert cpp_libtorch(harmless + planted) == planted
    assert python_api([*harmless, "PyModule_Create2", "_PyObject_New", "_Py_Dealloc"]) == [
        "PyModule_Create2",
        "_PyObject_New",
        "_Py_Dealloc",
    ]


def test_detector_fires_on_a_binary(tmp_path: Path) -> None:
    source = tmp_path / "planted.cpp"
    source.write_text(
        "namespace at { struct Tensor; void touch(Tensor&); }\nvoid f(at::Tensor& t) { at::touch(t); }\n"
    )
    library = tmp_path / "planted.so"
    succeed([*CXX, "-shared", "-fPIC", str(source), "-o", str(library)], tmp_path)
    assert cpp_libtorch(undefined_symbols(library)) == ["at::touch(at::Tensor&)"]


@pytest.fixture(scope="session", params=["C++", "CUDA"])
def library(request: pytest.FixtureRequest) -> Path:
    if request.param == "C++":
        assert _native.available, _native.why_not
        return Path(_native.PATH)
    for path in (_cuda.PATH, ROOT / "build" / "cuda" / "fastac" / _cuda.PATH.name):
        if path.exists():
            return path
    pytest.skip("the CUDA library is not built; `make cuda` builds it and runs this test")


def test_only_stable_symbols(library: Path) -> None:
    names = undefined_symbols(library)
    assert any(name.startswith("aoti_torch_") for name in names), "these are not the symbols of the library"
    assert cpp_libtorch(names) == []
    assert python_api(names) == []


def test_needed_libraries(library: Path) -> None:
    listing = succeed(["readelf", "--dynamic", "--wide", str(library)], library.parent)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", listing))
    system = {"libstdc++.so.6", "libc++.so.1", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
    loader = {name for name in needed if name.startswith("ld-linux")}
    torch_libraries = {"libtorch_cpu.so"}
    if library.name == _cuda.PATH.name:
        torch_libraries.add("libtorch_cuda.so")
        system |= {"libdl.so.2", "librt.so.1", "libpthread.so.0"}  # for the CUDA runtime inside
    assert needed - system - loader == torch_libraries
    assert not re.search(r"\((RPATH|RUNPATH)\)", listing)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without the library, with the compiled objects, so that only links repeat."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy2(ROOT / name, copy)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results", ".*")
    for name in ("fastac", "kernels", "csrc", "scripts", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    if (ROOT / "build" / "objects").is_dir():
        shutil.copytree(ROOT / "build" / "objects", copy / "build" / "objects")
    return copy


def build_wheel(tree: Path, out: Path, **environment: str) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    succeed([sys.executable, "-m", "pip", "wheel", *options, "-w", str(out), "."], tree, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def pure_wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("pure")
    shutil.copytree(
        tree, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build", "*.egg-info", "*.so")
    )
    return build_wheel(copy, tmp_path_factory.mktemp("pure_wheel"), FASTAC_NATIVE="0")


def installed(wheel: Path, target: Path) -> Path:
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    succeed(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(wheel)], target.parent
    )
    return target


def requirements(site: Path) -> list[str]:
    (info,) = site.glob("fastac-*.dist-info")
    distribution: Distribution = PathDistribution(info)
    return list(distribution.requires or [])


def test_wheel_contents(wheel: Path) -> None:
    version = re.escape(fastac.__version__)
    assert re.fullmatch(rf"fastac-{version}-cp310-abi3-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fastac", f"fastac-{fastac.__version__}.dist-info"}
    assert {
        "fastac/_C.abi3.so",
        "fastac/py.typed",
        "fastac/measured.json",
        "fastac/kernels/__init__.py",
        "fastac/cli/__init__.py",
        "fastac/data/__init__.py",
        "fastac/experiments/__init__.py",
        "fastac/models/__init__.py",
        "fastac/report/__init__.py",
        "fastac/report/blocks.html",
        "fastac/report/page.css",
        "fastac/report/page.html",
        "fastac/training/__init__.py",
        f"fastac-{fastac.__version__}.dist-info/licenses/LICENSE",
    } <= set(names)
    assert [name for name in names if name.endswith((".cpp", ".h", ".cu", ".cuh", ".o"))] == []
    packaged = {name for name in names if re.fullmatch(r"fastac/((?!kernels)\w+/)?\w+\.py", name)}
    assert packaged == {str(path.relative_to(ROOT)) for path in (ROOT / "fastac").rglob("*.py")}


COMPUTE = """
import sys, torch, fastac, fastac.kernels
from fastac import _native
assert fastac.__file__.startswith(sys.argv[1]), fastac.__file__
assert _native.available == (sys.argv[2] == "cpu"), _native.why_not
torch.manual_seed(0)
leaves = [torch.randn(*shape, requires_grad=True) for shape in ((3, 7, 20), (5, 20), (5,), (5,))]
lengths = torch.tensor([7, 0, 3])
def gradients(function):
    y = function(*leaves, lengths=lengths)
    return [y, *torch.autograd.grad(y.square().sum() + y.sum(), leaves)]
with fastac.backend(sys.argv[2]):
    ours = gradients(fastac.attention_cluster)
for got, expected in zip(ours, gradients(fastac.reference.attention_cluster)):
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
layer = fastac.AttentionCluster(20, 5)
assert layer(leaves[0]).shape == (3, 100)
print("computed")
"""


def test_wheel_computes_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    site = installed(wheel, tmp_path / "site")
    out = succeed([sys.executable, "-c", COMPUTE, str(site), "cpu"], tmp_path, PYTHONPATH=str(site))
    assert out.strip() == "computed"


def test_pure_wheel(pure_wheel: Path, tmp_path: Path) -> None:
    assert pure_wheel.name == f"fastac-{fastac.__version__}-py3-none-any.whl"
    assert [name for name in zipfile.ZipFile(pure_wheel).namelist() if name.endswith((".so", ".o"))] == []
    site = installed(pure_wheel, tmp_path / "site")
    out = succeed([sys.executable, "-c", COMPUTE, str(site), "reference"], tmp_path, PYTHONPATH=str(site))
    assert out.strip() == "computed"
    info = succeed([sys.executable, "-m", "fastac", "info"], tmp_path, PYTHONPATH=str(site))
    assert "FASTAC_NATIVE=0" in info


def test_every_dependency_is_pinned(wheel: Path, tmp_path: Path) -> None:
    site = installed(wheel, tmp_path / "site")

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {
        normal(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    asked = {normal(re.match(r"[\w.-]+", line).group()) for line in requirements(site)}  # type: ignore[union-attr]
    assert {"torch", "numpy", "pytest"} <= asked
    assert asked - pinned <= {
        "fastac",
        "triton",
    }  # triton: a GPU build of torch brings the one it was made with


def test_sdist_holds_what_a_build_needs(tree: Path, tmp_path: Path) -> None:
    succeed([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)], tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        names = {name.split("/", 1)[-1] for name in contents.getnames()}
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    sources = {str(p.relative_to(ROOT)) for p in files}
    assert len(sources) > 2
    assert sources | {"setup.py", "pyproject.toml", "LICENSE", "kernels/__init__.py"} <= names


def test_editable_install_maps_kernels(tree: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    succeed([sys.executable, "-m", "venv", "--without-pip", str(environment)], tmp_path)
    python = str(environment / "bin" / "python")
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--quiet"]
    succeed([python, "-m", "pip", "install", *options, "--editable", "."], tree)
    code = "import fastac, fastac.kernels as k; print(fastac.__file__, k.__file__, fastac._native.available)"
    where = succeed([python, "-c", code], tmp_path).split()
    assert where == [str(tree / "fastac" / "__init__.py"), str(tree / "kernels" / "__init__.py"), "True"]


def test_rebuild_compiles_only_what_changed(tree: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    succeed(command, tree)
    assert "compiling" not in succeed(command, tree)
    os.utime(tree / "csrc" / "guard.cpp")
    assert re.findall(r"compiling (\S+)", succeed(command, tree)) == ["csrc/guard.cpp"]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with setuptools alone, for an interpreter started without its site-packages."""
    import setuptools

    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (folder / name).symlink_to(Path(setuptools.__file__).parent.parent / name)
    return folder


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0, done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("fastac: ")
    return line


def bare_build(tree: Path, bare: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", "setup.py", "--quiet", "build_ext", "--build-lib", str(bare / "out")]
    return run(command, tree, PYTHONPATH=str(bare), **environment)


def test_build_without_torch_says_what_to_type(tree: Path, bare: Path) -> None:
    line = one_line(bare_build(tree, bare))
    assert "`pip install torch`" in line
    assert "`pip install --no-build-isolation .`" in line


def test_build_with_an_old_torch(tree: Path, bare: Path) -> None:
    (bare / "torch").mkdir()
    (bare / "torch" / "__init__.py").touch()
    (bare / "torch-2.9.1.dist-info").mkdir()
    (bare / "torch-2.9.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n"
    )
    line = one_line(bare_build(tree, bare))
    assert "torch >= 2.10 is needed, not 2.9.1" in line


@pytest.mark.parametrize(
    "environment", [{"CXX": "no-such-compiler"}, {"PATH": "", "CXX": ""}], ids=["CXX", "PATH"]
)
def test_build_without_a_compiler(tree: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    line = one_line(run(command, tree, **environment))
    assert "no C++ compiler" in line
    assert "install one" in line


def write_nvcc(folder: Path) -> dict[str, str]:
    """A CUDA toolkit whose compiler does nothing; the environment in which it is found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    return {"CUDA_HOME": str(folder), "FASTAC_CUDA": "1"}


def setup_py(tree: Path, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path / "out")]
    return run(command, tree, **environment)


@pytest.fixture
def build_rules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that setup.py defines, without its call of `setup`; no variable of the build is set."""
    for name in ("FASTAC_CUDA", "FASTAC_CUDA_ARCHS", "FASTAC_NATIVE", "FASTAC_SANITIZE", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    text = (ROOT / "setup.py").read_text()
    scope: dict[str, Any] = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec(compile(text.split("\nnative = extensions()")[0], "setup.py", "exec"), scope)
    return scope


def test_cuda_is_built_where_nvcc_is_found(
    build_rules: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", write_nvcc(tmp_path / "toolkit")["CUDA_HOME"])
    assert build_rules["find_nvcc"]() == str(tmp_path / "toolkit" / "bin" / "nvcc")
    found = {}
    for nvcc in ("nvcc", None):
        build_rules["find_nvcc"] = lambda nvcc=nvcc: nvcc
        for variables in ({}, {"FASTAC_CUDA": "0"}, {"FASTAC_NATIVE": "0"}, {"FASTAC_SANITIZE": "1"}):
            with monkeypatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                found[(nvcc, *variables)] = build_rules["wants_cuda"]()
    assert [key for key, wanted in found.items() if wanted] == [("nvcc",)]

    monkeypatch.setenv("FASTAC_CUDA", "1")
    with pytest.raises(SystemExit, match=r"fastac: no nvcc found .* set FASTAC_CUDA=0"):
        build_rules["wants_cuda"]()
    build_rules["find_nvcc"] = lambda: "nvcc"
    assert build_rules["wants_cuda"]()


def test_cuda_without_the_native_half(tree: Path, tmp_path: Path) -> None:
    found = one_line(setup_py(tree, tmp_path, FASTAC_CUDA="1", FASTAC_NATIVE="0"))
    assert "contradict" in found


@pytest.mark.parametrize("archs", ["", "sm_90", "75", "80;ninety", "90b"])
def test_cuda_for_what_is_no_gpu(tree: Path, tmp_path: Path, archs: str) -> None:
    environment = write_nvcc(tmp_path / "toolkit") | {"FASTAC_CUDA_ARCHS": archs}
    found = one_line(setup_py(tree, tmp_path, **environment))
    assert found == f'fastac: FASTAC_CUDA_ARCHS must list GPUs from 80 on, such as "80;90", got {archs!r}'


def test_cuda_is_compiled_for_what_is_asked_for(build_rules: dict[str, Any]) -> None:
    """Two translations to PTX, one for GPUs with clusters; the last one's PTX goes along."""
    with pytest.MonkeyPatch.context() as patch:
        for archs, expected in {
            "90;80": ["compute_80,code=[sm_80]", "compute_90,code=[sm_90,compute_90]"],
            "86": ["compute_80,code=[sm_86,compute_80]"],
            "120 90a": ["compute_90a,code=[sm_90a]", "compute_90,code=[sm_120,compute_90]"],
            build_rules["CUDA_ARCHS"]: [
                "compute_80,code=[sm_80,sm_86,sm_89]",
                "compute_90,code=[sm_90,sm_100,sm_120,compute_90]",
            ],
        }.items():
            patch.setenv("FASTAC_CUDA_ARCHS", archs)
            targets = build_rules["cuda_targets"](build_rules["cuda_archs"]("no-nvcc"))
            assert targets == [f"-gencode=arch={e}" for e in expected]


def test_cuda_is_compiled_for_what_nvcc_knows(build_rules: dict[str, Any], tmp_path: Path) -> None:
    """Unless asked for, a GPU that is too new for the CUDA toolkit does not stop the build."""
    write_nvcc(tmp_path / "toolkit")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    for known, expected in (("50 80 86 90 90a", ["80", "86", "90"]), ("90 120 121", ["90", "120"])):
        nvcc.write_text(f"#!/bin/sh\nprintf 'sm_%s\\n' {known}\n")
        assert build_rules["cuda_archs"](str(nvcc)) == expected
    nvcc.write_text("#!/bin/sh\necho sm_75\n")
    with pytest.raises(SystemExit, match=r"none of sm_80, sm_86, .* set FASTAC_CUDA=0"):
        build_rules["cuda_archs"](str(nvcc))


@pytest.mark.parametrize("name", ["FASTAC_NATIVE", "FASTAC_SANITIZE", "FASTAC_CUDA"])
def test_a_switch_is_0_or_1(tree: Path, tmp_path: Path, name: str) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    assert one_line(run(command, tree, **{name: "yes"})) == f"fastac: {name} must be 0 or 1, got 'yes'"


def test_readme_opens_with_two_commands_and_ten_lines_that_run(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)
    language, commands = blocks[0]
    assert language == "sh"
    assert [line.split("#")[0].strip() for line in commands.strip().splitlines()] == [
        "make demo",
        "make test",
    ]
    language, code = blocks[1]
    assert language == "python"
    assert len(code.strip().splitlines()) <= 12
    for language, code in blocks:
        if language == "python":
            succeed([sys.executable, "-W", "error", "-c", code], tmp_path, PYTHONPATH=str(ROOT))
