"""Automatic replies: who has one, once, and what it says; machines, lists and strangers to the mailbox have none."""

from __future__ import annotations

import email
import email.policy
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest

from gmta.mail.address import Address
from gmta.mail.session import Recipient
from gmta.testing.fakes import FakeClock, make_envelope, make_message, make_services, make_session, make_transaction
from gmta_plugins.autoreply import Config, Plugin, Text

MAIL = "From: ann@far.example\nTo: Joe <joe@example.test>\nSubject: =?utf-8?q?caf=C3=A9?=\nMessage-ID: <1@far>\nReferences: <0@far>\n\nhi\n"
DAY_S = 86400


class Office:
    """A plugin with a text for joe, and what it hands in."""

    def __init__(self, folder: Path, text: str = "I am away.\n", **keys: Any) -> None:
        self.clock = FakeClock()
        self.services = make_services(clock=self.clock)
        (folder / "joe@example.test").write_text(text)
        self.plugin = Plugin(Config(directory=str(folder), **keys), self.services)
        self.sent: list[tuple[Address, list[Address], bytes]] = []
        self.plugin.on_worker_started(SimpleNamespace(submit=lambda *what: self.sent.append(what)))

    def mail(self, text: str = MAIL, sender: str = "ann@far.example", recipient: str = "joe@example.test", original: str = "", tags: tuple[str, ...] = ()) -> int:
        """How many answers there are after this mail."""
        transaction = make_transaction(sender)
        address = Address.parse(recipient)
        transaction.recipients = [Recipient(address, original=Address.parse(original) if original else address)]
        assert self.plugin.check_message(make_session(), transaction, make_message(text)) is None
        self.plugin.on_queued(make_envelope(sender, tags=list(tags)))
        gevent.wait(timeout=5)
        return len(self.sent)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    yield Office(tmp_path)


def test_answer_goes_from_nobody_to_the_sender(office: Office) -> None:
    assert office.mail() == 1
    sender, recipients, raw = office.sent[0]
    assert not sender and [str(one) for one in recipients] == ["ann@far.example"]
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert (message["From"], message["To"], message["Subject"]) == ("joe@example.test", "ann@far.example", "Auto: café")
    assert message["Auto-Submitted"] == "auto-replied" and message["In-Reply-To"] == "<1@far>" and message["References"] == "<0@far> <1@far>"
    assert message["Date"] and message["Message-ID"] and message.get_content().strip() == "I am away."
    assert b"\n" not in raw.replace(b"\r\n", b"")


@pytest.mark.parametrize("text", ["Subject: Away\rBcc: x@far.example\n\nI am away.\n", "Subject: Away\x0bBcc: x@far.example\n\nI am\raway.\n"])
def test_controls_in_a_text_make_no_field(tmp_path: Path, text: str) -> None:
    office = Office(tmp_path, "x\n")
    (tmp_path / "joe@example.test").write_bytes(text.encode())
    assert office.mail() == 1
    raw = office.sent[0][2]
    assert email.message_from_bytes(raw)["Bcc"] is None
    assert b"\r" not in raw.replace(b"\r\n", b"")


def test_once_in_a_period_a_sender(office: Office) -> None:
    assert office.mail() == 1
    assert office.mail() == office.mail(sender="ANN@far.example") == 1
    assert office.mail(sender="bob@far.example") == 2
    office.clock.advance(7 * DAY_S + 1)
    assert office.mail() == 3


@pytest.mark.parametrize("sender", ["", "owner-list@far.example", "list-request@far.example", "list-bounces@far.example", "MAILER-DAEMON@far.example", "noreply@far.example",
                                    "no-reply+1@far.example", "do_not_reply@far.example", "bounces+joe=example.test@far.example", "SRS0=a=b=c=d@far.example", "joe@example.test"])
def test_machines_have_none(office: Office, sender: str) -> None:
    assert office.mail(sender=sender) == 0


@pytest.mark.parametrize("field", ["Auto-Submitted: auto-generated", "Auto-Submitted: auto-replied (x)", "Precedence: bulk", "precedence: LIST", "Precedence: junk", "List-Id: <x>",
                                   "List-Unsubscribe: <mailto:x>", "Feedback-ID: x", "Content-Type: multipart/report; boundary=x", "X-Spam-Flag: YES",
                                   "X-Auto-Response-Suppress: OOF", "X-Loop: x"])
