"""The maildir transport: what the file holds, where it goes, that a repeated delivery shows once, quotas, and that faults defer."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import threading
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta import Delivery, PluginConfig
from gmta.config import ConfigError, Section
from gmta.deliver.router import Router
from gmta.mail.address import Address, AddressError
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import FileBody, Message
from gmta.mail.session import Recipient
from gmta.mail.verdict import Outcome, Status
from gmta.plugins import PluginManager
from gmta.services import Services
from gmta.services.accounts import Account
from gmta.services.maildirsize import Limits, count_usage, read_usage
from gmta.services.metrics import Metrics
from gmta.testing import MemoryLog, make_config, make_session, make_transaction
from gmta_plugins import maildir
from gmta_plugins.maildir import Maildir, TransportConfig, folder_name, safe

RAW = b"Subject: x\r\n\r\n.dot\r\nbody\r\n"
HOSTILE: list[str] = json.loads((Path(__file__).parents[1] / "data/hostile_local_parts.json").read_text())
JOE = Address("joe", "c.example")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Maildir]]:
    """Makes transports on {tmp_path}/mail/{domain}/{local}. clock: Unix seconds; other keys: of the section."""
    started: list[Services] = []

    def made(*, clock: Callable[[], float] | None = None, **keys: Any) -> Maildir:
        config = make_config("")
        services = Services(config, MemoryLog(), Metrics(), hostname="mx.example", **({"clock": clock} if clock else {}))
        started.append(services)
        values = {"path": f"{tmp_path}/mail/{{domain}}/{{local}}"} | {key: str(value) for key, value in keys.items()}
        return Maildir("mailbox", config.validate(TransportConfig, Section("transport:mailbox", values=values)), services)

    yield made
    for services in started:
        services.close()


@pytest.fixture
def transport(make: Callable[..., Maildir]) -> Maildir:
    return make()


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """Joe's Maildir."""
    return tmp_path / "mail/c.example/joe"


def delivery(*addresses: Address, message: Message | None = None, first: bool = True, sender: str = "a@b.example", id: str = "0123456789ABCDEF",
             original: str = "", tags: tuple[str, ...] = ()) -> Any:
    recipients = [RecipientState(n, address, original) for n, address in enumerate(addresses)]
    envelope = Envelope(id, Address.parse(sender), recipients, received_at=1_800_000_000.5, tags=list(tags))
    return Delivery(envelope, recipients, message or Message.from_bytes(RAW), "mailbox", "", first)


def deliver(transport: Maildir, address: Address = JOE, **facts: Any) -> Outcome:
    return transport.deliver(delivery(address, **facts))[0]


def of_size(size: int) -> Message:
    """A message whose file in Joe's Maildir has about that many octets, and never more."""
    return Message.from_bytes(b"Subject: x\r\n\r\n" + b"x" * (size - 80) + b"\r\n")


def files(maildir: Path) -> list[Path]:
    return sorted((maildir / "new").iterdir()) if (maildir / "new").is_dir() else []


def address(mailbox: str) -> Address:
    try:
        return Address.make(mailbox, "c.example")
    except AddressError:
        return Address(mailbox, "c.example")


# --- the file ---------------------------------------------------------------------------------------------------


def test_file_has_trace_fields_and_lf_ends(transport: Maildir, tmp_path: Path) -> None:
    """A Maildir that is not there yet is made, by nobody else to be read."""
    outcomes = transport.deliver(delivery(Address("Joe", "C.example")))
    assert outcomes[0].status is Status.DELIVERED
    box = tmp_path / "mail/c.example/joe"
    (file,) = files(box)
    assert file.read_bytes() == (b"Return-Path: <a@b.example>\nDelivered-To: Joe@C.example\n" + RAW.replace(b"\r\n", b"\n"))
    assert file.name == f"1800000000.0123456789ABCDEFR0.mx.example,S={file.stat().st_size}"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [(box / part).stat().st_mode & 0o777 for part in (".", "cur", "new", "tmp")] == [0o700] * 4
    assert not list((box / "tmp").iterdir())


def test_null_sender_has_its_return_path(transport: Maildir, box: Path) -> None:
    deliver(transport, sender="")
    assert files(box)[0].read_bytes().startswith(b"Return-Path: <>\n")


def test_repeated_delivery_shows_once(transport: Maildir, box: Path) -> None:
    deliver(transport)
    deliver(transport, first=False)
    (file,) = files(box)
    os.rename(file, box / "cur" / f"{file.name}:2,S")  # a reader has seen it
    assert deliver(transport, first=False).status is Status.DELIVERED
    assert not files(box)


def test_repeated_batch_shows_once(transport: Maildir, box: Path) -> None:
    """Some are in new/ still, some in cur/, some were never written, and one can't be looked for."""
    def write(first: bool, names: str) -> list[Any]:
        jobs = [delivery(Address("ann" if id == "x" else "joe", "c.example"), id=id, first=first) for id in names]
        return transport._write_all([transport._item(job, job.recipients[0]) for job in jobs])

    assert write(True, "abcd") == [None] * 4
    for file in files(box)[:2]:
        os.rename(file, box / "cur" / f"{file.name}:2,RS")
    (box.parent / "ann").write_text("in the way")
    results = write(False, "abxcde")
    assert [result is None for result in results] == [True, True, False, True, True, True]
    assert len(files(box)) == 3 and len(list((box / "cur").iterdir())) == 2


