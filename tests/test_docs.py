"""The documents' own code runs: README examples and docstring examples."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import blaq
import blaq_kernels
from blaq_kernels import triton
from blaq_kernels.schemas import SCHEMAS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCTESTED = [name for package in (blaq, blaq_kernels)
             for _, name, _ in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
             if not name.endswith(("._C", "._cuda", ".__main__"))
             and not (name.startswith("blaq_kernels.triton.") and triton.unavailable())]


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_readme_examples_run_and_are_as_short_as_promised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, infer = python_blocks()[:2]
    assert len(train.strip().splitlines()) <= 12
    assert len(infer.strip().splitlines()) <= 6
    scope = {}
    for block in python_blocks():
        exec(compile(block, str(README), "exec"), scope)
    assert scope["accuracy"] > 0.85


def test_deployment_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), re.S)
    scope = {}
    exec(compile(block, "docs/deploy.md", "exec"), scope)
    assert scope["y"].shape == (3, 10)


def test_ops_without_python_have_the_schemas_of_those_with():
    source = (ROOT / "examples/aoti/define_ops.cpp").read_text()
    defined = {"".join(re.findall(r'"(.*)"', definition))
               for definition in re.findall(r"m\.def\((.*?)\);", source, re.S)}
    assert defined == {name + schema for name, schema in SCHEMAS.items() if
                       name == "unpack" or name.endswith(("repack", "linear", "conv2d"))}


@pytest.mark.parametrize("name", DOCTESTED)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
