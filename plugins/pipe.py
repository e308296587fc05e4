"""Transport `pipe`: hands each message to a command, such as procmail, maildrop, dovecot-lda or a script.

Hooks: get_transports.  Keys of [transport:NAME]: command or aliases_file, per, timeout, user, directory, environment, leading_dash, null_sender,
detail_separator, line_ends, from_line, trace, other_status.  Replies: 250 2.0.0 status 0; by sysexits 451 4.3.0 (75, 71) or 5xx with
5.1.1 (67), 5.1.2 (68), 5.2.0 (73), 5.3.0 (64, 66, 69, 70, 72, 74), 5.3.5 (78), 5.5.0 (76), 5.6.0 (65), 5.7.0 (77); other statuses by
key; 451 4.3.0 for a command that can't be started, is ended by a signal or runs too long; 550 5.1.3 and 5.1.7 for addresses that can't
be arguments; 550 5.1.1 no such account; 554 5.4.6 loop.

There is no shell. A word of `command` may be or hold {sender} {recipient} {local} {detail} {domain} {user} {id}, each of which stays
within its argument. An argument that an address would make begin with "-" is refused, unless a `--` stands before it; one that only
in part is an address holds no "/" and no leading "." from it. The command gets the message as a file on standard input, whole even
if gmta is killed meanwhile; 4 KB of what it prints go into log and report. It leads a process group of its own, which is killed when
time is over. With aliases_file the command is what an alias has behind `|`, and nothing is filled in. A message goes at least once: a crash before its outcome is recorded runs the command again.
"""

from __future__ import annotations

import errno
import os
import pwd
import re
import shlex
import shutil
import signal
import string
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import gevent
from gevent import subprocess
from gevent.os import make_nonblocking, nb_read
from pydantic import Field, field_validator

import gmta
from gmta import PluginConfig, hookimpl
from gmta.config import Duration, ExistingFile, Path
from gmta.mail.address import Address
from gmta.mail.envelope import stored_address
from gmta.mail.message import Message, with_lf
from gmta.mail.trace import delivered_to
from gmta.services.accounts import find_account
from gmta.services.aliases import COMMAND, Specials
from gmta.services.files import write_all

MAX_OUTPUT = 4096  # octets of what a command prints that are kept
IN_MEMORY = 1024 * 1024  # octets up to which a message needs no file on disk
GRACE_S = 2.0  # between SIGTERM and SIGKILL, and for what still holds the output open
SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_OF_RECIPIENT = frozenset({"recipient", "local", "detail", "domain", "user"})
_NAMES = _OF_RECIPIENT | {"sender", "id"}
_MAY_BE_EMPTY = frozenset({"detail", "sender", "domain"})
_LEADING_ENHANCED = re.compile(r"([245])\.\d{1,3}\.\d{1,3}\b\s*")
_LOOP = gmta.failed("The message was delivered to this address before: it goes round in circles", enhanced="5.4.6", code=554)
_DONE = gmta.delivered("Delivered to command", enhanced="2.0.0")

# sysexits.h
_STATUSES = {
    64: ("5.3.0", "wrong usage of the command"), 65: ("5.6.0", "bad data"), 66: ("5.3.0", "no input"), 67: ("5.1.1", "no such user"),
    68: ("5.1.2", "no such host"), 69: ("5.3.0", "service unavailable"), 70: ("5.3.0", "internal error"),
    71: ("4.3.0", "system error"), 72: ("5.3.0", "system file missing"), 73: ("5.2.0", "output can't be created"),
    74: ("5.3.0", "input/output error"), 75: ("4.3.0", "temporary failure"), 76: ("5.5.0", "protocol error"),
    77: ("5.7.0", "permission denied"), 78: ("5.3.5", "configuration error"),
}


class Config(PluginConfig):
    """[plugin:pipe] has no keys of its own."""