def test_automatic_mail_has_none(office: Office, field: str) -> None:
    assert office.mail(f"{field}\n{MAIL}") == 0


def test_a_word_that_it_is_not_automatic_is_believed(office: Office) -> None:
    assert office.mail(f"Auto-Submitted: no\n{MAIL}") == 1


@pytest.mark.parametrize(("to", "original", "count"), [
    ("other@example.test", "", 0), ("undisclosed-recipients:;", "", 0), ("JOE@EXAMPLE.TEST", "", 1), ("joe+work@example.test", "", 1), ("sales@example.test", "sales@example.test", 1),
    ("a@b.example, group: joe@example.test;", "", 1)])
def test_mailbox_must_be_named(office: Office, to: str, original: str, count: int) -> None:
    text = MAIL.replace("Joe <joe@example.test>", to)
    assert office.mail(text, original=original) == count


def test_it_need_not_where_so_configured(tmp_path: Path) -> None:
    assert Office(tmp_path, addressed=False).mail(MAIL.replace("joe@", "x@")) == 1


def test_spam_has_none(office: Office) -> None:
    assert office.mail(tags=("spam",)) == 0
    assert office.mail(tags=("other",)) == 1


def test_others_have_none(office: Office) -> None:
    assert office.mail(recipient="ann@example.test") == office.mail(recipient='"../joe@example.test"@example.test') == 0


def test_subject_and_dates_of_the_text(tmp_path: Path) -> None:
    office = Office(tmp_path, "Subject: Weg: ä\nFrom-Date: 2026-01-05\nUntil-Date: 2026-01-06\n\nIch bin ü.\n")  # the clock stands at 2026-01-05
    assert office.mail() == 1
    message = email.message_from_bytes(office.sent[0][2], policy=email.policy.default)
    assert message["Subject"] == "Weg: ä" and message.get_content().strip() == "Ich bin ü."
    office.clock.advance(DAY_S)
    assert office.mail(sender="b@far.example") == 2
    office.clock.advance(DAY_S)
    assert office.mail(sender="c@far.example") == 2


@pytest.mark.parametrize("octets", [b"", b"\n\n", b"Subject: x\n\n", b"\xff\n", b"Until-Date: soon\n\nx\n", b"From-Date: 2026-13-01\n\nx\n"])
def test_text_that_cant_be_used(tmp_path: Path, octets: bytes) -> None:
    with pytest.raises(ValueError):
        Text(octets)
    office = Office(tmp_path)
    (tmp_path / "joe@example.test").write_bytes(octets)
    assert office.mail() == 0


def test_subject_of_others_breaks_nothing_out(office: Office) -> None:
    office.mail(MAIL.replace("=?utf-8?q?caf=C3=A9?=", "=?utf-8?q?a=0D=0ABcc:_x=40y?="))
    assert email.message_from_bytes(office.sent[0][2])["Bcc"] is None


def test_folder_that_is_gone_stops_no_mail(office: Office, tmp_path: Path) -> None:
    (tmp_path / "joe@example.test").unlink()
    tmp_path.rmdir()
    office.clock.advance(5)
    assert office.mail() == 0


def test_directory_is_needed() -> None:
    with pytest.raises(ValueError, match="directory"):
        Plugin(Config(), make_services())


@pytest.mark.parametrize("kind", ["fifo", "directory", "unreadable"])
def test_a_text_that_is_no_file_holds_nobody_up(office: Office, tmp_path: Path, kind: str) -> None:
    text = tmp_path / "joe@example.test"
    text.unlink()
    if kind == "fifo":
        os.mkfifo(text)
    elif kind == "directory":
        text.mkdir()
    else:
        text.symlink_to("/nowhere")
    assert office.mail() == 0
    assert office.services.log.of("no automatic reply")  # type: ignore[attr-defined]


def test_an_answer_that_could_not_be_handed_in_is_due_again(office: Office) -> None:
    def full(*what: Any) -> None:
        raise OSError(28, "No space left on device")

    office.plugin.on_worker_started(SimpleNamespace(submit=full))
    assert office.mail() == 0 and office.services.log.of("no automatic reply")  # type: ignore[attr-defined]
    office.plugin.on_worker_started(SimpleNamespace(submit=lambda *what: office.sent.append(what)))
    assert office.mail() == 1
