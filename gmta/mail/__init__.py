"""The nouns of mail: replies, verdicts, addresses, sessions, envelopes, messages. Values only: no I/O, no clock."""
