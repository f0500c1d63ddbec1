"""Our HPACK against python-hyper's: what the one writes the other reads, and what the one refuses so does the other."""

import math
from typing import Any
from unittest.mock import Mock

import pytest
from hpack import Decoder, Encoder, HPACKError
from hypothesis import given
from hypothesis import strategies as st

from hedgerow.errors import InvalidInput, Unsupported
from hedgerow.http2 import huffman
from hedgerow.http2.headers import (
    MAX_LIST_BYTES,
    MAX_REMEMBERED,
    MAX_REMEMBERED_BYTES,
    TABLE_BYTES,
    HeaderFault,
    HeaderReader,
    HeaderWriter,
    header_block,
)
from hedgerow.http2.heads import Head, read_head

Pairs = list[tuple[str, str]]
NAMES = st.sampled_from([":path", ":authority", "te", "grpc-timeout", "traceparent", "x"])
LATIN = st.text(st.characters(max_codepoint=255))
FIELDS = st.lists(st.tuples(NAMES, st.one_of(st.text("0123456789m", max_size=3), LATIN)), max_size=6)
BIG = st.integers(0, TABLE_BYTES).map(lambda size: "b" * size)


def reader() -> HeaderReader[Pairs]:
    return HeaderReader(list)


@st.composite
def integers(draw: st.DrawFn, first: int, bits: int) -> bytes:
    """An integer as HPACK has it, sometimes one that is too long."""
    limit = (1 << bits) - 1
    value = draw(st.integers(0, limit - 1))
    more = draw(st.one_of(st.just(b""), st.just(b""), st.binary(min_size=1, max_size=3), st.just(b"\xff" * 12)))
    return bytes((first | limit,)) + more if more else bytes((first | value,))


STRINGS = st.one_of(
    LATIN.map(lambda text: Encoder().huffman_coder.encode(text.encode("latin-1"))).map(
        lambda coded: prefixed(coded, 0x80)
    ),
    st.binary(max_size=6).map(lambda noise: prefixed(noise, 0x80)),
    st.binary(max_size=130).map(lambda text: prefixed(text, 0)),
    BIG.map(lambda text: prefixed(text.encode(), 0)),
)
LITERALS = st.sampled_from([(0x40, 6), (0x00, 4), (0x10, 4)])
PARTS = st.one_of(
    integers(0x80, 7),
    st.sampled_from([b"\xbe", b"\xbf", b"\xc0", b"\xc1"]),
    st.builds(bytes.__add__, LITERALS.flatmap(lambda kind: integers(*kind)), STRINGS),
    st.builds(lambda kind, name, value: bytes((kind[0],)) + name + value, LITERALS, STRINGS, STRINGS),
    integers(0x20, 5),
    st.sampled_from([b"\x20", b"\x3f\xe1\x1f", b"\x3f\xe2\x1f"]),  # nothing, all, and one byte more
    st.binary(max_size=4),
)
"""What header blocks are made of, and what they must not be made of."""
BLOCKS = st.lists(PARTS, max_size=4).map(b"".join)