def test_two_recipients_two_files(transport: Maildir, box: Path) -> None:
    outcomes = transport.deliver(delivery(JOE, JOE))
    assert len(outcomes) == 2
    assert len(files(box)) == 2


def test_leftover_of_a_crash_is_overwritten(transport: Maildir, box: Path) -> None:
    deliver(transport)
    (file,) = files(box)
    whole = file.read_bytes()
    file.unlink()
    (box / "tmp" / file.name.partition(",")[0]).write_bytes(b"half" * 1000)
    deliver(transport, first=False)
    assert file.read_bytes() == whole
    assert not list((box / "tmp").iterdir())


def test_mailbox_removed_meanwhile_is_made_again(transport: Maildir, box: Path) -> None:
    deliver(transport)
    shutil.rmtree(box.parent)
    assert deliver(transport).status is Status.DELIVERED
    assert len(files(box)) == 1


def test_big_body_across_pieces(transport: Maildir, box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = b"line\r\n" * 100 + b"bare\rcr\r\n"
    path = tmp_path / "spool"
    path.write_bytes(body)
    message = Message(b"Subject: x\r\n", b"\r\n", FileBody(str(path), 0, len(body)))
    monkeypatch.setattr(message.body.__class__, "chunks", lambda self, size=7: iter(
        [body[at:at + 7] for at in range(0, len(body), 7)]))
    deliver(transport, message=message)
    assert files(box)[0].read_bytes().endswith(b"Subject: x\n\n" + body.replace(b"\r\n", b"\n"))


def test_many_deliveries_at_once_are_as_many_files(make: Callable[..., Maildir], box: Path) -> None:
    """A thousand within a moment, by eight threads, each with a transport of its own as a worker has."""
    transports = [make() for _ in range(8)]

    def write(number: int) -> list[Any]:
        transport = transports[number % 8]
        items = [transport._item(job, job.recipients[0]) for job in (delivery(JOE, id=f"{number:03}-{n:02}") for n in range(25))]
        return transport._write_all(items)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(write, range(40)))
    assert results == [[None] * 25] * 40
    assert len(files(box)) == 1000
    assert not list((box / "tmp").iterdir())


def test_a_name_that_is_taken_is_not_overwritten(transport: Maildir, box: Path) -> None:
    """The same name for other mail: both stay; for the same mail: it stays once."""
    deliver(transport)
    assert deliver(transport).status is Status.DELIVERED
    assert len(files(box)) == 1
    other = Message.from_bytes(RAW.replace(b"body", b"BODY"))
    assert deliver(transport, message=other).status is Status.DELIVERED
    assert len(files(box)) == 2
    assert {b"body" in file.read_bytes() for file in files(box)} == {True, False}
    assert not list((box / "tmp").iterdir())


def test_two_at_once_that_pick_the_same_name(transport: Maildir, box: Path) -> None:
    """Also in tmp/, before either is whole."""
    jobs = [delivery(JOE), delivery(JOE, message=Message.from_bytes(RAW.replace(b"body", b"BODY")))]
    assert transport._write_all([transport._item(job, job.recipients[0]) for job in jobs]) == [None, None]
    assert {file.read_bytes()[-5:] for file in files(box)} == {b"body\n", b"BODY\n"}
    assert not list((box / "tmp").iterdir())


def test_without_renameat2(transport: Maildir, box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta.services.files._renameat2", None)
    test_a_name_that_is_taken_is_not_overwritten(transport, box)


def test_no_descriptor_stays_open(make: Callable[..., Maildir], box: Path) -> None:
    transport = make(quota="2KB")
    deliver(transport, tags=("quarantine",))
    before = os.listdir("/proc/self/fd")
    for number in range(8):
        deliver(transport, Address("joe", "c.example"), id=str(number), message=of_size(1000), first=number % 2 == 0)
        deliver(transport, Address(f"x{number}+y", "c.example"))
        transport.room(JOE, 10)
    (box / "new").rename(box / "gone")
    (box / "new").write_text("in the way")
    deliver(transport)
    assert len(os.listdir("/proc/self/fd")) == len(before)


# --- faults -----------------------------------------------------------------------------------------------------


def test_fault_of_the_file_system_defers(transport: Maildir, tmp_path: Path) -> None:
    (tmp_path / "mail").mkdir()
    (tmp_path / "mail/c.example").write_text("in the way")
    outcomes = transport.deliver(delivery(JOE, Address("joe", "d.example")))
    assert outcomes[0].status is Status.DEFERRED and outcomes[0].recipient_fault
    assert outcomes[1].status is Status.DELIVERED


def test_a_plain_file_of_that_name_gets_no_message(transport: Maildir, box: Path) -> None:
    box.parent.mkdir(parents=True)
    box.write_text("mine")
    assert deliver(transport).status is Status.DEFERRED
    assert box.read_text() == "mine"


@pytest.mark.parametrize("call,fault,code", [
    ("fsync", errno.ENOSPC, 452), ("fsync", errno.EIO, 451), ("write", errno.ENOSPC, 452), ("write", errno.EDQUOT, 452), ("open", errno.EACCES, 451)])
def test_nothing_partial_is_left(transport: Maildir, box: Path, monkeypatch: pytest.MonkeyPatch, call: str, fault: int, code: int) -> None:
    deliver(transport, id="BEFORE")
    real = getattr(os, call)

    def broken(*arguments: Any, **keys: Any) -> Any:
        if call != "open" or "ABCDEF" in str(arguments[0]):
            raise OSError(fault, os.strerror(fault))
        return real(*arguments, **keys)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, broken)
        outcome = deliver(transport)
    assert (outcome.status, outcome.reply.code) == (Status.DEFERRED, code)
    assert len(files(box)) == 1 and not list((box / "tmp").iterdir())
    assert deliver(transport, first=False).status is Status.DELIVERED
    assert len(files(box)) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_mailbox_of_somebody_else(transport: Maildir, box: Path) -> None:
    deliver(transport)
    (box / "new").chmod(0o500)
    assert deliver(transport, id="OTHER").reply.code == 451


