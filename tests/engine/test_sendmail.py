"""sendmail and the maildrop: from the text that a program pipes in, over a file that outlives any crash, to the queue, once.

Three parts: the text (gmta.cli.compose), the commands as programs call them, the pickup on a real pipeline and a real store.
"""

from __future__ import annotations

import email.policy
import email.utils
import fcntl
import io
import json
import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import Event as Signal
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.cli import compose, sendmail
from gmta.cli.sendmail import Failure, Options
from gmta.config import load
from gmta.mail.address import Address, AddressError
from gmta.mail.envelope import QUEUED, Envelope
from gmta.mail.message import Message
from gmta.plugins import PluginManager
from gmta.queue import maildrop
from gmta.queue.admin import QueueAdmin
from gmta.queue.ids import IdSource
from gmta.queue.maildrop import BadDrop, Drop, Sender, open_drop, prepare
from gmta.queue.sqlite import SqliteStore
from gmta.queue.store import StoreError, StoreFull
from gmta.receive.pickup import RETRY_S, UNFINISHED_S, Pickup, look
from gmta.receive.pipeline import Pipeline
from gmta.testing import FakeClock, MemoryLog, make_services
from tests.e2e.conftest import DEADLINE_S, Gmta, until

ME = pwd.getpwuid(os.getuid()).pw_name
BIN = Path(sys.executable).parent


# --- the text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,found", [
    ("a@b.test", ["a@b.test"]),
    ("bob", ["bob"]),
    ("a@b.test, c@d.test,,", ["a@b.test", "c@d.test"]),
    ("Alice <a@b.test>", ["a@b.test"]),
    ('"Doe, John" <j@x.test>, "quo\\"te" <k@x.test>', ["j@x.test", "k@x.test"]),
    ("Undisclosed recipients:;", []),
    ("Friends: a@b.test, Bob <b@b.test>; , c@d.test", ["a@b.test", "b@b.test", "c@d.test"]),
    ("a@b.test (Alice, the (very) great), c@d.test", ["a@b.test", "c@d.test"]),
    ("(comment \\) with ( parentheses)) a@b.test", ["a@b.test"]),
    ("root (Cron Daemon)", ["root"]),
    ('"a b"@c.test', ['"a b"@c.test']),
    ('<"a>b"@c.test>', ['"a>b"@c.test']),
    ("a . b @ c.test", ["a.b@c.test"]),
    ("<@relay.test,@other.test:a@b.test>", ["a@b.test"]),
    ("a@[192.0.2.1], b@[IPv6:2001:db8::1]", ["a@[192.0.2.1]", "b@[IPv6:2001:db8::1]"]),
    ("Grüße <grüße@bücher.test>", ["grüße@bücher.test"]),
    ("=?utf-8?q?J=C3=B6rg?= <j@x.test>", ["j@x.test"]),
    ("A.B. Smith <s@x.test>; t@x.test", ["s@x.test", "t@x.test"]),
    ("<>", [""]),
    ("", []), (" , ", []), ("(only a comment)", []), ("(no end", []),
])
def test_addresses_of_a_list(text: str, found: list[str]) -> None:
    assert [one.text for one in compose.addresses(text)] == found


@pytest.mark.parametrize("text", ["John Smith", "a@b.test c@d.test", "<a@b.test", '"no end', "a@b.test]", "[no end", "a@b.test: c@d.test", "a)b@c.test",
                                  "x <a@b.test>: y"])
def test_lists_that_can_not_be_read(text: str) -> None:
    with pytest.raises(AddressError):
        list(compose.addresses(text))


@given(st.text(alphabet='ab.@<>()[]:;,"\\ \t\xfc\udc80', max_size=40))
@settings(max_examples=300)
def test_any_list_is_read_or_refused(text: str) -> None:
    try:
        for one in compose.addresses(text):
            compose.qualified(one.text, "example.test")
    except AddressError:
        pass


@given(st.lists(st.tuples(st.text("abc,;<>@()\\\" ü", max_size=8), st.sampled_from(["a@b.test", "bob", '"x, y"@z.test'])), max_size=5))
@settings(max_examples=100)
def test_a_list_is_read_as_it_was_written(pairs: list[tuple[str, str]]) -> None:
    def quoted(name: str) -> str:
        return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'

    text = ", ".join(f"{quoted(name)} <{address}>" for name, address in pairs)
    assert [one.text for one in compose.addresses(text)] == [address for _, address in pairs]


@pytest.mark.parametrize("text,address", [
    ("bob", "bob@example.test"), ("<bob@x.test>", "bob@x.test"), ('"a@b"', '"a@b"@example.test'), ("grüße", "grüße@example.test"),
    ("postmaster", "postmaster@example.test")])
def test_qualified(text: str, address: str) -> None:
    assert str(compose.qualified(text, "example.test")) == address