class TransportConfig(PluginConfig):
    """[transport:NAME] of type pipe."""

    command: str = Field("", description="program and arguments, with {sender} {recipient} {local} {detail} {domain} {user} {id}")
    aliases_file: ExistingFile = Field("", description="instead: commands are what aliases have behind |")
    per: Literal["recipient", "message"] = Field("recipient", description="one run for each, or one for all recipients of a message")
    timeout: Duration = Field(300.0, gt=0, description="how long a run may take")
    user: str = Field("", description="account that runs it, or {user}: the recipient's own; needs a start as root")
    directory: Path = Field("", description="where it runs; default: the account's home with {user}, else /")
    environment: list[str] = Field([], description="NAME=VALUE ... beside PATH, HOME, USER, LOGNAME, SHELL, LANG")
    leading_dash: Literal["refuse", "pass"] = Field("refuse", description="addresses that would look like options")
    null_sender: str = Field("", description="what {sender} is for <>, such as MAILER-DAEMON")
    detail_separator: str = Field("+", description="what parts {user} from {detail}; empty for none")
    line_ends: Literal["lf", "crlf"] = "lf"
    from_line: bool = Field(False, description="a line `From sender date` on top, as in mbox files")
    trace: bool = Field(True, description="Return-Path and Delivered-To on top, and loops stopped")
    other_status: Literal["defer", "fail"] = Field("defer", description="what statuses mean that sysexits.h does not have")

    @field_validator("environment")
    @classmethod
    def _check_environment(cls, value: list[str]) -> list[str]:
        for one in value:
            if re.match(r"[A-Za-z_][A-Za-z0-9_]*=", one) is None:
                raise ValueError("NAME=VALUE")
        return value


class Unfit(Exception):
    """The command can't be run for these addresses; `outcome` says why."""

    def __init__(self, outcome: gmta.Outcome) -> None:
        super().__init__(outcome.reply.text)
        self.outcome = outcome


class Word(NamedTuple):
    """One argument of a command: constant text, or text with names in it. names: (text before it, name) in order; end: text behind."""

    names: tuple[tuple[str, str], ...]
    end: str

    @property
    def whole(self) -> bool:
        """Whether it is one name and nothing else."""
        return len(self.names) == 1 and not self.names[0][0] and not self.end

    @property
    def of_recipient(self) -> bool:
        """Whether it is another one for each recipient."""
        return any(name in _OF_RECIPIENT for _, name in self.names)


class Account(NamedTuple):
    """Whom a command runs as; uid None: like gmta."""

    uid: int | None
    gid: int
    groups: list[int]
    name: str
    home: str


