"""Settings: what is secret in them is not shown, and what is not is."""

import pytest

from hedgerow.config import BrokerSettings, ServerSettings, Settings
from hedgerow.remote.settings import RemoteSettings

SECRET = "hush-hush"


@pytest.mark.parametrize(
    "settings",
    [ServerSettings(control_token=SECRET), BrokerSettings(password=SECRET), RemoteSettings(token=SECRET)],
    ids=lambda settings: type(settings).__name__,
)
def test_secrets_are_not_shown(settings: Settings) -> None:
    assert SECRET not in repr(settings)
    assert SECRET not in f"{settings}"
    assert "…" in repr(settings)


def test_the_rest_is_shown_and_so_is_that_no_secret_is_set() -> None:
    assert "port=8001" in repr(ServerSettings())
    assert "control_token=''" in repr(ServerSettings())
