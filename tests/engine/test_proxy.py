"""The PROXY protocol: each form of its header, what is no header, and that nothing behind it is taken."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.receive.proxy import SIGNATURE, Endpoints, read_header

CLIENT = Endpoints("198.51.100.7", 40000, "192.0.2.1", 25)
CLIENT6 = Endpoints("2001:db8::7", 40000, "2001:db8::1", 25)


def v2(command: int = 0x21, family: int = 0x11, tlvs: bytes = b"", size: int | None = None) -> bytes:
    addresses = b""
    if family == 0x11:
        addresses = struct.pack("!4s4sHH", socket.inet_aton(CLIENT.ip), socket.inet_aton(CLIENT.local_ip), 40000, 25)
    elif family == 0x21:
        addresses = struct.pack("!16s16sHH", *(socket.inet_pton(socket.AF_INET6, ip) for ip in (CLIENT6.ip, CLIENT6.local_ip)), 40000, 25)
    rest = addresses + tlvs
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(rest) if size is None else size) + rest


def read(octets: bytes) -> tuple[Endpoints | None, bytes]:
    """What the header says, and what is left for the session."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(octets)
        theirs.shutdown(socket.SHUT_WR)
        found = read_header(ours, 5)
        return found, ours.recv(1000)


@pytest.mark.parametrize("header,client", [
    (b"PROXY TCP4 198.51.100.7 192.0.2.1 40000 25\r\n", CLIENT), (b"PROXY TCP6 2001:db8::7 2001:db8::1 40000 25\r\n", CLIENT6),
    (b"PROXY UNKNOWN\r\n", None), (b"PROXY UNKNOWN ffff:f ffff:f 65535 65535\r\n", None),
    (b"PROXY TCP6 ::ffff:198.51.100.7 ::ffff:192.0.2.1 40000 25\r\n", CLIENT),
    (v2(), CLIENT), (v2(family=0x21), CLIENT6), (v2(tlvs=b"\x04\x00\x03abc"), CLIENT), (v2(command=0x20), None), (v2(family=0), None), (v2(family=0x31, tlvs=b"x" * 216), None),
])
def test_headers(header: bytes, client: Endpoints | None) -> None:
    assert read(header + b"EHLO x\r\n") == (client, b"EHLO x\r\n")


@pytest.mark.parametrize("octets", [
    b"", b"EHLO client.example\r\n", b"PROXY", b"PROXY TCP4 198.51.100.7", b"PROXY TCP4 198.51.100.7 192.0.2.1 40000\r\n", b"PROXY TCP4 2001:db8::7 192.0.2.1 1 2\r\n",
    b"PROXY TCP4 198.51.100.7 192.0.2.1 70000 25\r\n", b"PROXY TCP4 198.51.100.7 192.0.2.1 -1 25\r\n", b"PROXY TCP4  198.51.100.7 192.0.2.1 1 25\r\n",
    b"PROXY TCP9 198.51.100.7 192.0.2.1 1 25\r\n", b"PROXY \xff\r\n      ", b"PROXY UNKNOWN" + b"x" * 200, b"PROXY TCP4 1.2.3 192.0.2.1 1 25\r\n",
    v2(command=0x31), v2(command=0x22), v2(size=65000), v2(family=0x11, size=4), v2()[:20], b"\r\n" * 10,
])
def test_no_headers(octets: bytes) -> None:
    with pytest.raises(ValueError):
        read(octets)


@given(octets=st.binary(max_size=60), start=st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11"]))
@settings(max_examples=60, deadline=None)
def test_octets_of_any_kind(octets: bytes, start: bytes) -> None:
    try:
        read(start + octets)
    except ValueError:
        pass


def test_silence_ends() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError):
        read_header(ours, 0.01)
