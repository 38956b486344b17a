"""Score-entropy discrete diffusion for text."""

from sedd.version import __version__ as __version__
