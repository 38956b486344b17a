"""Published checkpoints, as config.json and model.safetensors or as PyTorch files: one file a format.

To add a format, write a file like `mdlm.py` and add a line to `FORMATS`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sedd.codecs.torch_files import SUFFIXES
from sedd.errors import UserError
from sedd.pretrained import format, hydra
from sedd.pretrained.bd3lm import Bd3lm
from sedd.pretrained.duo import Duo
from sedd.pretrained.format import Format
from sedd.pretrained.masked_lm import MaskedLM
from sedd.pretrained.mdlm import Mdlm
from sedd.pretrained.radd import Radd
from sedd.pretrained.score_entropy import Sedd
from sedd.pretrained.udlm import Udlm
from sedd.trained import Trained

FORMATS: dict[str, Format] = {form.name: form for form in (Sedd(), Mdlm(), Duo(), Udlm(), Radd(), Bd3lm(), MaskedLM())}


def format_of(about: dict) -> Format | None:
    """Returns the format of a checkpoint, None if it is of no known one. about: the contents of its config.json."""
    return next((form for form in FORMATS.values() if form.is_mine(about)), None)


def writer(name: str, model: Trained, config: ConfigDict) -> Callable[[epath.Path], None]:
    """Returns a function that writes a model to a folder. name: of the format; config: that of the model.

    UserError for an unknown format, or one that cannot hold the model.
    """
    if name not in FORMATS:
        raise UserError(f"there is no format {name}; choose one of {', '.join(FORMATS)}")
    return format.writer(FORMATS[name], model, config)


def described(file: Path) -> tuple[dict[str, Any], Format]:
    """Returns what describes a training checkpoint of PyTorch, as its config.json would, and its format.

    UserError if it is another file, if it has no config, or if its format is not known.
    """
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file} is a file; give its folder, or a checkpoint of PyTorch ({', '.join(SUFFIXES)})")
    about = hydra.description(file)
    form = format_of(about)
    if form is None:
        raise UserError(f"{file} is of no format that sedd reads, by its config: {', '.join(FORMATS)}")
    return about, form
