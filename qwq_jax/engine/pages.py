"""The page pool of one replica: who holds which pages of the KV cache, and which pages are worth keeping.

A full page of keys and values depends on its own tokens and all those before it, so it is known by a digest of them
(`page_digests`).  Sequences that begin alike share such pages; when the last of them has ended, its pages stay until
their room is needed, those unused for the longest time going first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


def pages_for(tokens: int, page_size: int) -> int:
    """The number of pages that hold `tokens` tokens.

    >>> pages_for(17, 16)
    2
    """
    return -(-tokens // page_size)


def extend_digests(digests: list[bytes], tokens: Sequence[int], page_size: int) -> None:
    """Add the digests of the full pages of `tokens` that `digests` does not hold yet."""
    while (len(digests) + 1) * page_size <= len(tokens):
        start = len(digests) * page_size
        page = np.asarray(tokens[start : start + page_size], np.int32).tobytes()
        parent = digests[-1] if digests else b""
        digests.append(hashlib.blake2b(parent + page, digest_size=16).digest())


class PagePool:
    """Hands out page numbers 0 .. size-1, and counts their holders.

    The order is a pure function of the calls made, so a run repeats itself.  Taking more than is free, or giving back
    what is not taken, is a bug of the caller and an assertion.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._empty = list(range(size - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Pages of a known content that nobody holds, in the order in which they are given up."""
        self._holders = [0] * size
        self._digest: list[bytes | None] = [None] * size
        self._known: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """How many pages can be taken now."""
        return len(self._empty) + len(self._kept)

    def take(self, count: int) -> list[int]:
        """Take `count` pages."""
        assert 0 <= count <= self.free, f"{count} pages asked of {self.free} free ones"
        pages = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for page in pages:
            assert not self._holders[page], f"page {page} handed out twice"
            self._holders[page] = 1
        return pages

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The pages that hold the longest known beginning; they are not taken by this."""
        pages: list[int] = []
        for digest in digests:
            if digest not in self._known:
                break
            pages.append(self._known[digest])
        return pages

    def unheld(self, pages: Iterable[int]) -> int:
        """How many of these pages nobody holds, so that sharing them leaves fewer free."""
        return sum(not self._holders[page] for page in pages)

    def share(self, pages: Sequence[int]) -> None:
        """Become one more holder of pages that `find` gave."""
        for page in pages:
            if not self._holders[page]:
                del self._kept[page]
            self._holders[page] += 1

    def register(self, page: int, digest: bytes) -> None:
        """Let others find this page; of two with the same content the first one is found."""
        assert self._holders[page], f"page {page} is nobody's"
        if digest not in self._known and self._digest[page] is None:
            self._known[digest] = page
            self._digest[page] = digest

    def give_back(self, pages: Sequence[int]) -> None:
        """Return pages, each exactly once; the ends of sequences are given up before their beginnings."""
        for page in reversed(pages):
            assert self._holders[page], f"page {page} freed twice"
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._digest[page] is None:
                self._empty.append(page)
            else:
                self._kept[page] = None

    def forget(self) -> None:
        """Keep nothing that nobody holds: what pages hold is no longer what their tokens would give."""
        assert len(self._empty) + len(self._kept) == self.size, "a page is held"
        while self._kept:
            self._empty.append(self._evict())

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        digest, self._digest[page] = self._digest[page], None
        assert digest is not None
        del self._known[digest]
        return page
