"""The architecture of the package: the order of imports, and no side effects of importing it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sedd

PACKAGE = Path(sedd.__file__).parent
ROOMS = [
    "__main__",
    "cli",
    "commands",
    "quickstart",
    "harness",
    "harness_settings",
    "info",
    "loading",
    "model",
    "pretrained",
    "training",
    "evaluation",
    "generation",
    "trained",
    "config_file",
    "config",
    "config_checks",
    "recipes",
    "codecs",
    "network",
    "data",
    "diffusion",
    "runtime",
]
LEAVES = {"errors", "seeds", "version"}  # any module may import these
# Rooms that import only these others.
ALONE = {
    "codecs": {"network", "diffusion", "runtime"},
    "data": {"runtime"},
    "network": {"diffusion", "runtime"},
    "diffusion": set(),
    "runtime": set(),
}
DIFFUSION = [
    "discrete.correctors",
    "discrete.unmasking_schedules",
    "discrete.unmasking",
    "discrete.pickers",
    "discrete.samplers",
    "discrete.exact_likelihood",
    "discrete.likelihood",
    "discrete.loss",
    "discrete.blocks",
    "discrete.process",
    "discrete.jump_process",
    "discrete.score",
    "gaussian.likelihood",
    "gaussian.loss",
    "gaussian.guidance",
    "gaussian.samplers",
    "gaussian.process",
    "bounds",
    "sampling",
    "denoiser",
    "schedule",
    "keyed_random",
]


def imports(file):
    """The modules of the package that a file imports, as dotted paths without `sedd.`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sedd":
            base = node.module.removeprefix("sedd").strip(".")
            for alias in node.names:
                is_module = (PACKAGE / base.replace(".", "/") / f"{alias.name}.py").is_file()
                yield ".".join(filter(None, [base, alias.name])) if is_module or not base else base
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("sedd.") for alias in node.names if alias.name.startswith("sedd"))


def test_imports_point_downwards():
    num_imports = 0
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in LEAVES | {"__init__"}:
            continue
        for module in imports(file):
            other = module.split(".")[0]
            num_imports += 1
            if other in LEAVES or other == room:
                continue
            assert ROOMS.index(room) < ROOMS.index(other), f"{file.name} of {room} imports {module}"
            assert other in ALONE.get(room, {other}), f"{file.name} of {room} imports {module}"
    assert num_imports > 50


def test_diffusion_imports_no_network():
    """Imports within diffusion/ have one direction too, so that sampling.py knows no process; none of them is Flax."""
    room = PACKAGE / "diffusion"
    files = {file: ".".join(file.relative_to(room).with_suffix("").parts) for file in room.rglob("[!_]*.py")}
    assert sorted(files.values()) == sorted(DIFFUSION)
    for file, name in files.items():
        assert "flax" not in file.read_text()
        for module in imports(file):
            other = module.removeprefix("diffusion.")
            if other not in LEAVES:
                assert DIFFUSION.index(name) < DIFFUSION.index(other), f"{name} imports {other}"


def test_data_does_not_use_jax():
    """Of runtime/ it imports disk only, which does not either."""
    for file in [*(PACKAGE / "data").glob("*.py"), PACKAGE / "runtime/disk.py"]:
        assert not re.search(r"^\s*(import|from) jax\b", file.read_text(), re.MULTILINE), file
        assert {module for module in imports(file) if module.startswith("runtime")} <= {"runtime.disk"}, file


def test_only_keyed_random_and_seeds_make_random_streams():
    """They name the generator: with the default of JAX the numbers can depend on the batch."""
    for file in PACKAGE.rglob("*.py"):
        calls = (node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
        names = {ast.unparse(function) for function in calls}
        makers = {name for name in names if name.split(".")[-1] in ("PRNGKey", "wrap_key_data", "default_rng")}
        makers |= names & {"jax.random.key", "random.key", "jax.random.fold_in", "random.fold_in"}
        makers |= {name for name in names if name.endswith("Philox")}
        assert not makers or file.name in ("keyed_random.py", "seeds.py"), f"{file.name} calls {', '.join(makers)}"


@pytest.mark.smoke
def test_import_has_no_side_effects():
    """It loads no dataset or checkpoint library and no torch, initialises no device and parses no flags."""
    code = (
        "import sys, sedd; from jax._src import xla_bridge; from absl import flags\n"
        "heavy = {'tensorflow_datasets', 'tensorflow', 'orbax', 'grain', 'torch', 'scipy', 'matplotlib', 'lm_eval',\n"
        "'sentencepiece', 'tokenizers', 'pyarrow', 'array_record', 'tensorboardX', 'transformers',\n"
        "'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)), list(xla_bridge._backends), flags.FLAGS.is_parsed())"
    )
    out = subprocess.run([sys.executable, "-c", code, "--no_such_flag"], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] [] False"


@pytest.mark.smoke
def test_public_names_exist():
    assert all(hasattr(sedd, name) for name in sedd.__all__)


def test_files_have_at_most_350_lines_of_120_columns():
    for file in PACKAGE.rglob("*.py"):
        lines = file.read_text().splitlines()
        assert len(lines) <= 350, file
        assert max(map(len, lines), default=0) <= 120, file
