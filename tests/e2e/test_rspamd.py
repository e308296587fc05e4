"""gmta and rspamd's arc module: each verifies the chains that the other sealed, and continues them."""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmta.mail.message import Message
from gmta.verify.arc import seal, verify_chain
from tests.e2e.conftest import DEADLINE_S, free_port, listens, program, until
from tests.engine.test_verify_arc import ALL, ONE, SEALER, THREE, TWO
from tests.engine.test_verify_dkim import NOW, PLAIN, RSA, pem, signed, write

pytestmark = pytest.mark.e2e

LATER = 4e9  # than rspamd's clock


class Rspamd:
    """A running rspamd, which seals with the key of RSA whatever it scans."""

    def __init__(self, port: int) -> None:
        self._port = port

    def scan(self, raw: bytes) -> tuple[str, bytes]:
        """(its symbol for the chain, the message with its ARC set where it sealed)."""
        link = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE_S)
        link.request("POST", "/checkv2", raw, {"From": "alice@example.com", "Rcpt": "bob@example.test", "IP": "127.0.0.1", "Helo": "x.example.com"})
        said: dict[str, Any] = json.loads(link.getresponse().read())
        link.close()
        (symbol,) = [name for name in said["symbols"] if name.startswith("ARC_") and name != "ARC_SIGNED"]
        added = said.get("milter", {}).get("add_headers", {})
        fields = [f"{name}: {added[name]['value']}\r\n" for name in ("ARC-Seal", "ARC-Message-Signature", "ARC-Authentication-Results") if name in added]
        return symbol, "".join(fields).encode() + raw


@pytest.fixture(scope="module")
def rspamd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rspamd]:
    directory = tmp_path_factory.mktemp("rspamd")
    port = free_port()
    write(directory / "key.pem", pem(RSA))
    (directory / "suffixes").write_text("com\nexample\nnet\ntest\n")  # the list that comes with it takes eight seconds
    with ALL.serve() as names:
        (directory / "rspamd.conf").write_text(f"""
options {{
  filters = "dkim";
  pidfile = "{directory}/pid"; control_socket = "{directory}/control"; hs_cache_dir = "{directory}"; temp_dir = "{directory}";
  url_tld = "{directory}/suffixes";
  dns {{ nameserver = ["{names.address}"]; }}
}}
logging {{ type = "file"; filename = "{directory}/log"; }}
worker "normal" {{ bind_socket = "127.0.0.1:{port}"; count = 1; }}
modules {{ path = "/usr/share/rspamd/plugins/arc.lua"; }}
dkim {{ }}
metric {{ name = "default"; actions {{ reject = 1000; }} }}
arc {{
  sign_local = true; sign_inbound = true; use_domain = "header"; use_esld = false; allow_hdrfrom_mismatch = true;
  selector = "{RSA.selector}"; path = "{directory}/key.pem";
}}
""")
        with open(directory / "output", "wb") as output:
            process = subprocess.Popen([program("rspamd"), "-f", "-i", "-c", str(directory / "rspamd.conf")], stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=output)
        try:
            until(lambda: process.poll() is not None or listens(port), "rspamd on its port")
            assert process.poll() is None, _said(directory)
            yield Rspamd(port)
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


def _said(directory: Path) -> str:
    return "".join((directory / name).read_text(errors="replace") for name in ("output", "log") if (directory / name).exists())


def verdict(raw: bytes) -> tuple[str, int, str]:
    """Ours: (result, how many sets, reason)."""
    result = verify_chain(Message.from_bytes(raw), ALL, now=LATER)
    return result.result, result.instances, result.reason


def sealed(raw: bytes) -> bytes:
    """The message with one more set of ours."""
    message = Message.from_bytes(raw)
    chain = verify_chain(message, ALL, now=LATER)
    fields = seal(message, SEALER, chain, "forwarder.example; arc=pass", now=NOW)
    return "".join(f"{name}: {value}\r\n" for name, value in fields).encode() + raw


@pytest.mark.parametrize("raw,symbol", [
    (PLAIN, "ARC_NA"), (signed(), "ARC_NA"), (ONE, "ARC_ALLOW"), (TWO, "ARC_ALLOW"), (THREE, "ARC_ALLOW"),
    (ONE.replace(b"Bye", b"bye"), "ARC_REJECT"), (THREE.replace(b"Bye", b"bye"), "ARC_REJECT"), (TWO.replace(b"spf=pass", b"spf=fail", 1), "ARC_REJECT"),
], ids=["plain", "signed", "one", "two", "three", "body", "body of three", "results"])
def test_rspamd_judges_our_chains(rspamd: Rspamd, raw: bytes, symbol: str) -> None:
    assert rspamd.scan(raw)[0] == symbol
    assert verdict(raw)[0] == {"ARC_NA": "none", "ARC_ALLOW": "pass", "ARC_REJECT": "fail"}[symbol]


@pytest.mark.parametrize("order", ["r", "rr", "rro", "ro", "roo", "or", "oro"])
def test_each_continues_the_chain_of_the_other(rspamd: Rspamd, order: str) -> None:
    """o: our set, r: rspamd's. It comes third nowhere: rspamd 3.4 hashes the older sets from the last up, and itself refuses what it seals so."""
    raw = signed()
    for instances, who in enumerate(order, 1):
        raw = sealed(raw) if who == "o" else rspamd.scan(raw)[1]
        assert verdict(raw) == ("pass", instances, "")
        assert rspamd.scan(raw)[0] == "ARC_ALLOW"
    altered = raw.replace(b"Bye", b"bye")
    assert (verdict(altered)[0], rspamd.scan(altered)[0]) == ("fail", "ARC_REJECT")
