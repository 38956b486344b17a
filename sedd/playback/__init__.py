"""The states of a sampler as people read them: live in a terminal, or played back by a page that is one file."""

from sedd.playback.page import page
from sedd.playback.reader import Reader, Run
from sedd.playback.terminal import Terminal

__all__ = ["Reader", "Run", "Terminal", "page"]
