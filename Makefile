# Two commands from nothing: `make demo` and `make test` (README.md).
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)

.PHONY: demo test clean

demo: $(VENV)/ready
	$(VENV)/bin/python -m blaq.train.demo --out runs/demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q tests

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
	rm -rf $(VENV) build *.egg-info blaq_kernels/_C*.so
