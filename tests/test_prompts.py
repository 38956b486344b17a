r"""Templates: what is a blank, what is text, and what is refused before it takes memory."""

import numpy as np
import pytest

from sedd import prompts
from sedd.data.tokenizers import pretrained_tokenizer
from sedd.errors import UserError


@pytest.mark.parametrize(
    "template, texts, sizes",
    [
        ("<blank:3>", ["", ""], [3]),
        ("a <blank:8>b<blank:02>c", ["a ", "b", "c"], [8, 2]),
        (r"\<blank:3> is <blank:1>", ["<blank:3> is ", ""], [1]),
        (r"\<BLANK> and \< blank <blank:1>", ["<BLANK> and < blank ", ""], [1]),
        (r"C:\\<blank:3>", ["C:\\", ""], [3]),
        (r"C:\\\<blank:3><blank:1>", ["C:\\<blank:3>", ""], [1]),
        (r"\<blank \<blank:3> \n <b> <blank:4>", [r"<blank <blank:3> \n <b> ", ""], [4]),
    ],
)
def test_a_template_is_texts_and_blanks(template, texts, sizes):
    """A backslash before `<blank` makes it text; elsewhere it stands for itself."""
    assert prompts.parsed(template) == (texts, sizes)


@pytest.mark.parametrize(
    "mark",
    [
        *("<blank>", "<blank: 3>", "<BLANK:3>", "<Blank:3>", "<blank:-1>", "<blank:3", "<blank :3>", "< blank:3>"),
        *("<blank:1.5>", "<blank:1e3>", "<blank:\u0663>", "<blanks:3>", "<blank 3>", "<blank=3>", "<blank:", "<blank"),
    ],
)
def test_a_misspelt_blank_is_an_error(mark):
    """Beside one that is right, and alone. The line says how to write it."""
    for template in (f"the {mark} of <blank:2>", mark):
        with pytest.raises(UserError, match="is no blank; write <blank:8> for 8 tokens, or .<blank for these letters"):
            prompts.parsed(template)


@pytest.mark.parametrize("size", ["999999999999", "9" * 18, "9" * 30, "9" * 5000])
def test_an_absurd_blank_takes_no_memory(size):
    with pytest.raises(UserError, match="tokens are more than the|is no blank") as caught:
        prompts.parsed(f"a <blank:{size}>")
    assert len(str(caught.value)) < 200


def test_an_absurd_length_takes_no_memory():
    with pytest.raises(UserError, match="1,000,000,000,000 tokens are more than the 268,435,456"):
        prompts.between("the", "", 10**12, pretrained_tokenizer("bytes"))


def test_what_is_escaped_is_encoded_as_it_reads():
    row = prompts.of_template(r"a\<blank:3><blank:2>", pretrained_tokenizer("bytes"))
    assert bytes(row.tokens[row.given].astype(np.uint8)) == b"a<blank:3>" and np.sum(~row.given) == 2
