"""Templates: blanks, escapes, and errors before memory is allocated."""

import numpy as np
import pytest

from sedd.data.tokenizers import pretrained_tokenizer
from sedd.errors import UserError
from sedd.generation import prompts


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
def test_template_is_parsed_into_texts_and_blanks(template, texts, sizes):
    """A backslash before `<blank` escapes it; elsewhere it is a literal backslash."""
    assert prompts.parse_template(template) == (texts, sizes)


@pytest.mark.parametrize(
    "mark",
    [
        *("<blank>", "<blank: 3>", "<BLANK:3>", "<Blank:3>", "<blank:-1>", "<blank:3", "<blank :3>", "< blank:3>"),
        *("<blank:1.5>", "<blank:1e3>", "<blank:\u0663>", "<blanks:3>", "<blank 3>", "<blank=3>", "<blank:", "<blank"),
    ],
)
def test_malformed_blank_is_an_error(mark):
    """With a valid blank in the template, and alone. The message has the right form."""
    for template in (f"the {mark} of <blank:2>", mark):
        with pytest.raises(
            UserError, match="is not a blank; write <blank:8> for 8 tokens, or .<blank for literal text"
        ):
            prompts.parse_template(template)


@pytest.mark.parametrize("size", ["999999999999", "9" * 18, "9" * 30, "9" * 5000])
def test_huge_blank_allocates_no_memory(size):
    with pytest.raises(UserError, match="tokens are more than the|is not a blank") as caught:
        prompts.parse_template(f"a <blank:{size}>")
    assert len(str(caught.value)) < 200


def test_huge_length_allocates_no_memory():
    with pytest.raises(UserError, match="1,000,000,000,000 tokens are more than the 268,435,456"):
        prompts.between("the", "", 10**12, pretrained_tokenizer("bytes"))


def test_escaped_blank_is_encoded_as_text():
    row = prompts.of_template(r"a\<blank:3><blank:2>", pretrained_tokenizer("bytes"))
    assert bytes(row.tokens[~row.free].astype(np.uint8)) == b"a<blank:3>" and np.sum(row.free) == 2
