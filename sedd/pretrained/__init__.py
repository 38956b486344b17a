"""Published checkpoints, as config.json and model.safetensors, without PyTorch: one file a format.

To add a format, write a file like `mdlm.py` and add a line to `FORMATS`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from sedd.data.tokenizers import Tokenizer
from sedd.errors import UserError
from sedd.pretrained import format
from sedd.pretrained.duo import Duo
from sedd.pretrained.format import Format
from sedd.pretrained.masked_lm import MaskedLM
from sedd.pretrained.mdlm import Mdlm
from sedd.pretrained.radd import Radd
from sedd.pretrained.score_entropy import Sedd
from sedd.pretrained.udlm import Udlm
from sedd.trained import Trained

FORMATS: dict[str, Format] = {form.name: form for form in (Sedd(), Mdlm(), Duo(), Udlm(), Radd(), MaskedLM())}


class Published(NamedTuple):
    """What a checkpoint contains: a config of sedd, parameters that fit it, and a tokenizer, None if it has none."""

    config: ConfigDict
    params: dict
    tokenizer: Tokenizer | None


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


def read(directory: Path, about: dict) -> Published | None:
    """Reads a published checkpoint; None if it is of no known format. about: the contents of its config.json.

    UserError if the checkpoint is damaged, or is of a kind that is not supported.
    """
    form = format_of(about)
    return None if form is None else Published(*format.read(form, about, directory))
