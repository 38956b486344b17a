"""`builtin:functions`: the short functions of the Python standard library.

They differ from one version of Python to another, so figures compare only under the same one.
"""

import ast
import functools
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from sedd.data.source import Source

LONGEST_FUNCTION = 200  # characters, docstring and comments not counted
TELLING_LINE = 40  # characters; two functions that share a longer line are copies in part

# Tests, other people's packages, and programs that many systems ship apart from the library.
LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "tkinter", "turtledemo"
}  # fmt: skip


def open_functions(spec: str) -> Source:
    """One function a document, in the order of files and lines, joined by two empty lines."""
    return Source(spec, joiner="\n\n\n", read=lambda: iter(_functions()))


@functools.cache
def _functions() -> tuple[str, ...]:
    """Kept, unlike other text: it takes seconds to find and less than a megabyte to hold."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if LEFT_OUT.isdisjoint(path.relative_to(root).parts))
    written = (_written(function) for path in paths for function in _outermost(_parsed(path)))
    return tuple(_without_copies(text for text in written if text and len(text) <= LONGEST_FUNCTION))


def _parsed(path: Path) -> ast.AST:
    """The syntax tree of a file, an empty one where it does not parse."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old escapes in strings
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _outermost(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods, but not those inside another one, whose text they belong to."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        else:
            yield from _outermost(node)


def _written(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A function in canonical layout and without its docstring; "" where nothing else is in it."""
    if ast.get_docstring(function, clean=False) is not None:
        del function.body[0]
    return ast.unparse(function) if function.body else ""


def _without_copies(functions: Iterable[str]) -> Iterator[str]:
    seen = set()
    for function in functions:
        marks = {line.strip() for line in function.split("\n") if len(line) > TELLING_LINE} | {function}
        if marks.isdisjoint(seen):
            seen |= marks
            yield function
