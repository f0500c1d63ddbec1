"""Quotas: what each tenant may ask for, in front of a backend. The rules are in `buckets`.

Who asks is the request's `Origin.tenant`; `tenants` says who is believed. A tenant that is named has an allowance of
its own, which nobody else can touch. All others, those who say no name among them, have one in common, and within it
each may have no more than a part, so that one of them does not take the others' share. Who makes up names gets no more
than what is in common.

What is over a quota is refused at once, never queued, and told when to come again. Asking about models is free.
"""

import collections
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from hedgerow.backend import Around, Backend, Deadline
from hedgerow.errors import HedgerowError, InvalidInput, Overloaded
from hedgerow.tensors import InferRequest, InferResponse
from hedgerow.traffic.buckets import Allowance
from hedgerow.traffic.facts import payload_bytes
from hedgerow.traffic.tenants import QuotaSettings, TenantsSettings

OTHERS: Final = ""
"""Stands for all tenants without a name in the settings."""
MAX_TENANT_CHARS = 256
"""Of a name that is not in the settings."""
FULL_RETRY_S = 1.0
"""When to come again if more tenants are being answered than are told apart."""


@dataclass(slots=True)
class QuotaCounts:
    """What came of a tenant's requests."""

    admitted: int = 0
    refused: int = 0


class Quotas(Around):
    """`backend` for those who keep to their quotas. Belongs to one event loop."""

    def __init__(self, backend: Backend, settings: TenantsSettings) -> None:
        super().__init__(backend)
        self._settings = settings
        now = time.monotonic()
        self._named = {name: Allowance(one.quota, now) for name, one in settings.named.items()}
        self._others = Allowance(settings.others.quota, now)
        self._each: collections.OrderedDict[str, Allowance] = collections.OrderedDict()
        self.counts = {name: QuotaCounts() for name in (*settings.named, OTHERS)}
        """By tenant, `OTHERS` among them."""

    @property
    def tracked(self) -> int:
        """Tenants without a name in the settings that are told apart now."""
        return len(self._each)

    def change(self, settings: TenantsSettings) -> None:
        """Have these quotas from now on; what was taken stays taken, and what is in flight counts."""
        now, before = time.monotonic(), self._named
        self._settings = settings
        self._named = {name: before.get(name) or Allowance(one.quota, now) for name, one in settings.named.items()}
        for name, allowance in self._named.items():
            allowance.change(settings.named[name].quota, now)
        self._others.change(settings.others.quota, now)
        for allowance in self._each.values():
            allowance.change(settings.each.quota, now)
        self.counts = {name: self.counts.get(name) or QuotaCounts() for name in (*settings.named, OTHERS)}

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`; raises `Overloaded` for what is over the quota."""
        with self._admitted(request):
            return await self._backend.infer(request, deadline)

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`; a stream is one request, in flight until its end."""
        with self._admitted(request):
            async for response in self._backend.stream(request, deadline):
                yield response

    @contextmanager
    def _admitted(self, request: InferRequest) -> Iterator[None]:
        """What counts a request while it is in flight; raises if there is no more of its tenant's quota."""
        counts = self.counts.get(request.origin.tenant) or self.counts[OTHERS]
        try:
            allowances = self._enter(request)
        except HedgerowError:
            counts.refused += 1
            raise
        counts.admitted += 1
        try:
            yield
        finally:
            for one in allowances:
                one.leave()

    def _enter(self, request: InferRequest) -> tuple[Allowance, ...]:
        now, tenant, size = time.monotonic(), request.origin.tenant, payload_bytes(request.inputs)
        allowances = self._allowances(tenant, now)
        refusals = [refusal for one in allowances if (refusal := one.refusal(size, now))]
        if refusals:
            last = max(refusals, key=lambda one: one.retry_after_s)
            raise Overloaded(
                f"quota of {f'tenant {tenant!r}' if tenant else 'callers without a name'}: {last.reason}",
                retry_after_s=None if math.isinf(last.retry_after_s) else last.retry_after_s,
            )
        for one in allowances:
            one.enter(size, now)
        return allowances

    def _allowances(self, tenant: str, now: float) -> tuple[Allowance, ...]:
        """All that a request of `tenant` has to find room in."""
        if (named := self._named.get(tenant)) is not None:
            return (named,)
        if self._settings.each == QuotaSettings():
            return (self._others,)
        if len(tenant) > MAX_TENANT_CHARS:
            raise InvalidInput(f"the tenant's name has {len(tenant)} characters; it may have {MAX_TENANT_CHARS}")
        own = self._each.get(tenant)
        if own is None:
            self._make_room()
            own = self._each[tenant] = Allowance(self._settings.each.quota, now)
        self._each.move_to_end(tenant)
        return (own, self._others)

    def _make_room(self) -> None:
        """Forget whom it takes to track one more. Never one with requests in flight: it would have a quota twice."""
        while len(self._each) >= self._settings.max_tracked:
            idle = next((name for name, one in self._each.items() if not one.inflight), None)
            if idle is None:
                raise Overloaded(
                    f"requests of {len(self._each)} tenants are in flight, which is the limit",
                    retry_after_s=FULL_RETRY_S,
                )
            del self._each[idle]
