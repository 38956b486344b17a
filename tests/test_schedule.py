"""Noise schedules: the rate is the derivative, the time the inverse, and the values at the ends are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd.diffusion.schedule import Geometric, LogLinear

SCHEDULES = [LogLinear(), LogLinear(eps=0.1), Geometric(), Geometric(1e-3, 8.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rate_is_the_derivative_and_time_the_inverse(schedule, float64):
    """A wrong constant or factor in any of the four methods breaks one of the equalities."""
    t = jnp.linspace(0.0, 1.0, 101)
    sigma = schedule.sigma(t)
    np.testing.assert_allclose(schedule.rate(t), jax.vmap(jax.grad(schedule.sigma))(t), rtol=1e-12)
    np.testing.assert_allclose(schedule.time(sigma), t, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(schedule.alpha(t), np.exp(-sigma), rtol=1e-12)


def test_values_at_the_ends_of_time():
    """At time 0 log-linear noise is exactly 0; all methods keep float32."""
    assert LogLinear(eps=1e-3).sigma(jnp.float32(0)) == 0
    np.testing.assert_allclose(LogLinear(eps=1e-3).alpha(jnp.float32(1)), 1e-3, rtol=1e-4)
    np.testing.assert_allclose(Geometric(1e-4, 20.0).sigma(jnp.array([0.0, 1.0])), [1e-4, 20.0], rtol=1e-5)
    for schedule in SCHEDULES:
        for method in (schedule.sigma, schedule.rate, schedule.time, schedule.alpha):
            assert method(jnp.float32(0.5)).dtype == jnp.float32


@pytest.mark.parametrize(
    "make",
    [lambda: LogLinear(0.0), lambda: LogLinear(1.0), lambda: Geometric(0.0, 1.0), lambda: Geometric(2.0, 1.0)],
)
def test_impossible_schedules_are_refused(make):
    """Each of these would give infinite, decreasing or undefined noise."""
    with pytest.raises(ValueError, match="must|needs"):
        make()
