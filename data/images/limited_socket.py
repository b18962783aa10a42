"""A socket for http.client whose waits and bytes have limits, whatever the other side sends."""

from __future__ import annotations

import io
import socket
import time
from typing import Any


class TooManyBytesError(OSError):
    """The other side sends more than is taken."""


def time_left(deadline: float, most: float) -> float:
    """How long one wait may take, seconds.

    Raises:
        TimeoutError: no longer.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, most)


class LimitedSocket:
    """What http.client needs of a socket, with a deadline and a limit on bytes that hold whatever it makes of them.

    A server that sends a byte now and then holds nobody up; nor does one whose chunk of -1 bytes http.client reads to
    its end fill the memory.
    """

    def __init__(self, raw: socket.socket, *, deadline: float, read_seconds: float, max_bytes: int):
        """Take over a connected socket, which stays its owner's to close.

        Args:
            raw: the socket.
            deadline: of `time.monotonic`, after which nothing is sent or read.
            read_seconds: longest wait for a byte.
            max_bytes: most that are read.
        """
        self.raw, self.deadline, self.read_seconds, self.bytes_left = raw, deadline, read_seconds, max_bytes

    def sendall(self, data: bytes) -> None:
        """Send, as `socket.sendall`."""
        self.raw.settimeout(time_left(self.deadline, self.read_seconds))
        self.raw.sendall(data)

    def makefile(self, mode: str, *_: Any) -> io.BufferedReader:
        """A file to read the answer from."""
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """Leave it open: the answer is still read, and its owner closes it."""


class _Reader(io.RawIOBase):
    def __init__(self, limited: LimitedSocket):
        super().__init__()
        self.limited = limited

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        limited = self.limited
        if limited.bytes_left <= 0:
            raise TooManyBytesError
        limited.raw.settimeout(time_left(limited.deadline, limited.read_seconds))
        count = limited.raw.recv_into(buffer)
        limited.bytes_left -= count
        return count
