"""Work for a native thread, crossed in batches: fsync, big reads and the like, which would stall the event loop.

A hop between the loop and a thread costs more than a small message does, so all items that wait cross together: while the
thread works on one batch the next gathers. `submit` blocks only the calling greenlet. Failure: what `run` raises is raised
at every `submit` of that batch; an Exception instance in its result is raised at that item's `submit`; a greenlet killed
while it waits leaves its item to be done, unseen. The threading primitives are the original ones, monkey patch or not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import sleep as _patched_sleep
from typing import Any

from gevent.hub import Waiter, get_hub
from gevent.monkey import get_original

_allocate_lock = get_original("_thread", "allocate_lock")
_start_new_thread = get_original("_thread", "start_new_thread")


LINGERS = 5


class BatchClosed(RuntimeError):
    """The batch was closed; nothing was done with the item."""


class Batch:
    """One native thread that runs `run(items) -> results`, up to `max_items` a hop; belongs to the hub that made it.

    linger_s: how long a batch waits for company where its first item is `patient` (default: always).
    """

    def __init__(self, run: Callable[[list[Any]], list[Any]], *, max_items: int = 32, linger_s: float = 0.0,
                 patient: Callable[[Any], bool] = lambda item: True, name: str = "") -> None:
        self.name = name
        self._run = run
        self._max_items = max_items
        self._linger_s = linger_s
        self._patient = patient
        self._sleep = get_original("time", "sleep") if linger_s else _patched_sleep
        self._waiting: deque[tuple[Any, Any]] = deque()
        self._done: deque[tuple[list[tuple[Any, Any]], list[Any]]] = deque()
        self._wake = _allocate_lock()
        self._wake.acquire()
        self._idle = False
        self._told = True  # the submitters of the last batch have their results
        self._closing = False
        self._ended = _allocate_lock()
        self._started = False
        self._async = get_hub().loop.async_()
        self._async.start(self._deliver)

    def submit(self, item: Any) -> Any:
        """Hands `item` to the thread and returns its result; raises what became of it instead."""
        waiter = Waiter()
        self._push(item, waiter)
        result = waiter.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def submit_all(self, items: list[Any]) -> list[Any]:
        """`submit` of several at once: one wait for all; raises the first failure."""
        waiters = [Waiter() for _ in items]
        for item, waiter in zip(items, waiters, strict=True):
            self._push(item, waiter)
        results = [waiter.get() for waiter in waiters]
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def post(self, item: Any) -> None:
        """Hands `item` to the thread without waiting; its result is dropped."""
        self._push(item, None)

    def _push(self, item: Any, waiter: Any) -> None:
        if self._closing:
            raise BatchClosed(self.name)
        self._waiting.append((item, waiter))
        if not self._started:
            self._started = True
            self._ended.acquire()
            _start_new_thread(self._work, ())
        if self._idle:
            self._signal()

    def _signal(self) -> None:
        self._idle = False
        try:
            self._wake.release()
        except RuntimeError:
            pass  # the thread was woken already

    def _work(self) -> None:
        """The native thread: takes what waits, runs it, hands the results to the loop."""
        waiting = self._waiting
        try:
            while True:
                if not waiting:
                    self._idle = True
                    if not waiting and not self._closing:  # an item pushed before the flag was seen needs no signal
                        self._wake.acquire()
                    self._idle = False
                    if not waiting:
                        if self._closing:
                            return
                        continue
                if self._linger_s:
                    self._linger()
                pairs = [waiting.popleft() for _ in range(min(len(waiting), self._max_items))]
                results = self._results([item for item, _ in pairs])
                self._told = False
                self._done.append((pairs, results))
                self._async.send()
        finally:
            self._ended.release()

    def _linger(self) -> None:
        """Waits for company: a little while, and until those of the last batch have heard, who often come again."""
        for _ in range(LINGERS):
            if len(self._waiting) >= self._max_items or not self._patient(self._waiting[0][0]):
                return
            self._sleep(self._linger_s)
            if self._told:
                return

    def _results(self, items: list[Any]) -> list[Any]:
        try:
            results = list(self._run(items))
            if len(results) != len(items):
                raise RuntimeError(f"batch {self.name}: {len(results)} results for {len(items)} items")
            return results
        except BaseException as error:  # it belongs to the submitters, this thread must live on
            return [error] * len(items)

    def _deliver(self) -> None:
        """In the hub: wakes the greenlets whose items are done."""
        done = self._done
        while done:
            pairs, results = done.popleft()
            for (_, waiter), result in zip(pairs, results, strict=True):
                if waiter is not None:
                    waiter.switch(result)
        self._told = True

    def close(self) -> None:
        """Lets the thread finish what was submitted, then ends it; submitters get their results once the loop runs."""
        if self._closing:
            return
        self._closing = True
        if self._started:
            self._signal()
            self._ended.acquire()
            self._ended.release()
        if self._done:
            get_hub().loop.run_callback(self._finish)
        else:
            self._stop()

    def _finish(self) -> None:
        self._deliver()
        self._stop()

    def _stop(self) -> None:
        self._async.stop()
        self._async.close()


def call_each(items: list[Callable[[], Any]]) -> list[Any]:
    """Runs callables one after another; one that raises spoils only its own result."""
    results: list[Any] = []
    for item in items:
        try:
            results.append(item())
        except Exception as error:
            results.append(error)
    return results