def prefixed(text: bytes, first: int) -> bytes:
    size, more = len(text), b""
    if size >= 127:
        size, rest = 127, size - 127
        more = bytes((rest % 128 | 128, rest // 128)) if rest >= 128 else bytes((rest,))
    return bytes((first | size,)) + more + text


def refused(blocks: list[bytes]) -> bool:
    """Whether the last of `blocks` of a connection is, while both read all that come before as the same."""
    ours, judge = reader(), Decoder(MAX_LIST_BYTES)
    for block in blocks:
        try:
            wanted: Any = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in judge.decode(block, raw=True)]
        except HPACKError:
            with pytest.raises(HeaderFault):
                ours.read(block)
            return True
        assert ours.read(block) == wanted
    return False


@given(st.data())
def test_any_block_means_what_python_hyper_takes_it_for_or_is_refused_by_both(data: st.DataObject) -> None:
    few = data.draw(st.lists(BLOCKS, min_size=1, max_size=4))
    refused(data.draw(st.lists(st.sampled_from(few), max_size=12)))  # they come again, the table being another


NEWEST, SMALLEST, WHOLE = b"\xbe", b"\x20", b"\x3f\xe1\x1f"
"""The newest entry; the table set to nothing, and to all that there may be."""


def entry(size: int) -> bytes:
    """A literal that takes up `size` bytes of the table."""
    return b"\x40\x01n" + prefixed(b"v" * (size - 33), 0)


@pytest.mark.parametrize(
    ("blocks", "last_is_refused"),
    [
        ([entry(TABLE_BYTES), NEWEST], False),
        ([entry(TABLE_BYTES + 1), NEWEST], True),
        ([entry(40), entry(TABLE_BYTES - 40), b"\xbf"], False),
        ([entry(40), entry(TABLE_BYTES - 39), b"\xbf"], True),
        ([WHOLE + b"\x82"], False),
        ([b"\x3f\xe2\x1f" + b"\x82"], True),
        ([b"\x82" + WHOLE], True),
        ([entry(40), SMALLEST + WHOLE + NEWEST], True),
        ([entry(40), b"\x3f\x09" + NEWEST], False),
        ([entry(40), b"\x3f\x08" + NEWEST], True),
        # Blocks that come again.
        ([SMALLEST + b"\x82", WHOLE + b"\x82", SMALLEST + b"\x82", entry(40), NEWEST], True),
        ([entry(40), NEWEST, NEWEST, entry(41), NEWEST], False),
        ([entry(40) + NEWEST, NEWEST, entry(41), entry(40) + NEWEST, NEWEST, b"\xc0"], False),
        # Not even that.
        ([b"\x10\x01a\x01b" + b"\x1f\x2e\x01b"], False),  # never to be remembered
        ([b"\x80"], True),
        ([NEWEST], True),
        ([b"\x40\x01"], True),
        ([b"\x00\x01a\x02b"], True),
        ([b"\xff" + b"\x80" * 4], True),
        ([b"\x3f" + b"\x80" * 4 + b"\x00"], False),
        ([b"\x3f" + b"\x80" * 5 + b"\x00"], True),
    ],
)
def test_the_limits_are_those_of_the_specification(blocks: list[bytes], last_is_refused: bool) -> None:
    assert refused(blocks) is last_is_refused


@given(st.lists(st.tuples(FIELDS, st.booleans(), st.sampled_from([None, None, 0, 60, TABLE_BYTES])), max_size=12))
def test_what_a_client_writes_is_read(requests: list[tuple[Pairs, bool, int | None]]) -> None:
    encoder, ours = Encoder(), reader()
    for fields, coded, size in requests:
        if size is not None:
            encoder.header_table_size = size
        written = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
        assert ours.read(encoder.encode(written, huffman=coded)) == fields


@given(st.data())
def test_what_we_write_is_read(data: st.DataObject) -> None:
    heads = data.draw(st.lists(st.tuples(FIELDS, BIG), min_size=1, max_size=3))
    writer, judge = HeaderWriter(), Decoder(2 * MAX_LIST_BYTES)
    for fields, big in data.draw(st.lists(st.sampled_from(heads), max_size=20)):
        again, rest = (
            [(n.encode("latin-1"), v.encode("latin-1")) for n, v in pairs]
            for pairs in ([*fields, ("big", big[::9])], data.draw(FIELDS))
        )
        block = writer.write(tuple(again), rest, remember=data.draw(st.integers(0, 9)) > 0)
        assert [tuple(pair) for pair in judge.decode(block, raw=True)] == [*again, *rest]


def test_what_was_written_before_is_written_by_its_place_now() -> None:
    writer, judge = HeaderWriter(), Decoder()
    first, second = (((b"a", b"1"), (b"b", b"2")), ((b"c", b"3"),))
    for pairs in (first, first, first, second, first, first):
        block = writer.write(pairs)
        assert [tuple(pair) for pair in judge.decode(block, raw=True)] == [*pairs]
    assert len(block) == 2


@given(st.binary(max_size=40))
def test_huffman_coded_strings_come_back(text: bytes) -> None:
    assert huffman.decode(Encoder().huffman_coder.encode(text)) == text.decode("latin-1")


@pytest.mark.parametrize(
    "coded",
    [
        b"\xff\xff\xff\xff",  # the end of a string, in a string
        b"\x1f\xff",  # more padding than there may be
        b"\x18",  # padding that is none
    ],
)
def test_huffman_coded_strings_that_end_wrong_are_refused(coded: bytes) -> None:
    with pytest.raises(ValueError, match="Huffman"):
        huffman.decode(coded)


def test_a_few_bytes_that_say_megabytes_are_refused() -> None:
    ours = reader()
    ours.read(entry(TABLE_BYTES))
    with pytest.raises(HeaderFault, match="larger than"):
        ours.read(NEWEST * 5)


def test_what_is_remembered_of_a_connection_is_bounded() -> None:
    convert = Mock(side_effect=list)
    ours = HeaderReader[Pairs](convert)
    small = [header_block([(b"n", b"%d" % number)]) for number in range(2 * MAX_REMEMBERED)]
    for block in small * 2:
        ours.read(block)
    assert convert.call_count == len(small) * 2 - MAX_REMEMBERED
    convert, large = Mock(side_effect=list), header_block([(b"n", bytes(MAX_REMEMBERED_BYTES))])
    ours = HeaderReader[Pairs](convert)
    assert ours.read(large) == ours.read(large)
    assert convert.call_count == 2


CALL = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/a/b"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
    ("grpc-timeout", "20m"),
    ("x-bin", "AA=="),
    ("x", "1"),
    ("x", "2"),
]


