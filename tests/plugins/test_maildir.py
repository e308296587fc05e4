"""The maildir transport: what the file holds, that a repeated delivery shows once, and that faults defer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gmta import Delivery
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import FileBody, Message
from gmta.mail.verdict import Status
from gmta.services import Services
from gmta.services.log import NullLog
from gmta.services.metrics import Metrics
from gmta_plugins.maildir import Maildir, safe

RAW = b"Subject: x\r\n\r\n.dot\r\nbody\r\n"


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[Maildir]:
    services = Services(SimpleNamespace(base=str(tmp_path)), NullLog(), Metrics(), hostname="mx.example")
    made = Maildir("mailbox", Maildir.Config(path="{domain}/{local}"), services)
    yield made
    services.close()


def delivery(*addresses: Address, message: Message | None = None, first: bool = True, sender: str = "a@b.example") -> Any:
    recipients = [RecipientState(n, address) for n, address in enumerate(addresses)]
    envelope = Envelope("0123456789ABCDEF", Address.parse(sender), recipients, received_at=1_800_000_000.5)
    return Delivery(envelope, recipients, message or Message.from_bytes(RAW), "mailbox", "", first)


def test_file_has_trace_fields_and_lf_ends(transport: Maildir, tmp_path: Path) -> None:
    outcomes = transport.deliver(delivery(Address("Joe", "C.example")))
    assert outcomes[0].status is Status.DELIVERED
    (file,) = (tmp_path / "c.example/joe/new").iterdir()
    assert file.read_bytes() == (b"Return-Path: <a@b.example>\nDelivered-To: Joe@C.example\n" + RAW.replace(b"\r\n", b"\n"))
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "c.example/joe").stat().st_mode & 0o777 == 0o700
    assert not list((tmp_path / "c.example/joe/tmp").iterdir())


def test_null_sender_has_its_return_path(transport: Maildir, tmp_path: Path) -> None:
    transport.deliver(delivery(Address("joe", "c.example"), sender=""))
    (file,) = (tmp_path / "c.example/joe/new").iterdir()
    assert file.read_bytes().startswith(b"Return-Path: <>\n")


def test_repeated_delivery_shows_once(transport: Maildir, tmp_path: Path) -> None:
    transport.deliver(delivery(Address("joe", "c.example")))
    transport.deliver(delivery(Address("joe", "c.example"), first=False))
    (file,) = (tmp_path / "c.example/joe/new").iterdir()
    os.rename(file, tmp_path / "c.example/joe/cur" / f"{file.name}:2,S")  # a reader has seen it
    assert transport.deliver(delivery(Address("joe", "c.example"), first=False))[0].status is Status.DELIVERED
    assert not list((tmp_path / "c.example/joe/new").iterdir())


def test_two_recipients_two_files(transport: Maildir, tmp_path: Path) -> None:
    outcomes = transport.deliver(delivery(Address("joe", "c.example"), Address("joe", "c.example")))
    assert len(outcomes) == 2
    assert len(list((tmp_path / "c.example/joe/new").iterdir())) == 2


def test_leftover_of_a_crash_is_overwritten(transport: Maildir, tmp_path: Path) -> None:
    transport.deliver(delivery(Address("joe", "c.example")))
    (file,) = (tmp_path / "c.example/joe/new").iterdir()
    whole = file.read_bytes()
    file.unlink()
    (tmp_path / "c.example/joe/tmp" / file.name).write_bytes(b"half" * 1000)
    transport.deliver(delivery(Address("joe", "c.example"), first=False))
    assert file.read_bytes() == whole


def test_mailbox_removed_meanwhile_is_made_again(transport: Maildir, tmp_path: Path) -> None:
    transport.deliver(delivery(Address("joe", "c.example")))
    shutil.rmtree(tmp_path / "c.example")
    assert transport.deliver(delivery(Address("joe", "c.example")))[0].status is Status.DELIVERED
    assert len(list((tmp_path / "c.example/joe/new").iterdir())) == 1


def test_fault_of_the_file_system_defers(transport: Maildir, tmp_path: Path) -> None:
    (tmp_path / "c.example").write_text("in the way")
    outcomes = transport.deliver(delivery(Address("joe", "c.example"), Address("joe", "d.example")))
    assert outcomes[0].status is Status.DEFERRED and outcomes[0].recipient_fault
    assert outcomes[1].status is Status.DELIVERED


def test_big_body_across_pieces(transport: Maildir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta.mail.message.CHUNK", 7)
    body = b"line\r\n" * 100 + b"bare\rcr\r\n"
    path = tmp_path / "spool"
    path.write_bytes(body)
    message = Message(b"Subject: x\r\n", b"\r\n", FileBody(str(path), 0, len(body)))
    monkeypatch.setattr(message.body.__class__, "chunks", lambda self, size=7: iter(
        [body[at:at + 7] for at in range(0, len(body), 7)]))
    transport.deliver(delivery(Address("joe", "c.example"), message=message))
    (file,) = (tmp_path / "c.example/joe/new").iterdir()
    assert file.read_bytes().endswith(b"Subject: x\n\n" + body.replace(b"\r\n", b"\n"))


@pytest.mark.parametrize("local", ["..", ".", "../../etc", "a/b", '"../x"', ".hidden", "a%2Fb"])
def test_an_address_stays_one_component(transport: Maildir, tmp_path: Path, local: str) -> None:
    directory = transport.directory(Address(local, "c.example"))
    assert os.path.dirname(os.path.normpath(directory)) == str(tmp_path / "c.example")


def test_safe_is_one_to_one() -> None:
    texts = ["a/b", "a%2Fb", ".a", "%2ea", "a", "..", "."]
    assert len({safe(text) for text in texts}) == len(texts)


def test_unknown_placeholder_is_refused(tmp_path: Path) -> None:
    services = SimpleNamespace(hostname="mx.example", config=SimpleNamespace(base=str(tmp_path)))
    with pytest.raises(ValueError, match="path"):
        Maildir("mailbox", Maildir.Config(path="{home}/Maildir"), services)