def test_a_name_too_long_fails(transport: Maildir) -> None:
    outcome = deliver(transport, Address("x" * 300, "c.example"))
    assert outcome.status is Status.FAILED and outcome.reply.enhanced == "5.1.3"


# --- where it goes ----------------------------------------------------------------------------------------------


def test_hostile_local_parts_stay_in_their_place(transport: Maildir, tmp_path: Path) -> None:
    """Each has a directory of its own, directly below that of the domain; nothing else is touched."""
    assert len(HOSTILE) >= 40
    (tmp_path / "etc").mkdir()
    for number, mailbox in enumerate(HOSTILE):
        assert deliver(transport, address(mailbox), id=str(number)).status is Status.DELIVERED, mailbox
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["etc", "mail"]
    assert not list((tmp_path / "etc").iterdir())
    assert [entry.name for entry in (tmp_path / "mail").iterdir()] == ["c.example"]
    found = list((tmp_path / "mail/c.example").iterdir())
    assert len(found) == len({unicodedata.normalize("NFC", unicodedata.normalize("NFC", mailbox).lower()) for mailbox in HOSTILE})
    for directory in found:
        assert sorted(entry.name for entry in directory.iterdir()) == ["cur", "new", "tmp"], directory
    assert sum(len(files(directory)) for directory in found) == len(HOSTILE)


def test_hostile_details_stay_in_their_place(transport: Maildir, box: Path, tmp_path: Path) -> None:
    for number, detail in enumerate(HOSTILE):
        assert deliver(transport, original=str(address(f"joe+{detail}")), id=str(number)).status is Status.DELIVERED
    assert sorted(entry.name for entry in box.iterdir()) == ["cur", "new", "tmp"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["mail"]
    assert len(files(box)) == len(HOSTILE)


@given(st.text(max_size=30), st.text(max_size=10), st.sampled_from(["{domain}/{local}", "{user}/{detail}", "x/{user}.{detail}/Maildir", "{detail}", ".{detail}"]))
@settings(max_examples=100, deadline=None)
def test_no_path_leads_out(local: str, detail: str, template: str) -> None:
    services = SimpleNamespace(hostname="mx.example", config=SimpleNamespace(base="/base"), clock=lambda: 0.0)
    transport = Maildir("mailbox", TransportConfig(path=template), services)  # type: ignore[call-arg]
    path = transport.path(Address(local, "c.example"), detail)
    assert not {"", ".", ".."} & set(path)
    assert not any("/" in part or "\0" in part for part in path)
    os.fsencode("/".join(path))


@given(st.lists(st.text(max_size=8), min_size=2, max_size=2, unique=True))
@settings(max_examples=100, deadline=None)
def test_safe_is_one_to_one(texts: list[str]) -> None:
    assert safe(texts[0], False, "none") != safe(texts[1], False, "none")


@pytest.mark.parametrize("keys,one,other,same", [
    ({}, "Joe", "joe", True),
    ({"fold_case": "no"}, "Joe", "joe", False),
    ({}, "ren\u00e9", "rene\u0301", True),
    ({}, "REN\u00c9", "rene\u0301", True),
    ({"normalize": "none"}, "ren\u00e9", "rene\u0301", False),
    ({}, "\ufb01x", "fix", False),
    ({"normalize": "nfkc"}, "\ufb01x", "fix", True),
])
def test_names_are_folded_as_configured(make: Callable[..., Maildir], keys: dict[str, str], one: str, other: str, same: bool) -> None:
    transport = make(**keys)
    assert (transport.path(Address(one, "c.example")) == transport.path(Address(other, "C.example"))) is same


@pytest.mark.parametrize("template,error", [("{home}/Maildir", "braces"), ("{local", "braces"), ("{0}", "braces"), ("{local.x}", "braces")])
def test_unknown_placeholder_is_refused(make: Callable[..., Maildir], template: str, error: str) -> None:
    with pytest.raises(ValueError, match=f"path.*{error}"):
        make(path=template)


@pytest.mark.parametrize("keys", [{"file_mode": "rw"}, {"owner": "no-such-user"}, {"quarantine_folder": "Junk"}, {"quarantine_folder": "./../x"},
                                  {"quarantine_folder": ".."}, {"quota": "much"}, {"missing": "maybe"}])
def test_bad_keys_are_refused(make: Callable[..., Maildir], keys: dict[str, str]) -> None:
    with pytest.raises((ConfigError, ValueError)):
        make(**keys)


@pytest.mark.parametrize("link", ["c.example", "c.example/joe", "c.example/joe/new", "c.example/joe/tmp"])
def test_no_symbolic_link_is_followed(make: Callable[..., Maildir], tmp_path: Path, link: str) -> None:
    """Not below the fixed part of the path; there, and with the key, they are."""
    transport = make()
    deliver(transport)
    place, elsewhere = tmp_path / "mail" / link, tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    outcome = deliver(transport, id="SECOND")
    assert outcome.status is Status.DEFERRED and outcome.reply.code == 451
    assert sorted(elsewhere.rglob("*")) == before
    assert deliver(make(symlinks="yes"), id="SECOND").status is Status.DELIVERED


def test_symbolic_link_in_the_fixed_part(transport: Maildir, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "mail").symlink_to(tmp_path / "disk")
    assert deliver(transport).status is Status.DELIVERED
    assert len(files(tmp_path / "disk/c.example/joe")) == 1


@pytest.mark.parametrize("target", ["file", "gone"])
def test_link_where_a_file_will_be(transport: Maildir, box: Path, tmp_path: Path, target: str) -> None:
    """What stands in tmp/ or as maildirsize under the name that comes is not written through."""
    deliver(transport)
    (tmp_path / "file").write_text("mine")
    name = files(box)[0].name.partition(",")[0].replace("0123", "9999")
    (box / "tmp" / name).symlink_to(tmp_path / target)
    assert deliver(transport, id="9999456789ABCDEF").status is Status.DELIVERED
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "gone").exists()
    assert len(files(box)) == 2


