"""Fixtures and options of all tests. The environment is set before JAX is imported: eight virtual devices, on the CPU.

Compiled programs are cached for the other tests, and for the processes that they start, until the end of the session.
"""

import gc
import importlib.metadata
import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Most tests compile far longer than they run, so nothing is optimised; without the emitters of fusions, XLA compiles in
# two thirds of the time (later versions have no others).
_flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flags}".strip()
if "PYTEST_XDIST_WORKER" not in os.environ and "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit it
    _compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

# Tracing makes many objects that last, and locations that no test reads.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
gc.set_threshold(100_000, 20, 100)

import jax  # noqa: E402, after the environment; the next three too
import pytest  # noqa: E402
from oracle import Joint  # noqa: E402

from sedd.diffusion.discrete.process import Absorbing, Uniform  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--skips", metavar="WORDS", help="fail on skips whose reason holds none of these, as in torch,root"
    )


def pytest_collection_modifyitems(items):
    """Puts the files that take longest first: a worker runs whole files, and both are to end at about the same time."""
    longest = ["test_recipes", "test_cli", "test_processes", "test_bucket"]
    items.sort(key=lambda item: [item.path.stem != name for name in longest])


def pytest_sessionfinish(session):
    """Fails the session on skips whose reason is not expected, if --skips is given."""
    expected, reporter = session.config.option.skips, session.config.pluginmanager.get_plugin("terminalreporter")
    if expected is None or reporter is None:
        return
    reasons = [report.longrepr[2] for report in reporter.stats.get("skipped", [])]
    unexpected = [reason for reason in reasons if not any(word in reason for word in expected.split(","))]
    if unexpected:
        print("\nunexpected skips: " + "; ".join(sorted(set(unexpected))))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Drops the compiled programs of a worker that holds more than 2 GiB, so that it stays under 4; on Linux."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 2 * 2**30:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def float64():
    """Runs a test in float64, for exact distributions; without it a test runs in float32, as production does."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=[Absorbing(3), Uniform(3)], ids=["absorbing", "uniform"])
def process(request):
    """Both processes over three tokens."""
    return request.param


@pytest.fixture(scope="session")
def joint():
    """A random joint distribution of three dependent positions over three tokens."""
    return Joint.random()
