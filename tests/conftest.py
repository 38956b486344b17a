"""What every test shares. The environment is set before JAX is imported: eight virtual devices, on the CPU."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from oracle import Joint  # noqa: E402

from sedd.diffusion.process import Absorbing, Uniform  # noqa: E402


@pytest.fixture
def float64():
    """Laws are tested in float64; without this a test runs in float32, as production does."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=[Absorbing(3), Uniform(3)], ids=["absorbing", "uniform"])
def process(request):
    """Both processes over three tokens."""
    return request.param


@pytest.fixture(scope="session")
def joint():
    """A random correlated law of three tokens over three positions."""
    return Joint.random()
