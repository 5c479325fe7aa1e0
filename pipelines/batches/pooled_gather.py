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

SPARE_BYTES = 512 << 20  # most that waits to be used again: a batch of stage II at MUSIC-AVQA's size is 63 MB
SMALL_BYTES = 1 << 20  # what is smaller comes from memory that the process has anyway
FITS = 2  # a tensor takes memory of at most so many times its size

_spare: deque[np.ndarray] = deque()  # bytes; whoever takes one of these has it alone


def gather(rows_SD: Tensor, places: Tensor, into: Tensor | None = None) -> Tensor:
    """`rows_SD[places]` on the CPU: in memory of its own, or over `into`, a former result of this shape."""
    shape = (*places.shape, *rows_SD.shape[1:])
    result = roomy(shape, rows_SD.dtype) if into is None else into
    flat = (places.numel(), *rows_SD.shape[1:])
    torch.index_select(rows_SD, 0, places.flatten(), out=result.view(flat))
    return result


def roomy(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU whose memory goes round. Any thread may ask, and may drop it."""
    size = math.prod(shape) * dtype.itemsize
    if size < SMALL_BYTES:
        return torch.empty(shape, dtype=dtype)
    whole = _taken(size)
    view = whole[:size]  # the tensor's storage holds this object, and all that share the storage with it
    weakref.finalize(view, _left, whole).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)


def spare_bytes() -> int:
    """What waits to be used again."""
    return sum(one.nbytes for one in tuple(_spare))


def _taken(size: int) -> np.ndarray:
    for _ in range(len(_spare)):
        try:
            one = _spare.popleft()
        except IndexError:  # another thread was faster
            break
        if size <= one.nbytes <= FITS * size:
            return one
        _spare.append(one)
    return _new(size)


def _new(size: int) -> np.ndarray:
    return np.empty(size, dtype=np.uint8)  # numpy asks for pages of 2 MiB


def _left(whole: np.ndarray) -> None:
    _spare.append(whole)
    while spare_bytes() > SPARE_BYTES:
        try:
            _spare.popleft()
        except IndexError:
            return