@pytest.mark.parametrize("text", [
    "a@example.org>\r\nRCPT TO:<b@example.org", "a@b.test> NOTIFY=NEVER <", "a@b.test>", "a@b.test\n", "a b", "", "<>", "@b.test", "a@", "\udc80@b.test",
    "a@b..test", "x" * 300 + "@b.test", "a@b.test\x00", "a\u2028@b.test"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        compose.qualified(text, "example.test")


def read(octets: bytes, *, dot_ends: bool = False, limit: int = 10_000) -> tuple[list[bytes], bytes]:
    """(raw fields, the body's octets)."""
    text = compose.Text(io.BytesIO(octets), dot_ends=dot_ends)
    fields, first = compose.read_header(text, limit)
    return [field.raw for field in fields], b"".join(text.body(first))


@pytest.mark.parametrize("octets,fields,body", [
    (b"A: 1\nB: 2\n\nx\n", [b"A: 1\r\n", b"B: 2\r\n"], b"x\r\n"),
    (b"A: 1\r\nB: 2\r\n\r\nx\r\n", [b"A: 1\r\n", b"B: 2\r\n"], b"x\r\n"),
    (b"A: 1\r\r\nB: 2\r\r\n\r\r\nx\r\r\n", [b"A: 1\r\n", b"B: 2\r\n"], b"x\r\n"),  # CRLF that went through a program for text
    (b"A: 1\n folded\n\ttwice\n\n", [b"A: 1\r\n folded\r\n\ttwice\r\n"], b""),
    (b"A: 1\n \n\nx", [b"A: 1\r\n"], b"x\r\n"),
    (b"A : 1\n\nx", [b"A : 1\r\n"], b"x\r\n"),
    (b"just text\nA: 1\n", [], b"just text\r\nA: 1\r\n"),
    (b"A: 1\nno field\nmore\n", [b"A: 1\r\n"], b"no field\r\nmore\r\n"),
    (b"From bob Mon Jan  5 10:00:00 2026\nA: 1\n\nFrom x\n", [b"A: 1\r\n"], b"From x\r\n"),
    (b"\nx\n", [], b"x\r\n"),
    (b"", [], b""),
    (b"A: 1", [b"A: 1\r\n"], b""),
    (b"A: 1\rBcc: evil@x.test\n\n50%\r100%\n", [b"A: 1 Bcc: evil@x.test\r\n"], b"50%\r\n100%\r\n"),
    (b"A: \x001\n\nn\x00ul\n", [b"A: 1\r\n"], b"nul\r\n"),
    (b"A: \xfc\n\n\xff\n", [b"A: \xfc\r\n"], b"\xff\r\n"),
    (b"A: 1\n\na\n\n\nb", [b"A: 1\r\n"], b"a\r\n\r\n\r\nb\r\n"),
])
def test_text_becomes_a_message(octets: bytes, fields: list[bytes], body: bytes) -> None:
    assert read(octets) == (fields, body)


@pytest.mark.parametrize("octets,body", [(b"\na\n.\nb\n", b"a\r\n"), (b"\na\r\n.\r\nb", b"a\r\n"), (b"\n.", b""), (b"\n..\n.x\n. \n", b"..\r\n.x\r\n. \r\n")])
def test_a_dot_alone_ends_the_text(octets: bytes, body: bytes) -> None:
    assert read(octets, dot_ends=True) == ([], body)
    assert read(octets)[1] == b"".join(line.rstrip(b"\r") + b"\r\n" for line in octets[1:].removesuffix(b"\n").split(b"\n"))


def test_a_dot_in_the_header_ends_the_text_too() -> None:
    assert read(b"A: 1\n.\nB: 2\n", dot_ends=True) == ([b"A: 1\r\n"], b"")


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"ab", b"A: b", b" ", b"\0"]), max_size=20), st.integers(1, 5))
@settings(max_examples=200)
def test_long_lines_in_pieces_make_the_same_message(parts: list[bytes], piece: int) -> None:
    octets = b"\n" + b"".join(parts)
    whole = read(octets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "PIECE", piece)
        assert read(octets) == whole
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n|\0", whole[1])


def test_a_header_past_its_limit() -> None:
    for octets in (b"A: 1\n" * 30, b"A: " + b"x" * 200 + b"\n", b"A: 1\n" + b" more\n" * 30):
        with pytest.raises(compose.TooLarge):
            read(octets, limit=100)
    assert read(b"x" * 1000, limit=100)[1] == b"x" * 1000 + b"\r\n"  # no header at all


def header(text: str, **facts: Any) -> str:
    """`complete` on a header section."""
    fields, _ = compose.read_header(compose.Text(io.BytesIO(text.encode("utf-8", "surrogateescape")), dot_ends=False), 10_000)
    given: dict[str, Any] = {"author": Address.parse("bob@example.test"), "full_name": "Bob", "origin": "example.test", "hostname": "mx.example.test",
                             "message_id": "ID", "date": "DATE"} | facts
    return compose.complete(fields, **given).decode("utf-8", "surrogateescape")


def test_what_is_missing_is_added_and_nothing_else_changes() -> None:
    assert header("Subject: x\n") == "Subject: x\r\nFrom: Bob <bob@example.test>\r\nDate: DATE\r\nMessage-ID: <ID@mx.example.test>\r\n"
    whole = "From: A <a@b.test>,\n\tc@d.test\nDATE: now\nMessage-id: <x>\nX: bob\n"
    assert header(whole) == whole.replace("\n", "\r\n")
    assert header("From: a@b.test\nDate: x\nMessage-ID: x\nBcc: c@d.test,\n e@f.test\nbCC : g\nResent-Bcc: h\n") == \
        "From: a@b.test\r\nDate: x\r\nMessage-ID: x\r\n"


@pytest.mark.parametrize("value,made", [
    ("root (Cron Daemon)", "root@example.test (Cron Daemon)"), ("Bob <bob>", "Bob <bob@example.test>"), ("a, b@x.test, c", "a@example.test, b@x.test, c@example.test"),
    ("Team: a, <b>;", "Team: a@example.test, <b@example.test>;"), ('"x y"', '"x y"@example.test'), ("Grüße <g>", "Grüße <g@example.test>"),
    ("John Smith", "John Smith"), ("<>", "<>"), ("a@x.test", "a@x.test")])
def test_bare_names_get_the_domain(value: str, made: str) -> None:
    rest = "Date: x\nMessage-ID: x\n"
    assert header(f"From: {value}\n{rest}") == f"From: {made}\r\n" + rest.replace("\n", "\r\n")


@pytest.mark.parametrize("name,made", [("", ""), ("CronDaemon", "CronDaemon "), ("Bob B. Smith", '"Bob B. Smith" '), ('x"y\\z', '"x\\"y\\\\z" '),
                                       ("Jörg", "=?utf-8?b?SsO2cmc=?= "), ("a\r\nBcc: x", '"a Bcc: x" '), ("\udcff", "=?utf-8?b?Pw==?= ")])
def test_display_names(name: str, made: str) -> None:
    if made.startswith("=?"):
        assert re.fullmatch(r"=\?utf-8\?[bq]\?[!-~]+\?= ", compose.phrase(name))
    else:
        assert compose.phrase(name) == made


def test_recipients_in_the_header() -> None:
    def named(text: str) -> list[str]:
        return [str(one) for one in compose.recipients(compose.read_header(compose.Text(io.BytesIO(text.encode()), dot_ends=False), 10_000)[0], "o.test")]

    assert named("To: a, b@x.test\nCC: c@x.test\nBcc: d@x.test,\n a\nFrom: no@x.test\n") == ["a@o.test", "b@x.test", "c@x.test", "d@x.test"]
    assert named("To: a@x.test\nResent-To: b@x.test\nResent-Bcc: c@x.test\n") == ["b@x.test", "c@x.test"]
    assert named("To: undisclosed-recipients:;\n") == []
    with pytest.raises(AddressError):
        named("To: a b c\n")


