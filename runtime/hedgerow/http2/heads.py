"""What the headers of a gRPC call say (PROTOCOL-HTTP2.md of the gRPC project, RFC 9113, 8). No IO.

Calls differ in their deadlines and traces, hardly ever in the names of their headers or in what they agree upon: so
what those mean is found out once.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple

from hedgerow.errors import HedgerowError, InvalidInput, Unsupported
from hedgerow.http2.grpc import ENCODINGS, parse_timeout
from hedgerow.http2.headers import Pair

MAX_REMEMBERED = 128
"""Ways to call of which is remembered what they mean, in the process."""
_REQUIRED: Final = frozenset({":method", ":scheme", ":path"})
_PSEUDO: Final = _REQUIRED | {":authority"}
_OF_HTTP1: Final = frozenset({"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"})
_NAME: Final = re.compile("[!-9;-@\\[-~]+")
"""Of a header, in lower case (RFC 9113, 8.2.1)."""
_BLANKS: Final = " \t"
_CONTENT_TYPE: Final = re.compile(r"application/grpc($|[+;])")


@dataclass(slots=True)  # frozen would make it five times as dear
class Head:
    """What the headers of a call say. Not to be changed: the same headers may give the same object."""

    path: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = math.inf
    encoding: str = ""
    answer_in: str = ""
    """The compression that the caller takes."""
    malformed: bool = False
    """No request of HTTP/2."""
    http_status: str = ""
    """What to answer to a request that is none of gRPC."""
    error: HedgerowError | None = None


def read_head(compression: str, pairs: Sequence[Pair]) -> Head:
    """What the headers of a call say; answers are to be compressed by `compression` if the caller takes that."""
    shape = _shape(tuple([name for name, _ in pairs]))
    if shape is None:
        return Head(malformed=True)
    # One look at all values together: many are new in each call, hardly one holds what it must not.
    text = " ".join([value for _, value in pairs])
    if "\0" in text or "\r" in text or "\n" in text:
        return Head(malformed=True)
    if "  " in text or "\t" in text or text[-1] == " ":  # perhaps at an end; gRPC allows it, and to strip it
        pairs = [(name, value.strip(_BLANKS)) for name, value in pairs]
    metadata = dict(pairs[shape.pseudo :])
    for name in shape.binary:
        metadata.pop(name, None)
    value = metadata.get
    terms = _terms(
        pairs[shape.method][1],
        value("te", "trailers"),
        value("content-type", ""),
        value("grpc-encoding", "identity"),
        value("grpc-accept-encoding", ""),
    )
    timeout_s, error, timeout = math.inf, terms.error, value("grpc-timeout")
    if timeout is not None and error is None:
        try:
            timeout_s = parse_timeout(timeout)
        except InvalidInput as wrong:
            error = wrong
    answer_in = compression if compression in terms.accepted else ""
    path = pairs[shape.path][1]
    return Head(path, metadata, timeout_s, terms.encoding, answer_in, terms.malformed, terms.http_status, error)


class _Shape(NamedTuple):
    """What the names of headers say, whatever their values are."""

    method: int
    """Where it is."""
    path: int
    """Where it is."""
    pseudo: int
    """How many there are of the pseudo headers, which come first."""
    binary: Sequence[str]
    """Those that nothing here reads."""


@lru_cache(MAX_REMEMBERED)
def _shape(names: tuple[str, ...]) -> _Shape | None:
    """None: they are no request of HTTP/2."""
    count = sum(name[:1] == ":" for name in names)
    pseudo, rest = set(names[:count]), names[count:]
    if len(pseudo) != count or not _REQUIRED <= pseudo <= _PSEUDO:
        return None  # one is missing, unknown, there twice, or behind the others
    if any(not _NAME.fullmatch(name) or name in _OF_HTTP1 for name in rest) or rest.count("te") > 1:
        return None
    binary = [name for name in rest if name.endswith("-bin")]
    return _Shape(names.index(":method"), names.index(":path"), count, binary)


class _Terms(NamedTuple):
    """What a caller asks for in all of its calls alike; see `Head`."""

    accepted: Sequence[str] = ()
    encoding: str = ""
    malformed: bool = False
    http_status: str = ""
    error: HedgerowError | None = None


@lru_cache(MAX_REMEMBERED)
def _terms(method: str, te: str, content_type: str, encoding: str, accepted: str) -> _Terms:
    if te != "trailers":
        return _Terms(malformed=True)
    if method != "POST":
        return _Terms(http_status="405")
    if not _CONTENT_TYPE.match(content_type):
        return _Terms(http_status="415")
    error = None
    if encoding != "identity" and encoding not in ENCODINGS:
        error = Unsupported(f"messages compressed by {encoding[:40]!r} are not read here; expected gzip or deflate")
    return _Terms(accepted.replace(" ", "").split(","), encoding, error=error)
