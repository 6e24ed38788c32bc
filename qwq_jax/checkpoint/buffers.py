"""Memory for tensors in flight: bounded, and used again, because touching new pages costs more than reading a file."""

import threading

import numpy as np


class BufferPool:
    """Lends byte buffers to threads; what is lent and what is kept for later never exceed `limit` together."""

    def __init__(self, limit: int):
        self._limit = limit
        self._lent = 0
        self._kept: list[np.ndarray] = []
        self._closed = False
        self._changed = threading.Condition()

    def borrow(self, size: int) -> np.ndarray | None:
        """A buffer of `size` bytes as soon as there is room for it; ``None`` once the pool is closed."""
        assert size <= self._limit, (size, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._lent + size <= self._limit)
            if self._closed:
                return None
            self._lent += size
            for index, buffer in enumerate(self._kept):
                if buffer.size == size:
                    return self._kept.pop(index)
            while self._lent + sum(buffer.size for buffer in self._kept) > self._limit:
                self._kept.pop(0)
        return np.empty(size, np.uint8)

    def give_back(self, buffer: np.ndarray) -> None:
        """Ends a loan. The borrower keeps no view of the buffer."""
        with self._changed:
            self._lent -= buffer.size
            self._kept.append(buffer)
            self._changed.notify_all()

    def close(self) -> None:
        """Makes every `borrow`, waiting or to come, return ``None``."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
