"""Config files: valid forms, and one line with file and line number for each error."""

import sys

import pytest

from sedd import config as configs
from sedd.config_file import load_config
from sedd.errors import UserError

BEGINS = "from sedd import config as configs\ndef get_config():\n    config = configs.default()\n"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Returns a function that writes a config and modules to a folder, and returns the path of the config."""
    monkeypatch.chdir(tmp_path)

    def write(text, folder="a", **modules):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, code in {"mine": text, **modules}.items():
            (tmp_path / folder / f"{name}.py").write_bytes(code if isinstance(code, bytes) else code.encode())
        return f"{folder}/mine.py"

    return write


@pytest.mark.parametrize(
    "code",
    [
        "def get_config():\n    return {'training': {'steps': 5}}",
        "def get_config():\n    return {'training': {'steps': 5.0}, 'network': {}}",
        BEGINS + "    config.training.steps = 5\n    return config",
        BEGINS + "    config.training.steps = 5\n    return {'training': config.training}",
        BEGINS + "    config.training.steps = config.network.get_ref('heads') + 1\n    return config",
        "from ml_collections import FrozenConfigDict\n"
        "def get_config():\n    return FrozenConfigDict({'training': {'steps': 5}})",
    ],
)
def test_get_config_returns_a_config_or_a_dict(written, code):
    """A ConfigDict of any kind or a dict, of all settings or of some."""
    expected = configs.override(configs.default(), ["training.steps=5"])
    assert load_config(written(code)).to_dict() == expected.to_dict()


def test_config_imports_the_modules_of_its_own_folder(written, monkeypatch):
    """Also within get_config(), and if another config or package has modules of the same names."""
    code = (
        "from base import STEPS\ndef get_config():\n    import more\n"
        "    return {'training': {'steps': STEPS + more.STEPS}}"
    )
    monkeypatch.setitem(sys.modules, "base", elsewhere := type(sys)("base"))
    path, modules = list(sys.path), set(sys.modules)
    for steps in (5, 7):
        file = written(code, f"folder{steps}", base=f"STEPS = {steps}", more="STEPS = 1")
        assert load_config(file).training.steps == steps + 1
    assert sys.path == path and set(sys.modules) == modules and sys.modules["base"] is elsewhere


@pytest.mark.parametrize(
    "code, location, message",
    [
        ("x = (\n", "mine.py, line 1", "SyntaxError: '(' was never closed"),
        ("x = 1\n  y = 2\n", "mine.py, line 2", "IndentationError: unexpected indent"),
        (b"x = 'caf\xe9'\n", "mine.py, line 1", "SyntaxError: (unicode error)"),
        (b"x = 1\0", "mine.py", "null byte"),
        ("import broken", "broken.py, line 2", "SyntaxError: invalid syntax"),
        ("import absent", "mine.py, line 1", "ModuleNotFoundError: No module named 'absent'"),
        ("\nx = 1", "mine.py", "the file defines no get_config()"),
        ("get_config = {}", "mine.py", "the file defines no get_config()"),
        ("\ndef get_config():\n    pass", "mine.py, line 2", "get_config() returns nothing; end it with: return"),
        ("\ndef get_config():\n    return [1]", "mine.py, line 2", "get_config() returns list, not a config"),
        ("\ndef get_config(size):\n    pass", "mine.py, line 2", "missing 1 required positional argument: 'size'"),
        ("def get_config():\n    raise ValueError('one\\ntwo')", "mine.py, line 2", "ValueError: one two"),
        ("def get_config():\n    assert False", "mine.py, line 2", "AssertionError"),
        ("import other\ndef get_config():\n    return other.half(1)", "other.py, line 2", "ZeroDivisionError"),
        (BEGINS + "    config.training.stepz = 5", "mine.py, line 4", "no stepz; the nearest is training.steps"),
        (BEGINS + "    config.training.lerning_rate = 5", "mine.py, line 4", "nearest is optimizer.learning_rate"),
        (BEGINS + "    config.trainig.steps = 5", "mine.py, line 4", "no trainig; the nearest is training"),
        (BEGINS + "    config.training.update(stepz=5)", "mine.py, line 4", "no stepz; the nearest is training"),
        (BEGINS + "    config['training']['zzz'] = 5", "mine.py, line 4", "no zzz; the nearest is"),
        (BEGINS + "    config.training = {'stepz': 5}\n    return config", "mine.py, line 4", "is training.steps"),
        ("def get_config():\n    return {'training': {\n    'stepz': 5}}", "mine.py, line 3", "is training.steps"),
        ("def get_config():\n    return {\n    'trainig': dict()}", "mine.py, line 3", "trainig is not a group"),
        (
            "def get_config():\n    return {\n    'training.steps': 5}",
            "mine.py, line 1",
            "training.steps is not a group",
        ),
        (BEGINS + "    config.training.steps = 0\n    return config", "mine.py, line 4", "steps must be positive"),
        (BEGINS + "    config.training.steps = 'a'", "mine.py, line 4", "Could not override field 'steps'"),
        (BEGINS + "    configs.override(config, ['training.stepz=1'])", "mine.py, line 4", "no training.stepz"),
    ],
)
def test_errors_are_one_line_with_file_and_line_number(written, code, location, message):
    """That of the innermost line in the user's files, not in a library."""
    file = written(code, broken="\nx = = 1", other="def half(x):\n    return x / 0")
    with pytest.raises(UserError) as caught:
        load_config(file)
    text = str(caught.value)
    assert f"{location}: " in text and message in text.partition(": ")[2] and "\n" not in text, text


@pytest.mark.parametrize(
    "name, message",
    [("absent.py", "there is no such file"), (".", "it is a folder"), ("mine.json", "a config is a Python file")],
)
def test_other_paths_are_refused(tmp_path, name, message):
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / name)
