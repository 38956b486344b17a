"""TensorBoard event files, for who wants them: `config.metrics.tensorboard`. No failure of theirs stops training."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from sedd.errors import UserError


class TensorBoardWriter:
    """Numbers and texts in an event file of workdir/tensorboard.

    It is written at once, without the thread of tensorboardX's SummaryWriter, whose queue blocks for ever once that
    thread has died, of a full disk for example. At the first failure it says so, and writes nothing more.
    """

    def __init__(self, folder: Path, start: int):
        """start: the step that a run goes on from; what TensorBoard has of later ones is purged."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._events: EventsWriter | None = None

        def begin():
            folder.mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(folder / "events"), f".{start}")
            self._write(start + 1, session_log=SessionLog(status=SessionLog.START))

        self._try(begin)

    def numbers(self, step: int, values: dict[str, float]):
        """A point of each curve."""
        from tensorboardX import summary

        def write():
            for name, value in values.items():
                self._write(step, summary=summary.scalar(name, value))

        self._try(write)

    def texts(self, step: int, texts: list[str]):
        """Samples, shown as they are: TensorBoard takes indented lines literally."""
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
        except Exception as error:  # whatever it is, training is worth more
            self._events = None
            tqdm.write(f"sedd: TensorBoard files cannot be written any more ({error}); training goes on", sys.stderr)


def check_installed():
    """UserError if tensorboardX is missing."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise UserError(
            "config: metrics.tensorboard needs tensorboardX; pip install 'sedd[tensorboard]', or set it to false"
        ) from None