def test_modes_and_owner(make: Callable[..., Maildir], box: Path) -> None:
    former = os.umask(0o077)
    try:
        owner = "nobody" if os.geteuid() == 0 else ""
        deliver(make(file_mode="0640", directory_mode="2770", owner=owner, quota="1MB"))
        deliver(make(file_mode="0640", directory_mode="2770", owner=owner, quota="1MB"), id="SECOND", tags=("quarantine",))
    finally:
        os.umask(former)
    made = [box.parent, box, box / "cur", box / "new", box / "tmp", box / ".Junk", box / ".Junk/new"]
    assert {path.stat().st_mode & 0o7777 for path in made} == {0o2770}
    kept = [*files(box), *files(box / ".Junk"), box / "maildirsize"]
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o640}
    if owner:
        assert len({path.stat().st_uid for path in (*made, *kept, box / ".Junk/maildirfolder")} - {0}) == 1
        assert not {path.stat().st_uid for path in (*made, *kept, box / ".Junk/maildirfolder")} & {0}


@pytest.mark.parametrize("missing,code", [("defer", 450), ("reject", 550)])
def test_no_mailbox_is_made(make: Callable[..., Maildir], box: Path, missing: str, code: int) -> None:
    transport = make(create="no", missing=missing)
    assert deliver(transport).reply.code == code
    assert not box.parent.exists()
    box.mkdir(parents=True)  # a home without a Maildir's directories gets them
    assert deliver(transport).status is Status.DELIVERED
    assert len(files(box)) == 1


# --- folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given,folder", [
    ("joe+work", ".work"), ("joe+WORK", ".work"), ("joe+Lists.Python", ".Lists.Python"), ("joe+lists.python", ".Lists.Python"),
    ("joe+other", ""), ("joe", ""), ("ann+work", ""), ("joe+gr\u00fc\u00dfe", ".gr&APwA3w-e"), ("joe+file", ""), ("joe+link", ""), ("joe+", ""), ("joe+a+b", ".a+b"),
])
def test_detail_is_a_folder_that_exists(transport: Maildir, box: Path, tmp_path: Path, given: str, folder: str) -> None:
    for name in (".work", ".Lists.Python", ".gr&APwA3w-e", ".a+b"):
        (box / name).mkdir(parents=True)
    (box / ".file").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (box / ".link").symlink_to(tmp_path / "elsewhere")
    assert deliver(transport, original=f"{given}@C.example").status is Status.DELIVERED
    assert len(files(box / folder)) == 1


