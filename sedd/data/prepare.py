"""Tokenises a source once, into a corpus directory."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from sedd.data.corpus import FORMAT, Corpus, open_corpus
from sedd.data.source import Source
from sedd.data.sources import open_source
from sedd.data.splits import SPLITS, Segment, has_many_documents, philox, segments
from sedd.data.survey import PROGRESS_DELAY, Survey, survey
from sedd.data.tokenizers import make_tokenizer, tokenizer_file
from sedd.data.writer import hash_of_splits, token_dtype, write_splits
from sedd.errors import UserError


def prepare(source: str, tokenizer: str, out: str | Path, seed: int = 0) -> Corpus:
    """Reads a source, splits it, makes or loads the tokenizer and writes the corpus directory `out`.

    `out` appears when it is complete. Where it holds the same corpus already, that is returned as it is. The source is
    read two to four times, one document in memory at a time.

    Args:
      source: what `open_source` takes, such as `text:books/*.txt`.
      tokenizer: what `make_tokenizer` takes, such as `sentencepiece:8000`.
      out: the directory to make.
      seed: draws the held-out documents, and the order of the documents of a split.

    Raises:
      UserError: a spec is wrong, the source is empty or too short to split, or `out` holds something else.
    """
    out = Path(out).resolve()
    existing = _existing(out)
    text, model = open_source(source), tokenizer_file(tokenizer)
    counted = survey(text)
    origin = {
        "source": source,
        "tokenizer": tokenizer,
        "seed": seed,
        "text_sha256": counted.sha256,
        "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest() if model else None,
    }
    if existing:
        _check_same(existing, origin)
    else:
        _write(out, text, counted, origin)
    return open_corpus(out)


def _existing(out: Path) -> Corpus | None:
    """The corpus that `out` holds, None where nothing is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "meta.json").is_file():
        raise UserError(f"{out} is not empty and holds no corpus; choose another --out")
    return open_corpus(out)


def _check_same(corpus: Corpus, origin: dict) -> None:
    for name, value in origin.items():
        if corpus.meta.get(name) != value:
            what = name.removesuffix("_sha256")
            raise UserError(f"{corpus.path} holds a corpus with another {what}; choose another --out")


def _write(out: Path, text: Source, counted: Survey, origin: dict) -> None:
    parts = functools.partial(segments, text, counted, origin["seed"])
    # After the only document it would be an id that training never sees.
    end_of_text = text.joiner is None and counted.documents > 1
    train, held_out = _texts(parts(), SPLITS[:1]), _texts(parts(), SPLITS[1:])
    tokenizer = make_tokenizer(origin["tokenizer"], train, end_of_text, held_out)
    order = philox(origin["seed"], 1) if has_many_documents(counted) else None
    with _appearing(out) as folder:
        tokenizer.save(folder / "tokenizer")
        meta = {
            "format": FORMAT,
            "mode": "packed",
            **origin,
            "vocab_size": tokenizer.vocab_size,
            "dtype": token_dtype(tokenizer).str,
            "splits": write_splits(folder, _with_progress(parts(), counted.num_bytes), tokenizer, order),
            "hash": hash_of_splits(folder, tokenizer),
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _texts(parts: Iterable[Segment], splits: tuple[str, ...]) -> Iterator[str]:
    return (part.text for part in parts if part.split in splits)


def _with_progress(parts: Iterable[Segment], num_bytes: int) -> Iterator[Segment]:
    with tqdm(desc="tokenising", total=num_bytes, unit="B", unit_scale=True, delay=PROGRESS_DELAY) as progress:
        for part in parts:
            yield part
            progress.update(len(part.text.encode("utf-8")))


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it when all went well, and vanishes otherwise."""
    folder = out.with_name(f".{out.name}.{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
