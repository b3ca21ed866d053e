# Two commands from nothing: `make demo` and `make test` (README.md).
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.h)

.PHONY: demo test wheel clean

demo: $(VENV)/ready
	$(VENV)/bin/python -m blaq.train.demo --out runs/demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q tests

wheel: $(VENV)/installed  # with CUDA code of every architecture; needs nvcc, and no GPU
	BLAQ_CUDA=1 $(PIP) wheel -q --no-build-isolation --no-deps -w dist .

$(VENV)/installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools torch numpy ninja pybind11 safetensors \
		scikit-learn scipy matplotlib tqdm pytest pytest-benchmark hypothesis \
		$(if $(filter Linux,$(shell uname -s)),triton)
	touch $@

$(VENV)/ready: $(VENV)/installed pyproject.toml setup.py $(NATIVE)
	$(PIP) install -q --no-build-isolation -c constraints.txt -e '.[train,test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info blaq_kernels/_C*.so blaq_kernels/_cuda*.so
