"""Addresses in header fields, by the strict grammar of RFC 5322 section 3.4 with groups (RFC 6854) and UTF-8 (RFC 6532).

For decisions that must not be deceived: what readers could take in more than one way (a second bracket, a local part with blanks, a
comment without end, a route) is an error, never a guess. What readers show of a stranger's field is `gmta.verify.dmarc`'s business.
`mailboxes` raises ValueError whose text can be shown to a client.
"""

from __future__ import annotations

import re

from gmta.mail.address import Address, AddressError

MAX_OCTETS = 64 * 1024  # of a field; its addresses are no more than its commas
MAX_COMMENTS = 20  # within one another

_TOKEN = re.compile(r'[ \t\r\n]+|"(?:[^"\\\r\n]|\\.|\r\n[ \t])*"|\[[^\[\]\\\s]*\]|[^\s()<>\[\]:;@\\,"\x00-\x1f\x7f]+|[<>:;@,(]')
_COMMENT = re.compile(r"[^()\\]+|\\.|[()]", re.S)
_SPECIAL = "<>:;@,"


def mailboxes(value: bytes) -> list[Address]:
    """The addresses of From, Sender, To and their like, folded or not; raises ValueError."""
    if len(value) > MAX_OCTETS:
        raise ValueError("the field is too long")
    try:
        tokens = _tokens(value.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("octets that are no UTF-8") from None
    found: list[Address] = []
    mailbox: list[str] = []
    in_group = in_angle = False
    for token in [*tokens, ","]:
        if token == "<" or token == ">":
            if (token == "<") is in_angle:
                raise ValueError("angle brackets that don't match")
            in_angle = not in_angle
        elif token in (",", ":", ";") and in_angle:
            raise ValueError("a route or a list within angle brackets")
        if token == ":":
            if in_group or not mailbox or any(word in _SPECIAL for word in mailbox):
                raise ValueError("a colon out of place")
            in_group = True
            mailbox.clear()
        elif token in (",", ";"):
            if token == ";" and not in_group:
                raise ValueError("a semicolon out of place")
            if mailbox:
                found.append(_mailbox(mailbox))
                mailbox = []
            in_group = in_group and token != ";"
        else:
            mailbox.append(token)
    if in_group or in_angle:
        raise ValueError("a group or a bracket without end")
    return found


def _tokens(text: str) -> list[str]:
    """Words, quoted strings, literals and specials; blanks and comments are left out."""
    tokens: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"{text[position]!a} out of place")
        position = match.end()
        token = match[0]
        if token == "(":
            position = _comment_end(text, position)
        elif token[0] not in " \t\r\n":
            tokens.append(token)
    return tokens


def _comment_end(text: str, position: int) -> int:
    """Where the comment that has just begun ends (RFC 5322 section 3.2.2)."""
    depth = 1
    while depth:
        match = _COMMENT.match(text, position)
        if match is None or depth > MAX_COMMENTS:
            raise ValueError("a comment without end")
        position = match.end()
        depth += (match[0] == "(") - (match[0] == ")")
    return position


def _mailbox(tokens: list[str]) -> Address:
    """The address of `name <local@domain>` or `local@domain`."""
    if "<" in tokens:
        start = tokens.index("<")
        if tokens[-1] != ">" or any(token in _SPECIAL or token[0] == "[" for token in tokens[:start]):
            raise ValueError("text around an address that is no name")
        tokens = tokens[start + 1:-1]
    if len(tokens) != 3 or tokens[1] != "@":
        raise ValueError("an address that is not of the form local@domain")
    try:
        return Address.parse("".join(tokens))
    except AddressError as error:
        raise ValueError(f"an address that is wrong: {error}") from None
