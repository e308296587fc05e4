"""Receiving: one greenlet a connection, the hook pipeline, and the limits that keep both bounded."""
