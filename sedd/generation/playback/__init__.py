"""The states of a sampler as text: live in a terminal, or in a self-contained HTML page."""

from sedd.generation.playback.page import page
from sedd.generation.playback.reader import Reader, Run
from sedd.generation.playback.terminal import Terminal

__all__ = ["Reader", "Run", "Terminal", "page"]