@pytest.mark.parametrize("arguments,wanted", [
    (["-t", "-i"], {"from_header": True, "ignore_dots": True}),
    (["-ti"], {"from_header": True, "ignore_dots": True}),
    (["-oi", "-oem", "-odb", "-om", "a@b"], {"ignore_dots": True, "recipients": ["a@b"]}),
    (["-OIgnoreDots=True", "-O", "DeliveryMode=b"], {"ignore_dots": True}),
    (["-fa@b", "-Fx y", "--", "-c@d"], {"sender": "a@b", "full_name": "x y", "recipients": ["-c@d"]}),
    (["-f", "", "x"], {"sender": "", "recipients": ["x"]}),
    (["-r", "a@b", "x"], {"sender": "a@b", "recipients": ["x"]}),
    (["-N", "success,Failure", "-R", "hdrs", "-V", "id1", "x"], {"notify": frozenset({"SUCCESS", "FAILURE"}), "ret": "HDRS", "envid": "id1", "recipients": ["x"]}),
    (["-N", "never", "x"], {"notify": frozenset({"NEVER"}), "recipients": ["x"]}),
    (["-bp"], {"mode": "p"}), (["-b", "s"], {"mode": "s"}), (["-bm", "x"], {"recipients": ["x"]}), (["-I"], {"mode": "i"}),
    (["-q"], {"flush": ""}), (["-q30m"], {"flush": "30m"}), (["-qIABC"], {"flush": "IABC"}),
    (["-v", "-G", "-n", "-U", "-h5", "-p", "smtp", "-B", "8BITMIME", "-L", "tag", "-X", "file", "x"], {"verbose": True, "gateway": True, "recipients": ["x"]}),
    (["-C", "file", "x"], {"config": "file", "recipients": ["x"]}),
    (["--", "-q"], {"recipients": ["-q"]}), (["-"], {}),
])
def test_options(arguments: list[str], wanted: dict[str, Any]) -> None:
    assert Options.parse(arguments) == Options(**wanted)


@pytest.mark.parametrize("arguments", [["-f"], ["-Z"], ["-N", "often"], ["-N", "never,success"], ["-R", "some"], ["-V", "a b"], ["a@b", "-t"], ["--help"],
                                       ["-V", "x" * 101]])
def test_wrong_options(arguments: list[str]) -> None:
    with pytest.raises(Failure) as refused:
        Options.parse(arguments)
    assert refused.value.status == 64


# --- the commands -----------------------------------------------------------------------------------------------


CONFIG = """
[gmta]
hostname = mx.example.test
workers = 1
[listener:mx]
address = 127.0.0.1:2525
[domains]
local = example.test, other.test
[limits]
message_size = 100KB
header_size = 8KB
recipients = 100
[plugins]
enable = mailboxes, access, own
path = plugins
[plugin:mailboxes]
mailboxes = you@example.test, me@example.test
[transport:mailbox]
type = maildir
path = var/mail/{domain}/{local}
[transport:outbound]
type = relay
[tls]
certificate = not-for-everybody.pem
[route]
local = mailbox
* = outbound
"""


