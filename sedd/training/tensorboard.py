"""TensorBoard event files (`config.metrics.tensorboard`). Their failures do not stop training."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from sedd.errors import UserError


class TensorBoardWriter:
    """Writes scalars and texts to an event file in workdir/tensorboard.

    Writes synchronously: the queue of tensorboardX's SummaryWriter blocks for ever once its thread has died, for
    example of a full disk. The first failure is printed, and nothing is written after it.
    """

    def __init__(self, folder: Path, start: int):
        """start: the step from which a run resumes; TensorBoard purges the events of later steps."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._events: EventsWriter | None = None

        def begin():
            folder.mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(folder / "events"), f".{start}")
            self._write(start + 1, session_log=SessionLog(status=SessionLog.START))

        self._try(begin)

    def numbers(self, step: int, values: dict[str, float]):
        """Writes one point of each curve."""
        from tensorboardX import summary

        def write():
            for name, value in values.items():
                self._write(step, summary=summary.scalar(name, value))

        self._try(write)

    def texts(self, step: int, texts: list[str]):
        """Writes samples, indented: TensorBoard shows indented lines literally."""
        from tensorboardX import summary

        def write():
            for number, text in enumerate(texts, start=1):
                indented = "\n".join("    " + line for line in text.split("\n"))
                self._write(step, summary=summary.text(f"samples/{number}", indented))

        self._try(write)

    def close(self):
        self._try(lambda: self._events and self._events.close())
        self._events = None

    def _write(self, step: int, **content):
        from tensorboardX.proto.event_pb2 import Event

        if self._events is not None:
            self._events.write_event(Event(wall_time=time.time(), step=step, **content))
            self._events.flush()

    def _try(self, write: Callable[[], None]):
        try:
            write()
        except Exception as error:  # of any kind: training continues
            self._events = None
            tqdm.write(f"sedd: TensorBoard files cannot be written any more ({error}); training continues", sys.stderr)


def check_installed():
    """UserError if tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise UserError(
            "config: metrics.tensorboard needs tensorboardX; pip install 'sedd[tensorboard]', or set it to false"
        ) from None
