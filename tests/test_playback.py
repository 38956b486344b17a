"""The text of states, the display in a terminal, and the HTML page in a browser."""

import io
import json
import os
import re
import shutil
import termios
import unicodedata
from functools import cache

import numpy as np
import pytest
import sentencepiece
from test_tokenizers import END, byte_level

from sedd.data.tokenizer_huggingface import HuggingFace
from sedd.data.tokenizer_sentencepiece import SentencePiece
from sedd.data.tokenizers import Tokenizer, make_tokenizer
from sedd.errors import UserError
from sedd.generation.playback import Reader, Terminal, page, reader, terminal
from sedd.generation.playback.reader import BLOCK, BROKEN

TEXT = "Grüße, “the cat” — 漢字 and 😀!\n\n  Two  spaces, the end."
KINDS = ["bytes", "characters", "sentencepiece", "dummy prefix", "byte level", "ids"]


@cache
def tokenizer(kind):
    if kind in ("bytes", "characters"):
        return make_tokenizer(kind, [TEXT], end_of_text=True)
    if kind == "sentencepiece":
        return make_tokenizer("sentencepiece:285", [TEXT + " The cat sat on the mat."] * 9, end_of_text=True)
    if kind == "byte level":
        return Tokenizer("huggingface", HuggingFace(byte_level().to_str().encode()), True)
    options = dict(add_dummy_prefix=True, byte_fallback=True, hard_vocab_limit=False, vocab_size=330, minloglevel=2)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["the cat sat"] * 9), model_writer=model, **options)
    return Tokenizer("sentencepiece", SentencePiece(model.getvalue()), True)


def trace(ids, given, steps, mask, seed=0):
    """Int[T L]: each token that is not given is unmasked at a random step, one at the first and one at the last."""
    when = np.random.default_rng(seed).integers(1, steps + 1, len(ids))
    when[np.flatnonzero(~given)[[0, -1]]] = 1, steps
    return np.array([np.where(given | (when <= step), ids, mask) for step in range(1, steps + 1)])


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_runs_join_to_the_decoded_text(kind):
    """For any grouping of tokens, also after an end of text. Only a space that opens a text is dropped."""
    tok = tokenizer(kind)
    ids = np.concatenate([tok.encode(TEXT), [tok.end_of_text], tok.encode("the cat"), tok.encode("ü the")])
    decoder, rng = Reader(tok, tok.vocab_size), np.random.default_rng(0)
    for _ in range(20):
        runs = decoder.runs(ids, rng.random(len(ids)) < 0.5, np.where(rng.random(len(ids)) < 0.3, 0, ids))
        assert "".join(run.text for run in runs) == tok.decode(ids)
        assert all(run.kind != after.kind for run, after in zip(runs, runs[1:]))
    for cut in range(len(ids)):  # any tokens may open a row
        assert "".join(cell or "" for cell in decoder.cells(ids[cut:])) == tok.decode(ids[cut:])
    if kind == "dummy prefix":  # control: decoded one by one, the tokens lose the space
        assert "".join(tok.decode(ids[at : at + 1]) for at in range(len(ids))) != tok.decode(ids)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_random_ids_join_to_the_decoded_text(kind):
    tok = tokenizer(kind)
    decoder = Reader(tok, None)
    for seed in range(30):
        ids = np.random.default_rng(seed).integers(0, tok.vocab_size, 40)
        assert "".join(cell or "" for cell in decoder.cells(ids)) == tok.decode(ids)


