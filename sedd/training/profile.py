"""Profiler traces of a few steps, for TensorBoard's profile plugin, XProf or Perfetto."""

import contextlib
from pathlib import Path

import jax

WARMUP_STEPS = 10  # first steps of a call, which are not traced: they compile


class Profiler:
    """Traces `steps` steps, after the first WARMUP_STEPS of a call. Every process traces its own devices.

    A context manager around all steps.
    """

    def __init__(self, folder: Path, start: int, steps: int):
        """start: the step from which the run resumes; steps: number of steps to trace; 0: none."""
        self._folder, self._first, self._steps, self._tracing = folder, start + WARMUP_STEPS + 1, steps, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._tracing:
            jax.profiler.stop_trace()

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Returns the context manager in which step `number` must run."""
        if not self._steps:
            return contextlib.nullcontext()
        if number == self._first:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif number == self._first + self._steps and self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
        return jax.profiler.StepTraceAnnotation("train", step_num=number)
