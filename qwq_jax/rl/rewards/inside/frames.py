"""Messages between the two sides: four bytes of length, then JSON."""

import json
import os
import select
import struct
import time
from typing import Any

Message = dict[str, Any]

HEADER_BYTES = 4


def framed(message: Message) -> bytes:
    """A message as bytes, its length before it."""
    data = json.dumps(message).encode()
    return header(len(data)) + data


def header(length: int) -> bytes:
    """The length of what follows, as bytes."""
    return struct.pack("!I", length)


def send(fd: int, data: bytes, deadline: float | None = None) -> None:
    """Writes all of it.

    Args:
        fd: Where to; it must not block if there is a deadline.
        data: What.
        deadline: Time of ``time.monotonic`` at which it gives up; None waits for ever.

    Raises:
        TimeoutError: The deadline has passed.
        OSError: Nobody reads.
    """
    rest = memoryview(data)
    while rest:
        if deadline is not None:
            _wait([], [fd], deadline)
        rest = rest[os.write(fd, rest[:65536]) :]


def read(fd: int, count: int, deadline: float | None = None) -> bytes:
    """Reads `count` bytes.

    Raises:
        EOFError: There are fewer.
        TimeoutError: The deadline has passed.
    """
    data = bytearray()
    while len(data) < count:
        if deadline is not None:
            _wait([fd], [], deadline)
        piece = os.read(fd, min(count - len(data), 1 << 20))
        if not piece:
            raise EOFError("the other side has ended")
        data += piece
    return bytes(data)


def receive(fd: int, *, most: int = 2**31, deadline: float | None = None) -> Message:
    """Reads a message of at most `most` bytes.

    Raises:
        EOFError: There is none, or not all of it.
        TimeoutError: The deadline has passed.
        ValueError: It is too long, or is no message.
    """
    (length,) = struct.unpack("!I", read(fd, HEADER_BYTES, deadline))
    if length > most:
        raise ValueError(f"a message of {length} bytes where {most} are the most")
    try:
        message = json.loads(read(fd, length, deadline))
    except RecursionError:
        raise ValueError("a message too deep to be read") from None
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message


def _wait(reading: list[int], writing: list[int], deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0 or not any(select.select(reading, writing, [], left)):
        raise TimeoutError("the other side takes too long")