def head(**changes: str) -> Head:
    """Of `CALL` with headers that are others, or (by a name that is not there) more."""
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    more = [(name, value) for name, value in named.items() if name not in dict(CALL)]
    return read_head("gzip", [*((name, named.get(name, value)) for name, value in CALL), *more])


def test_a_head_says_what_was_asked_for() -> None:
    metadata = {"te": "trailers", "content-type": "application/grpc", "grpc-timeout": "20m", "x": "2"}
    for _ in range(2):
        assert head() == Head("/a/b", metadata, 0.02, "identity")
    assert head(grpc_timeout="7S").timeout_s == 7
    assert head(grpc_encoding="gzip").encoding == "gzip"
    assert head(grpc_accept_encoding="identity, gzip").answer_in == "gzip"
    assert read_head("gzip", CALL[:5]).timeout_s == math.inf


def test_what_is_no_call_is_told_from_the_others_with_equal_names() -> None:
    for _ in range(2):
        assert not head().malformed
        assert head(te="x").malformed
        assert read_head("", [(":method", "GET"), *CALL[1:]]).http_status == "405"
        assert head(content_type="application/grpcx").http_status == "415"
        assert isinstance(head(grpc_timeout="soon").error, InvalidInput)
        assert isinstance(head(grpc_encoding="lzma").error, Unsupported)
        assert head().error is None


@pytest.mark.parametrize(
    "pairs",
    [
        CALL[1:],
        [CALL[0], *CALL[2:]],
        [*CALL[:2], *CALL[3:]],
        [CALL[0], *CALL],
        [*CALL[1:], CALL[0]],
        [*CALL, (":authority", "a")],
        [(":protocol", "x"), *CALL],
        [*CALL, ("Upper", "x")],
        [*CALL, ("", "x")],
        [*CALL, ("connection", "close")],
        [*CALL, ("te", "trailers")],
        [*CALL, ("spa ce", "x")],
        [*CALL, ("col:on", "x")],
        [*CALL, ("line\n", "x")],
        [*CALL, ("umläut", "x")],
        *([*CALL, (f"y{where}", value)] for where, value in enumerate(["\0", "a\nb", "a\r", "\n", "\r\n b"])),
        [*CALL[:2], (":path", "/a/b\r\nx: y"), *CALL[3:]],
        [*CALL[:-1], ("x", "\n"), ("x", "2")],
    ],
)
def test_what_is_no_request_of_http2_is_malformed(pairs: Pairs) -> None:
    assert read_head("", pairs).malformed


@pytest.mark.parametrize("value", ["a  b", "a \t b", "a\x7fb\xff", ""])
def test_what_may_be_within_a_value_stays(value: str) -> None:
    for blanks in ("", " ", "\t", " \t "):
        assert read_head("", [*CALL, ("y", f"{blanks}{value}{blanks}"), ("z", "")]).metadata["y"] == value
        assert read_head("", [*CALL, ("y", f"{blanks}{value}{blanks}")]).metadata["y"] == value
        assert head(y=f"{value}{blanks}", grpc_timeout=f"{blanks}20m").timeout_s == 0.02
