"""One pass over a source that counts its text, as the split rules need it."""

import hashlib
from dataclasses import dataclass

from tqdm import tqdm

from sedd.data.source import Source
from sedd.errors import UserError

PROGRESS_DELAY = 2.0  # seconds of work before a bar is shown


@dataclass(frozen=True)
class Scan:
    """Counts of a source, joiners included, and the SHA-256 of its documents, in hexadecimal."""

    documents: int
    characters: int
    num_bytes: int
    sha256: str


def scan(source: Source) -> Scan:
    """Reads a source once and returns its counts. UserError if it holds no text."""
    documents = characters = num_bytes = 0
    digest = hashlib.sha256()
    with tqdm(desc="reading", unit="B", unit_scale=True, delay=PROGRESS_DELAY) as progress:
        for text, ends_document in source:
            encoded = text.encode("utf-8")
            digest.update(len(encoded).to_bytes(8, "little") + encoded + bytes([ends_document]))
            documents += ends_document
            characters += len(text)
            num_bytes += len(encoded)
            progress.update(len(encoded))
    if not documents:
        raise UserError(f"the source {source.spec} holds no text; choose another")
    return Scan(documents, characters, num_bytes, digest.hexdigest())
