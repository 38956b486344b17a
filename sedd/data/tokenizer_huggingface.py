"""`huggingface:FILE` and `gpt2:FOLDER`: a pretrained `tokenizer.json`, or one made of GPT-2's two files."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import numpy as np

from sedd.data.tokenizer_ends import Rules, marks_ends, rules_inside
from sedd.errors import UserError
from sedd.runtime.disk import absolute

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # the first that exists ends a text
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

# Encoding a million characters takes up to 200 MB, and the library encodes the texts of each call in parallel.
_CALLS = BoundedSemaphore(4)


@dataclass(frozen=True)
class HuggingFace:
    """A tokenizer of the library `tokenizers`; `data` is its `tokenizer.json`.

    Its own rules apply, some of which lose spaces or normalise characters. Special tokens are not added, ids are not
    truncated, padded or sampled (BPE dropout), and text is never encoded as a special token. Ids are those of the
    library, which for added tokens may differ from those in the file.
    """

    data: bytes = field(repr=False)

    @cached_property
    def _tokenizer(self):
        library = _library()
        try:
            tokenizer = library.Tokenizer.from_str(self.data.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"the tokenizer file is not a tokenizer.json ({_first_line(error)}); give another"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as text
        for sampling in ("dropout", "alpha"):  # of BPE, of Unigram
            if getattr(tokenizer.model, sampling, None) is not None:
                setattr(tokenizer.model, sampling, None)
        return tokenizer

    @property
    def rules(self) -> dict[str, Any]:
        """The content of `data` as the library writes it, with its ids of added tokens."""
        return json.loads(self._tokenizer.to_str())

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids by the text of the token."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def _special(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in sorted(added.items()) if token.special}

    @cached_property
    def _forbidden(self) -> np.ndarray:
        """The ids of all special tokens but the unknown token, which no text may have. Int32[N]."""
        model = json.loads(self.data)["model"]
        unknown = (model.get("unk_id"), self._special.get(model.get("unk_token")))
        return np.array([token for token in self._special.values() if token not in unknown], np.int32)

    @property
    def end_of_text(self) -> int | None:
        """The id of the first of `END_TOKENS` among the special tokens, None if there is none."""
        return next((self._special[token] for token in END_TOKENS if token in self._special), None)

    @cached_property
    def marks_ends(self) -> bool:
        """See `EndSensitiveBackend`."""
        return marks_ends(self._tokenizer)

    @cached_property
    def _rules(self) -> dict[tuple[bool, bool], Rules]:
        """The rules by (the part begins the text, the part ends the text)."""
        rules = {(opens, closes): Rules(self._tokenizer) for opens in (True, False) for closes in (True, False)}
        return rules | rules_inside(self._tokenizer) if self.marks_ends else rules

    def encode_all(self, texts: Sequence[str], opens: bool = True, closes: bool = True) -> list[np.ndarray]:
        rules = Rules(self._tokenizer) if opens and closes else self._rules[opens, closes]
        with _CALLS:
            encoded = rules.tokenizer.encode_batch_fast([*map(rules.frame, texts)], add_special_tokens=False)
            all_ids = [rules.unframe(one.ids)[0] for one in encoded]
        return [
            self._encode_cut(text, opens, closes) if ids is None or np.isin(ids, self._forbidden).any() else ids
            for text, ids in zip(texts, all_ids, strict=True)
        ]

    def _encode_cut(self, text: str, opens: bool, closes: bool) -> np.ndarray:
        """Returns the ids of a text that the model encodes with special tokens: cuts these until it no longer does."""
        rules = self._rules[opens, closes]
        encoded = rules.tokenizer.encode(rules.frame(text), add_special_tokens=False)
        ids, first = rules.unframe(encoded.ids)
        if ids is None:
            return self.encode_all([text])[0]
        special = np.flatnonzero(np.isin(ids, self._forbidden))
        if not len(special):
            return ids
        if len(text) == 1:
            raise UserError(f"the tokenizer encodes the character {text!r} as a special token; leave it out")
        starts = [encoded.offsets[first + index][0] - len(rules.before) for index in special]
        cuts = sorted({0, len(text), *starts, *(start + 1 for start in starts)})
        parts = [
            self._encode_cut(text[start:end], opens and start == 0, closes and end == len(text))
            for start, end in itertools.pairwise(cuts)
        ]
        return np.concatenate(parts)

    def decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def with_special_token(data: bytes, text: str) -> bytes:
    """Returns a `tokenizer.json` with one more special token, whose id is the next one."""
    tokenizer = _library().Tokenizer.from_str(data.decode("utf-8"))
    tokenizer.add_special_tokens([text])
    return tokenizer.to_str().encode("utf-8")


def gpt2_data(folder: Path) -> bytes:
    """Returns the `tokenizer.json` for a folder with GPT-2's `vocab.json` and `merges.txt`.

    `encoder.json` and `vocab.bpe` are accepted too. UserError if they are missing, or not like GPT-2's.
    """
    folder = Path(absolute(folder))
    names = next((names for names in GPT2_FILES if all((folder / name).is_file() for name in names)), None)
    if names is None:
        required = " or ".join(" and ".join(names) for names in GPT2_FILES)
        raise UserError(f"there is no GPT-2 tokenizer in {str(folder)!r}; it needs {required}")
    library = _library()
    try:
        vocab = json.loads((folder / names[0]).read_bytes())
        lines = (folder / names[1]).read_bytes().decode("utf-8").split("\n")
        merges = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip() and line[:8] != "#version"]
        if unknown := [merge for merge in merges if not {*merge, "".join(merge)} <= vocab.keys() or len(merge) != 2]:
            raise ValueError(f"{names[0]} lacks a token of the merge {' '.join(unknown[0])!r} in {names[1]}")
        if missing := set(library.pre_tokenizers.ByteLevel.alphabet()) - vocab.keys():
            raise ValueError(f"{names[0]} lacks {len(missing)} of the 256 bytes")
        tokenizer = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"the GPT-2 tokenizer in {str(folder)!r} is damaged: {_first_line(error)}") from error
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    if END_TOKENS[0] in vocab:
        tokenizer.add_special_tokens([END_TOKENS[0]])
    return tokenizer.to_str().encode("utf-8")


def _library():
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
    except ImportError as error:
        raise UserError("this tokenizer needs the package tokenizers: pip install 'sedd[tokenizers]'") from error
    return tokenizers


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
