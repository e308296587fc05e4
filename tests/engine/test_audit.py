"""The defaults of docs/security.md, as values that are in force with the shipped configuration and with the least there can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gmta import config

ROOT = Path(__file__).parents[2]
LEAST = "[gmta]\nhostname = mx.example.test\n[domains]\nlocal = example.test\n[listener:mx]\naddress = 127.0.0.1:2525\n[listener:submission]\naddress = 127.0.0.1:2587\nrole = submission\n"
LISTENERS: dict[str, Any] = {
    "auth_required": {"mx": False, "submission": True}, "bare_newline": "reject", "proxy_protocol": False, "xclient_from": [], "client_ca": "",
    "client_names": [], "allow_plain_on_loopback": False, "vrfy": "no", "expn": "no", "banner_delay": 0.0, "tls": "starttls"}
OTHERS: dict[str, dict[str, Any]] = {
    "domains": {"relay_from": [], "relay_to": frozenset(), "etrn_from": []},
    "tls": {"minimum_version": "1.2"},
    "limits": {"auth_failures": 3, "errors_per_session": 20, "connections_per_ip": 50, "connections_per_subnet": 200, "recipients": 1000,
               "message_size": 35 * 1024 ** 2, "command_timeout": 300.0, "data_rate": 500, "header_size": 1024 ** 2, "hops": 50},
}


@pytest.fixture(params=["shipped", "least"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> config.Config:
    file = tmp_path / "config.ini"
    file.write_text((ROOT / "config.ini").read_text() if request.param == "shipped" else LEAST)
    return config.load(str(file))


def test_listeners(loaded: config.Config) -> None:
    assert loaded.listeners
    for listener in loaded.listeners.values():
        for key, value in LISTENERS.items():
            assert getattr(listener, key) == (value[listener.role] if isinstance(value, dict) else value), key
        assert {str(network) for network in listener.proxy_from} == {"127.0.0.0/8", "::1/128"}


def test_shipped_listeners_are_on_this_machine() -> None:
    """A server that was only tried out is nobody's."""
    for listener in config.load(str(ROOT / "config.ini")).listeners.values():
        assert {host for host, _ in listener.addresses} <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("section", OTHERS)
def test_sections(loaded: config.Config, section: str) -> None:
    for key, value in OTHERS[section].items():
        assert getattr(getattr(loaded, section), key) == value, key
