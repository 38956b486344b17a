"""Config files: Python with a `get_config()`. An error in one is reported as one line, with file and line number."""

import ast
import contextlib
import difflib
import importlib
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sedd import config as configs
from sedd.errors import UserError
from sedd.runtime import disk

_PACKAGE = Path(__file__).resolve().parent
# The messages of a ConfigDict for a key that it does not have.
_MISSING = re.compile(r'Key \\*"([^"\\]+)\\*" does not exist|Did you mean ".*" instead of "([^"]+)"')


def load_config(path: str | Path) -> ConfigDict:
    """Returns the default config, updated with what `get_config()` of the file returns: a ConfigDict or a nested dict.

    The file runs like a script and can import modules of its folder. These are removed from sys.modules afterwards, so
    that another config can have modules of the same names. UserError if the file does not exist or is not valid.
    """
    file = Path(disk.absolute(path))
    if not file.is_file():
        raise UserError(f"--config={path}: {'it is a folder' if file.is_dir() else 'there is no such file'}")
    if file.suffix != ".py":
        raise UserError(f"--config={path}: a config is a Python file, such as experiments/quickstart.py")
    with _modules_beside(file):
        try:
            return configs.from_dict(_returned(file))
        except Exception as error:
            raise UserError(f"{_location(error, file)}: {_message(error)}") from error


def _returned(file: Path) -> dict[str, Any]:
    """Returns the result of get_config() of the file, as nested dicts."""
    get_config = runpy.run_path(str(file)).get("get_config")
    if not callable(get_config):
        raise UserError("the file defines no get_config()")
    values = get_config()
    if values is None:
        raise UserError("get_config() returns nothing; end it with: return config")
    if not isinstance(values, (ConfigDict, Mapping)):
        raise UserError(f"get_config() returns {type(values).__name__}, not a config or a dict of its groups")
    return ConfigDict(values, allow_dotted_keys=True).to_dict()  # resolves references, at any depth


@contextlib.contextmanager
def _modules_beside(file: Path) -> Iterator[None]:
    """Context in which modules of the folder of a file can be imported; they are unloaded at its end."""
    folder = file.resolve().parent
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    names -= sys.stdlib_module_names | {_PACKAGE.name}

    def loaded():
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}

    before = loaded()  # modules of the same names, from elsewhere or imported earlier
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(before)


def _location(error: Exception, file: Path) -> str:
    """Returns the origin of an error in the user's files: "PATH, line NUMBER", or PATH if the line is unknown."""
    if isinstance(error, SyntaxError) and error.lineno and _is_users(error.filename or "", file):
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename, file)]
    if frames:
        return f"{frames[-1].filename}, line {frames[-1].lineno}"
    line = _line(file, re.findall(r"\w+\.(\w+)|^config: (\w+)", str(error)))
    return str(file) if line is None else f"{file}, line {line}"


def _is_users(name: str, file: Path) -> bool:
    """True if a module file is in the folder of the config, and not in sedd or site-packages."""
    path = Path(name).resolve()
    library = path.is_relative_to(_PACKAGE) or "site-packages" in path.parts
    return path.is_file() and path.is_relative_to(file.resolve().parent) and not library


def _line(file: Path, keys: list[tuple[str, ...]]) -> int | None:
    """Returns the first line of the file that names one of the keys, or the line of get_config."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):
        return None
    names = {"name": ast.FunctionDef, "attr": ast.Attribute, "arg": ast.keyword, "value": ast.Constant}
    for key in [*map("".join, keys), "get_config"]:
        for field, kind in names.items():
            found = (node for node in nodes if isinstance(node, kind) and getattr(node, field) == key)
            lines = [node.lineno for node in found if isinstance(node, (ast.stmt, ast.expr, ast.keyword))]
            if lines:
                return min(lines)
    return None


def _message(error: Exception) -> str:
    """Returns the message of an error, in one line."""
    text = str(error)
    if isinstance(error, UserError):
        return text.removeprefix("config: ")
    missing = isinstance(error, (KeyError, AttributeError)) and _MISSING.search(text)
    if missing:
        name = missing[1] or missing[2]
        keys = {key: f"{group}.{key}" for group, members in configs.default().items() for key in members}
        keys |= {group: group for group in configs.default()}
        return f"there is no {name}; the nearest is {keys[difflib.get_close_matches(name, keys, n=1, cutoff=0.0)[0]]}"
    words = (error.msg if isinstance(error, SyntaxError) else text).split()
    return " ".join([f"{type(error).__name__}:", *words]).removesuffix(":")
