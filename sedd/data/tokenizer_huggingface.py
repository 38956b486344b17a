"""`huggingface:FILE` and `gpt2:FOLDER`: a given `tokenizer.json`, or GPT-2's two files turned into one."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import BoundedSemaphore

import numpy as np

from sedd.data.tokenizer_ends import Rules, marks_ends, rules_inside
from sedd.errors import UserError
from sedd.runtime.disk import absolute

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # what ends a text, the first that there is
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

# Encoding a million characters takes up to 200 MB, and the library runs in parallel over the texts of each call.
_CALLS = BoundedSemaphore(4)


@dataclass(frozen=True)
class HuggingFace:
    """A tokenizer of the library `tokenizers`; `data` is its `tokenizer.json`.

    Its rules are its own, and some lose spaces or normalise characters. Only here, nothing is added, cut, padded or
    drawn at random, and no text becomes a special token, whatever it says. Ids are those that the library gives, which
    for added tokens may be others than the file says.
    """

    data: bytes = field(repr=False)

    @cached_property
    def _tokenizer(self):
        library = _library()
        try:
            tokenizer = library.Tokenizer.from_str(self.data.decode("utf-8"))
        except Exception as error:  # whatever the library raises
            raise UserError(f"the tokenizer file is no tokenizer.json ({_first_line(error)}); give another") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as text
        for sampling in ("dropout", "alpha"):  # of BPE, of Unigram
            if getattr(tokenizer.model, sampling, None) is not None:
                setattr(tokenizer.model, sampling, None)
        return tokenizer

    @cached_property
    def size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def _special(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in sorted(added.items()) if token.special}

    @cached_property
    def _forbidden(self) -> np.ndarray:
        """The ids that no text may have: of all special tokens but the one for what is unknown."""
        model = json.loads(self.data)["model"]
        unknown = (model.get("unk_id"), self._special.get(model.get("unk_token")))
        return np.array([token for token in self._special.values() if token not in unknown], np.int32)

    @property
    def end_of_text(self) -> int | None:
        """The id of the first of `ENDS` among the special tokens."""
        return next((self._special[end] for end in ENDS if end in self._special), None)

    @cached_property
    def marks_ends(self) -> bool:
        return marks_ends(self._tokenizer)

    @cached_property
    def _rules(self) -> dict[tuple[bool, bool], Rules]:
        """The rules by whether a text begins with what is encoded, and whether it ends with it."""
        whole = dict.fromkeys(itertools.product((True, False), repeat=2), Rules(self._tokenizer))
        return whole | rules_inside(self._tokenizer) if self.marks_ends else whole

    def encode_all(self, texts: Sequence[str], opens: bool = True, closes: bool = True) -> list[np.ndarray]:
        rules = Rules(self._tokenizer) if opens and closes else self._rules[opens, closes]
        with _CALLS:
            encoded = rules.tokenizer.encode_batch_fast([*map(rules.frame, texts)], add_special_tokens=False)
            found = [rules.within(one.ids) for one in encoded]
        return [
            self._spelt(text, opens, closes) if ids is None or np.isin(ids, self._forbidden).any() else ids
            for text, (ids, _) in zip(texts, found, strict=True)
        ]

    def _spelt(self, text: str, opens: bool, closes: bool) -> np.ndarray:
        """The ids of a text in which the model itself found special tokens, which are cut until it does not."""
        rules = self._rules[opens, closes]
        encoded = rules.tokenizer.encode(rules.frame(text), add_special_tokens=False)
        ids, first = rules.within(encoded.ids)
        if ids is None:
            return self.encode_all([text])[0]
        wrong = np.flatnonzero(np.isin(ids, self._forbidden))
        if not len(wrong):
            return ids
        if len(text) == 1:
            raise UserError(f"the tokenizer takes the character {text!r} for a special token; leave it out")
        starts = [encoded.offsets[first + index][0] - len(rules.before) for index in wrong]
        cuts = sorted({0, len(text), *starts, *(start + 1 for start in starts)})
        parts = itertools.pairwise(cuts)
        return np.concatenate(
            [self._spelt(text[start:end], opens and start == 0, closes and end == len(text)) for start, end in parts]
        )

    def decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def gpt2_data(folder: Path) -> bytes:
    """The `tokenizer.json` of a folder with GPT-2's `vocab.json` and `merges.txt`, or `encoder.json` and `vocab.bpe`.

    Raises:
      UserError: they are not there, or not like GPT-2's.
    """
    folder = Path(absolute(folder))
    names = next((names for names in GPT2_FILES if all((folder / name).is_file() for name in names)), None)
    if names is None:
        wanted = " or ".join(" and ".join(names) for names in GPT2_FILES)
        raise UserError(f"there is no GPT-2 tokenizer in {str(folder)!r}; it needs {wanted}")
    library = _library()
    try:
        vocab = json.loads((folder / names[0]).read_bytes())
        lines = (folder / names[1]).read_bytes().decode("utf-8").split("\n")
        merges = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip() and line[:8] != "#version"]
        if unknown := [merge for merge in merges if not {*merge, "".join(merge)} <= vocab.keys() or len(merge) != 2]:
            raise ValueError(f"{names[0]} does not hold what {' '.join(unknown[0])!r} of {names[1]} merges")
        if missing := set(library.pre_tokenizers.ByteLevel.alphabet()) - vocab.keys():
            raise ValueError(f"{names[0]} lacks {len(missing)} of the 256 bytes")
        tokenizer = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # whatever the library raises
        raise UserError(f"the GPT-2 tokenizer in {str(folder)!r} is damaged: {_first_line(error)}") from error
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    if ENDS[0] in vocab:
        tokenizer.add_special_tokens([ENDS[0]])
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