class Place:
    """A configuration and its maildrop, without a server."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config.ini"
        self.config.write_text(CONFIG)
        (directory / "plugins").mkdir()
        (directory / "plugins/own.py").write_text('"""Nothing."""\nclass Plugin:\n    def __init__(self, config, services):\n        pass\n')
        self.maildrop = directory / "var/maildrop"

    def call(self, *command: str, octets: bytes = b"", status: int = 0, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Runs an installed command."""
        program = BIN / command[0]
        assert program.exists(), f"{program} is not installed: pip install -e ."
        environ = {**os.environ, "GMTA_CONFIG": str(self.config), "NAME": "Mr. Test"}
        done = subprocess.run([program, *command[1:]], input=octets, capture_output=True, env=environ, timeout=DEADLINE_S, check=False, **options)
        assert done.returncode == status, (done.stdout, done.stderr)
        assert b"Traceback" not in done.stderr
        return done

    def run(self, program: str, *arguments: str, octets: bytes = b"x\n") -> int:
        """The same within this process; the status."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(octets)))
            patch.setenv("GMTA_CONFIG", str(self.config))
            return sendmail.run(program, list(arguments))

    def dropped(self) -> list[tuple[Drop, bytes]]:
        """What lies in the maildrop, in the order it came."""
        found = []
        for file in sorted(self.maildrop.glob("*.mail")):
            opened = open_drop(str(file))
            with opened.file:
                found.append((opened.drop, opened.file.read()))
        return found


@pytest.fixture
def place() -> Iterator[Place]:
    path = Path(tempfile.mkdtemp(prefix="gmta-"))
    path.chmod(0o755)
    yield Place(path)
    shutil.rmtree(path, ignore_errors=True)


FROM_ME = f"From: \"Mr. Test\" <{ME}@example.test>"


@pytest.mark.parametrize("command,octets,sender,recipients,lines", [
    # mutt
    (["-oem", "-oi", "-f", "me@example.test", "--", "a@x.test", "b@y.test"], b"From: me@example.test\nBcc: b@y.test\nSubject: x\n\n.\nbody\n",
     "me@example.test", ["a@x.test", "b@y.test"], ["From: me@example.test", "Subject: x", "", ".", "body"]),
    # cron
    (["-i", "-FCronDaemon", "-B8BITMIME", "-oem", "root"], "From: root (Cron Daemon)\nTo: root\nSubject: Cron <root@mx> job\n\nüblich\r50%\n".encode(),
     f"{ME}@example.test", ["root@example.test"], ["From: root@example.test (Cron Daemon)", "To: root@example.test", "", "üblich", "50%"]),
    # PHP's mail(): header lines with CRLF, text with LF
    (["-t", "-i", "-fwww@example.test"], b"To: Doe, <j@x.test>\nSubject: x\nX-PHP-Originating-Script: 0:a.php\r\nBcc: \"k, l\" <k@x.test>\r\n\r\nline\n",
     "www@example.test", ["Doe@example.test", "j@x.test", "k@x.test"], [FROM_ME.replace(ME, "www"), "To: Doe@example.test, <j@x.test>", "", "line"]),
    # a shell script
    (["you"], b"no header\n", f"{ME}@example.test", ["you@example.test"], [FROM_ME, "", "no header"]),
    # a mailing list manager: VERP, nothing to be touched
    (["-G", "-i", "-f", "list+j=x.test@example.test", "j@x.test"], b"From: root\nBcc: z\n\nx\n", "list+j=x.test@example.test", ["j@x.test"], ["From: root", "", "x"]),
    # an auto-reply; two recipients in one word, one of them twice
    (["-f", "<>", "a@x.test, b@x.test", "a@x.test"], b"Subject: away\n\nx\n.\ncut off\n", "", ["a@x.test", "b@x.test"], ["Subject: away", FROM_ME, "", "x"]),
    # SMTPUTF8
    (["-ti"], "To: Grüße <grüße@bücher.test>\n\nx\n".encode(), f"{ME}@example.test", ["grüße@bücher.test"], ["To: Grüße <grüße@bücher.test>", "", "x"]),
])
def test_as_programs_call_it(place: Place, command: list[str], octets: bytes, sender: str, recipients: list[str], lines: list[str]) -> None:
    done = place.call("sendmail", *command, octets=octets)
    assert done.stdout == done.stderr == b""
    ((drop, message),) = place.dropped()
    assert str(drop.sender) == sender and [str(one) for one in drop.recipients] == recipients
    assert drop.body == ("7BIT" if message.isascii() else "8BITMIME")
    text = message.decode()
    assert text.endswith("\r\n") and text.replace("\r\n", "").isprintable()
    head, _, body = text.partition("\r\n\r\n")
    wanted = "\r\n".join(lines[lines.index("") + 1:])
    assert body == wanted + "\r\n"
    assert set(lines[:lines.index("")]) <= set(head.split("\r\n"))
    if "-G" not in command:
        parsed = email.message_from_bytes(message, policy=email.policy.default)
        assert re.fullmatch(r"<[0-9A-V]{16}@mx\.example\.test>", parsed["Message-ID"]) and email.utils.parsedate_to_datetime(parsed["Date"])
        assert parsed["From"] and parsed["Bcc"] is None


def test_what_a_dropped_file_is(place: Place) -> None:
    place.call("sendmail", "-N", "success", "-R", "full", "-V", "e1", "-v", "a@x.test", octets=b"Subject: x\n\nx\n")
    (file,) = place.maildrop.glob("*.mail")
    facts = file.stat()
    assert stat.S_IMODE(facts.st_mode) == 0o640 and stat.S_IMODE(place.maildrop.stat().st_mode) == 0o3730
    line, _, message = file.read_bytes().partition(b"\n")
    assert json.loads(line) == {"gmta": 1, "sender": f"{ME}@example.test", "recipients": ["a@x.test"], "notify": ["SUCCESS"], "ret": "FULL",
                                "envid": "e1", "body": "7BIT"}
    assert message.startswith(b"Subject: x\r\nFrom: ")


@pytest.mark.parametrize("command,octets,status,said", [
    ([], b"x\n", 64, "Name recipients"), (["-t"], b"Subject: x\n\nx\n", 64, "names no recipient"), (["-t", "-Z"], b"", 64, "no option -Z"),
    (["-bd"], b"", 64, "gmta serve"), (["-bv", "x"], b"", 64, "-bv is not available"), (["-f", "a b", "you"], b"x\n", 64, "sender a b"),
    (["-t"], b"To: a b c\n\nx\n", 65, "no address"), (["-t"], b"To: a@x.test\n" + b"X: y\n" * 3000, 65, "header is larger than 8192"),
    (["a@x.test>\r\nRCPT TO:<b@x.test"], b"x\n", 67, "recipient a@x.test>\\r\\n"), (["nobody at all"], b"x\n", 67, "recipient"), (["a@b..test"], b"x\n", 67, ""),
    (["you"], b"x" * 110_000, 69, "larger than 102400"), (["--", *(f"u{n}@x.test" for n in range(101))], b"x\n", 69, "101 recipients, 100 are allowed"),
])
def test_refusals_leave_nothing(place: Place, capsys: pytest.CaptureFixture[str], command: list[str], octets: bytes, status: int, said: str) -> None:
    assert place.run("sendmail", *command, octets=octets) == status
    told = capsys.readouterr().err
    assert told.startswith("sendmail: ") and told.count("\n") == 1 and said in told
    assert not [name for name in (os.listdir(place.maildrop) if place.maildrop.exists() else []) if name not in ("odd", "taken")]


def test_the_status_is_the_commands(place: Place) -> None:
    said = place.call("sendmail", "a@x.test>\r\nRCPT TO:<b@x.test", octets=b"x\n", status=67).stderr
    assert said.startswith(b"sendmail: recipient a@x.test>\\r\\nRCPT TO:<b@x.test: ") and said.count(b"\n") == 1


def test_octets_that_are_not_utf8_in_an_argument(place: Place) -> None:
    done = subprocess.run([os.fsencode(BIN / "sendmail"), b"\xff@x.test"], input=b"x\n", capture_output=True, check=False,
                          env={**os.environ, "GMTA_CONFIG": str(place.config)}, timeout=DEADLINE_S)
    assert done.returncode == 67 and b"Traceback" not in done.stderr


@pytest.mark.parametrize("text,said", [("[gmta]\nworkers = many\n", "[gmta] workers: expected a whole number"), ("[limits]\nmessage_size = big\n", "a size such as"),
                                       ("", "nothing in it")])
def test_a_bad_configuration_is_status_78(place: Place, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    place.config.write_text(text)
    assert place.run("sendmail", "you") == 78
    assert said in capsys.readouterr().err


def test_a_configuration_that_is_wrong_elsewhere_does_not_stop_mail(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.config.write_text(CONFIG + "[bogus]\nx = ${NO_SUCH_VARIABLE}\n[transport:x]\n")
    assert place.run("sendmail", "you") == 0
    assert len(place.dropped()) == 1
    place.config.unlink()
    assert place.run("sendmail", "you") == 78
    assert "can't be read" in capsys.readouterr().err


def test_a_maildrop_that_can_not_be_written(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.directory / "var").mkdir()
    place.maildrop.write_text("no directory")
    assert place.run("sendmail", "you") == 73
    assert "maildrop" in capsys.readouterr().err


def test_no_room_is_try_again(monkeypatch: pytest.MonkeyPatch, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(maildrop.os, "fsync", full)
    assert place.run("sendmail", "you") == 75
    assert "No space left" in capsys.readouterr().err
    assert sorted(os.listdir(place.maildrop)) == ["odd", "taken"]


def as_user(user: pwd.struct_passwd, groups: list[int], program: str, *arguments: str) -> int:
    """The status of a command run by another account, in a process of its own: the installed one may be out of its reach."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            os.setgroups(groups)
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            os.umask(0o077)
            os.dup2(os.open("/dev/null", os.O_RDWR), 2)
            sys.stdin = io.TextIOWrapper(io.BytesIO(b"x\n"))
            status = sendmail.run(program, list(arguments))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_who_may_leave_mail(place: Place) -> None:
    """Members of the group write, others are told; what they write is the workers' to read and nobody else's to remove."""
    if os.geteuid() != 0:
        assert place.call("sendmail", "you", octets=b"x\n").returncode == 0  # who owns it may, whoever else is root's to try
        return
    owner, user = pwd.getpwnam("nobody"), pwd.getpwnam("daemon")
    (place.directory / "var").mkdir(mode=0o710)
    os.chown(place.directory / "var", owner.pw_uid, owner.pw_gid)
    prepare(str(place.directory / "var"), owner)
    assert as_user(user, [], "sendmail", "-C", str(place.config), "you") == 73
    assert as_user(user, [owner.pw_gid], "sendmail", "-C", str(place.config), "you") == 0
    (file,) = place.maildrop.glob("*.mail")
    facts = file.stat()
    assert (facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)) == (user.pw_uid, owner.pw_gid, 0o640)
    assert open_drop(str(file)).drop.sender == Address.parse("daemon@example.test")
    assert as_user(user, [owner.pw_gid], "mailq", "-C", str(place.config)) == 77


