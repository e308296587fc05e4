"""plugins/mbox.py: files that aliases name, what stands in them, and what is never written to."""

from __future__ import annotations

import fcntl
import mailbox
import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta import Delivery
from gmta.mail.envelope import RecipientState
from gmta.mail.message import Message
from gmta.mail.verdict import Outcome
from gmta.services.aliases import special_local
from gmta.testing.fakes import make_envelope, make_message, make_services
from gmta_plugins import mbox
from gmta_plugins.mbox import Mbox, TransportConfig, quoted

Make = Callable[[], Mbox]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A transport whose aliases name a file `box`, and some that can't be."""
    monkeypatch.setattr(mbox.os, "geteuid", lambda: 12345)
    made: list[Any] = []

    def one() -> Mbox:
        (tmp_path / "aliases").write_text(f"a: {tmp_path}/box, {tmp_path}/link, {tmp_path}/fifo, {tmp_path}, {tmp_path}/none/box, {tmp_path}/hard, /dev/null, |/bin/x\n")
        made.append(make_services())
        return Mbox("files", TransportConfig(aliases_file=str(tmp_path / "aliases")), made[-1])

    yield one
    for services in made:
        services.close()


def deliver(transport: Mbox, target: Path | str, message: Message | None = None, sender: str = "a@b.example") -> Outcome:
    envelope = make_envelope(sender=sender, recipients=(f"{special_local(str(target))}@example.test",))
    state: RecipientState = envelope.recipients[0]
    state.original = "list@example.test"
    return transport.deliver(Delivery(envelope, [state], message or make_message(), "files"))[0]


def test_a_reader_finds_the_messages(make: Make, tmp_path: Path) -> None:
    transport = make()
    texts = ["hi\r\n", "From me\r\n>From you\r\n\r\nFromage\r\n", "no end", "", "\r\n\r\n"]
    for text in texts:
        assert deliver(transport, tmp_path / "box", Message.from_bytes(f"Subject: x\r\n\r\n{text}".encode())).reply.enhanced == "2.0.0"
    assert (tmp_path / "box").stat().st_mode & 0o777 == 0o600
    found = list(mailbox.mbox(tmp_path / "box"))
    assert len(found) == len(texts)
    assert [one["Delivered-To"] for one in found] == ["list@example.test"] * len(texts) and found[0]["Return-Path"] == "<a@b.example>"
    assert found[1].get_payload() == ">From me\n>>From you\n\nFromage\n"


