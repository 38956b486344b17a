"""Published checkpoints, as config.json and model.safetensors, without PyTorch: one file a format.

To add a format, write a file like `masked_lm.py` and add a line to `FORMATS`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from sedd.data.tokenizers import Tokenizer
from sedd.pretrained import masked_lm, score_entropy


class Published(NamedTuple):
    """What a checkpoint contains: a config of sedd, parameters that fit it, and a tokenizer, None if it has none."""

    config: ConfigDict
    params: dict
    tokenizer: Tokenizer | None


# For the contents of a config.json whether they are of the format, and the function that reads the folder.
FORMATS: tuple[tuple[Callable[[dict], bool], Callable[..., tuple]], ...] = (
    (score_entropy.is_published, score_entropy.load),
    (masked_lm.is_published, masked_lm.load),
)


def read(directory: Path, about: dict) -> Published | None:
    """Reads a published checkpoint; None if it is of no known format. about: the contents of its config.json.

    UserError if the checkpoint is damaged, or is of a kind that is not supported.
    """
    load = next((load for is_published, load in FORMATS if is_published(about)), None)
    return None if load is None else Published(*load(directory, about))