# -bs, mailq, newaliases


def test_smtp_on_standard_input(place: Place) -> None:
    octets = (b"EHLO localhost\r\nMAIL FROM:<me@example.test>\r\nRCPT TO:<a@x.test>\r\nRCPT TO:<bad address>\r\nRCPT TO:<b@x.test>\r\n"
              b"DATA\r\nSubject: one\r\n\r\n..dot\r\n.\r\nMAIL FROM:<>\r\nRCPT TO:<postmaster>\r\nRSET\r\n"
              b"MAIL FROM:<>\r\nRCPT TO:<postmaster>\r\nBDAT 4\r\nA: 1BDAT 6 LAST\r\n\r\n\r\nx\xffVRFY x\r\nNOOP\r\nQUIT\r\nNOOP\r\n")
    said = place.call("sendmail", "-bs", octets=octets).stdout.decode()
    codes = [line[:3] for line in said.splitlines() if line[3:4] == " "]
    assert codes == ["220", "250", "250", "250", "501", "250", "354", "250", "250", "250", "250", "250", "250", "250", "250", "252", "250", "221"]
    assert "STARTTLS" not in said and "DSN" not in said
    (first, second) = place.dropped()
    assert (str(first[0].sender), [str(one) for one in first[0].recipients]) == ("me@example.test", ["a@x.test", "b@x.test"])
    assert first[1] == b"Subject: one\r\n\r\n.dot\r\n"
    assert (str(second[0].sender), [str(one) for one in second[0].recipients], second[0].body) == ("", ["postmaster"], "8BITMIME")
    assert second[1] == b"A: 1\r\n\r\nx\xff"


@pytest.mark.parametrize("octets,reply", [
    (b"DATA\r\nSubject: x\n\r\n.\r\n", "550 5.5.2"), (b"DATA\r\n" + b"x" * 70_000 + b"\r\n.\r\n", "5"),
    (b"DATA\r\n" + (b"x" * 900 + b"\r\n") * 150 + b".\r\n", "552 5.3.4"), (b"DATA\r\nhalf", None)])
def test_what_smtp_on_standard_input_refuses_leaves_nothing(place: Place, octets: bytes, reply: str | None) -> None:
    said = place.call("sendmail", "-bs", octets=b"EHLO localhost\r\nMAIL FROM:<>\r\nRCPT TO:<a@x.test>\r\n" + octets).stdout.decode().splitlines()
    assert said[-1].startswith(reply or "354")
    assert sorted(os.listdir(place.maildrop)) == ["odd", "taken"]


def test_mailq(place: Place) -> None:
    assert place.call("mailq").stdout == b"Mail queue is empty\n"
    place.call("sendmail", "you", octets=b"x\n")
    rig = Rig(place)
    rig.deliver()
    rig.close()
    place.call("sendmail", "you", octets=b"x\n")
    first, row, recipient, empty, dropped, last = place.call("sendmail", "-bp").stdout.decode().splitlines()
    assert first.startswith("-Queue ID-") and re.match(rf"[0-9A-V]{{16}} +\d+ \w\w\w \w\w\w \d\d \d\d:\d\d:\d\d  {ME}@example\.test$", row)
    assert recipient.strip() == "you@example.test" and not empty
    assert dropped == "(1 in the maildrop, for the server to pick up)" and last == "-- 1 Kbytes in 1 Request."
    for argument in ("-q", "-qRexample.test", "-q15m", "-qI" + row[:16], "-qSa@b.test"):
        assert place.run("sendmail", argument) == 0
    kinds = [event.kind for event in QueueAdmin(str(place.directory / "var/queue")).trace(row[:16])]
    assert kinds == ["received", "retried", "retried", "retried"]


def test_newaliases_says_what_is_wrong(place: Place) -> None:
    aliases = place.directory / "aliases"
    place.config.write_text(CONFIG.replace("certificate = not-for-everybody.pem", "").replace("[plugin:mailboxes]", "[plugin:mailboxes]\naliases_file = aliases"))
    aliases.write_text("root: you\n")
    assert place.call("newaliases").stderr == b""
    aliases.write_text("root you\n")
    assert b"aliases:1: expected `name: target" in place.call("sendmail", "-bi", status=78).stderr


# --- the pickup -------------------------------------------------------------------------------------------------


PLUGIN = '''"""Does as a file says."""
from pathlib import Path
from gmta import defer, hookimpl, reject


class Plugin:
    def __init__(self, config, services):
        self.file = Path(services.config.base, "plugins", "own.txt")

    def _verdict(self, hook):
        word, _, text = self.file.read_text().partition(" ") if self.file.exists() else ("", "", "")
        if word == hook:
            return defer("not now") if text == "defer" else reject("never", code=550, enhanced="5.7.1")

    @hookimpl
    def check_mail(self, session, transaction):
        return self._verdict("mail")

    @hookimpl
    def check_rcpt(self, session, transaction, recipient):
        return self._verdict("rcpt") if recipient.address.local == "you" else None

    @hookimpl
    def check_message(self, session, transaction, message):
        return self._verdict("message")

    @hookimpl
    def get_headers(self, session, transaction, message):
        return [("X-Role", f"{session.role} {session.trusted}")]

    @hookimpl
    def get_signatures(self, session, transaction, message):
        return [("X-Signed", "yes")]
'''


