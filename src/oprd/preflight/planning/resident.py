"""What blocks of memory keep resident on a CPU: glibc's malloc is asked where it would put them.

Blocks below a threshold, which moves up to 32 MB, come from a heap, and what is freed there stays resident
until it is handed out again: with 100 million weights a tenth of the peak and more. The blocks are taken in
earnest and never written to, so none of them costs memory.
"""

import ctypes
import platform
import sys
from bisect import bisect_left

PAGE = 4096
ALIGNMENT = 64  # torch's
MAPPED = 2  # the bit of a chunk's size that tells a mapping of its own


class ResidentBlocks:
    """Bytes that live and freed blocks keep resident, were they written to."""

    def __init__(self) -> None:
        self._tracks = sys.platform == "linux" and platform.libc_ver()[0] == "glibc" and not _is_limited()
        self._libc = ctypes.CDLL(None)
        self._libc.free.argtypes = [ctypes.c_void_p]
        self._heap: dict[int, tuple[int, int]] = {}
        self._alone: dict[int, tuple[int | None, int]] = {}
        self._touched: list[tuple[int, int]] = []
        self.size = 0

    def take(self, key: int, size: int) -> None:
        """A block of `size` bytes from now on."""
        at = self._allocate(size)
        if at is None or ctypes.c_size_t.from_address(at - ctypes.sizeof(ctypes.c_size_t)).value & MAPPED:
            self._alone[key] = at, size
            self.size += size
        else:
            self._heap[key] = at, size
            self._touch(at, size)

    def free(self, key: int) -> None:
        """The block is no more; what lay in the heap stays resident."""
        if key in self._alone:
            at, size = self._alone.pop(key)
            self.size -= size
        else:
            at, _ = self._heap.pop(key)
        self._libc.free(at)

    def trim(self) -> None:
        """Hand freed memory back to the system, as the memory meter does before it measures."""
        if self._tracks:
            self._libc.malloc_trim(0)
        self.size -= sum(end - start for start, end in self._touched)
        self._touched = []
        for at, size in self._heap.values():
            self._touch(at, size)

    def _allocate(self, size: int) -> int | None:
        """An address; None where blocks are not tracked, or there is no room even for an empty one."""
        if not self._tracks or not size:
            return None
        at = ctypes.c_void_p()
        failed = self._libc.posix_memalign(
            ctypes.byref(at), ctypes.c_size_t(ALIGNMENT), ctypes.c_size_t(size)
        )
        return None if failed else at.value

    def _touch(self, at: int, size: int) -> None:
        """Join the pages of a block to the touched stretches of the heap, which are apart and in order."""
        start, end = at // PAGE * PAGE, -(-(at + size) // PAGE) * PAGE
        stretches = self._touched
        first = bisect_left(stretches, (start,))
        if first and stretches[first - 1][1] >= start:
            first -= 1
            start = stretches[first][0]
        last = first
        while last < len(stretches) and stretches[last][0] <= end:
            end = max(end, stretches[last][1])
            self.size -= stretches[last][1] - stretches[last][0]
            last += 1
        stretches[first:last] = [(start, end)]
        self.size += end - start


def _is_limited() -> bool:
    """Whether this process has a memory limit: then empty blocks would leave no room for others."""
    import resource

    kinds = resource.RLIMIT_DATA, resource.RLIMIT_AS
    return any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in kinds)
