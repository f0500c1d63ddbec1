"""What every call of every service passes through."""

import gc
from typing import Never

import pytest

from hedgerow.errors import Overloaded
from hedgerow.rpc import Method


async def full(_: object, __: object) -> Never:
    raise Overloaded("full")


async def test_a_refused_call_leaves_nothing_to_the_garbage_collector() -> None:
    method = Method("Refuse", full, None, client_streaming=False, server_streaming=False)
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            with pytest.raises(Overloaded):
                await method.answer(b"", None)  # type: ignore[arg-type] # no call is looked at
        assert gc.collect() == 0
    finally:
        gc.enable()
