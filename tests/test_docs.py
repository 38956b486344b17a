"""What the pages in docs/ name is there, and their code runs.

Of docs/equations.md: functions can be imported, tests can be found, each equation has its row.
"""

import ast
import importlib
import re
from functools import reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sedd import parallel

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "equations.md").read_text()
FUNCTION = re.compile(r"`(sedd/[\w/]+)\.py: ([\w.]+)`")
TEST = re.compile(r"`(tests/\w+\.py)::(\w+)`")
HEADS = ("| equation", "| formula")


def rows(text):
    """The rows of its tables."""
    return [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(HEADS)]


def found(module, name):
    """Whether `a.b.c` has a public `Name.of`."""
    try:
        reduce(getattr, name.split("."), importlib.import_module(module.replace("/", ".")))
    except (ImportError, AttributeError):
        return False
    return not any(part.startswith("_") for part in name.split("."))


def names_in(file):
    """The functions of a file of tests."""
    if not (ROOT / file).is_file():
        return []
    return [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]


def numbers(text):
    """The equations that a row is about: (19), (20) are two, (23) to (37) fifteen."""
    listed = [int(number) for number in re.findall(r"\((\d+)\)", text)]
    return range(listed[0], listed[1] + 1) if " to " in text else listed


def test_every_function_named_exists():
    named = FUNCTION.findall(PAGE)
    assert len(named) > 40
    assert [f"{module}.py: {name}" for module, name in named if not found(module, name)] == []


def test_every_test_named_exists():
    named = TEST.findall(PAGE)
    assert len(named) > 40
    assert [f"{file}::{name}" for file, name in named if name not in names_in(file)] == []


@pytest.mark.parametrize("row", rows(PAGE), ids=lambda row: row.split("|")[1].strip()[:30])
def test_each_row_is_whole(row):
    """All cells filled; where a function is named so is its test, and nothing else stands in backquotes."""
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert all(cells)
    if len(cells) > 3:
        function, test = cells[-2:]
        assert FUNCTION.sub("", function).strip() == "" and TEST.sub("", test).strip() == ""


def test_no_equation_of_the_paper_is_left_out():
    """Each of its 37 has one row, whether it is implemented or not."""
    of_the_paper = rows(PAGE.partition("## Beyond")[0])
    assert sorted(number for row in of_the_paper for number in numbers(row.split("|")[1])) == list(range(1, 38))


def test_a_wrong_name_is_noticed():
    """The control."""
    assert found("sedd/diffusion/process", "Absorbing.tweedie")
    assert not found("sedd/diffusion/process", "Absorbing.tweedy")
    assert not found("sedd/diffusion/proces", "Absorbing.tweedie")
    assert "test_euler" in names_in("tests/test_pretrained.py") and "test_euler" not in names_in("tests/test_data.py")


@pytest.mark.slow
def test_the_example_under_pmap_gives_the_gradient_of_the_sharded_step():
    """The code of docs/parallel.md is run as it stands."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "parallel.md").read_text(), re.S)
    names = {}
    exec(compile(code, "docs/parallel.md", "exec"), names)
    mesh = parallel.make_mesh(names["config"])
    tokens, rows = jax.device_put((names["tokens"], jnp.arange(64)), parallel.batch_sharding(mesh))
    sharded = jax.jit(jax.grad(names["loss"]))(names["params"], tokens, rows)
    mapped = jax.tree.map(lambda leaf: leaf[0], names["mapped"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mapped, sharded)
    assert optax.tree.norm(mapped) > 0.1 and len(jax.devices()) == 8


PAGES = ["README.md", "tpu_launch/README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page):
    """Every relative link leads somewhere, and every file of the project that is named is there."""
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:sedd|tests|docs|experiments|benchmarks|tpu_launch)/[\w/]+\.\w+)", text)
    files = [(ROOT / page).parent / link for link in links] + [ROOT / name for name in named]
    assert [str(file) for file in files if not file.exists()] == []
    assert files or page not in ("README.md", "docs/index.md")
