"""Where a session is, and which commands are refused there: the order of commands as one table.

What is not in the table is allowed. Says nothing about syntax, TLS or AUTH policy. RFC 5321 section 4.1.4, RFC 3030.
"""

from __future__ import annotations

from enum import IntEnum

from gmta.mail.reply import BAD_SEQUENCE, HELO_FIRST, MAIL_FIRST, NESTED_MAIL, NO_RECIPIENTS, Reply


class State(IntEnum):
    """How far the session has come."""

    START = 0  # no greeting yet
    GREETED = 1
    MAIL = 2  # sender known, no recipient accepted
    RCPT = 3  # at least one recipient
    CHUNKED = 4  # between BDAT chunks
    FAILED = 5  # a chunk was refused: only RSET, a greeting or QUIT lead on (RFC 3030 section 2)


class Mode(IntEnum):
    """What the next octets are."""

    COMMAND = 0
    AUTH = 1
    DATA = 2
    CHUNK = 3
    TLS = 4
    CLOSED = 5


REFUSED: dict[State, dict[str, Reply]] = {
    State.START: dict.fromkeys(("MAIL", "RCPT", "DATA", "BDAT", "AUTH", "STARTTLS"), HELO_FIRST),
    State.GREETED: {"RCPT": MAIL_FIRST, "DATA": MAIL_FIRST, "BDAT": MAIL_FIRST},
    State.MAIL: {"MAIL": NESTED_MAIL, "DATA": NO_RECIPIENTS, "BDAT": NO_RECIPIENTS,
                 "AUTH": BAD_SEQUENCE},  # RFC 4954 section 4: not during a transaction
    State.RCPT: {"MAIL": NESTED_MAIL, "AUTH": BAD_SEQUENCE},
    State.CHUNKED: {"MAIL": NESTED_MAIL, "RCPT": BAD_SEQUENCE, "DATA": BAD_SEQUENCE, "AUTH": BAD_SEQUENCE,
                    "STARTTLS": BAD_SEQUENCE},
    State.FAILED: dict.fromkeys(("MAIL", "RCPT", "DATA", "BDAT", "AUTH", "STARTTLS"), BAD_SEQUENCE),
}