def test_detail_of_the_address_itself(make: Callable[..., Maildir], tmp_path: Path, box: Path) -> None:
    transport = make(path=f"{tmp_path}/mail/{{domain}}/{{user}}")
    (box / ".work").mkdir(parents=True)
    deliver(transport, Address("joe+work", "c.example"))
    assert len(files(box / ".work")) == 1
    off = make(path=f"{tmp_path}/mail/{{domain}}/{{user}}", detail_folders="no")
    deliver(off, Address("joe+work", "c.example"))
    assert len(files(box)) == 1
    by_path = make(path=f"{tmp_path}/mail/{{domain}}/{{user}}/{{detail}}", detail_folders="no")
    assert by_path.path(Address("joe+../x", "c.example")) == ("c.example", "joe", "%2E.%2Fx")


@pytest.mark.parametrize("detail,folder", [("", ""), (".", ""), ("a..b", ""), ("a/b", ""), ("a\nb", ""), ("x" * 65, ""), ("a&b", ".a&-b"), ("\u65e5\u672c", ".&ZeVnLA-")])
def test_folder_names(detail: str, folder: str) -> None:
    assert folder_name(detail) == folder


def test_quarantined_mail_has_its_folder(make: Callable[..., Maildir], box: Path) -> None:
    assert deliver(make(), tags=("dmarc-fail", "quarantine")).status is Status.DELIVERED
    assert len(files(box / ".Junk")) == 1 and not files(box)
    assert (box / ".Junk/maildirfolder").exists() and (box / "cur").is_dir()
    assert deliver(make(), tags=("quarantine",), first=False).status is Status.DELIVERED
    assert len(files(box / ".Junk")) == 1
    deliver(make(quarantine_folder=""), tags=("quarantine",))
    assert len(files(box)) == 1


def test_loop_is_stopped(make: Callable[..., Maildir], box: Path) -> None:
    raw = b"Received: by x\r\nDELIVERED-TO: <JOE@c.example>\r\nDelivered-To: \xff\r\n" + RAW
    outcome = deliver(make(), message=Message.from_bytes(raw))
    assert outcome.status is Status.FAILED and (outcome.reply.code, outcome.reply.enhanced) == (554, "5.4.6")
    assert not box.exists()
    assert deliver(make(), Address("ann", "c.example"), message=Message.from_bytes(raw)).status is Status.DELIVERED
    assert deliver(make(loop_check="no"), message=Message.from_bytes(raw)).status is Status.DELIVERED
    assert deliver(make(), id="2", message=Message.from_bytes(RAW + raw)).status is Status.DELIVERED  # in the body it is text


# --- quota ------------------------------------------------------------------------------------------------------


def size_file(box: Path) -> list[str]:
    file = box / "maildirsize"
    return file.read_text().splitlines() if file.exists() else []


def test_quota_file_is_kept(make: Callable[..., Maildir], box: Path) -> None:
    """A first line with the quota, one with what was counted, one a delivery; the sum is what is there."""
    transport = make(quota="1MB", quota_messages=100)
    for number in range(3):
        deliver(transport, id=str(number))
    size = files(box)[0].stat().st_size
    assert size_file(box) == ["1048576S,100C", "0 0", f"{size} 1", f"{size} 1", f"{size} 1"]
    deliver(transport, id="junk", tags=("quarantine",))
    assert size_file(box)[-1] == f"{size} 1"
    deliver(transport, id="junk", tags=("quarantine",), first=False)  # whether that was counted nobody knows
    assert size_file(box) == []
    deliver(transport, id="4")
    assert size_file(box) == ["1048576S,100C", f"{4 * size} 4", f"{size} 1"]


@pytest.mark.parametrize("keys,status,code,enhanced", [
    ({"quota": 10000}, Status.FAILED, 552, "5.2.2"),
    ({"quota": 10000, "over_quota": "defer"}, Status.DEFERRED, 452, "4.2.2"),
    ({"quota_messages": 3}, Status.FAILED, 552, "5.2.2"),
])
def test_full_mailbox(make: Callable[..., Maildir], box: Path, keys: dict[str, Any], status: Status, code: int, enhanced: str) -> None:
    transport = make(**keys)
    outcomes = [deliver(transport, id=str(number), message=of_size(3000)) for number in range(5)]
    assert [outcome.status for outcome in outcomes] == [Status.DELIVERED] * 3 + [status] * 2
    assert (outcomes[3].reply.code, outcomes[3].reply.enhanced, outcomes[3].reply.text) == (code, enhanced, "Mailbox is full")
    assert len(files(box)) == 3 and not list((box / "tmp").iterdir())
    files(box)[0].unlink()
    (box / "maildirsize").unlink()
    assert deliver(transport, id="again", message=of_size(3000)).status is Status.DELIVERED


def test_message_larger_than_the_quota_is_never_deferred(make: Callable[..., Maildir]) -> None:
    assert deliver(make(quota=1000, over_quota="defer"), message=of_size(2000)).status is Status.FAILED


def test_quota_within_a_batch(make: Callable[..., Maildir], box: Path) -> None:
    transport = make(quota=10000)
    jobs = [delivery(JOE, id=str(number), message=of_size(3000)) for number in range(6)]
    results = transport._write_all([transport._item(job, job.recipients[0]) for job in jobs])
    assert [result is None for result in results] == [True] * 3 + [False] * 3
    assert len(files(box)) == 3
    assert sum(int(line.split()[1]) for line in size_file(box)[1:]) == 3


