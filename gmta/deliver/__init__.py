"""Delivering: what is due, where it goes, how fast, over which connection, and what the sender is told."""
