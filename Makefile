# Two commands from nothing: `make demo` and `make test` (README.md).
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check

.PHONY: test clean

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q tests

$(VENV)/ready: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools torch numpy ninja pybind11 pytest pytest-benchmark
	$(PIP) install -q --no-build-isolation -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
