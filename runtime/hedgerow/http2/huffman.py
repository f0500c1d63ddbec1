"""Huffman-coded strings of header blocks (RFC 7541, 5.2 and appendix B), read a byte at a time.

A string is read by a machine whose state is the bits that are no whole code yet. What a byte does in a state is found
out bit by bit when it first comes, then looked up: 256 states by 256 bytes, some megabytes, if all of them ever come.
"""

from typing import Final

from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

END_OF_STRING = 256
"""The code that stands in no string; its first bits are the padding."""
_SYMBOLS: Final = {key: symbol for symbol, key in enumerate(zip(REQUEST_CODES_LENGTH, REQUEST_CODES, strict=True))}
"""What codes stand for, by their length and their bits."""


class _State(dict[int, tuple[str, "_State"]]):
    """What each next byte completes after `length` bits, as Latin-1, and the state then; bytes not seen are missing."""

    def __init__(self, length: int, bits: int) -> None:
        super().__init__()
        self._length, self._bits = length, bits
        self.ends = length < 8 and bits == (1 << length) - 1
        """Whether a string may end here: what is left is its padding."""

    def __missing__(self, byte: int) -> "tuple[str, _State]":
        length, bits, text = self._length, self._bits, ""
        for shift in range(7, -1, -1):
            length, bits = length + 1, bits << 1 | byte >> shift & 1
            symbol = _SYMBOLS.get((length, bits))
            if symbol == END_OF_STRING:
                raise ValueError("a Huffman-coded string contains the end of a string")
            if symbol is not None:
                text, length, bits = text + chr(symbol), 0, 0
        state = _STATES.get((length, bits))
        if state is None:
            state = _STATES[length, bits] = _State(length, bits)
        self[byte] = text, state
        return text, state


_START: Final = _State(0, 0)
_STATES: Final = {(0, 0): _START}


def decode(coded: bytes) -> str:
    """The string, its bytes as Latin-1; raises `ValueError`."""
    state, parts = _START, []
    for byte in coded:
        part, state = state[byte]
        parts.append(part)
    if not state.ends:
        raise ValueError("a Huffman-coded string ends within a code")
    return "".join(parts)
