"""The SMTP protocol, sans-IO: bytes in, events out (RFC 5321 and its extensions). Imports only gmta.mail."""