class Pipe:
    """The transport."""

    Config = TransportConfig
    concurrency = 10

    def __init__(self, name: str, config: TransportConfig, services: Any) -> None:
        self.name = name
        self._config = config
        self._services = services
        self._words: list[Word] = []
        self._aliases: Specials | None = None
        if bool(config.command) == bool(config.aliases_file):
            raise ValueError("command: expected either this or aliases_file")
        if config.command:
            self._words = parse_command(config.command)
            self._program = self._find(self._words[0].end)
        else:
            if config.per == "message" or config.user == "{user}":
                raise ValueError("aliases_file: expected per = recipient and an account as user")
            self._aliases = Specials(config.aliases_file, COMMAND, services.clock)
            for target in self._aliases:
                self._find(alias_words(target)[0])
        self._own_account = config.user == "{user}"
        if config.user and not self._own_account:
            try:
                self._account: Account | None = account(config.user)
            except KeyError as error:
                raise ValueError(f"user: there is no account {config.user}") from error
        else:
            self._account = None
            if not config.user and not os.geteuid():
                services.log.warning("commands run as root: give the transport a user", transport=name)
        if self._aliases is not None and not (self._account.uid if self._account is not None else os.geteuid()):
            raise ValueError("user: expected an account, since commands of aliases never run as root")
        if config.user and not services.agent and os.geteuid() not in (0, self._account.uid if self._account is not None else -1):
            services.log.warning("commands can't run as another user: gmta was not started as root", transport=name)
        self.longest_s = config.timeout + 3 * GRACE_S

    def _find(self, program: str) -> str:
        """The path of a program; raises ValueError."""
        found = shutil.which(os.path.join(self._services.config.base, program) if "/" in program else program, path=SEARCH)
        if found is None:
            raise ValueError(f"command: there is no program {program}")
        return found

    def user_of(self, address: Address) -> str:
        """The account that runs the command for an address; "" for our own."""
        return self._user(address) if self._own_account else self._config.user

    def _user(self, address: Address) -> str:
        return address.split_detail(self._config.detail_separator)[0].lower()

    def deliver(self, delivery: Any) -> dict[int, gmta.Outcome]:
        """Runs the command for each recipient, or once for all of them."""
        recipients = delivery.recipients
        if self._config.per == "message":
            return dict.fromkeys((recipient.number for recipient in recipients), self._attempt(delivery, recipients))
        return {recipient.number: self._attempt(delivery, [recipient]) for recipient in recipients}

    def _attempt(self, delivery: Any, recipients: list[Any]) -> gmta.Outcome:
        try:
            addresses = [recipient.address for recipient in recipients]
            if self._aliases is not None:
                arguments = self._alias_arguments(self._aliases, addresses[0])
                addresses = [stored_address(recipients[0].original or str(addresses[0]))]  # the alias
                program = self._find(arguments[0])
            if self._config.trace and len(addresses) == 1 and addresses[0].key in delivered_to(delivery.message):
                return _LOOP
            if self._aliases is None:
                program, arguments = self._program, self.arguments(delivery.envelope, addresses)
            return self._run([program, *arguments[1:]], self._account_of(addresses), delivery, addresses)
        except Unfit as unfit:
            return unfit.outcome
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "strerror", None) or str(error))[:200]
            return gmta.deferred(f"The command can't be run: {_clean(reason)}", enhanced="4.3.0")

    # --- arguments --------------------------------------------------------------------------------------------------

    def arguments(self, envelope: Any, addresses: list[Address]) -> list[str]:
        """The command's arguments, its name first; raises Unfit for addresses that can't be arguments."""
        common = {"sender": str(envelope.sender) or self._config.null_sender, "id": envelope.id}
        each = [common | self._parts(address) for address in addresses]
        out = [self._words[0].end]
        options_end = self._config.leading_dash == "pass"
        for word in self._words[1:]:
            if not word.names:
                out.append(word.end)
                options_end |= word.end == "--"
                continue
            for values in each if word.of_recipient else each[:1]:
                argument = _fill(word, values)
                if argument.startswith("-") and not word.names[0][0] and not options_end:
                    raise _unfit(word)
                out.append(argument)
        return out

    @staticmethod
    def _alias_arguments(aliases: Specials, address: Address) -> list[str]:
        """The command that an alias names by this address; raises Unfit, ValueError."""
        target = aliases.get(address.mailbox)
        if target is not None:
            return alias_words(target)
        if aliases.trouble:
            raise ValueError(f"aliases_file: {aliases.trouble}")
        raise Unfit(gmta.failed("The alias names no such command", enhanced="5.1.1", code=550))

    def _parts(self, address: Address) -> dict[str, str]:
        user, detail = address.split_detail(self._config.detail_separator)
        return {"recipient": str(address), "local": address.mailbox, "domain": address.host or self._services.hostname, "user": user,
                "detail": detail}

    def _account_of(self, addresses: list[Address]) -> Account | None:
        """The account to run as, or None for our own; raises Unfit."""
        if not self._own_account:
            return self._account
        names = {self._user(address) for address in addresses}
        try:
            (name,) = names
            found: Account = gevent.get_hub().threadpool.apply(account, (name,))  # may ask a directory over the network
        except (KeyError, ValueError) as error:
            raise Unfit(gmta.failed("There is no such account", enhanced="5.1.1", code=550)) from error
        if not found.uid:
            raise Unfit(gmta.failed("No command runs as this account", enhanced="5.7.1", code=550))
        return found

    # --- running ----------------------------------------------------------------------------------------------------

    def _run(self, arguments: list[str], runs_as: Account | None, delivery: Any, addresses: list[Address]) -> gmta.Outcome:
        config = self._config
        who = runs_as or _ourselves()
        environment = {"PATH": SEARCH, "HOME": who.home, "USER": who.name, "LOGNAME": who.name, "SHELL": "/bin/sh", "LANG": "C.UTF-8"}
        environment.update(one.partition("=")[::2] for one in config.environment)
        identity: dict[str, Any] = {}
        if runs_as is not None and (runs_as.uid, runs_as.gid) != (os.geteuid(), os.getegid()):
            identity = {"user": runs_as.uid, "group": runs_as.gid, "extra_groups": runs_as.groups}
        directory = config.directory or (who.home if self._own_account else "/")
        output, output_end = os.pipe2(os.O_CLOEXEC)
        reader: Any = None
        try:
            make_nonblocking(output)
            standard_input = -1
            try:
                standard_input = self._input(delivery, addresses)
                process = subprocess.Popen(
                    arguments, stdin=standard_input, stdout=output_end, stderr=output_end, cwd=directory,
                    env=environment, close_fds=True, start_new_session=True, umask=0o077, **identity)
            finally:
                os.close(output_end)
                if standard_input >= 0:
                    os.close(standard_input)
            said = bytearray()
            reader = gevent.spawn(_collect, output, said)
            status = self._wait(process)
            reader.join(GRACE_S)
        finally:
            if reader is not None:
                reader.kill()
            os.close(output)
        return self._outcome(status, said.decode("utf-8", "replace"))

    def _wait(self, process: Any) -> int | None:
        """The status of a command, below 0 for a signal; None where it had to be killed."""
        status: int | None = None
        try:
            status = process.wait(self._config.timeout)
        except subprocess.TimeoutExpired:
            _kill(process, signal.SIGTERM)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                pass
        finally:
            if status is None:  # what it started goes with it; a worker that ends leaves nothing behind either
                _kill(process, signal.SIGKILL)
                try:
                    process.wait(GRACE_S)
                except subprocess.TimeoutExpired:  # a program that has become another user is not ours to kill
                    self._services.log.error("command can't be ended", transport=self.name, pid=process.pid)
        return status

    def _input(self, delivery: Any, addresses: list[Address]) -> int:
        """The message in an open file without a name, at its start."""
        message: Message = delivery.message
        if message.size <= IN_MEMORY and hasattr(os, "memfd_create"):
            file = os.memfd_create("message", os.MFD_CLOEXEC)
        else:
            data_dir = self._services.config.gmta.data_dir
            file, path = tempfile.mkstemp(prefix="pipe-", dir=data_dir if os.access(data_dir, os.W_OK) else None)
            os.unlink(path)
        try:
            for piece in self._content(delivery, addresses):
                write_all(file, piece)
                if len(piece) > IN_MEMORY // 8:
                    gevent.sleep(0)  # others have their turn
            os.lseek(file, 0, os.SEEK_SET)
        except BaseException:
            os.close(file)
            raise
        return file

    def _content(self, delivery: Any, addresses: list[Address]) -> Iterator[bytes]:
        config = self._config
        message: Message = delivery.message
        sender = str(delivery.envelope.sender)
        top = ""
        if config.from_line:
            when = time.asctime(time.gmtime(delivery.envelope.received_at))
            top += f"From {re.sub(r'[^!-~]', '_', sender) or 'MAILER-DAEMON'} {when}\n"
        if config.trace:
            top += f"Return-Path: <{sender}>\n"
            if len(addresses) == 1:
                top += f"Delivered-To: {addresses[0]}\n"
            if not message.separator and not message.header and message.body.size:
                top += "\n"
        octets = top.encode("utf-8", "surrogateescape")
        if config.line_ends == "lf":
            yield from with_lf(message.chunks(), octets)
        else:
            yield octets.replace(b"\n", b"\r\n")
            yield from message.chunks()

    def _outcome(self, status: int | None, output: str) -> gmta.Outcome:
        """What a status and what was printed mean."""
        output = _clean(output)
        if status is None:
            return gmta.deferred(_joined(f"The command did not end within {self._config.timeout:g} s", output), enhanced="4.3.0")
        if not status:
            return _DONE
        if status < 0:
            return gmta.deferred(_joined(f"The command was ended by signal {-status}", output), enhanced="4.3.0")
        enhanced, meaning = _STATUSES.get(status, ("4.3.0" if self._config.other_status == "defer" else "5.3.0", ""))
        own = _LEADING_ENHANCED.match(output)
        if own is not None and own[1] == enhanced[0]:  # as the command words it, where it does not contradict its status
            enhanced, output = own[0].strip(), output[own.end():]
        text = _joined(f"The command ended with status {status}{f' ({meaning})' if meaning else ''}", output)
        return gmta.deferred(text, enhanced=enhanced) if enhanced[0] == "4" else gmta.failed(text, enhanced=enhanced)


