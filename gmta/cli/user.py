"""gmta user: the users that log in to send, in the file that `[plugin:auth_file] users_file` names.

A password is asked for at the terminal, or read as one line from standard input (`--password-stdin`); it is never an argument,
which others could see. The file is written whole or not at all; running servers see the change within a second. Exit status 1 where
a user is there already, or isn't.
"""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Callable

import click
from pydantic import BaseModel, ConfigDict

from gmta.cli.options import config_option, json_option
from gmta.cli.output import clean, print_json
from gmta.config import Config, Path, Section, load
from gmta.services.passwords import DEFAULT_FILE, Users, change, check_user, hash_password

SECTION = "auth_file"  # of [plugin:…]: whoever knows users from a file, its key `users_file` says which

stdin_option = click.option("--password-stdin", is_flag=True, help="read the password as one line from standard input")


class _Keys(BaseModel):
    """What is read of the section."""

    model_config = ConfigDict(validate_default=True)

    users_file: Path = DEFAULT_FILE


class _Refused(Exception):
    """The change can't be made; the text says why."""


@click.group()
def user() -> None:
    """Users that log in to send: add, change, list, delete."""


@user.command()
@click.argument("address")
@stdin_option
@config_option
def add(address: str, password_stdin: bool, path: str | None) -> None:
    """Add a user."""
    config = load(path)
    name = _name(address)
    line = f"{name} {_password(password_stdin)}"

    def edit(users: dict[str, str]) -> None:
        if name in users:
            raise _Refused(f"{name} is there already; gmta user passwd changes its password")
        users[name] = line

    _change(config, edit)


@user.command()
@click.argument("address")
@stdin_option
@config_option
def passwd(address: str, password_stdin: bool, path: str | None) -> None:
    """Change a user's password."""
    config = load(path)
    name = _name(address)
    line = f"{name} {_password(password_stdin)}"

    def edit(users: dict[str, str]) -> None:
        if name not in users:
            raise _Refused(f"there is no user {name}")
        users[name] = line

    _change(config, edit)


@user.command("list")
@config_option
@json_option
def list_users(path: str | None, as_json: bool) -> None:
    """List the users."""
    users = Users(_file(load(path)))
    try:
        users.refresh()
    except FileNotFoundError:
        pass
    except OSError as error:
        _fail(f"{users.path}: {error.strerror}")
    if as_json:
        print_json(users.names())
        return
    for name in users.names():
        click.echo(clean(name))


@user.command()
@click.argument("address")
@config_option
def delete(address: str, path: str | None) -> None:
    """Delete a user."""
    config = load(path)
    name = _name(address)

    def edit(users: dict[str, str]) -> None:
        if users.pop(name, None) is None:
            raise _Refused(f"there is no user {name}")

    _change(config, edit)


def _name(address: str) -> str:
    try:
        return check_user(address)
    except ValueError as error:
        raise click.UsageError(clean(str(error))) from None


def _password(from_stdin: bool) -> str:
    """What the file keeps of the password."""
    try:
        if from_stdin:  # UTF-8, whatever the locale says: it is what mail clients send
            secret = sys.stdin.buffer.readline().decode("utf-8").removesuffix("\n").removesuffix("\r")
        else:
            secret = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
        return hash_password(secret)
    except (ValueError, UnicodeError) as error:
        raise click.UsageError(f"{error}") from None


def _file(config: Config) -> str:
    section = config.plugin.get(SECTION) or Section(f"plugin:{SECTION}", config.file)
    return config.validate(_Keys, section, ignore=section.keys() - {"users_file"}).users_file


def _change(config: Config, edit: Callable[[dict[str, str]], None]) -> None:
    """Writes the file; a new one belongs to the account that workers run as."""
    file = _file(config)
    account = pwd.getpwnam(config.gmta.user) if config.gmta.user and os.geteuid() == 0 else None
    try:
        change(file, edit, (account.pw_uid, account.pw_gid) if account else None)
    except _Refused as refused:
        _fail(clean(str(refused)))
    except OSError as error:
        _fail(f"{error.filename or file}: {error.strerror}")


def _fail(text: str) -> None:
    click.echo(text, err=True)
    sys.exit(1)
