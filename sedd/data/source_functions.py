"""`builtin:functions`: the short functions of the Python standard library.

They depend on the version of Python: figures are comparable only under the same one.
"""

import ast
import functools
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from sedd.data.source import Source

LONGEST_FUNCTION = 200  # characters, without docstring and comments
DISTINCTIVE_LINE = 40  # characters; two functions that share a longer line are partial copies

# Tests, third-party packages, and programs that many systems ship apart from the library.
EXCLUDED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "tkinter", "turtledemo"
}  # fmt: skip


def open_functions(spec: str) -> Source:
    """Returns the source of one document per function, in the order of files and lines, joined by two empty lines."""
    return Source(spec, joiner="\n\n\n", read=lambda: iter(_functions()))


@functools.cache
def _functions() -> tuple[str, ...]:
    """Returns all functions; cached, unlike other sources: they take seconds to extract and less than a megabyte."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if EXCLUDED_FOLDERS.isdisjoint(path.relative_to(root).parts))
    texts = (_unparsed(function) for path in paths for function in _outermost(_parsed(path)))
    return tuple(_without_copies(text for text in texts if text and len(text) <= LONGEST_FUNCTION))


def _parsed(path: Path) -> ast.AST:
    """Returns the syntax tree of a file, an empty one if it does not parse."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old escapes in strings
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _outermost(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields functions and methods, without those nested in another function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        else:
            yield from _outermost(node)


def _unparsed(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Returns a function in canonical layout without its docstring; "" if it has nothing else."""
    if ast.get_docstring(function, clean=False) is not None:
        del function.body[0]
    return ast.unparse(function) if function.body else ""


def _without_copies(functions: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for function in functions:
        keys = {line.strip() for line in function.split("\n") if len(line) > DISTINCTIVE_LINE} | {function}
        if keys.isdisjoint(seen):
            seen |= keys
            yield function
