"""Several stores one after the other, as one."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from deltapatch.data.decode import ImageInput
from deltapatch.data.sources.source import ImageStore


@dataclass(frozen=True)
class ConcatenatedStore:
    """The rows of the first store, then those of the second, and so on; nothing is copied."""

    stores: Sequence[ImageStore]

    def __len__(self) -> int:
        return self.starts[-1]

    def name(self, row: int) -> str:
        store, own = self._place(row)
        return store.name(own)

    def read(self, row: int) -> ImageInput:
        store, own = self._place(row)
        return store.read(own)

    def version(self) -> str:
        """sha256 over length and version of each store, in order."""
        digest = hashlib.sha256()
        for store in self.stores:
            digest.update(f"{len(store)} {store.version()}\n".encode())
        return digest.hexdigest()

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The row at which each store begins, and the number of all rows."""
        return tuple(accumulate((len(store) for store in self.stores), initial=0))

    def _place(self, row: int) -> tuple[ImageStore, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)} images")
        # The last store that begins here: those before it that begin here too are empty.
        index = bisect_right(self.starts, row) - 1
        return self.stores[index], row - self.starts[index]
