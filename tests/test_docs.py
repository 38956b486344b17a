"""The pages of docs/, README.md and CONTRIBUTING.md: the names, files and links in them exist, and their code runs.

For docs/equations.md also: functions can be imported, tests exist, each equation of the paper has one row.
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

from sedd.runtime import parallel

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "equations.md").read_text()
FUNCTION = re.compile(r"`(sedd/[\w/]+)\.py: ([\w.]+)`")
TEST = re.compile(r"`(tests/\w+\.py)::(\w+)`")
HEADS = ("| equation", "| formula")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "tpu_launch/README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]


def table_rows(text):
    """The rows of the tables of a page, without headers."""
    return [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(HEADS)]


def is_public(module, name):
    """True if the module `a/b/c` has the attribute `name`, which may have dots, and no part of it is private."""
    try:
        reduce(getattr, name.split("."), importlib.import_module(module.replace("/", ".")))
    except (ImportError, AttributeError):
        return False
    return not any(part.startswith("_") for part in name.split("."))


def function_names(file):
    """The names of the functions of a test file; none if there is no such file."""
    if not (ROOT / file).is_file():
        return []
    return [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]


def equation_numbers(text):
    """The numbers of the equations of a row: (19), (20) are two, (23) to (37) fifteen."""
    listed = [int(number) for number in re.findall(r"\((\d+)\)", text)]
    return range(listed[0], listed[1] + 1) if " to " in text else listed


def anchors(text):
    """The anchors of the headings of a page, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_function_named_exists():
    named = FUNCTION.findall(PAGE)
    assert len(named) > 40
    assert [f"{module}.py: {name}" for module, name in named if not is_public(module, name)] == []


def test_every_test_named_exists():
    named = TEST.findall("".join((ROOT / page).read_text() for page in PAGES))
    assert len(named) > 40
    assert [f"{file}::{name}" for file, name in named if name not in function_names(file)] == []


@pytest.mark.parametrize("row", table_rows(PAGE), ids=lambda row: row.split("|")[1].strip()[:30])
def test_every_cell_of_a_row_is_filled(row):
    """The cells of functions and tests contain nothing else."""
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert all(cells)
    if len(cells) > 3:
        function, test = cells[-2:]
        assert FUNCTION.sub("", function).strip() == "" and TEST.sub("", test).strip() == ""


def test_every_equation_of_the_paper_has_one_row():
    """The paper has 37 equations, implemented or not."""
    of_the_paper = table_rows(PAGE.partition("## Beyond")[0])
    assert sorted(n for row in of_the_paper for n in equation_numbers(row.split("|")[1])) == list(range(1, 38))


def test_wrong_names_are_detected():
    """The control."""
    assert is_public("sedd/diffusion/discrete/process", "Absorbing.tweedie")
    assert not is_public("sedd/diffusion/discrete/process", "Absorbing.tweedy")
    assert not is_public("sedd/diffusion/proces", "Absorbing.tweedie")
    assert "test_euler" in function_names("tests/test_pretrained.py")
    assert "test_euler" not in function_names("tests/test_data.py")


@pytest.mark.slow
def test_the_pmap_example_gives_the_gradient_of_the_sharded_step():
    """Runs the code of docs/parallel.md unchanged."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "parallel.md").read_text(), re.S)
    names = {}
    exec(compile(code, "docs/parallel.md", "exec"), names)
    mesh = parallel.make_mesh(names["config"])
    tokens, rows = jax.device_put((names["tokens"], jnp.arange(64)), parallel.batch_sharding(mesh))
    sharded = jax.jit(jax.grad(names["loss"]))(names["params"], tokens, rows)
    mapped = jax.tree.map(lambda leaf: leaf[0], names["mapped"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mapped, sharded)
    assert optax.tree.norm(mapped) > 0.1 and len(jax.devices()) == 8


@pytest.mark.parametrize("page", PAGES)
def test_links_anchors_and_files_exist(page):
    """Relative links lead to a file and a heading of it. Files of the project that are named exist, but for NAME."""
    text = (ROOT / page).read_text()
    targets = [target.partition("#") for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    links = [((ROOT / page).parent / path if path else ROOT / page, anchor) for path, _, anchor in targets]
    named = re.findall(r"`((?:sedd|tests|docs|experiments|benchmarks|tpu_launch)/[\w/]+\.\w+)", text)
    files = [file for file, _ in links] + [ROOT / name for name in named if "NAME" not in name]
    assert [str(file) for file in files if not file.exists()] == []
    assert [f"{file}#{anchor}" for file, anchor in links if anchor and anchor not in anchors(file.read_text())] == []
    assert files or page not in ("README.md", "docs/index.md")
