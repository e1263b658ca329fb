"""Turns at the model: one answer at a time, first come, first served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class ModelTurns:
    """The queue of those who need the model or its processor, which all conversations of a page share."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._tickets: list[Ticket] = []

    @contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """A place in the queue, which is given up at the end of the `with` block."""
        ticket = Ticket(self)
        with self._changed:
            self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def before(self, ticket: Ticket, timeout: float | None) -> int:
        """Wait until no ticket is before this one, at most `timeout` seconds if it is given; returns how many still are."""
        with self._changed:
            self._changed.wait_for(lambda: self._tickets[0] is ticket, timeout)
            return self._tickets.index(ticket)


class Ticket:
    """A place in the queue of `ModelTurns`."""

    def __init__(self, turns: ModelTurns) -> None:
        self._turns = turns

    def before(self, timeout: float | None) -> int:
        """Wait for the turn, at most `timeout` seconds if it is given; returns the number of tickets before this one."""
        return self._turns.before(self, timeout)
