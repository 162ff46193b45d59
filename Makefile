# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt, and
# the C++ extension. Stamps in .venv make a second run start at once; a change in csrc/ recompiles what it touched.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --constraint constraints.txt
LIBRARY := fastac/_C.abi3.so
# Compiling the CUDA kernels takes minutes: `make FASTAC_CUDA=1 build` adds them to the package.
export FASTAC_CUDA ?= 0
CUDA_LIBRARY := fastac/_C_cuda.abi3.so
CUDA_ARCHS ?= 80;90
CUDA_SOURCES := $(wildcard csrc/cuda/*)
NVCC := $(or $(wildcard $(CUDA_HOME)/bin/nvcc),$(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
HARNESS := $(foreach folder,native cuda_emulation,$(wildcard tests/$(folder)/*.cpp tests/$(folder)/*.h))
PYTEST := $(PY) -m pytest --numprocesses auto --dist loadgroup
# test_bench.py measures; the others test the harness.
TESTS := tests $(filter-out benchmarks/test_bench.py,$(wildcard benchmarks/test_*.py))
CROSS_CXX ?= aarch64-linux-gnu-g++

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo test full lint bench bench-compare bench-check report aot cuda gpu sanitize cross clean distclean

help:
	@echo "make demo      train an attention cluster on handwritten digits and compare with plain torch (minutes)"
	@echo "make test      build and run the tests (about twelve minutes on two cores)"
	@echo "make full      run every test, the long ones too, and compile every Triton configuration (an hour or more)"
	@echo "make bench     measure against eager, torch.compile, scaled_dot_product_attention and other poolings"
	@echo "make bench-compare BASE=commit   speed of another commit against this tree (ARGS: see benchmarks/bench_compare.py)"
	@echo "make bench-check   two short ratios against eager, far from close: fails if a fast path is lost"
	@echo "make report    turn the results of make bench into the page of figures in docs/"
	@echo "make aot       compile the Triton kernels for NVIDIA and AMD GPUs that need not be there (AOT_ARGS=--all: all)"
	@echo "make cuda      compile the CUDA kernels for CUDA_ARCHS='$(CUDA_ARCHS)' and print what became of them"
	@echo "make gpu       on an NVIDIA GPU: tests, race repeats, benchmark; GPU_PYTHON=python3 uses that torch, no .venv"
	@echo "make lint      ruff, mypy --strict and clang-format"
	@echo "make sanitize  run the operator tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make cross     compile the portable code for aarch64, where $(CROSS_CXX) is installed"
	@echo "make build     set up .venv and build the extension, no more"
	@echo "make clean     remove what was built; make distclean removes .venv too"
	@echo "PYTHON=python3.12 make ... uses that interpreter for .venv; CXX=... that compiler"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "Python 3.10 or newer is needed, '$(PYTHON)' is not; type: PYTHON=python3.12 make ..."; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || \
		{ echo "a C++ compiler is needed, '$(CXX)' was not found; install one (apt install g++) or set CXX"; exit 1; }
	@echo "== creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "python -m venv failed; install it (apt install python3-venv)"; exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "== installing torch (the largest download, once)"
	@$(PIP) torch setuptools wheel
	@touch $@

$(LIBRARY): $(VENV)/.torch setup.py $(SOURCES)
	@echo "== building $@ (the first time about a minute)"
	@CXX="$(CXX)" $(PY) setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.installed: $(VENV)/.torch constraints.txt pyproject.toml setup.py | $(LIBRARY)
	@echo "== installing fastac (editable) and what the demo and the tests need"
	@CXX="$(CXX)" $(PIP) --quiet --no-build-isolation --editable ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "== installing what lint and bench need"
	@CXX="$(CXX)" $(PIP) --quiet --no-build-isolation --editable ".[dev]"
	@touch $@

build: $(VENV)/.installed $(LIBRARY) $(if $(filter 1,$(FASTAC_CUDA)),$(CUDA_LIBRARY))

$(CUDA_LIBRARY): $(VENV)/.torch setup.py $(CUDA_SOURCES) | $(LIBRARY)
	@echo "== building $@ (minutes)"
	@CXX="$(CXX)" $(PY) setup.py --quiet build_ext --inplace
	@touch $@

demo: build
	@echo "== demo"
	@$(PY) -m fastac demo

test: build
	@echo "== tests"
	@$(PYTEST) -m "not full" --durations=10 $(TESTS)

full: build
	@echo "== all tests"
	@$(PYTEST) --durations=20 $(TESTS)
	@echo "== compiling every Triton configuration"
	@$(PY) -m fastac.kernels.aot --all
	@$(if $(NVCC),$(MAKE) cuda CUDA_ARCHS="80;86;89;90;100;120",echo "== no nvcc: the CUDA kernels were not compiled")

lint: $(VENV)/.dev
	@echo "== ruff"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@echo "== mypy"
	@$(PY) -m mypy
	@echo "== clang-format"
	@$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES) $(CUDA_SOURCES) $(HARNESS)

# The benchmarks start themselves again with the malloc settings they need; benchmarks/machine.py says why.
bench: build $(VENV)/.dev
	@echo "== benchmarks"
	@$(PY) -m benchmarks

# ARGS are arguments of benchmarks/bench_compare.py: make bench-compare BASE=HEAD ARGS="--workload online"
bench-compare: $(if $(BASE),build)
	@$(if $(BASE),,echo "make bench-compare needs a commit: make bench-compare BASE=HEAD~1" >&2; exit 2)
	@$(PY) -m benchmarks.bench_compare "$(BASE)" $(ARGS)

bench-check: build
	@echo "== ratios to eager"
	@$(PY) -m benchmarks.ratio_check $(ARGS)

report: build
	@echo "== report"
	@$(PY) -m fastac report $(ARGS)

# AOT_ARGS are arguments of kernels/aot.py.
aot: build
	@echo "== compiling the Triton kernels"
	@$(PY) -m fastac.kernels.aot $(AOT_ARGS)

# Warnings are errors. The package in the tree stays as it is.
COMPILED := build/cuda
cuda: build
	@$(if $(NVCC),,echo "make cuda needs nvcc, of the CUDA toolkit: not on the path nor in /usr/local/cuda" >&2; exit 2)
	@echo "== compiling the CUDA kernels for $(CUDA_ARCHS)"
	@CXX="$(CXX)" FASTAC_CUDA=1 FASTAC_CUDA_ARCHS="$(CUDA_ARCHS)" \
		NVCC_APPEND_FLAGS="$(strip $(NVCC_APPEND_FLAGS) -Werror all-warnings -Xcompiler -Werror)" \
		$(PY) setup.py --quiet build_ext --build-lib $(COMPILED)
	@$(PY) scripts/cuda_report.py $(COMPILED)/$(CUDA_LIBRARY)
	@$(PY) -m pytest --quiet tests/test_packaging.py -k "CUDA and (stable_symbols or needed_libraries)"

# Ends within eight minutes, .venv not counted; --build adds the CUDA kernels, for this GPU, where nvcc is. With
# GPU_PYTHON nothing is installed: that interpreter builds in place what it can. GPU_ARGS: see benchmarks/gpu.py.
GPU_DEVICE := $(wildcard /dev/nvidiactl /dev/dxg)
gpu: $(if $(GPU_PYTHON),,$(if $(GPU_DEVICE),build))
	@$(if $(GPU_PYTHON)$(GPU_DEVICE),,echo "make gpu needs an NVIDIA GPU: this machine has no /dev/nvidiactl" >&2; exit 2)
	@$(or $(GPU_PYTHON),$(PY)) -m benchmarks.gpu --build $(GPU_ARGS)

# torch itself is not instrumented, so its leaks and its own allocator are left alone; tests that start compilers or
# build wheels would carry the sanitizer into those programs and stay out, as does the one that writes into a guard.
SANITIZED := build/sanitize
# What runs the kernels on tensors.
SANITIZED_TESTS := autograd backends backward bounds classifier classifier_config classifier_errors cuda_cluster \
	cuda_emulation cuda_operators cuda_plan determinism errors forward helpers memory module properties ragged reference \
	softmax_weight strides
sanitize: build
	@echo "== building $(SANITIZED)/fastac"
	@CXX="$(CXX)" FASTAC_SANITIZE=1 $(PY) setup.py --quiet build --build-lib $(SANITIZED)
	@nm -D $(SANITIZED)/$(LIBRARY) | grep -q __asan_init || { echo "the library is not instrumented"; exit 1; }
	@echo "== building the emulated CUDA kernels"
	@emulated=$$(CXX="$(CXX)" FASTAC_SANITIZE=1 PYTHONPATH=tests \
		$(PY) -c 'import cuda_operators; print(cuda_operators.build_operators())') && \
		{ nm -D $$emulated | grep -q __asan_init || { echo "the emulated kernels are not instrumented"; exit 1; }; }
	@echo "== tests under the sanitizers (ten minutes on two cores)"
	@cd $(SANITIZED) && export PYTHONPATH="$(CURDIR)/$(SANITIZED):$(CURDIR)" FASTAC_SANITIZE=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 && \
		$(CURDIR)/$(PY) -c 'import fastac._native as n; print(n.PATH); assert n.available, n.why_not' | \
			grep -F $(SANITIZED) && \
		$(CURDIR)/$(VENV)/bin/pytest -c $(CURDIR)/pyproject.toml --rootdir=$(CURDIR) -m "not full" \
		-k "not triton and not test_the_guard_sees" -p no:cacheprovider --capture=sys --numprocesses auto --dist loadgroup \
		$(SANITIZE_ARGS) $(SANITIZED_TESTS:%=$(CURDIR)/tests/test_%.py)

cross: $(VENV)/.torch
	@command -v $(CROSS_CXX) >/dev/null || { echo "$(CROSS_CXX) is not installed"; exit 1; }
	@echo "== compiling for aarch64"
	@mkdir -p build/cross
	@for source in $(wildcard csrc/*.cpp csrc/cpu/*.cpp); do \
		echo "$$source"; \
		$(CROSS_CXX) -std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra \
			-DTORCH_TARGET_VERSION=0x020a000000000000ULL -Icsrc \
			-isystem $$($(PY) -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')/include \
			-c $$source -o build/cross/$$(basename $$source .cpp).o || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info $(LIBRARY) $(CUDA_LIBRARY) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
