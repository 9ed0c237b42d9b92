"""Documents of any length in bounded memory: how long one may be, and the parts it is tokenized in.

A tokenizer takes some 200 bytes of memory for a byte of text. So a document is cut into parts of
`PART_CHARS` characters, where it has white space if there is some near; each part is tokenized on
its own. A shorter document is one part: its tokens do not change.
"""

from collections.abc import Iterator

MAX_DOCUMENT_BYTES = 2**27
"""134 MB, as a file or a row holds it. A longer one is refused."""

PART_CHARS = 2**20

_SEARCHED_CHARS = 1000
"""Characters at the end of a part in which white space is looked for."""


def parts_of(text: str) -> Iterator[str]:
    """The parts of a document, in order; together they are the text."""
    begin = 0
    while len(text) - begin > PART_CHARS:
        end = begin + PART_CHARS
        tail = text[end - _SEARCHED_CHARS : end]
        spaces = [i for i, character in enumerate(tail) if character.isspace()]
        # White space goes with the word behind it, as tokenizers have it.
        end += spaces[-1] - _SEARCHED_CHARS if spaces else 0
        yield text[begin:end]
        begin = end
    yield text[begin:]


def check_length(num_bytes: int, field: str, place: str) -> None:
    """Raise ValueError for a document that is too long."""
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{field} must hold documents of at most {MAX_DOCUMENT_BYTES:,} bytes, got a longer "
            f"one{place}: split it"
        )
