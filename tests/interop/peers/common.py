"""What the peers share: the bytes they send, and how they name descriptors."""

import os
import struct


def counted(start, length):
    """Bytes `start` to `start + length` of the stream that both sides know:
    the numbers from 0 on, as four bytes each."""
    words = range(start // 4, (start + length + 3) // 4)
    packed = struct.pack(f">{len(words)}I", *words)
    return packed[start % 4 :][:length]


def identity(fd):
    """Which open file a descriptor means, whatever its number."""
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"
