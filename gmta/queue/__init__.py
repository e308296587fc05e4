"""The durable queue: the Store interface and its implementations."""
