"""Bound on the bytes of bodies that one process has in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import OverloadedError

# Retry-After: an upload takes seconds.
_RETRY_S = 5.0


class MemoryBudget:
    """A bounded number of bytes, shared by all bodies.

    Args:
        max_bytes: of all bodies together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._taken_bytes = 0

    @property
    def taken_bytes(self) -> int:
        """Bytes that are reserved now; 0 when idle."""
        return self._taken_bytes

    @contextmanager
    def hold(self) -> Iterator[Reservation]:
        """Reserve memory for a body as it grows; it is given back at the end of the ``with`` block."""
        held = Reservation(self)
        try:
            yield held
        finally:
            self.give_back(held.num_bytes)

    def take(self, num_bytes: int) -> None:
        """Use :meth:`Reservation.grow_to` instead.

        Raises:
            OverloadedError: there is not so much room.
        """
        self.check(num_bytes)
        self._taken_bytes += num_bytes

    def check(self, num_bytes: int) -> None:
        """Use :meth:`Reservation.check` instead.

        Raises:
            OverloadedError: there is not so much room.
        """
        if self._taken_bytes + num_bytes > self._max_bytes:
            raise OverloadedError("bytes of bodies in memory", self._max_bytes, _RETRY_S)

    def overdraw(self, num_bytes: int) -> None:
        """Use :meth:`Reservation.need` instead."""
        self._taken_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Use :meth:`Reservation.room_for` instead."""
        self._taken_bytes -= num_bytes


class Reservation:
    """The bytes that one body has reserved."""

    def __init__(self, room: MemoryBudget) -> None:
        self._room = room
        self.num_bytes = 0

    def need(self, num_bytes: int) -> None:
        """Have room for so many bytes more, beyond the bound if it has to be: for results, which are not refused any
        more. They are as many as the requests that were accepted; new bodies are refused until they are gone.
        """
        self._room.overdraw(num_bytes)
        self.num_bytes += num_bytes

    def check(self, num_bytes: int) -> None:
        """Check that so many bytes could be reserved; none are, as they have not come yet.

        Raises:
            OverloadedError: there is not so much room.
        """
        self._room.check(num_bytes)

    def grow_to(self, num_bytes: int) -> None:
        """Reserve so many bytes in all.

        Raises:
            OverloadedError: there is not so much room.
        """
        if num_bytes > self.num_bytes:
            self._room.take(num_bytes - self.num_bytes)
            self.num_bytes = num_bytes

    def grow_by(self, num_bytes: int) -> None:
        """Reserve so many bytes more.

        Raises:
            OverloadedError: there is not so much room.
        """
        self.grow_to(self.num_bytes + num_bytes)

    @contextmanager
    def room_for(self, num_bytes: int) -> Iterator[None]:
        """Reserve so many bytes more inside the ``with`` block, for what may turn out to be less.

        Raises:
            OverloadedError: there is not so much room.
        """
        self.grow_by(num_bytes)
        try:
            yield
        finally:
            self.num_bytes -= num_bytes
            self._room.give_back(num_bytes)
