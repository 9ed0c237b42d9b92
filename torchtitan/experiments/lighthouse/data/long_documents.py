"""Tokenize long documents in bounded memory.

A tokenizer uses about 200 bytes of memory per byte of text. So a document is cut into parts of
`PART_CHARS` characters, at white space if there is any nearby. Each part is tokenized separately. A
shorter document is one part, so its tokens do not change.
"""

from collections.abc import Iterator

MAX_DOCUMENT_BYTES = 2**27
"""Maximum size of a document in a file or row, 134 MB. A longer one raises an error."""

PART_CHARS = 2**20

_SEARCHED_CHARS = 1000
"""Number of characters at the end of a part that are searched for white space."""


def parts_of(text: str) -> Iterator[str]:
    """The parts of a document, in order. Joined, they are the whole text."""
    begin = 0
    while len(text) - begin > PART_CHARS:
        end = begin + PART_CHARS
        tail = text[end - _SEARCHED_CHARS : end]
        spaces = [i for i, character in enumerate(tail) if character.isspace()]
        # White space belongs to the word after it, as in tokenizers.
        end += spaces[-1] - _SEARCHED_CHARS if spaces else 0
        yield text[begin:end]
        begin = end
    yield text[begin:]


def check_length(num_bytes: int, field: str, place: str) -> None:
    """Raise ValueError if a document is too long."""
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{field} must hold documents of at most {MAX_DOCUMENT_BYTES:,} bytes, got a longer "
            f"one{place}: split it"
        )
