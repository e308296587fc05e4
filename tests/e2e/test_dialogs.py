"""Every dialogue of tests/dialogs against a running server, over a socket: what is queued is looked up in its store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import gmta.testing
from gmta import Address
from gmta.mail.envelope import stored_address
from gmta.queue.admin import QueueAdmin
from gmta.testing import Dialogue, keywords_at, make_config, play_at
from gmta.testing.authority import Authority
from tests.e2e.conftest import DEADLINE_S, Gmta, free_port, listens, until

pytestmark = pytest.mark.e2e

FOLDER = Path(__file__).parents[1] / "dialogs"


class Server:
    """The server of tests/dialogs/server.ini as a process. Everything stays in its queue, so that it can be looked at."""

    def __init__(self, gmta: Gmta) -> None:
        known = make_config(FOLDER / "server.ini")
        self.addresses = {name: ("127.0.0.1", free_port()) for name in known.listeners}
        self._queue = gmta.directory / "var/queue"
        certificate, key = Authority(gmta.directory).issue("mx.example.test")
        listeners = "".join(f"[listener:{name}]\naddress = 127.0.0.1:{port}\nrole = {known.listeners[name].role}\n"
                            for name, (_, port) in self.addresses.items())
        (gmta.directory / "here.ini").write_text(f"""
{listeners}
[plugins]
enable = {', '.join(known.plugins.enable)}, stand_in
path = {gmta_testing()}
[limits]
connections_per_ip = 0
connections_per_subnet = 0
""")
        gmta.port = self.addresses["mx"][1]
        gmta.serve(f"""
[gmta]
include = here.ini
hostname = mx.example.test
workers = 1
log_file = gmta.log
[tls]
certificate = {certificate}
key = {key}
[route]
local = hold
* = hold
{(FOLDER / 'server.ini').read_text()}
""")
        for _, port in self.addresses.values():
            until(lambda port=port: listens(port), "banner")  # type: ignore[misc]

    def fetch(self, queue_id: str) -> tuple[Address, list[Address], bytes]:
        """What is in the queue under that id."""
        admin = QueueAdmin(str(self._queue))
        try:
            (row,) = admin.list([queue_id])
            octets = admin.cat(queue_id)
            assert octets is not None
            return stored_address(row["sender"]), [stored_address(one["address"]) for one in row["recipients"]], b"".join(octets)
        finally:
            admin.close()


def gmta_testing() -> Path:
    """The folder with the stand-in plugin."""
    return Path(gmta.testing.__file__).parent


@pytest.fixture
def server(gmta: Gmta) -> Iterator[Server]:
    yield Server(gmta)


def test_dialogs(server: Server) -> None:
    """One server for all; a failure names the file and the line."""
    keywords = {name: keywords_at(address, timeout_s=DEADLINE_S) for name, address in server.addresses.items()}
    played = 0
    for path in sorted(FOLDER.rglob("*.dialog")):
        dialogue = Dialogue.load(path)
        if dialogue.waits:
            continue
        assert dialogue.missing(keywords[dialogue.listener]) == "", path
        play_at(dialogue, server.addresses[dialogue.listener], timeout_s=DEADLINE_S, fetch=server.fetch)
        played += 1
    assert played > 100
