"""What tests of several folders need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.postgresql import PostgreSQL


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL for all tests of the session, without syncs; `create` makes a database of the test's own."""
    from tests.postgresql import PostgreSQL

    server = PostgreSQL()
    yield server
    server.remove()


@pytest.fixture
def database_url(postgresql: PostgreSQL) -> str:
    """An empty database."""
    return postgresql.create()
