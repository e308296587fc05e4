"""The PROXY protocol, versions 1 and 2: who the client behind a load balancer is, said before anything else.

`read_header` takes exactly the header from a socket, and nothing of what follows it, so that TLS may begin behind it. Whose headers
are believed is decided before. Failure: ValueError for octets that are no header, OSError (TimeoutError) where none comes.
https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Any, NamedTuple

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LONGEST_V1 = 107
LONGEST_V2 = 4096  # addresses and their TLVs; certificates are not among them
_LAYOUTS = {0x11: (4, "!4s4sHH"), 0x21: (16, "!16s16sHH")}  # TCP over IPv4, over IPv6


class Endpoints(NamedTuple):
    """Where the client comes from, and where it thinks it goes."""

    ip: str
    port: int
    local_ip: str
    local_port: int


def read_header(sock: Any, timeout_s: float) -> Endpoints | None:
    """The client that the header names; None where the proxy speaks for itself (health checks) or does not know."""
    sock.settimeout(timeout_s)
    try:
        start = _exactly(sock, len(SIGNATURE))
        if start == SIGNATURE:
            head = _exactly(sock, 4)
            size = int.from_bytes(head[2:], "big")
            if size > LONGEST_V2:
                raise ValueError("a PROXY header that is too long")
            return parse_v2(head[0], head[1], _exactly(sock, size))
        if not start.startswith(b"PROXY "):
            raise ValueError("no PROXY header")
        while not start.endswith(b"\r\n"):
            if len(start) >= LONGEST_V1:
                raise ValueError("a PROXY line that is too long")
            start += _exactly(sock, 1)
        return parse_v1(start[:-2])
    finally:
        sock.settimeout(None)


def _exactly(sock: Any, size: int) -> bytes:
    """So many octets; a TLS client behind the header must find the rest untouched."""
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ValueError("the connection ends in the PROXY header")
        data += piece
    return data


def parse_v1(line: bytes) -> Endpoints | None:
    """The client of `PROXY TCP4|TCP6|UNKNOWN …` (section 2.1); raises ValueError."""
    words = line.decode("ascii").split(" ")
    if words[:2] == ["PROXY", "UNKNOWN"]:
        return None
    if len(words) != 6 or words[0] != "PROXY" or words[1] not in ("TCP4", "TCP6"):
        raise ValueError("not a PROXY line")
    version = 4 if words[1] == "TCP4" else 6
    addresses = [ipaddress.ip_address(word) for word in words[2:4]]
    if any(address.version != version for address in addresses) or not all(word.isdigit() and int(word) < 65536 for word in words[4:]):
        raise ValueError("not the addresses of a PROXY line")
    return Endpoints(_plain(addresses[0]), int(words[4]), _plain(addresses[1]), int(words[5]))


def parse_v2(command: int, family: int, rest: bytes) -> Endpoints | None:
    """The client of a binary header behind its signature (section 2.2); raises ValueError."""
    if command >> 4 != 2 or command & 15 > 1:
        raise ValueError("an unknown version or command of the PROXY protocol")
    layout = _LAYOUTS.get(family)
    if command & 15 == 0 or layout is None:  # LOCAL, or a family that is none of ours: to be skipped
        return None
    length, form = layout
    if len(rest) < 2 * length + 4:
        raise ValueError("a PROXY header that is too short")
    source, target, port, local_port = struct.unpack_from(form, rest)
    return Endpoints(_plain(ipaddress.ip_address(source)), port, _plain(ipaddress.ip_address(target)), local_port)


def _plain(address: Any) -> str:
    """As text; an IPv4 address that was dressed as IPv6 is itself again."""
    return str(getattr(address, "ipv4_mapped", None) or address)


def turn_away(sock: Any, octets: bytes) -> None:
    """Says a last word to one who may not come here, as far as it goes out at once."""
    try:
        sock.setblocking(False)
        sock.send(octets)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    sock.close()