class Rig:
    """A worker's pickup on a real pipeline and store; messages come out of `queued`, none is delivered."""

    def __init__(self, place: Place, clock: FakeClock | None = None) -> None:
        (place.directory / "plugins/own.py").write_text(PLUGIN)
        self.place = place
        text = place.config.read_text().replace("certificate = not-for-everybody.pem", "")
        place.config.write_text(text)
        self.config = load(str(place.config))
        self.data_dir = self.config.gmta.data_dir
        os.makedirs(self.data_dir, exist_ok=True)
        self.maildrop = Path(prepare(self.data_dir))
        self.clock = clock or FakeClock()
        self.log = MemoryLog()
        self.services = make_services(self.config, clock=self.clock, log=self.log)
        self.plugins = PluginManager(self.config, self.services, self.log)
        self.ids = IdSource(self.clock)
        self.queue = os.path.join(self.data_dir, "queue")
        self.store = SqliteStore(self.queue, instance_tag=self.ids.tag, log=self.log, clock=self.clock)
        self.accepted: list[tuple[Envelope, bytes]] = []
        pipeline = Pipeline(self.config, self.plugins, self.store, self.services, self.ids, self._accept)
        self.pickup = Pickup(str(self.maildrop), self.queue, pipeline, 3600.0)

    def _accept(self, envelope: Envelope, message: Message) -> None:
        self.accepted.append((envelope, b"".join(message.chunks())))

    def drop(self, *recipients: str, sender: str = "me@example.test", octets: bytes = b"Subject: x\r\n\r\nbody\r\n", notify: frozenset[str] = frozenset()) -> str:
        """A file in the maildrop; its path."""
        name = self.ids.new()
        file = Sender(str(self.maildrop), name, Drop(Address.parse(sender), [Address.parse(one) for one in recipients], notify))
        file.write(octets)
        file.commit()
        path = str(self.maildrop / f"{name}.mail")
        os.utime(path, (self.clock.now, self.clock.now))
        return path

    def hook(self, word: str = "") -> None:
        """What the plugin does."""
        (self.place.directory / "plugins/own.txt").write_text(word)

    def deliver(self) -> None:
        """One look, and the end of all that it took in hand."""
        self.pickup._seen = -1
        with gevent.Timeout(DEADLINE_S):
            self.pickup.turn()
            self.pickup._pool.join()

    def left(self) -> list[str]:
        """The files that lie about."""
        return sorted(str(path.relative_to(self.maildrop)) for path in self.maildrop.rglob("*") if not path.is_dir())

    def queued(self) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """(sender, [(recipient, transport, last reply)]) of every message in the queue."""
        admin = QueueAdmin(self.queue)
        rows = [(row["sender"], [(one["address"], one["transport"], one["last_reply"]) for one in row["recipients"]]) for row in admin.list()]
        admin.close()
        return rows

    def close(self) -> None:
        self.pickup.stop(0)
        self.store.close()
        self.plugins.close()
        self.services.close()


@pytest.fixture
def rig(place: Place) -> Iterator[Rig]:
    made = Rig(place)
    yield made
    made.close()


def test_a_dropped_message_is_received_as_a_trusted_clients(rig: Rig) -> None:
    rig.drop("you@example.test", "far@away.test", notify=frozenset({"NEVER"}))
    rig.deliver()
    assert rig.left() == []
    ((envelope, octets),) = rig.accepted
    assert [(str(state.address), state.status, state.notify) for state in envelope.recipients] == [
        ("you@example.test", QUEUED, {"NEVER"}), ("far@away.test", QUEUED, {"NEVER"})]
    assert envelope.facts["protocol"] == "local" and envelope.facts["session"].startswith(f"local-{os.getuid()}-")
    fields = re.findall(rb"^([A-Za-z-]+): ([^\r]*)", octets, re.M)
    assert [name for name, _ in fields] == [b"X-Signed", b"Received", b"X-Role", b"Subject"]
    assert dict(fields)[b"X-Role"] == b"local True"
    assert b"from localhost (localhost [127.0.0.1])" in octets and f"with local id {envelope.id}".encode() in octets
    (line,) = rig.log.of("picked up")
    assert (line["id"], line["uid"], line["recipients"]) == (envelope.id, os.getuid(), 2)


def test_large_messages_come_through_octet_for_octet(rig: Rig) -> None:
    body = b"".join(b".%d\r\n" % number + b"x" * 70 + b"\r\n" for number in range(1200))
    rig.drop("you@example.test", octets=b"Subject: x\r\n\r\n" + body)
    rig.deliver()
    assert rig.accepted[0][1].endswith(b"\r\n\r\n" + body)


def test_recipients_that_are_refused_fail_with_the_reason_and_the_others_get_it(rig: Rig) -> None:
    rig.drop("nobody@example.test", "you@example.test", "x@other.test")
    rig.deliver()
    assert rig.left() == []
    assert rig.queued() == [
        ("me@example.test", [("you@example.test", "", "")]),
        ("me@example.test", [("nobody@example.test", "fail", "550 5.1.1 <nobody@example.test>: no such user here"),
                             ("x@other.test", "fail", "550 5.1.1 <x@other.test>: no such user here")])]
    failed = next(envelope for envelope, _ in rig.accepted if len(envelope.recipients) == 2)
    assert all(state.fixed_transport for state in failed.recipients)


@pytest.mark.parametrize("hook,octets,reply", [
    ("mail reject", b"x", "550 5.7.1 never"), ("message reject", b"x", "550 5.7.1 never"), ("rcpt reject", b"x", "550 5.7.1 never"),
    ("", b"x" * 110_000, "552 5.3.4 Message size exceeds the limit"), ("", b"bare\nline end\r\n", "550 5.5.2 "), ("", b"X: y\r\n" * 2000, "552 ")])
def test_a_message_that_is_refused_fails_with_the_reason(rig: Rig, hook: str, octets: bytes, reply: str) -> None:
    rig.hook(hook)
    path = rig.drop("you@example.test", octets=octets)
    size = os.path.getsize(path)
    rig.deliver()
    assert rig.left() == []
    ((sender, [(address, transport, said)]),) = rig.queued()
    assert (sender, address, transport) == ("me@example.test", "you@example.test", "fail") and said.startswith(reply)
    ((_, found),) = rig.accepted
    assert found == octets and size > len(octets)


@pytest.mark.parametrize("hook", ["mail defer", "rcpt defer", "message defer"])
def test_what_is_deferred_is_tried_again_until_its_lifetime_is_over(rig: Rig, hook: str) -> None:
    rig.hook(hook)
    rig.drop("you@example.test", "nobody@example.test")
    rig.deliver()
    for tries in range(2):
        before = rig.left()
        rig.clock.advance(RETRY_S * 2**tries - 1)
        rig.deliver()
        assert rig.left() == before  # not due yet
        rig.clock.advance(1)
        rig.deliver()
    assert len(rig.left()) == 1
    others = [row for row in rig.queued() if row[1][0][0] == "nobody@example.test"]
    assert len(others) == (hook == "message defer")  # told once, however often the rest is tried
    rig.clock.advance(3600)
    rig.deliver()
    assert rig.left() == []
    (late,) = [found for _, recipients in rig.queued() for found in recipients if found[0] == "you@example.test"]
    assert late[1:] == ("fail", "554 5.4.7 Delivery time expired; last reply: 451 4.7.1 not now")