def parse_command(command: str) -> list[Word]:
    """The words of `command`, quoted as for a shell; raises ValueError."""
    try:
        words = [_parse_word(text) for text in shlex.split(command)]
    except ValueError as error:
        raise ValueError(f"command: {error}") from error
    if not words or words[0].names or not words[0].end:
        raise ValueError("command: expected a program first")
    return words


def alias_words(target: str) -> list[str]:
    """Program and arguments of an alias's `|command`, quoted as for a shell; raises ValueError."""
    try:
        words = shlex.split(target.removeprefix(COMMAND))
    except ValueError as error:
        raise ValueError(f"{target[:60]!r}: {error}") from error
    if not words or not words[0]:
        raise ValueError(f"{target[:60]!r}: expected a program")
    return words


def _parse_word(text: str) -> Word:
    names: list[tuple[str, str]] = []
    before = ""
    for literal, name, form, conversion in string.Formatter().parse(text):
        before += literal
        if name is None:
            continue
        if name not in _NAMES or form or conversion:
            raise ValueError(f"{text}: expected {', '.join(f'{{{one}}}' for one in sorted(_NAMES))} in braces, {{{{ and }}}} for braces")
        names.append((before, name))
        before = ""
    return Word(tuple(names), before)


def _fill(word: Word, values: dict[str, str]) -> str:
    """The argument; raises Unfit."""
    out = ""
    for before, name in word.names:
        value = values[name]
        if "\0" in value or any(0xD800 <= ord(char) < 0xDC80 or 0xDD00 <= ord(char) < 0xE000 for char in value):
            raise _unfit(word)
        if not word.whole and ("/" in value or value.startswith(".") or not (value or name in _MAY_BE_EMPTY)):
            raise _unfit(word)  # the rest of the argument may be a path
        out += before + value
    return out + word.end