def test_runs_are_given_new_unchanged_or_masked():
    tok = tokenizer("characters")
    mask, ids = tok.vocab_size, tok.encode("the cat")
    state = np.array([*ids[:5], mask, mask, -1])
    before = np.array([*ids[:4], mask, mask, ids[6], -1])
    given = np.arange(8) < 3
    assert Reader(tok, mask).runs(state, given, before) == [
        ("the", "given"), (" ", "unchanged"), ("c", "new"), (2 * BLOCK, "masked")
    ]  # fmt: skip
    assert Reader(tok, mask).runs(state, given)[1] == (" c", "new")  # all was masked before the first step
    assert Reader(tok, None).runs(ids, given[:7]) == [("the", "given"), (" cat", "unchanged")]  # without a mask
    assert Reader(None, 9).runs(np.array([4, 9, 5]), given[5:]) == [("4 ", "new"), (BLOCK, "masked"), ("5 ", "new")]


@pytest.mark.parametrize("kind", ["bytes", "dummy prefix", "byte level"])
def test_split_character_is_replaced_only_until_it_is_complete(kind):
    tok = tokenizer(kind)
    ids = tok.encode("a😀b")
    mask, given = tok.vocab_size, np.zeros(len(ids), bool)
    given[: len(ids) - 3] = True  # the first bytes of the character are given, the last two are not
    decoder = Reader(tok, mask)
    half = np.where(np.arange(len(ids)) == len(ids) - 2, mask, ids)
    assert any(BROKEN in run.text for run in decoder.runs(half, given))
    assert decoder.runs(ids, given, half) == [("a", "given"), ("😀", "new"), ("b", "unchanged")]
    assert decoder.runs(ids, given, ids) == [("a", "given"), ("😀b", "unchanged")]
    assert sum(cell is None for cell in decoder.cells(ids)) == len("😀".encode()) - 1


def test_invalid_bytes_are_replaced_one_by_one(monkeypatch):
    tok = tokenizer("bytes")
    first, *others = "😀".encode()
    ids = np.array([first, first, *others, others[-1], ord("b")])
    cells = [BROKEN, "😀", None, None, None, BROKEN, "b"]
    assert Reader(tok, None).cells(ids) == cells
    monkeypatch.setattr(reader, "WINDOW", 2)  # characters split over more tokens than the first window
    assert Reader(tok, None).cells(ids) == cells


class Screen(io.StringIO):
    """An emulated terminal. It fails on sequences and characters that must not be written."""

    def __init__(self, columns=40, lines=12):
        super().__init__()
        self.columns, self.height = columns, lines
        self.cells, self.row, self.column, self.style, self.cursor, self.frames = [[]], 0, 0, "", True, 0

    def isatty(self):
        return True

    def write(self, text):
        for code, command, character in re.findall(r"\x1b\[([?\d;]*)([a-zA-Z])|([^\x1b])", text, re.DOTALL):
            self._put(character) if character else self._obey(code, command)

    def _put(self, character):
        if character == "\n":
            self.row, self.column = self.row + 1, 0
            self.cells += [[]] * (self.row + 1 - len(self.cells))
        elif character == "\r":
            self.column = 0
        else:
            assert unicodedata.category(character) != "Cc"
            line = self.cells[self.row]
            self.cells[self.row] = [*line[: self.column], (character, self.style), *line[self.column + 1 :]]
            self.column += 1
            wide = sum(unicodedata.east_asian_width(cell) in "WF" for cell, _ in self.cells[self.row][: self.column])
            assert self.column + wide < self.columns

    def _obey(self, code, command):
        if code == "?25":
            self.cursor = command == "h"
        elif command == "A":
            self.row -= int(code)
            assert self.row >= 0
        elif command == "K":
            self.cells[self.row] = self.cells[self.row][: self.column]
        elif command == "J":
            self.cells = [*self.cells[: self.row], self.cells[self.row][: self.column]]
            self.frames += 1
            assert len(self.cells) < self.height
        else:
            assert command == "m"
            self.style = "" if code == "0" else code

    def text(self):
        return ["".join(character for character, _ in line) for line in self.cells]