def test_what_is_deferred_goes_when_it_may(rig: Rig) -> None:
    rig.hook("message defer")
    rig.drop("you@example.test")
    rig.deliver()
    rig.hook()
    rig.clock.advance(RETRY_S)
    rig.deliver()
    assert rig.left() == [] and len(rig.accepted) == 1


def test_more_recipients_than_one_message_may_have_become_two(rig: Rig) -> None:
    rig.hook("message defer")
    rig.drop(*(f"u{number}@away.test" for number in range(100)), "you@example.test", "me@example.test")  # as many as aliases may make of them
    rig.deliver()
    assert len([name for name in rig.left() if name.endswith(".mail")]) == 1
    rig.deliver()
    rig.hook()
    rig.clock.advance(RETRY_S)
    rig.deliver()
    assert rig.left() == []
    assert sorted(len(envelope.recipients) for envelope, _ in rig.accepted) == [2, 100]
    assert len({octets.partition(b"Subject")[2] for _, octets in rig.accepted}) == 1


def test_the_lock_is_kept_until_nothing_is_in_hand(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that can't be read for a moment must not let another worker take up what this one has in hand."""
    go = Signal()
    put = rig.store.put

    def slow(*arguments: Any) -> None:
        go.wait()
        put(*arguments)

    monkeypatch.setattr(rig.store, "put", slow)
    monkeypatch.setattr("gmta.receive.pickup.POLL_S", 0.01)
    rig.drop("you@example.test")
    rig.pickup.start()
    with gevent.Timeout(DEADLINE_S):
        while not [name for name in rig.left() if name.startswith("taken/")]:
            gevent.sleep(0.01)
        monkeypatch.setattr(rig.pickup, "turn", lambda: os.stat("/no such directory"))
        while not rig.log.of("maildrop can't be read"):
            gevent.sleep(0.01)
        lock = os.open(rig.maildrop, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        go.set()
        rig.pickup._pool.join()
    assert rig.left() == [] and len(rig.accepted) == 1


@pytest.mark.parametrize("error", [StoreError("locked"), StoreFull("no room")])
def test_a_store_that_fails_loses_and_doubles_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch, error: StoreError) -> None:
    put = rig.store.put

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(rig.store, "put", fail)
    rig.drop("you@example.test")
    rig.deliver()
    assert len(rig.left()) == 1 and rig.accepted == []
    monkeypatch.setattr(rig.store, "put", put)
    rig.clock.advance(RETRY_S)
    rig.deliver()
    assert rig.left() == [] and len(rig.queued()) == 1


def test_a_full_disk_is_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.store, "has_room", lambda size: False)
    path = rig.drop("you@example.test")
    rig.deliver()
    assert rig.left() != [] and rig.queued() == [], path


def test_a_crash_between_queue_and_maildrop_doubles_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def crash(path: str) -> None:
        raise gevent.GreenletExit  # the worker dies here: queued, not removed

    monkeypatch.setattr("gmta.receive.pickup.os.unlink", crash)
    rig.drop("you@example.test")
    rig.deliver()
    monkeypatch.setattr("gmta.receive.pickup.os.unlink", unlink)
    queue_id = rig.accepted[0][0].id
    assert rig.left() == [f"taken/{queue_id}"]
    rig.close()
    again = Rig(rig.place, rig.clock)
    again.deliver()
    assert again.left() == [] and again.accepted == [] and len(again.queued()) == 1
    again.close()


def test_a_crash_before_the_queue_loses_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: Any) -> None:
        raise gevent.GreenletExit

    monkeypatch.setattr(rig.store, "put", crash)
    rig.drop("you@example.test")
    rig.deliver()
    assert len(rig.left()) == 1 and rig.left()[0].startswith("taken/")
    rig.close()
    again = Rig(rig.place, rig.clock)
    again.deliver()
    assert again.left() == [] and len(again.accepted) == 1
    again.close()


ENVELOPE = {"gmta": 1, "sender": "a@b.test", "recipients": ["c@d.test"]}


@pytest.mark.parametrize("line", [
    b"", b"no json\n", b"[1]\n", b"{}\n", json.dumps(ENVELOPE).encode(), b"x" * 2_000_000,
    *(json.dumps(ENVELOPE | change).encode() + b"\n" for change in (
        {"gmta": 2}, {"recipients": []}, {"recipients": "c@d.test"}, {"recipients": [1]}, {"recipients": ["c@d.test>\r\nRCPT TO:<e@f.test"]},
        {"recipients": ["c d"]}, {"recipients": ["c@d.test> NOTIFY=NEVER"]}, {"sender": "x y"}, {"sender": None}, {"notify": ["OFTEN"]}, {"ret": "x"}, {"body": "x"},
        {"envid": "a b"}, {"envid": "\u00e4"}, {"sender": "\ud800@b.test"}))])
def test_a_file_that_is_no_dropped_message_is_set_aside_and_blocks_nobody(rig: Rig, line: bytes) -> None:
    (rig.maildrop / "0000000000000000.mail").write_bytes(line)
    rig.drop("you@example.test")
    rig.deliver()
    assert len(rig.accepted) == 1
    assert [name for name in rig.left() if name.startswith("odd/0000000000000000.mail.")] == rig.left()
    assert len(rig.log.of("odd file in the maildrop set aside")) == 1


def test_what_is_no_file_of_ours_is_set_aside(rig: Rig, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(json.dumps(ENVELOPE).encode() + b"\nsecret\r\n")
    os.symlink(secret, rig.maildrop / "0000000000000001.mail")
    os.link(secret, rig.maildrop / "0000000000000002.mail") if secret.stat().st_dev == rig.maildrop.stat().st_dev else None
    os.mkfifo(rig.maildrop / "0000000000000003.mail")
    os.mkdir(rig.maildrop / "0000000000000004.mail")
    (rig.maildrop / "notes.txt").write_text("x")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(rig.maildrop / "0000000000000005.mail"))
    (rig.maildrop / "taken" / "0000000000000006").write_text("x")
    rig.deliver()
    rig.deliver()
    assert rig.accepted == []
    assert sorted(os.listdir(rig.maildrop)) == ["odd", "taken"] and os.listdir(rig.maildrop / "taken") == []
    assert len(os.listdir(rig.maildrop / "odd")) == len(rig.log.of("odd file in the maildrop set aside")) >= 6