def _unfit(word: Word) -> Unfit:
    if word.of_recipient:
        return Unfit(gmta.failed("The address can't be handed to the command", enhanced="5.1.3", code=550))
    return Unfit(gmta.failed("The sender's address can't be handed to the command", enhanced="5.1.7", code=550))


def account(name: str) -> Account:
    """An account of this machine; raises KeyError, OSError where that can't be told now."""
    found = find_account(name)
    if found is None:
        raise KeyError(name)
    return Account(found.uid, found.gid, found.groups(), found.name, found.home)


def _ourselves() -> Account:
    try:
        entry = pwd.getpwuid(os.geteuid())
    except KeyError:
        return Account(None, os.getegid(), [], str(os.geteuid()), "/")
    return Account(None, entry.pw_gid, [], entry.pw_name, entry.pw_dir)


def _kill(process: Any, number: int) -> None:
    """Signals the command and all that it started and that did not leave its group."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:  # all of them are another user's
        pass


def _collect(output: int, said: bytearray) -> None:
    """Reads what a command prints to its end, and keeps the beginning."""
    while True:
        try:
            piece = nb_read(output, 65536)
        except OSError as error:
            if error.errno in (errno.EBADF, errno.EIO):
                return
            raise
        if not piece:
            return
        said += piece[:max(0, MAX_OUTPUT - len(said))]


def _clean(text: str) -> str:
    """Printed text for a reply: one line, nothing that moves a cursor."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _joined(text: str, output: str) -> str:
    return f"{text}: {output}" if output else text


class Plugin:
    """Offers the transport type."""

    def __init__(self, config: Config, services: Any) -> None:
        pass

    @hookimpl
    def get_transports(self, config: Any) -> dict[str, Any]:
        """{type name: transport class}."""
        return {"pipe": Pipe}
