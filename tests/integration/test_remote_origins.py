"""What endpoints learn of where a request comes from, and that none goes in circles."""

import dataclasses
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from simulators.cloud import LONG_S, MODEL, SETTINGS, Cloud
from simulators.foreign import Foreign, says
from simulators.remotes import ANSWER, REQUEST, ask, reached

from hedgerow import rpc
from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import BackendUnavailable, InvalidInput, ModelNotFound
from hedgerow.remote.backend import RemoteBackend
from hedgerow.server import Server
from hedgerow.tensors import Origin


async def test_endpoints_learn_where_a_request_comes_from_and_nothing_more(stack: AsyncExitStack) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    origin = Origin(tenant="acme", hops=2, traceparent=trace, tracestate="a=1")
    foreign = await stack.enter_async_context(Foreign({"ModelInfer": says(ANSWER)}))
    discreet = await reached(stack, foreign.target)
    telling = await reached(stack, foreign.target, forward_tenant=True)
    for remote, said in ((discreet, origin), (telling, origin), (telling, Origin()), (telling, Origin(tenant="b"))):
        await remote.infer(replace(REQUEST, origin=said), Deadline.after(LONG_S))
    known = ("hedgerow-hops", "traceparent", "tracestate", "hedgerow-tenant")
    assert [{key: heard[key] for key in known if key in heard} for heard in foreign.heard] == [
        {"hedgerow-hops": "3", "traceparent": trace, "tracestate": "a=1"},
        {"hedgerow-hops": "3", "traceparent": trace, "tracestate": "a=1", "hedgerow-tenant": "acme"},
        {"hedgerow-hops": "1"},
        {"hedgerow-hops": "1", "hedgerow-tenant": "b"},
    ]
    with pytest.raises(InvalidInput, match="tenant"):
        await telling.infer(replace(REQUEST, origin=Origin(tenant="a\nb")), Deadline.after(LONG_S))
    await telling.infer(replace(REQUEST, origin=Origin(traceparent="\u00e4\n")), Deadline.after(LONG_S))
    assert "traceparent" not in foreign.heard[-1]


async def test_a_request_that_has_passed_too_many_routers_is_not_sent_on(stack: AsyncExitStack) -> None:
    cloud = await stack.enter_async_context(Cloud())
    remote = await reached(stack, cloud.target, max_hops=2)
    await ask(remote, replace(REQUEST, origin=Origin(hops=1)))
    with pytest.raises(BackendUnavailable, match="passed 2 routers, the limit is 2"):
        await ask(remote, replace(REQUEST, origin=Origin(hops=2)))
    assert cloud.asked == 1
    assert remote.snapshot(MODEL).healthy


class Counted:
    """Counts the calls that a server answers, and lets its callers manage models, of which there are none."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, served: rpc.Methods) -> rpc.Methods:
        def counted(method: rpc.Method) -> rpc.Method:
            async def handle(request: Any, call: rpc.Call) -> Any:
                self.calls += 1
                return await method.handle(request, call)

            return dataclasses.replace(method, handle=handle)

        return {path: counted(method) for path, method in served.items()}

    async def load(self, model: str) -> None:
        raise ModelNotFound(model)

    unload = load


async def test_routers_in_a_circle_do_not_chase_questions_about_models(stack: AsyncExitStack) -> None:
    settings = msgspec.structs.replace(SETTINGS, probe_timeout_s=LONG_S, heartbeat_s=600.0, max_hops=3)
    nowhere, counted = "127.0.0.1:1", Counted()
    first, second = (RemoteBackend(name, nowhere, settings) for name in ("first", "second"))
    for one, other in ((first, second), (second, first)):
        server = Server(one, ServerSettings(port=0, drain_s=0.001), around=counted, control=counted)
        await stack.enter_async_context(server)
        stack.push_async_callback(one.close)
        other.update_targets(server.address)
    with pytest.raises(BackendUnavailable, match="passed 3 routers, the limit is 3"):
        await first.metadata(MODEL)
    assert counted.calls == 3
    assert not await first.ready(MODEL)
    assert counted.calls == 6
    assert await first.models() == ()
    assert counted.calls == 9
