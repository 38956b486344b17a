"""Tokenises a source into a corpus directory."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sedd.data.corpus import FORMAT, Corpus, open_corpus
from sedd.data.layout import Layout, make_layout
from sedd.data.overlap import also_in_train
from sedd.data.scan import PROGRESS_DELAY, Scan, scan
from sedd.data.source import Source
from sedd.data.split_text import SplitText, open_sources, parse_rule, with_split_rule
from sedd.data.splits import SPLITS
from sedd.data.staging import file_stamps, staging_directory
from sedd.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer, pretrained_data
from sedd.data.writer import arrange, hash_of_splits, token_dtype, write_splits
from sedd.errors import UserError
from sedd.runtime.disk import absolute, write_text_atomic
from sedd.seeds import DOCUMENT_ORDER, check_seed, philox

MAX_DEFAULT_WORKERS = 32  # threads: each holds some megabytes
MAX_OVERLAP = 0.01  # share of a split's tokens that may be in documents also in train: short ones, such as headings


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
    """Reads a source, splits it, trains or loads the tokenizer and writes the corpus directory `out`.

    `out` appears only when it is complete. If it already holds the same corpus, that is returned; after an interrupted
    call, the work resumes. The source is read two to four times, a few megabytes in memory at a time. The corpus does
    not depend on the number of workers. `meta["splits"]` counts the documents of each split that are also in train; a
    line on stderr warns where they have more than 1 % of its tokens.

    source: a spec for `open_source`, such as `text:books/*.txt`; or a spec for each split.
    tokenizer: a spec for `make_tokenizer`, such as `sentencepiece:8000`.
    seed: of the draw of held-out documents, and of the order of the documents of a split.
    split: a rule (see `splits.py`); by default 90, 5 and 5 per cent of the documents, drawn at random, or of the text,
    cut in order, if there are fewer than 40 documents.
    mode: "packed" or "padded". padding: "scored" or "ignored" (the default), if the mode is padded; see `layout.py`.
    workers: number of tokenising threads; by default the number of cores, at most 32.

    UserError if a spec is invalid, the source is empty or too short to split, or `out` holds something else.
    """
    out = Path(absolute(out)).resolve()
    layout, seed = make_layout(mode, padding), check_seed(seed)
    if workers is not None and workers < 1:
        raise UserError(f"there must be at least one worker, not {workers}")
    existing = _existing(out)
    sources = open_sources(source, joined=not layout.padded)
    rule = parse_rule(split, sources)
    pretrained = pretrained_data(tokenizer)
    request = {
        "source": source if isinstance(source, str) else dict(source),
        "tokenizer": tokenizer,
        "seed": seed,
        "mode": layout.mode,
        "padding": layout.padding,
        "model_sha256": hashlib.sha256(pretrained).hexdigest() if pretrained is not None else None,
    }
    if existing:
        scans = {name: scan(one) for name, one in sources.items()}
        _check_same(existing, with_split_rule(sources, scans, rule).origin() | request)
        _warn_of_copies(existing)
        return existing
    files = file_stamps(file for one in sources.values() for file in one.files)
    with staging_directory(out, request | {"format": FORMAT, "split": split, "files": files}, "corpus") as folder:
        text = with_split_rule(sources, _scanned(folder / "scan.json", sources), rule)
        _write(folder, text, layout, request, workers or min(_cores(), MAX_DEFAULT_WORKERS))
    corpus = open_corpus(out)
    _warn_of_copies(corpus)
    return corpus


def _existing(out: Path) -> Corpus | None:
    """Returns the corpus in `out`, None if `out` is missing or empty. UserError if it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "meta.json").is_file():
        raise UserError(f"{out} is not empty and holds no corpus; choose another --out")
    return open_corpus(out)


def _check_same(corpus: Corpus, origin: dict):
    """UserError if the corpus was prepared with a different value of one of these settings."""
    for name, value in origin.items():
        if corpus.meta.get(name) != value:
            what = name.removesuffix("_sha256")
            raise UserError(f"{corpus.path} holds a corpus with another {what}; choose another --out")


def _scanned(record: Path, sources: dict[str, Source]) -> dict[str, Scan]:
    """Returns the scan of each source; recorded in a file, since it takes a pass over all text."""
    if record.is_file():
        return {name: Scan(**values) for name, values in json.loads(record.read_text()).items()}
    scans = {name: scan(one) for name, one in sources.items()}
    write_text_atomic(record, json.dumps({name: asdict(one) for name, one in scans.items()}))
    return scans


def _write(folder: Path, text: SplitText, layout: Layout, request: dict, workers: int):
    """Writes the folder `corpus` of a staging directory; each stage resumes where it was interrupted."""
    written, corpus, splits, seed = folder / "written", folder / "corpus", text.splits, request["seed"]
    tokenizer = _tokenizer(corpus / "tokenizer", text, layout, request)
    written.mkdir(exist_ok=True)
    with tqdm(desc="tokenising", total=text.num_bytes, unit="B", unit_scale=True, delay=PROGRESS_DELAY) as progress:
        segments = text.segments(seed)
        counts: dict[str, dict[str, Any]] = write_splits(written, segments, splits, tokenizer, workers, progress.update)
    dtype = token_dtype(tokenizer)
    arrange(written, corpus, splits, dtype, None if text.in_order else philox(seed, DOCUMENT_ORDER))
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
    """Prints a line on stderr for each split with more than `MAX_OVERLAP` of its tokens in documents also in train."""
    for split, counts in corpus.meta["splits"].items():
        copies = counts.get("also_in_train")  # absent for train, and in older corpora
        if copies and copies["tokens"] > MAX_OVERLAP * counts["tokens"]:
            print(
                f"sedd: {copies['documents']:,} of the {counts['documents']:,} documents of {split}, with "
                f"{copies['tokens'] / counts['tokens']:.1%} of its tokens, are also in train, so that they are not "
                "held-out text; check that no file is in both",
                file=sys.stderr,
            )


def _tokenizer(directory: Path, text: SplitText, layout: Layout, request: dict) -> Tokenizer:
    """Returns the tokenizer, pretrained or trained on the training text; saved, since training may take minutes."""
    if directory.is_dir():
        return load_tokenizer(directory)
    train, held_out = (text.of_splits(splits, request["seed"]) for splits in (SPLITS[:1], SPLITS[1:]))
    tokenizer = make_tokenizer(request["tokenizer"], train, layout.padded or text.needs_end_of_text, held_out)
    part = directory.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save(part)
    part.replace(directory)
    return tokenizer


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
