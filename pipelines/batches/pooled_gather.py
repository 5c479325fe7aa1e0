"""Rows of a tensor, in any order and any shape: what every batch is made with.

Writing a batch into memory that the system has just given takes longer than copying it: every page of it is
cleared first. So memory goes round: what a tensor leaves when nobody has it any more, the next one takes.
"""

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

POOL_BYTES = 512 << 20  # most that waits to be used again: a batch of stage II at MUSIC-AVQA's size is 63 MB
MIN_POOLED_BYTES = 1 << 20  # what is smaller comes from memory that the process has anyway
MAX_OVERSIZE = 2  # a tensor takes memory of at most so many times its size

_pool: deque[np.ndarray] = deque()  # bytes; whoever takes one of these has it alone


def take_rows(rows_SD: Tensor, places: Tensor, out: Tensor | None = None) -> Tensor:
    """`rows_SD[places]` on the CPU: in memory of its own, or over `into`, a former result of this shape."""
    shape = (*places.shape, *rows_SD.shape[1:])
    result = pooled_empty(shape, rows_SD.dtype) if out is None else out
    flat = (places.numel(), *rows_SD.shape[1:])
    torch.index_select(rows_SD, 0, places.flatten(), out=result.view(flat))
    return result


def pooled_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU whose memory goes round. Any thread may ask, and may drop it."""
    size = math.prod(shape) * dtype.itemsize
    if size < MIN_POOLED_BYTES:
        return torch.empty(shape, dtype=dtype)
    whole = _acquire(size)
    view = whole[:size]  # the tensor's storage holds this object, and all that share the storage with it
    weakref.finalize(view, _release, whole).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)


def pooled_bytes() -> int:
    """What waits to be used again."""
    return sum(one.nbytes for one in tuple(_pool))


def _acquire(size: int) -> np.ndarray:
    for _ in range(len(_pool)):
        try:
            one = _pool.popleft()
        except IndexError:  # another thread was faster
            break
        if size <= one.nbytes <= MAX_OVERSIZE * size:
            return one
        _pool.append(one)
    return _new(size)


def _new(size: int) -> np.ndarray:
    return np.empty(size, dtype=np.uint8)  # numpy asks for pages of 2 MiB


def _release(whole: np.ndarray) -> None:
    _pool.append(whole)
    while pooled_bytes() > POOL_BYTES:
        try:
            _pool.popleft()
        except IndexError:
            return
