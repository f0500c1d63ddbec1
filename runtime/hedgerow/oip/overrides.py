"""What a caller may want of a model when it loads one: the parameters of OIP's RepositoryModelLoad. Pure.

Models are configured by whoever runs the server, so a load changes nothing about them:

- `config`, a model configuration as JSON, is taken if all that it says is so already; a client that brings the
  configuration it knows gets what it expects or an error, never something else. What is not loaded has none to compare
  with, and has to be loaded without;
- files in place of the model's own are refused, and so is everything else.
"""

from collections.abc import Mapping
from typing import Final

from google.protobuf import json_format

from hedgerow.errors import InvalidInput, Unsupported
from hedgerow.proto import oip_pb2

CONFIG: Final = "config"
MAX_CONFIG_CHARS = 64 * 1024


def wanted_config(parameters: Mapping[str, oip_pb2.ModelRepositoryParameter]) -> oip_pb2.ModelConfig:
    """The configuration that a load with these `parameters` wants; empty if it does not mind.

    Raises `InvalidInput` if it is none, and `Unsupported`, naming the field, for what is not configured here.
    """
    config = oip_pb2.ModelConfig()
    for key, value in parameters.items():
        if key != CONFIG:
            raise Unsupported(f"parameter {key[:80]!r} is not supported here: models are loaded as they are configured")
        text = value.string_param
        if not value.HasField("string_param") or len(text) > MAX_CONFIG_CHARS:
            raise InvalidInput(f"expected {CONFIG} to be text of at most {MAX_CONFIG_CHARS} characters")
        try:
            json_format.Parse(text, config)
        except json_format.ParseError as error:
            if "has no field named" in str(error):
                raise Unsupported(f"{CONFIG}: {error}; nothing else is configured here") from error
            raise InvalidInput(f"expected {CONFIG} to be a model configuration as JSON: {error}") from error
    return config


def check_config(wanted: oip_pb2.ModelConfig, current: oip_pb2.ModelConfig) -> None:
    """Raise `Unsupported`, naming the field, if `wanted` says something else than `current`.

    What is 0 or empty in `wanted` is not said: protobuf does not tell the two apart.
    """
    for field, value in wanted.ListFields():
        if getattr(current, field.name) != value:
            raise Unsupported(f"{CONFIG}: {field.name} is not what the model has, and a load does not change it")
