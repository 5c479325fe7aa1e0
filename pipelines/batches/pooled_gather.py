"""Rows of a tensor, in any order and any shape: what every batch is made of.

Writing a batch into memory fresh from the system takes longer than copying it, because every page is cleared
first. So memory is pooled: what one tensor releases, the next one reuses.
"""

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

POOL_BYTES = 512 << 20  # most that the pool keeps: a batch of stage II at MUSIC-AVQA's size is 63 MB
MIN_POOLED_BYTES = 1 << 20  # smaller tensors reuse memory that the process already has
MAX_OVERSIZE = 2  # a tensor takes memory of at most this multiple of its size

_pool: deque[np.ndarray] = deque()  # of bytes; popping is atomic, so each belongs to one thread


def take_rows(rows_SD: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """`rows_SD[index]` on the CPU, in pooled memory or in `out`, a former result of the same shape."""
    shape = (*index.shape, *rows_SD.shape[1:])
    result = pooled_empty(shape, rows_SD.dtype) if out is None else out
    flat = (index.numel(), *rows_SD.shape[1:])
    torch.index_select(rows_SD, 0, index.flatten(), out=result.view(flat))
    return result


def pooled_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU, from the pool and back to it when dropped. Thread-safe."""
    size = math.prod(shape) * dtype.itemsize
    if size < MIN_POOLED_BYTES:
        return torch.empty(shape, dtype=dtype)
    buffer = _acquire(size)
    # The tensor's storage keeps this view alive, and so do all tensors that share the storage.
    view = buffer[:size]
    weakref.finalize(view, _release, buffer).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)


def pooled_bytes() -> int:
    """Memory in the pool, waiting for reuse."""
    return sum(buffer.nbytes for buffer in tuple(_pool))


def _acquire(size: int) -> np.ndarray:
    for _ in range(len(_pool)):
        try:
            buffer = _pool.popleft()
        except IndexError:  # another thread took the last one
            break
        if size <= buffer.nbytes <= MAX_OVERSIZE * size:
            return buffer
        _pool.append(buffer)
    return _allocate(size)


def _allocate(size: int) -> np.ndarray:
    return np.empty(size, dtype=np.uint8)  # numpy asks for pages of 2 MiB


def _release(buffer: np.ndarray) -> None:
    _pool.append(buffer)
    while pooled_bytes() > POOL_BYTES:
        try:
            _pool.popleft()
        except IndexError:
            return
