"""Tokenises a source once, into a corpus directory."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from sedd.data.corpus import FORMAT, Corpus, open_corpus
from sedd.data.layout import Layout, make_layout
from sedd.data.overlap import also_in_train
from sedd.data.scan import PROGRESS_DELAY, Scan, scan
from sedd.data.source import Source
from sedd.data.split_text import SplitText, open_sources, parse_rule, with_split_rule
from sedd.data.splits import SPLITS, philox
from sedd.data.staging import file_stamps, staging_directory
from sedd.data.tokenizers import Tokenizer, given_data, load_tokenizer, make_tokenizer
from sedd.data.writer import arrange, hash_of_splits, token_dtype, write_splits
from sedd.errors import UserError
from sedd.runtime.disk import absolute, write_json_atomic
from sedd.seeds import check_seed

MOST_WORKERS = 32  # threads, unless told otherwise: each holds some megabytes
FEW = 0.01  # of the tokens of a split, in documents that are also in train: some are short, such as headings


def prepare(
    source: str | Mapping[str, str],
    tokenizer: str,
    out: str | Path,
    seed: int = 0,
    *,
    split: str | None = None,
    mode: str = "packed",
    padding: str | None = None,
    workers: int | None = None,
) -> Corpus:
    """Reads a source, splits it, makes or loads the tokenizer and writes the corpus directory `out`.

    `out` appears when it is complete. Where it holds the same corpus already, that is returned as it is; where an
    earlier call was interrupted, the work goes on. The source is read two to four times, a few megabytes in memory at a
    time. The corpus does not depend on the number of workers. `meta["splits"]` says how many documents of a split are
    also in train, and so does a line on stderr where those are more than a few.

    Args:
      source: what `open_source` takes, such as `text:books/*.txt`; or one such for each split.
      tokenizer: what `make_tokenizer` takes, such as `sentencepiece:8000`.
      out: the directory to make.
      seed: draws the held-out documents, and the order of the documents of a split.
      split: a rule as in `splits.py`; by default documents are drawn, 90, 5 and 5 per cent, or where they are fewer
        than 40 the text is cut so.
      mode: "packed" or "padded".
      padding: "scored" or "ignored" (the default), where the mode is padded; `layout.py` says what they are.
      workers: threads that tokenise; by default as many as there are cores, 32 at most.

    Raises:
      UserError: a spec is wrong, the source is empty or too short to split, or `out` holds something else.
    """
    out = Path(absolute(out)).resolve()
    layout, seed = make_layout(mode, padding), check_seed(seed)
    if workers is not None and workers < 1:
        raise UserError(f"there must be at least one worker, not {workers}")
    existing = _existing(out)
    sources = open_sources(source, joined=not layout.padded)
    rule = parse_rule(split, sources)
    given = given_data(tokenizer)
    request = {
        "source": source if isinstance(source, str) else dict(source),
        "tokenizer": tokenizer,
        "seed": seed,
        "mode": layout.mode,
        "padding": layout.padding,
        "model_sha256": hashlib.sha256(given).hexdigest() if given is not None else None,
    }
    if existing:
        counted = {name: scan(one) for name, one in sources.items()}
        _check_same(existing, with_split_rule(sources, counted, rule).origin() | request)
        _warn_of_copies(existing)
        return existing
    files = file_stamps(file for one in sources.values() for file in one.files)
    with staging_directory(out, request | {"format": FORMAT, "split": split, "files": files}, "corpus") as folder:
        text = with_split_rule(sources, _counted(folder / "survey.json", sources), rule)
        _write(folder, text, layout, request, workers or min(_cores(), MOST_WORKERS))
    corpus = open_corpus(out)
    _warn_of_copies(corpus)
    return corpus


def _existing(out: Path) -> Corpus | None:
    """The corpus that `out` holds, None where nothing is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "meta.json").is_file():
        raise UserError(f"{out} is not empty and holds no corpus; choose another --out")
    return open_corpus(out)


def _check_same(corpus: Corpus, origin: dict):
    for name, value in origin.items():
        if corpus.meta.get(name) != value:
            what = name.removesuffix("_sha256")
            raise UserError(f"{corpus.path} holds a corpus with another {what}; choose another --out")


def _counted(record: Path, sources: dict[str, Source]) -> dict[str, Scan]:
    """The survey of each source; kept, since it takes a pass over all text."""
    if record.is_file():
        return {name: Scan(**values) for name, values in json.loads(record.read_text()).items()}
    counted = {name: scan(one) for name, one in sources.items()}
    write_json_atomic(record, json.dumps({name: asdict(one) for name, one in counted.items()}))
    return counted


def _write(folder: Path, text: SplitText, layout: Layout, request: dict, workers: int):
    """Fills the folder `corpus` of a folder to work in, each stage from where it was interrupted."""
    written, corpus, splits, seed = folder / "written", folder / "corpus", text.splits, request["seed"]
    tokenizer = _tokenizer(corpus / "tokenizer", text, layout, request)
    written.mkdir(exist_ok=True)
    with tqdm(desc="tokenising", total=text.num_bytes, unit="B", unit_scale=True, delay=PROGRESS_DELAY) as progress:
        counts = write_splits(written, text.segments(seed), splits, tokenizer, workers, progress.update)
    dtype = token_dtype(tokenizer)
    arrange(written, corpus, splits, dtype, None if text.in_order else philox(seed, 1))
    for split, copies in also_in_train(corpus, splits, dtype).items():
        counts[split] = counts[split] | {"also_in_train": copies}
    meta = {
        "format": FORMAT,
        **request,
        **text.origin(),
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.str,
        "splits": counts,
        "hash": hash_of_splits(corpus, splits, tokenizer, layout),
    }
    (corpus / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _warn_of_copies(corpus: Corpus):
    """A line on stderr for each split of which more than a few tokens are of documents that are in train too."""
    for split, counts in corpus.meta["splits"].items():
        copies = counts.get("also_in_train")  # not of train, nor in corpora of before
        if copies and copies["tokens"] > FEW * counts["tokens"]:
            print(
                f"sedd: {copies['documents']:,} of the {counts['documents']:,} documents of {split}, with "
                f"{copies['tokens'] / counts['tokens']:.1%} of its tokens, are also in train: what is measured on them "
                "is not held out; check that no file is in both",
                file=sys.stderr,
            )


def _tokenizer(place: Path, text: SplitText, layout: Layout, request: dict) -> Tokenizer:
    """The tokenizer, made from the training text where it is not given; kept, since that may take minutes."""
    if place.is_dir():
        return load_tokenizer(place)
    train, held_out = (text.of_splits(splits, request["seed"]) for splits in (SPLITS[:1], SPLITS[1:]))
    tokenizer = make_tokenizer(request["tokenizer"], train, layout.padded or text.needs_end_of_text, held_out)
    part = place.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save(part)
    part.replace(place)
    return tokenizer


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