def test_unknown_keys_of_a_later_version_are_ignored(rig: Rig) -> None:
    (rig.maildrop / "0000000000000000.mail").write_bytes(json.dumps(ENVELOPE | {"recipients": ["you@example.test"], "later": [1]}).encode() + b"  \nA: 1\r\n\r\nx\r\n")
    rig.deliver()
    assert len(rig.accepted) == 1 and rig.left() == []


def test_unfinished_files_are_left_alone_for_a_day(rig: Rig) -> None:
    for name, age_s in (("0000000000000001.tmp", UNFINISHED_S - 10), ("0000000000000002.tmp", UNFINISHED_S + 10)):
        (rig.maildrop / name).write_text("x")
        os.utime(rig.maildrop / name, (rig.clock.now - age_s,) * 2)
    rig.deliver()
    assert rig.left() == ["0000000000000001.tmp"]


def test_a_file_that_is_completed_while_the_directory_is_read_is_no_trouble(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = rig.drop("you@example.test")
    unfinished = rig.maildrop / "0000000000000001.tmp"
    unfinished.write_text("x")
    scandir = os.scandir

    @contextmanager
    def slow(directory: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(directory) as entries:
            found = list(entries)
        unfinished.unlink()
        yield iter(found)

    monkeypatch.setattr("gmta.receive.pickup.os.scandir", slow)
    assert look(str(rig.maildrop), (), rig.clock.now) == ([waiting], [])


def test_who_gets_the_lock_again_looks_at_what_has_not_changed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta.receive.pickup.POLL_S", 0.01)
    monkeypatch.setattr("gmta.receive.pickup.LOCK_S", 0.01)
    monkeypatch.setattr(rig.store, "has_room", lambda size_bytes: False)
    rig.drop("you@example.test")
    os.utime(rig.maildrop, (rig.clock.now - 10,) * 2)
    turn, stat = rig.pickup.turn, os.stat

    def failing() -> None:
        monkeypatch.setattr(rig.pickup, "turn", turn)
        monkeypatch.setattr(rig.store, "has_room", lambda size_bytes: True)
        stat("/no such directory")

    rig.pickup.start()
    with gevent.Timeout(DEADLINE_S):
        while not rig.log.of("dropped message is left for later"):
            gevent.sleep(0.01)
        monkeypatch.setattr(rig.pickup, "turn", failing)
        while not rig.accepted:
            gevent.sleep(0.01)
    assert rig.left() == []


def test_one_worker_at_a_time_looks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta.receive.pickup.POLL_S", 0.01)
    monkeypatch.setattr("gmta.receive.pickup.LOCK_S", 0.01)
    first, second = Rig(place), Rig(place)
    first.drop("you@example.test")
    first.pickup.start()
    with gevent.Timeout(DEADLINE_S):
        while not first.accepted:
            gevent.sleep(0.01)
        second.pickup.start()
        first.drop("me@example.test")
        first.pickup._seen = -1
        while len(first.accepted) < 2:
            gevent.sleep(0.01)
        assert second.accepted == []
        first.pickup.stop(1.0)
        second.drop("you@example.test")
        second.pickup._seen = -1
        while not second.accepted:
            gevent.sleep(0.01)
    first.close()
    second.close()


@given(st.builds(Drop, st.sampled_from([Address("", ""), Address("a", "b.test"), Address("ü", "ü.test")]),
                 st.lists(st.sampled_from([Address("c", "d.test"), Address('"x y"', "d.test"), Address("postmaster", "")]), min_size=1, max_size=4),
                 st.sampled_from([frozenset(), frozenset({"NEVER"}), frozenset({"SUCCESS", "DELAY"})]), st.sampled_from(["", "FULL", "HDRS"]),
                 st.text("abc+=!~", max_size=10), st.sampled_from(["7BIT", "8BITMIME"])))
@settings(max_examples=50)
def test_an_envelope_is_read_as_it_was_written(drop: Drop) -> None:
    assert Drop.parse(drop.line(drop.line().__len__() + 7)) == drop


@given(st.binary(max_size=60) | st.text('{}[]":,\\ gmta1sender', max_size=60).map(str.encode))
@settings(max_examples=100)
def test_any_line_is_an_envelope_or_refused(line: bytes) -> None:
    try:
        Drop.parse(line)
    except BadDrop:
        pass


# --- all of it, as processes ------------------------------------------------------------------------------------


@pytest.fixture
def gmta() -> Iterator[Gmta]:
    path = Path(tempfile.mkdtemp(prefix="gmta-"))
    path.chmod(0o755)
    server = Gmta(path)
    yield server
    server.stop()
    shutil.rmtree(path, ignore_errors=True)


def test_mail_sent_while_the_server_was_down_arrives_once_with_the_rest(gmta: Gmta) -> None:
    gmta.start(mailboxes="mailboxes = you@example.test, root@example.test, me@example.test")
    environ = {**os.environ, "GMTA_CONFIG": str(gmta.config)}

    def send(*arguments: str, octets: bytes) -> None:
        subprocess.run([BIN / "sendmail", *arguments], input=octets, env=environ, check=True, timeout=DEADLINE_S)

    send("-ti", octets=b"To: you\nSubject: up\n\nGr\xc3\xbc\xc3\x9fe\n.\nend\n")
    (first,) = gmta.arrived("you")
    text = first.read_bytes()
    assert b"\n\nGr\xc3\xbc\xc3\x9fe\n.\nend\n" in text and b"\nTo: you@example.test\n" in text
    assert gmta.stop() == 0
    send("-fme", "you", octets=b"Subject: down\n\nx\n")
    send("-fme", "nobody", octets=b"Subject: nobody there\n\nx\n")
    gmta.serve(gmta.config.read_text())
    assert len(gmta.arrived("you", 2)) == 2
    (report,) = gmta.arrived("me")
    parsed = email.message_from_bytes(report.read_bytes(), policy=email.policy.default)
    assert parsed.get_content_type() == "multipart/report" and "nobody@example.test" in str(parsed)
    until(lambda: json.loads(gmta.command("queue", "stats", "--json").stdout)["messages"] == 0, "empty queue")
    drop = gmta.directory / "var/maildrop"
    assert sorted(os.listdir(drop)) == ["odd", "taken"] and os.listdir(drop / "odd") == os.listdir(drop / "taken") == []
    assert len(gmta.arrived("you", 2)) == 2
