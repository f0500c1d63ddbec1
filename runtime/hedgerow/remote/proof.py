"""The token by which a server knows us, as it goes with each call: a client's, and a router's to what is behind it.

It is a secret: no message here, and no setting's text, says what it is.
"""

import logging
import re
from typing import Final

from hedgerow.errors import ConfigError
from hedgerow.identity import AUTHORIZATION

_THIS_MACHINE: Final = re.compile(
    r"(dns:(///)?|ipv4:|ipv6:)?(localhost|127(\.\d+){3}|\[::1\])(:\d+)?|unix(-abstract)?:.*"
)

log = logging.getLogger(__name__)


def proof(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that says `token`; none for an empty one. Raises `ConfigError` for what no header can say."""
    if not (token.isascii() and token.isprintable() and token == token.strip()):
        raise ConfigError("token: expected printable ASCII, with no space at either end")
    return ((AUTHORIZATION, f"Bearer {token}"),) if token else ()


def warn_of_eavesdroppers(target: str) -> None:
    """Say that a token goes to `target` in the clear, unless that is this machine."""
    if not _THIS_MACHINE.fullmatch(target):
        log.warning(
            "the token for %s goes there in the clear, for anyone on the way to read: take TLS (ca_file)", target
        )
