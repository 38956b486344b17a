"""A trace of some steps, for TensorBoard's profile plugin, XProf or Perfetto."""

import contextlib
from pathlib import Path

import jax

AFTER = 10  # steps of a call that are not traced: the first ones compile


class Profile:
    """Traces so many steps, after the first ten that a call takes; every process traces its own devices.

    A context manager, around all steps.
    """

    def __init__(self, folder: Path, start: int, steps: int):
        """start: the step that the run goes on from; steps: how many to trace; 0: none."""
        self._folder, self._first, self._steps, self._tracing = folder, start + AFTER + 1, steps, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._tracing:
            jax.profiler.stop_trace()

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """What a step is to run in."""
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