@given(st.lists(st.sampled_from(["From ", ">", "F", "\r\n", "\r", "\n", "x", "From", " "]), max_size=20), st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_no_text_begins_a_message(words: list[str], size: int) -> None:
    text = "".join(words).encode().replace(b"\r\n", b"\n")
    out = b"".join(quoted(iter([text[at:at + size] for at in range(0, len(text), size)])))
    lines = out.split(b"\n")
    assert not [line for line in lines if line.startswith(b"From ")] and out.endswith(b"\n") and (not text or out.endswith(b"\n\n"))
    back = b"\n".join(line[1:] if line.lstrip(b">").startswith(b"From ") and line.startswith(b">") else line for line in lines)
    assert back.startswith(text) and not back[len(text):].strip(b"\n")


@pytest.mark.parametrize(("name", "reply"), [("link", "5.2.0"), ("fifo", "5.2.0"), ("", "5.2.0"), ("hard", "5.2.0"), ("none/box", "4.3.0"), ("other", "5.1.1")])
def test_what_is_never_written_to(make: Make, tmp_path: Path, name: str, reply: str) -> None:
    transport = make()
    (tmp_path / "victim").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    os.link(tmp_path / "victim", tmp_path / "hard")
    os.mkfifo(tmp_path / "fifo")
    assert deliver(transport, tmp_path / name if name else tmp_path).reply.enhanced == reply
    assert (tmp_path / "victim").read_text() == "x" and not (tmp_path / "none").exists() and not (tmp_path / "other").exists()


def test_nowhere(make: Make) -> None:
    assert deliver(make(), "/dev/null").reply.enhanced == "2.0.0"


def test_a_command_is_no_file(make: Make) -> None:
    assert deliver(make(), "|/bin/x").reply.enhanced == "5.1.1"


def test_a_full_disk_leaves_what_was(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = make()
    deliver(transport, tmp_path / "box")
    before = (tmp_path / "box").read_bytes()

    def full(file: int, data: bytes) -> None:
        os.write(file, data[:20])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(mbox, "write_all", full)
        assert str(deliver(transport, tmp_path / "box").reply).startswith("452 4.3.1")
    assert (tmp_path / "box").read_bytes() == before


@pytest.mark.parametrize("end", [b"From x\nSubject: cut sho", b"From x\nSubject: cut\n", b"From x\nSubject: whole\n\nhi\n\n"])
def test_a_message_that_was_cut_takes_no_other_with_it(make: Make, tmp_path: Path, end: bytes) -> None:
    """Who died while writing, or another program, may have left the file without the empty line that ends a message."""
    (tmp_path / "box").write_bytes(end)
    (tmp_path / "box").chmod(0o600)
    assert deliver(make(), tmp_path / "box", Message.from_bytes(b"Subject: next\r\n\r\nhi\r\n")).reply.enhanced == "2.0.0"
    text = (tmp_path / "box").read_bytes()
    assert text.startswith(end) and text[len(end):].lstrip(b"\n").startswith(b"From a@b.example")
    assert text.split(b"From a@b.example")[0].endswith(b"\n\n") and not text.split(b"From a@b.example")[0].endswith(b"\n\n\n")
    assert [one["Subject"] for one in mailbox.mbox(tmp_path / "box")][1] == "next"


def test_the_name_of_a_new_file_is_made_durable(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(mbox, "sync_directory", synced.append)
    transport = make()
    for _ in range(2):
        deliver(transport, tmp_path / "box")
    assert synced == [str(tmp_path)]


def test_a_file_that_may_only_be_written(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = make()
    open_ = os.open

    def without_reading(path: str, flags: int, *more: int) -> int:
        if flags & os.O_ACCMODE == os.O_RDWR and path.endswith("box"):
            raise PermissionError(13, "Permission denied")
        return open_(path, flags, *more)

    monkeypatch.setattr(mbox.os, "open", without_reading)
    assert deliver(transport, tmp_path / "box").reply.enhanced == "2.0.0"


def test_a_locked_file_waits(make: Make, tmp_path: Path) -> None:
    (tmp_path / "box").touch()
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        try:
            file = os.open(tmp_path / "box", os.O_RDWR)
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    try:
        assert str(deliver(make(), tmp_path / "box").reply).startswith("450 4.2.0")
    finally:
        os.write(done[1], b"x")
        os.waitpid(pid, 0)
        for one in (*ready, *done):
            os.close(one)


def test_loop_is_stopped(make: Make, tmp_path: Path) -> None:
    assert deliver(make(), tmp_path / "box", Message.from_bytes(b"Delivered-To: List@example.test\r\n\r\nx\r\n")).reply.enhanced == "5.4.6"


def test_an_alias_that_went_and_one_that_came(make: Make, tmp_path: Path) -> None:
    transport = make()
    services = transport._services
    (tmp_path / "aliases").write_text(f"a: {tmp_path}/new\n")
    services.clock.advance(2)
    assert deliver(transport, tmp_path / "box").reply.enhanced == "5.1.1" and deliver(transport, tmp_path / "new").reply.enhanced == "2.0.0"
    (tmp_path / "aliases").unlink()
    services.clock.advance(2)
    for _ in range(3):  # for as long as it is so
        assert deliver(transport, tmp_path / "later").reply.enhanced == "4.3.0"
        services.clock.advance(2)


def test_never_as_root_and_never_as_somebody_else(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = make()
    monkeypatch.setattr(mbox.os, "geteuid", lambda: 54321)
    assert deliver(transport, tmp_path / "box").reply.enhanced == "4.3.5"
    monkeypatch.setattr(mbox.os, "geteuid", lambda: 0)
    for keys in ({}, {"user": "root"}, {"user": "no-such-account"}):
        with pytest.raises(ValueError, match="user"):
            Mbox("files", TransportConfig(aliases_file=str(tmp_path / "aliases"), **keys), make_services())
    assert Mbox("files", TransportConfig(aliases_file=str(tmp_path / "aliases"), user="nobody"), make_services()).user_of(None) == "nobody"  # type: ignore[arg-type]
    assert pwd.getpwnam("nobody").pw_uid


def test_every_key_is_documented() -> None:
    section = (Path(__file__).parents[2] / "docs/transports.md").read_text().split("\n### mbox\n")[1].split("\n## ")[0]
    assert not [key for key in TransportConfig.model_fields if key not in ("timeout", "on_error") and f"| `{key}` |" not in section]