def written(box: Path, text: str, age_s: float = 0.0, now: float = 1_800_000_000.0) -> None:
    (box / "maildirsize").write_text(text)
    os.utime(box / "maildirsize", (now - age_s, now - age_s))


@pytest.mark.parametrize("text,age_s,counted", [
    ("10000S\n9990 3\n", 60, False),  # over, but one line and fresh: believed
    ("10000S\n9990 3\n", 1000, True),  # over and old
    ("10000S\n9000 3\n990 1\n", 60, True),  # over, of several lines
    ("10000S\n100 1\n", 10_000, False),  # not over: believed whatever its age
    ("9000S\n100 1\n", 60, True),  # another quota
    ("10000S,5C\n100 1\n", 60, True),
    ("10000S,0C\n100 1\n", 60, False),
    ("10000S\n", 60, True),  # nothing counted
    ("10000S\n-5 0\n", 60, True),
    ("10000S\n5 -1\n", 60, True),
    ("10000S\nnonsense\n", 60, True),
    ("", 60, True),
    ("\0\0", 60, True),
    ("10000S\n1 1 1\n", 60, True),
    ("10000S\n" + "0 0\n" * 1279, 60, True),  # past 5120 octets
    ("10000S\n" + "0 0\n" * 1200, 60, False),
])
def test_when_a_mailbox_is_counted_anew(make: Callable[..., Maildir], box: Path, text: str, age_s: float, counted: bool) -> None:
    now = 1_800_000_000.0
    transport = make(quota=10000, clock=lambda: now)
    for part in ("cur", "new", "tmp"):
        (box / part).mkdir(parents=True)
    (box / "cur/1.a,S=700:2,S").write_text("x")  # the name says it
    (box / "new/2.b").write_text("x" * 50)
    (box / "new/3.c,S=1x").write_text("x" * 7)
    (box / ".Sub/cur").mkdir(parents=True)
    (box / ".Sub/cur/4.d,S=43,W=50:2,").write_text("")
    written(box, text, age_s)
    transport.room(JOE, 100)
    assert (size_file(box) == ["10000S", "800 4"]) is counted
    assert (size_file(box) == text.split("\n")[:-1]) is not counted


def test_courier_leaves_deleted_messages_out(box: Path) -> None:
    for name, size in (("cur/1:2,ST", 1), ("cur/2:2,S", 2), (".Trash/cur/3", 4), ("new/4", 8), (".Sub/new/5", 16), ("tmp/6", 32)):
        (box / name).parent.mkdir(parents=True, exist_ok=True)
        (box / name).write_text("x" * size)
    top = os.open(box, os.O_RDONLY)
    try:
        assert count_usage(top)[0][:2] == (31, 5)
        assert count_usage(top, courier=True)[0][:2] == (26, 3)
    finally:
        os.close(top)


