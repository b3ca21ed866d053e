# Two commands from nothing: `make demo` and `make test` (README.md).
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.h)
# Where nvcc is one that knows all four architectures: CUDA 12.8 or later.
HAS_NVCC := $(shell PATH="$$PATH:/usr/local/cuda/bin" nvcc --list-gpu-arch 2>/dev/null | grep -x compute_120)

.PHONY: demo test sanitize aoti wheel clean

demo: $(VENV)/ready
	$(VENV)/bin/python -m blaq.train.demo --out runs/demo

# Where nvcc is, CUDA kernels are built for every architecture (minutes, once) and held to their contract.
# In processes, since most tests are Python, or Triton's interpreter, on one core.
test: $(VENV)/ready $(if $(HAS_NVCC),$(VENV)/cuda)
	$(VENV)/bin/python -m pytest -q --numprocesses=auto --maxprocesses=8 --dist=worksteal tests

wheel: $(VENV)/installed  # with CUDA code of every architecture; needs nvcc, and no GPU
	BLAQ_CUDA=1 $(PIP) wheel -q --no-build-isolation --no-deps -w dist .

# The kernel tests with AddressSanitizer and UndefinedBehaviorSanitizer, which a program that is not built
# with them must preload; libstdc++ too, or they miss its exceptions. Python itself leaks.
KERNEL_TESTS ?= $(filter-out tests/test_binary_layers.py, \
	$(wildcard tests/test_cpu_*.py tests/test_binary*.py tests/test_*accuracy.py)) tests/test_errors.py
sanitize: $(VENV)/installed
	BLAQ_SANITIZE=1 BLAQ_CUDA=0 $(VENV)/bin/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(for l in asan ubsan stdc++; do $${CXX:-g++} -print-file-name=lib$$l.so; done | xargs)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize/lib \
	$(VENV)/bin/pytest -q -p no:cacheprovider $(KERNEL_TESTS)

# A packed model compiled, and run by a program without Python (docs/deploy.md).
aoti: $(VENV)/ready
	$(VENV)/bin/python examples/aoti/export.py build/aoti
	$(MAKE) -f examples/aoti/Makefile OUT=build/aoti TORCH=$$($(VENV)/bin/python -c 'import torch; print(torch.__path__[0])')
	cd build/aoti && ./run model.pt2 input output 5 1 28 28
	$(VENV)/bin/python examples/aoti/check.py build/aoti/output build/aoti/expected

$(VENV)/installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools torch numpy ninja pybind11 safetensors \
		scikit-learn scipy matplotlib tqdm pytest pytest-benchmark pytest-xdist hypothesis \
		$(if $(filter Linux,$(shell uname -s)),triton)
	touch $@

$(VENV)/ready: $(VENV)/installed pyproject.toml setup.py $(NATIVE)
	$(PIP) install -q --no-build-isolation -c constraints.txt -e '.[train,test]'
	touch $@

$(VENV)/cuda: $(VENV)/ready $(filter csrc/%.h csrc/cuda/%,$(NATIVE))
	BLAQ_CUDA=only $(VENV)/bin/python setup.py -q build_ext --inplace
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info blaq_kernels/_C*.so blaq_kernels/_cuda*.so
