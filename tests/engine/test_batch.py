"""Batch: items cross together, errors reach whom they concern."""

from __future__ import annotations

import gevent
import pytest

from gmta.services.batch import Batch, BatchClosed


def test_results_and_errors_reach_their_submitters() -> None:
    batch = Batch(lambda items: [ValueError(n) if n == 3 else n * 2 for n in items], max_items=4)
    jobs = [gevent.spawn(batch.submit, n) for n in range(10)]
    gevent.joinall(jobs)
    assert [job.value for job in jobs] == [0, 2, 4, None, 8, 10, 12, 14, 16, 18]
    assert isinstance(jobs[3].exception, ValueError)
    batch.close()
    with pytest.raises(BatchClosed):
        batch.submit(1)


def test_wrong_number_of_results_is_an_error() -> None:
    batch = Batch(lambda items: [])
    with pytest.raises(RuntimeError):
        batch.submit(1)
    batch.close()