def test_no_file_is_written_where_the_mailbox_changes_meanwhile(make: Callable[..., Maildir], box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = make(quota=10000)
    deliver(transport)
    real = count_usage

    def count_and_change(top: int, **keys: Any) -> Any:
        found = real(top, **keys)
        (box / "new/other").write_text("x")
        return found

    monkeypatch.setattr(maildir, "count_usage", count_and_change)
    (box / "maildirsize").unlink()
    assert transport.room(JOE, 10) is None
    assert size_file(box) == []


def test_quota_file_through_a_link_is_not_written(make: Callable[..., Maildir], box: Path, tmp_path: Path) -> None:
    box.mkdir(parents=True)
    (tmp_path / "mine").write_text("10000S\n0 0\n")
    (box / "maildirsize").symlink_to(tmp_path / "mine")
    assert deliver(make(quota=10000)).status is Status.DELIVERED
    assert (tmp_path / "mine").read_text() == "10000S\n0 0\n"


@pytest.mark.parametrize("text", ["9" * 5000 + "S\n0 0\n", "10000S\n" + "9" * 5000 + " 1\n", "\udcff", "-1S\n0 0\n"])
def test_odd_quota_file_fails_nobody_of_a_batch(make: Callable[..., Maildir], box: Path, text: str) -> None:
    """What a mailbox's owner writes there costs a count, and no message of anybody."""
    box.mkdir(parents=True)
    (box / "maildirsize").write_bytes(text.encode("utf-8", "surrogateescape"))
    outcomes = make(quota=10000).deliver(delivery(JOE, Address("ann", "c.example")))
    assert [one.status for one in outcomes.values()] == [Status.DELIVERED] * 2
    assert size_file(box)[0] == "10000S"


@pytest.mark.parametrize("fifo", ["maildirsize", ".Junk/maildirfolder", "tmp/NAME", "new/NAME"])
def test_nobody_waits_for_a_fifo(make: Callable[..., Maildir], box: Path, fifo: str) -> None:
    """What a mailbox's owner puts there holds up no thread."""
    transport = make(quota=10000)
    deliver(transport)
    (name,) = (file.name for file in files(box))
    stem, size = name.split(",")
    path = box / fifo.replace("NAME", stem if "tmp" in fifo else f"{stem.replace('0123456789ABCDEF', '2')},{size}")
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    done: list[Outcome] = []
    thread = threading.Thread(target=lambda: done.append(deliver(make(quota=10000), id="2", tags=("quarantine",) if "Junk" in fifo else ())), daemon=True)
    thread.start()
    thread.join(10)
    assert done and (box / ("new" if "Junk" not in fifo else ".Junk")).is_dir()


def test_quota_where_nothing_can_be_locked(make: Callable[..., Maildir], box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: int, kind: int) -> None:
        raise OSError(errno.EBADF, "no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert deliver(make(quota=10000)).status is Status.DELIVERED
    assert len(size_file(box)) == 3


def test_the_sum_is_right_with_many_writers(make: Callable[..., Maildir], box: Path) -> None:
    """Eight workers, two mailboxes, counting and adding at once: nothing is counted twice or left out."""
    transports = [make(quota="1GB") for _ in range(8)]
    names = ("joe", "ann")
    start = threading.Barrier(8)

    def work(number: int) -> list[Any]:
        transport = transports[number]
        start.wait(10)
        results = []
        for batch in range(6):
            jobs = [delivery(Address(names[n % 2], "c.example"), id=f"{number}-{batch}-{n}") for n in range(8)]
            results += transport._write_all([transport._item(job, job.recipients[0]) for job in jobs])
        return results

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[None] * 48] * 8
    for name in names:
        top = os.open(box.parent / name, os.O_RDONLY)
        try:
            used = read_usage(top, Limits(1024 ** 3, 0), 0.0)
            counted = count_usage(top)[0]
        finally:
            os.close(top)
        assert counted.messages == 192
        assert used is None or used[:2] == counted[:2]


def test_quotas_of_single_mailboxes(make: Callable[..., Maildir], tmp_path: Path) -> None:
    now = [1_800_000_000.0]
    file = tmp_path / "quotas"
    file.write_text("# who  how much\njoe@c.example 1GB 5\nann 2MB\nbob 0\n")
    transport = make(quota="1MB", quota_file=file, clock=lambda: now[0])
    assert transport.limits(JOE) == Limits(1024 ** 3, 5)
    assert transport.limits(Address("JOE", "C.example")) == Limits(1024 ** 3, 5)
    assert transport.limits(Address("ann+x", "any.example")) == Limits(2 * 1024 ** 2, 0)
    assert transport.limits(Address("bob", "c.example")) is None
    assert transport.limits(Address("eve", "c.example")) == Limits(1024 ** 2, 0)
    file.write_text("joe@c.example many\n")
    now[0] += 2
    assert transport.limits(JOE) == Limits(1024 ** 3, 5)
    assert "expected `ADDRESS SIZE [MESSAGES]`" in str(transport._services.log.lines)
    file.write_text("joe@c.example 5KB # less\n")
    now[0] += 2
    assert transport.limits(JOE) == Limits(5 * 1024, 0)


def test_bad_quota_file_stops_the_start(make: Callable[..., Maildir], tmp_path: Path) -> None:
    (tmp_path / "quotas").write_text("joe 1GB\njoe\n")
    with pytest.raises(ValueError, match="quotas:2: expected"):
        make(quota_file=tmp_path / "quotas")


# --- at RCPT ----------------------------------------------------------------------------------------------------


class Server:
    """What a worker has of plugins and routes."""

    def __init__(self, tmp_path: Path, keys: str) -> None:
        config = make_config(f"""
[domains]
local = c.example
[plugins]
enable = mailboxes, maildir
[plugin:mailboxes]
accept = any
[transport:mailbox]
type = maildir
path = {tmp_path}/mail/{{domain}}/{{local}}
{keys}
[transport:other]
type = discard
[route]
local = mailbox
other@c.example = other
* = other
""")
        self.services = Services(config, MemoryLog(), Metrics(), hostname="mx.example")
        self.plugins = PluginManager(config, self.services, self.services.log)
        self.plugins.on("on_worker_started", SimpleNamespace(scheduler=SimpleNamespace(router=Router(config, self.plugins)), plugins=self.plugins))

    def rcpt(self, address: Address, size: int | None = None, transport: str | None = None) -> str:
        """The objection, or ""."""
        transaction = make_transaction(size=size)
        verdict = self.plugins.check("check_rcpt", make_session(), transaction, Recipient(address, transport=transport))
        return str(verdict.reply) if verdict else ""

    def close(self) -> None:
        """Ends it."""
        self.plugins.close()
        self.services.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    started: list[Server] = []

    def serve(keys: str) -> Server:
        started.append(Server(tmp_path, keys))
        return started[-1]

    yield serve
    for server in started:
        server.close()


def test_full_mailbox_is_told_at_rcpt(serve: Callable[[str], Server], box: Path) -> None:
    server = serve("quota = 10KB")
    transport: Any = server.plugins.transports["mailbox"]
    assert server.rcpt(JOE) == "" and server.rcpt(JOE, 5000) == ""
    assert server.rcpt(JOE, 20_000) == "552 5.2.2 Mailbox is full"
    deliver(transport, message=of_size(8000))
    assert server.rcpt(JOE) == "" and server.rcpt(JOE, 2000) == ""
    assert server.rcpt(JOE, 5000) == "552 5.2.2 Mailbox is full"
    written(box, "10240S\n10240 3\n", now=server.services.clock())
    assert server.rcpt(JOE) == "552 5.2.2 Mailbox is full"
    assert server.rcpt(JOE, transport="other") == ""
    assert server.rcpt(Address("other", "c.example"), 20_000) == ""
    assert server.rcpt(Address("joe", "d.example"), 20_000) == ""
    assert server.rcpt(Address("ann", "c.example"), 5000) == ""
    assert not (box.parent / "ann").exists()  # asking makes none


def test_full_mailbox_may_be_deferred_at_rcpt(serve: Callable[[str], Server]) -> None:
    server = serve("quota = 10KB\nover_quota = defer")
    transport: Any = server.plugins.transports["mailbox"]
    deliver(transport, message=of_size(8000))
    assert server.rcpt(JOE, 5000) == "452 4.2.2 Mailbox is full"


def test_missing_mailbox_is_told_at_rcpt(serve: Callable[[str], Server], box: Path) -> None:
    assert serve("create = no").rcpt(JOE).startswith("450 4.2.0 ")
    assert serve("create = no\nmissing = reject").rcpt(JOE).startswith("550 5.1.1 ")
    box.mkdir(parents=True)
    assert serve("create = no\nmissing = reject").rcpt(JOE) == ""


def test_nothing_is_asked_without_need(serve: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Maildir, "room", None)
    assert serve("").rcpt(JOE, 10) == ""


def test_quota_without_the_hook_is_warned_of(tmp_path: Path) -> None:
    config = make_config(f"[transport:mailbox]\ntype = maildir\npath = {tmp_path}/{{local}}\nquota = 1GB\n")
    services = Services(config, MemoryLog(), Metrics(), hostname="mx.example")
    PluginManager(config, services, services.log).close()
    assert "maildir is not in [plugins] enable" in str(services.log.lines)  # type: ignore[attr-defined]


# --- users ------------------------------------------------------------------------------------------------------


def account(monkeypatch: pytest.MonkeyPatch, **homes: Path | str) -> None:
    """Accounts of these names, all of them ours."""
    monkeypatch.setattr("gmta_plugins.maildir.find_account", lambda name: Account(name, os.geteuid(), os.getegid(), str(homes[name])))


def test_home_of_a_user(make: Callable[..., Maildir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    account(monkeypatch, joe=home, ann=home)
    transport = make(path="{home}/mail/{domain}", user="{user}")
    assert transport.user_of(address("Joe+x")) == "joe"
    assert deliver(transport, address("Joe+x")).status is Status.DELIVERED
    assert len(files(home / "mail/c.example")) == 1
    assert deliver(transport, address("ann")).status is Status.DEFERRED  # another account: another process
    assert deliver(make(path="{home}/Maildir", user="joe"), address("whoever")).status is Status.DELIVERED
    assert len(files(home / "Maildir")) == 1


def test_mail_is_never_written_as_somebody_else(make: Callable[..., Maildir], tmp_path: Path) -> None:
    transport = make(path=f"{tmp_path}/{{user}}", user="{user}")
    assert deliver(transport, address("nobody")).status is (Status.DEFERRED if os.geteuid() != pwd.getpwnam("nobody").pw_uid else Status.DELIVERED)
    assert deliver(transport, address("no-such-account")).status is Status.DEFERRED
    assert not list(tmp_path.glob("no*"))


@pytest.mark.parametrize("home", ["", "joe", "./joe"])
def test_a_home_that_is_nowhere(make: Callable[..., Maildir], monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    """An entry of passwd(5) may have none, and a relative one would be below wherever we happen to be."""
    account(monkeypatch, joe=home)
    transport = make(path="{home}/mail", user="{user}")
    monkeypatch.setattr(transport, "_write_all", lambda items: [None] * len(items))
    outcome = deliver(transport, address("joe"))
    assert str(outcome.reply) == "451 4.3.0 Mailbox can't be written: the account has no home directory"
    with pytest.raises(ValueError, match="home"):
        make(path="{home}/Maildir", user="joe")


@pytest.mark.parametrize("keys", [{"user": "no-such-account"}, {"user": "root", "owner": "root"}, {"path": "{home}/Maildir"}, {"path": "x/{home}", "user": "root"}])
def test_users_that_can_not_be(make: Callable[..., Maildir], keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"user|path|owner"):
        make(**keys)


def test_every_key_is_documented() -> None:
    section = (Path(__file__).parents[2] / "docs/transports.md").read_text().split("\n## maildir\n")[1].split("\n## ")[0]
    rows = " ".join(line.split(" | ")[0] for line in section.splitlines() if line.startswith("| "))
    assert not [key for key in TransportConfig.model_fields.keys() - PluginConfig.model_fields.keys() if f"`{key}`" not in rows]
