"""Signing keys: made here, found again by name, used through securesystemslib's signers.

A key is described by ``<name>.json``: its public part and the URI of its private part. Keys made here are ed25519
files, ``file2:<name>.pem`` beside the description, readable by their owner only. A URI of another scheme (a KMS, a
token) put there with its public part makes the same name mean a key that never leaves its hardware. The folder belongs
outside of the repositories; offline keys belong on another machine.
"""

from pathlib import Path

import msgspec
from securesystemslib.exceptions import Error as SigningError
from securesystemslib.signer import CryptoSigner, Key, Signer

from hedgerow.durable import write_durably
from hedgerow.errors import ConfigError
from hedgerow.link import checked_id

_FILE_SCHEME = f"{CryptoSigner.SCHEME}:"


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    uri: str
    keyid: str
    public: dict[str, object]


def generate(folder: Path, name: str) -> Signer:
    """A new ed25519 key called `name` in `folder`; raises `ConfigError` if there is one."""
    checked_id(name, "key")
    private, described = folder / f"{name}.pem", folder / f"{name}.json"
    if described.exists():
        raise ConfigError(f"there is a key called {name!r} already")
    if private.exists():
        raise ConfigError(f"{private} lacks its {described.name}: remove it, if the making of keys was cut off")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    signer = CryptoSigner.generate_ed25519()
    write_durably(private, signer.private_bytes, mode=0o600)
    description = _Description(f"{_FILE_SCHEME}{private.name}", signer.public_key.keyid, signer.public_key.to_dict())
    write_durably(described, msgspec.json.format(msgspec.json.encode(description), indent=1) + b"\n")
    return signer


def load(folder: Path, name: str) -> Signer:
    """The key called `name`, able to sign; raises `ConfigError` naming what is wrong with it."""
    try:
        description = msgspec.json.decode((folder / f"{checked_id(name, 'key')}.json").read_bytes(), type=_Description)
        uri = description.uri
        if uri.startswith(_FILE_SCHEME):
            private = folder / uri.removeprefix(_FILE_SCHEME)
            if (mode := private.stat().st_mode & 0o777) & 0o077:
                raise ConfigError(f"{private.name} can be read by others (mode {mode:o}): chmod 600 it")
            uri = f"{_FILE_SCHEME}{private.absolute()}"
        return Signer.from_priv_key_uri(uri, Key.from_dict(description.keyid, description.public))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no key called {name!r} in {folder}") from error
    except (OSError, ValueError, KeyError, SigningError, msgspec.DecodeError) as error:
        raise ConfigError(f"the key {name!r} cannot be used: {error}") from error


def load_or_generate(folder: Path, name: str) -> Signer:
    """The key called `name`, made now if there is none."""
    return load(folder, name) if (folder / f"{name}.json").exists() else generate(folder, name)
