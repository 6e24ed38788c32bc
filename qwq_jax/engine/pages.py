"""The page pool of one replica: which pages of the KV cache are free and which are taken."""

from collections.abc import Sequence


def pages_for(tokens: int, page_size: int) -> int:
    """The number of pages that hold `tokens` tokens.

    >>> pages_for(17, 16)
    2
    """
    return -(-tokens // page_size)


class PagePool:
    """Hands out page numbers 0 .. size-1, each to one owner at a time.

    The order is a pure function of the calls made, so a run repeats itself.  Taking more than is free, or giving back
    what is not taken, is a bug of the caller and an assertion.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._taken = bytearray(size)

    @property
    def free(self) -> int:
        """How many pages can be taken now."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` pages."""
        assert 0 <= count <= len(self._free), f"{count} pages asked of {len(self._free)} free ones"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            assert not self._taken[page], f"page {page} handed out twice"
            self._taken[page] = 1
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        """Return pages, each exactly once."""
        for page in pages:
            assert self._taken[page], f"page {page} freed twice"
            self._taken[page] = 0
        self._free.extend(reversed(pages))