@pytest.fixture
def quick(monkeypatch):
    """No pauses; the size of a terminal is that of its Screen."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "PAUSES", 0.0)
    monkeypatch.setattr(terminal, "SHORTEST", 0.0)
    monkeypatch.setattr(Terminal, "_size", lambda self: (self._stream.columns - 1, self._stream.height))


def show(screen, states, given, tok, texts=None):
    """Shows states, Int[T N L], as one group of texts."""
    rows = np.arange(states.shape[1])
    with Terminal(tok, tok.vocab_size, texts, screen) as watch:
        assert not screen.cursor
        for step, tokens in enumerate(states):
            watch(rows, tokens, given, step + 1)


def test_terminal_shows_the_final_text_last(quick):
    tok, screen = tokenizer("sentencepiece"), Screen()
    ids = tok.encode(TEXT)
    given = np.arange(len(ids)) < 5
    show(screen, trace(ids, given, 8, tok.vocab_size)[:, None], given[None], tok)
    head, *lines, after = screen.text()
    assert head == "step 8" and after == "" and screen.cursor and screen.style == "" and screen.frames == 8
    words = TEXT.split()
    assert "\n".join(lines).split() == words
    assert max(map(len, lines)) < 40 and "" in lines  # the empty line of the text
    styles = {style for line in screen.cells[1:] for _, style in line}
    assert styles == {"94", "1;32", ""}  # given, new, unchanged


def test_terminal_fits_the_screen_and_scrolls_to_changes(quick):
    tok, screen = tokenizer("characters"), Screen(lines=9)
    ids = tok.encode((TEXT * 4).replace("\n", " "))
    given = np.zeros((3, len(ids)), bool)
    order = np.arange(len(ids)) // 30  # from left to right
    states = np.stack([np.where(order <= step, ids, tok.vocab_size) for step in range(order[-1] + 1)])
    show(screen, np.stack([states] * 2, axis=1), given[:2], tok, texts=2)
    head, *lines, _ = screen.text()
    assert head == f"step {len(states)}, texts 1 to 2"
    assert [line[:3] for line in lines if line[0] != " "] == ["1  ", "2  "] and len(lines) == 7
    assert lines[2].endswith("the end.") and lines[-1].endswith("the end.") and BLOCK not in "".join(lines)
    crowded = Screen(lines=5)
    show(crowded, np.stack([states] * 9, axis=1), np.zeros((9, len(ids)), bool), tok)
    assert crowded.text()[-2] == "and 7 more"


def test_control_characters_of_texts_are_replaced(quick, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    tok, screen = make_tokenizer("bytes", [], end_of_text=False), Screen()
    ids = tok.encode("a\x1b[2Jb\r\x07c\td\x9b\u202ee")
    show(screen, ids[None, None], np.zeros((1, len(ids)), bool), tok)
    assert screen.text()[1] == f"a\u241b[2Jb\u240d\u2407c d{BROKEN}e"
    assert {style for line in screen.cells for _, style in line} == {""}


def test_ascii_terminal_shows_question_marks_for_other_characters(quick):
    """Each takes one column."""

    class Ascii(Screen):
        encoding = "ascii"

        def write(self, text):
            super().write(text.encode("ascii").decode())

    tok, screen = make_tokenizer("characters", [TEXT, "e\u0301\x1b"], end_of_text=True), Ascii()
    ids = tok.encode(TEXT + "e\u0301\x1b")
    show(screen, trace(ids, np.zeros(len(ids), bool), 3, tok.vocab_size)[:, None], np.zeros((1, len(ids)), bool), tok)
    _, *lines, _ = screen.text()
    assert " ".join("\n".join(lines).split()) == "Gr??e, ?the cat? ? ?? and ?! Two spaces, the end.e?"


def test_cursor_is_restored_after_an_interruption(quick):
    tok, screen = tokenizer("characters"), Screen()
    with pytest.raises(KeyboardInterrupt), Terminal(tok, None, stream=screen) as watch:
        watch(np.arange(1), tok.encode("the")[None], np.zeros((1, 3), bool), 1)
        raise KeyboardInterrupt
    assert screen.cursor and screen.text() == ["step 1", "the", ""] and screen.style == ""
    with Terminal(tok, None, stream=Screen()) as watch:
        assert watch._stream.text() == ["waiting for the first step"]
    assert watch._stream.cursor and watch._stream.text() == [""]


def test_pauses_get_shorter_and_are_bounded(quick, monkeypatch):
    """With steps of 1 ms the first frames are delayed, thousands are not, and the last state is shown."""
    now = [100.0]
    monkeypatch.setattr(terminal, "PAUSES", 8.0)
    monkeypatch.setattr(terminal, "SHORTEST", 0.015)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(terminal.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    tok, screen, ended = tokenizer("characters"), Screen(), []
    ids = tok.encode("the cat")
    with Terminal(tok, tok.vocab_size, stream=screen) as watch:
        for step in range(5000):
            now[0] += 0.001
            watch(np.arange(1), ids[None], np.zeros((1, 7), bool), step + 1)
            ended.append(now[0] - 100)
    assert 64 * 0.02 < ended[63] < 64 * 0.031 and ended[-1] < 5 + 8
    assert screen.frames < 1000 and screen.text()[0] == "step 5000"


def test_stream_that_is_not_a_terminal_is_refused(quick, monkeypatch):
    tok = tokenizer("characters")
    with pytest.raises(UserError, match="--watch needs a terminal; leave it out, or write a page with --html=FILE"):
        Terminal(tok, None, stream=io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    with pytest.raises(UserError, match="--watch"):
        Terminal(tok, None, stream=Screen())


def test_size_of_a_real_terminal_is_read(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stream:
        assert Terminal(None, None, stream=stream)._size() == (79, 24)  # the defaults: it has no size yet
        termios.tcsetwinsize(stream.fileno(), (30, 100))
        assert Terminal(None, None, stream=stream)._size() == (99, 30)
    os.close(master)


def embedded(written):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', written, re.DOTALL)[1])


def replayed(data):
    """Yields the step and texts of every frame of a page, computed like its script."""
    pieces, rows = data["pieces"], [list(row) for row in data["base"]]
    yield data["first"], ["".join(pieces[piece] for piece in row) for row in rows]
    for step, changes in data["frames"]:
        for row, changed in zip(rows, changes):
            for at, piece in zip(changed[::2], changed[1::2]):
                row[at] = piece
        yield step, ["".join(pieces[piece] for piece in row) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [True, False])
def test_page_has_the_text_of_every_state(kind, masked):
    tok = None if kind == "ids" else tokenizer(kind)
    size = tok.vocab_size if tok else 300
    ids = np.arange(40) % size if tok is None else tok.encode(TEXT)
    given = np.arange(len(ids)) < 4
    early = trace(ids, given, 6, size)
    states = np.stack([trace(ids, given, 12, size), np.concatenate([early, early[[-1] * 6]])], axis=1)
    states[:, 1, -2:] = -1  # a shorter row
    mask = size if masked else None
    if not masked:
        states = np.where(states == size, np.roll(ids, 3), states)
    decoder = Reader(tok, mask)
    frames = dict(replayed(embedded(page(states, np.stack([given] * 2), tok, mask, {}))))
    before = None
    for step, state in enumerate(states, 1):
        assert (step in frames) == (step == 12 or before is None or not np.array_equal(state, before))
        if step in frames:
            assert frames[step] == ["".join(cell or "" for cell in decoder.cells(tokens)) for tokens in state]
        before = state
    assert (0 in frames) == masked


def test_token_is_new_even_if_its_text_is_equal():
    tok = tokenizer("sentencepiece")
    ids = np.array([[tok.encode("xt")[-1]], [tok.backend._processor.piece_to_id("<0x74>")]])
    data = embedded(page(ids[:, None], np.zeros((1, 1), bool), tok, None, {}))
    assert ids[0] != ids[1] and data["frames"] == [[2, [[0, *data["base"][0]]]]]


def test_page_is_small_and_deterministic():
    """Less than 16 bytes per changed token: all of 4 rows of 256 tokens are unmasked in 256 steps."""
    tok = tokenizer("characters")
    ids = np.resize(tok.encode(TEXT), 256)
    states = np.stack([trace(ids, np.zeros(256, bool), 256, tok.vocab_size, seed) for seed in range(4)], axis=1)
    written, empty = (page(shown, np.zeros((4, 256), bool), tok, tok.vocab_size, {}) for shown in (states, states[:0]))
    assert len(written) - len(empty) < 4 * 256 * 16
    assert written == page(states, np.zeros((4, 256), bool), tok, tok.vocab_size, {})


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium without a network, with the installed driver."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no chromium with a chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = selenium.Chrome(service=selenium.ChromeService(driver), options=options)
    yield chrome
    chrome.quit()


EVIL = "</script><b>no</b> <!-- & \"'\u2028 {{data}} {{final}}"


def test_page_plays_pauses_and_steps_in_a_browser(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    tags = ("<b>no</b>", "</script>")
    tok = Tokenizer("huggingface", HuggingFace(byte_level(special=(END, *tags)).to_str().encode()), True)
    mask, ids = tok.vocab_size, np.concatenate([tok.encode(f"{EVIL} {TEXT}"), [1, 2]])
    assert tok.decode(ids).endswith("".join(tags))
    given = np.stack([np.arange(len(ids)) < 20] * 2)
    states = np.stack([trace(ids, given[0], 30, mask, seed) for seed in (0, 1)], axis=1)
    file = tmp_path / "page.html"
    file.write_text(page(states, given, tok, mask, {"seed": 0, "model": EVIL}), encoding="utf-8")
    browser.get(file.as_uri())
    play, back, forward, step, speed = (
        browser.find_element("id", name) for name in ("play", "back", "forward", "step", "speed")
    )
    wait = WebDriverWait(browser, 30, poll_frequency=0.02)
    decoder = Reader(tok, mask)

    def texts():
        return browser.execute_script("return [...document.querySelectorAll('.text')].map((text) => text.textContent)")

    def expected(number):
        state = states[number - 1] if number else np.where(given, ids, mask)
        return ["".join(cell or "" for cell in decoder.cells(tokens)) for tokens in state]

    def reached():
        return int(step.text.split()[1])

    wait.until(lambda _: reached() > 1)  # it starts to play by itself
    play.click()
    paused = reached()
    assert 1 < paused < 30 and play.get_attribute("aria-label") == "Play" and texts() == expected(paused)
    forward.click()
    assert reached() == paused + 1 and texts() == expected(paused + 1)
    fresh = browser.execute_script("return [...document.querySelectorAll('.text .new')].length")
    assert 0 < fresh <= np.sum(states[paused] != states[paused - 1])
    back.click()
    back.click()
    assert reached() == paused - 1 and texts() == expected(paused - 1)
    body = browser.find_element("tag name", "body")
    body.send_keys(Keys.HOME)
    assert reached() == 0 and texts() == expected(0) and not back.is_enabled()
    body.send_keys(Keys.ARROW_RIGHT)
    assert reached() == 1 and texts() == expected(1)
    Select(speed).select_by_value("4")
    body.send_keys(Keys.SPACE)
    assert play.get_attribute("aria-label") == "Pause"
    wait.until(lambda _: reached() == 30)
    wait.until(lambda _: play.get_attribute("aria-label") == "Play")
    assert texts() == [tok.decode(ids)] * 2 == expected(30) and not forward.is_enabled()
    assert browser.find_element("tag name", "dl").get_property("textContent") == f"seed0model{EVIL}"
    assert not browser.find_elements("css selector", "main b")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []
