"""Who is calling: only whoever has the token, only under the certificate's name, and no settings that leave a hole."""

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings, load
from hedgerow.errors import ConfigError, Forbidden, Unauthenticated
from hedgerow.identity import Tokens, as_said, bearer, certificate_name, name_of_peer, token_digest
from hedgerow.traffic.tenants import MAX_SAID_CHARS, TenantSettings, TenantsSettings, identify

MUTUAL = ServerSettings(tls_cert_file="server.pem", tls_client_ca_file="authority.pem")
texts = st.text(st.characters(codec="latin-1"), max_size=20)


@dataclass
class Caller:
    """A call, as far as it says who makes it."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    peer: str = ""
    deadline: Deadline = field(default_factory=Deadline.never)

    async def write(self, message: bytes) -> None:
        raise AssertionError


def brings(token: str, **said: str) -> Caller:
    return Caller({"authorization": f"Bearer {token}", **{name.replace("_", "-"): text for name, text in said.items()}})


# -- tokens


@given(st.dictionaries(texts, texts, max_size=5), texts)
def test_a_token_has_the_owner_that_it_was_given_to_and_no_other_has_one(owners: dict[str, str], other: str) -> None:
    tokens = Tokens((token_digest(token), owner) for token, owner in owners.items())
    for token, owner in owners.items():
        assert tokens.owner(token) == owner
    assert tokens.owner(other) == owners.get(other)


def test_what_is_found_for_a_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []
    equal = hmac.compare_digest

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return equal(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    tokens = Tokens([(token_digest("right"), "acme")])
    assert (tokens.owner("right"), tokens.owner("wrong")) == ("acme", None)
    assert compared == [(token_digest("right"),) * 2, ("", token_digest("wrong"))]
    again = Tokens([(token_digest("right"), "acme")])
    assert tokens._owners.keys() != again._owners.keys(), "nobody can know what is looked up"


def test_a_token_of_two_is_an_error_that_does_not_tell_it() -> None:
    digest = token_digest("secret")
    assert Tokens([(digest, "a"), (digest, "a")]).owner("secret") == "a"
    with pytest.raises(ConfigError, match="a and b have the same token") as caught:
        Tokens([(digest, "a"), (digest, "b")])
    assert digest not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "token"),
    [("Bearer x", "x"), ("bearer  x ", "x"), ("x", ""), ("Basic x", ""), ("Bearer", ""), ("Bearerx", ""), ("", "")],
)
def test_a_token_is_what_stands_behind_bearer(header: str, token: str) -> None:
    assert bearer({"authorization": header}) == token
    assert bearer({}) == ""


# -- certificates


@pytest.mark.parametrize(
    ("uris", "dns", "common", "name"),
    [
        (("spiffe://x/acme", "u2"), ("acme.example",), ("acme",), "spiffe://x/acme"),
        ((), ("acme.example", "d2"), ("acme",), "acme.example"),
        ((), (), ("acme",), "acme"),
        (("",), (), ("acme",), "acme"),
        ((), (), (), ""),
    ],
)
def test_a_certificate_goes_by_its_uri_or_dns_name_or_common_name(
    uris: tuple[str, ...], dns: tuple[str, ...], common: tuple[str, ...], name: str
) -> None:
    assert certificate_name(uris, dns, common) == name
    alternatives = [("IP Address", "127.0.0.1"), *(("DNS", one) for one in dns), *(("URI", one) for one in uris)]
    subject = ((("organizationName", "o"),), *((("commonName", one),) for one in common))
    assert name_of_peer({"subject": subject, "subjectAltName": tuple(alternatives)}) == name


def test_who_has_no_certificate_or_an_unverified_one_has_no_name() -> None:
    assert name_of_peer(None) == name_of_peer({}) == ""


# -- tenants


def by_token(**settings: object) -> Callable[[Caller], str]:
    named = {name: TenantSettings(token_sha256=(token_digest(f"{name}'s"),)) for name in ("acme", "zeta")}
    named["acme"] = TenantSettings(token_sha256=(token_digest("acme's"), token_digest("acme's next")))
    return identify(TenantsSettings(identify_by="token", named=named, **settings), ServerSettings())  # type: ignore[arg-type]


def by_certificate(**settings: object) -> Callable[[Caller], str]:
    return identify(TenantsSettings(identify_by="certificate", **settings), MUTUAL)  # type: ignore[arg-type]


def test_a_token_says_who_asks_and_another_takes_its_place_while_both_are_good() -> None:
    who = by_token()
    assert [who(brings(token)) for token in ("acme's", "acme's next", "zeta's")] == ["acme", "acme", "zeta"]
    assert who(brings("acme's", hedgerow_tenant="acme")) == "acme"
    assert who(Caller()) == who(Caller({"authorization": "Basic abc"})) == ""


@pytest.mark.parametrize("require", [False, True])
def test_a_wrong_token_and_a_name_that_nothing_proves_are_refused(require: bool) -> None:
    who = by_token(require=require)
    for wrong in ("acme", token_digest("acme's"), "acme's\x00", "ACME'S"):
        with pytest.raises(Unauthenticated, match="the token is none that this server knows"):
            who(brings(wrong))
    with pytest.raises(Unauthenticated, match="hedgerow-tenant is 'acme' and nothing proves it"):
        who(Caller({"hedgerow-tenant": "acme"}))
    with pytest.raises(Unauthenticated):
        who(Caller({"hedgerow-tenant": "acme"}, peer="acme"))  # a certificate that this server does not go by


def test_who_proves_nothing_is_nobody_or_where_that_is_required_refused() -> None:
    assert by_token()(Caller()) == by_certificate()(Caller()) == ""
    for who in (by_token(require=True), by_certificate(require=True)):
        with pytest.raises(Unauthenticated, match="nothing says who is asking"):
            who(Caller())


def test_a_certificate_says_who_asks_whatever_else_is_said() -> None:
    who = by_certificate()
    assert who(Caller(peer="acme")) == who(Caller({"hedgerow-tenant": "acme"}, peer="acme")) == "acme"
    assert who(Caller({"authorization": "Bearer acme's"}, peer="zeta")) == "zeta"
    with pytest.raises(Forbidden, match="'acme' may not ask for tenant 'zeta'"):
        who(Caller({"hedgerow-tenant": "zeta"}, peer="acme"))
    with pytest.raises(Forbidden) as caught:
        who(Caller({"hedgerow-tenant": "z" * 5000}, peer="acme"))
    assert len(str(caught.value)) < 3 * MAX_SAID_CHARS + 60


def test_trusted_routers_speak_for_others_and_for_nobody_else_but_themselves() -> None:
    for who, router in (
        (by_certificate(trusted_routers=("router",)), Caller(peer="router")),
        (by_token(trusted_routers=("acme",)), brings("acme's")),
    ):
        assert who(router) == ("router" if router.peer else "acme")
        assert who(Caller({**router.metadata, "hedgerow-tenant": "zeta"}, peer=router.peer)) == "zeta"
    with pytest.raises(Forbidden):
        by_certificate(trusted_routers=("router",))(Caller({"hedgerow-tenant": "router"}, peer="acme"))
    with pytest.raises(Unauthenticated):
        by_certificate(trusted_routers=("router",))(Caller({"hedgerow-tenant": "router"}))


def test_without_settings_callers_are_who_they_say() -> None:
    for settings in (None, TenantsSettings(), TenantsSettings(identify_by="metadata", named={"a": TenantSettings()})):
        assert identify(settings, ServerSettings()) is as_said
    assert as_said(Caller({"hedgerow-tenant": "acme"})) == "acme"
    assert as_said(Caller()) == ""


def test_a_server_in_the_clear_knows_nobody_by_certificate() -> None:
    with pytest.raises(ConfigError, match=r"server\.tls_cert_file"):
        identify(TenantsSettings(identify_by="certificate"), ServerSettings(tls_client_ca_file="authority.pem"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[named.acme]\nmax_inflight = 1", "tenants.identify_by: is needed"),
        ("require = true", "tenants.identify_by: is needed"),
        ('trusted_routers = ["router"]', "tenants.identify_by: is needed"),
        ('identify_by = "metadata"\nrequire = true', "tenants.require"),
        ('identify_by = "metadata"\ntrusted_routers = ["router"]', "trusted_routers"),
        ('identify_by = "certificate"', "server.tls_client_ca_file"),
        ('identify_by = "token"', "token_sha256"),
        ('identify_by = "token"\n[named.acme]\nmax_inflight = 1', "token_sha256"),
        (f'identify_by = "metadata"\n[named.acme]\ntoken_sha256 = ["{"0" * 64}"]', "token_sha256"),
        ('identify_by = "rumour"', "identify_by"),
        ('[named.acme]\ntoken_sha256 = ["secret"]', "token_sha256"),
        ('[named."(others)"]\nmax_inflight = 1', "named"),
    ],
)
def test_settings_that_would_be_a_hole_are_errors_that_name_the_key(text: str, key: str, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=key):
        identify(load(TenantsSettings, file, {}), ServerSettings())
