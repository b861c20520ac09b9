"""What a unit of text is: a word, a pair of characters where words have no spaces, or a token.

Plain functions of whole numbers: the reference calls them, the compiled index is made of them.
"""

MOST_LETTERS = 64
"""A longer run of letters is no word."""
PAIR = 6
"""Bytes of two characters of a script without spaces."""
HAS_DIGIT, IS_DENSE = 1, 2
FIRST_HASH = 0x811C9DC5


def fold(byte: int) -> int:
    """Return a letter in lower case."""
    return byte + 32 if 65 <= byte <= 90 else byte


def is_letter(byte: int) -> bool:
    """Return whether a byte belongs to a word: a letter, a digit, or part of a longer character."""
    return 97 <= byte <= 122 or 48 <= byte <= 57 or 65 <= byte <= 90 or 128 <= byte <= 255


def is_dense(lead: int, second: int) -> bool:
    """Return whether a character that begins so is of a script without spaces."""
    if lead == 0xE0:
        return 0xB8 <= second <= 0xBB  # Thai, Lao
    if lead == 0xE1:
        return 0x80 <= second <= 0x82 or 0x9E <= second <= 0x9F  # Burmese, Khmer
    return 0xE3 <= lead <= 0xE9  # Kana, Chinese


def mark_run(marks: int, byte: int, begins_dense: bool) -> int:
    """Return what a run of letters has in it after one more: a digit, a script without spaces."""
    if begins_dense:
        return marks | IS_DENSE
    return marks | HAS_DIGIT if 48 <= byte <= 57 else marks


def is_word(length: int, marks: int) -> bool:
    """Return whether a run of so many letters is a word: three letters, or fewer with a digit."""
    return marks < IS_DENSE and (length >= 3 or marks == HAS_DIGIT) and length <= MOST_LETTERS


def extend_hash(code: int, token: int) -> int:
    """Return the hash in 0 .. 2**32 - 1 of a unit with one more token (FNV-1a)."""
    return ((code ^ token) * 0x01000193) & 0xFFFFFFFF


def finish_hash(code: int, length: int) -> int:
    """Return the hash of a whole unit: its last seven bits are the number of its tokens."""
    return code - code % 128 + length


def choose_entry(code: int, num_entries: int) -> int:
    """Return the entry of a hash table at which the search for a unit begins."""
    mixed = (code * 0x9E3779B1) & 0xFFFFFFFF
    return (mixed * num_entries) >> 32
