"""What else feeds a training: the same tensors in memory, in memory-mapped files, or from Ray Data.

All of them get what they need laid out as suits them: sequences of equal length in one array, the words of
each distinct question once, neighbours as rows. Each gives batches with the content of `Dataset.batch` in
stage II.
"""

import logging
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor

from benchmarks.machine import cores
from benchmarks.training.store import DIM, SECONDS
from r2scp.jobs.training.data import TrainingData
from r2scp.model.batch import Batch, Neighbours
from r2scp.pipelines.batches.dataset import Dataset
from r2scp.pipelines.batches.examples import MODALITIES
from r2scp.pipelines.ray_session import RAY_ENVIRONMENT
from r2scp.store.schema import Table

ROWS_AT_ONCE = 256  # of clips, while files are written
JOINED = 1_024  # questions that Ray Data reads joined with all their sequences: 1 GB
LOCAL_SHUFFLE = 512  # rows; 500 MB
Make = Callable[[np.ndarray, int], Batch]  # questions, missing modality


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Everything that batches are made of. `clips` float16 (R, L, C), in files: sound, picture."""

    clips: tuple[np.ndarray, np.ndarray]
    words_TWC: np.ndarray
    lengths_T: np.ndarray
    sentences_TC: np.ndarray
    text_B: np.ndarray
    clip_B: np.ndarray
    target_B: np.ndarray
    near_RN: tuple[np.ndarray, np.ndarray]  # by missing modality
    far_RN: tuple[np.ndarray, np.ndarray]

    @classmethod
    def read(cls, opened: TrainingData, dataset: Dataset, folder: Path) -> "Arrays":
        """From the store; sequences are written to files in `folder` if missing."""
        texts = np.unique(dataset.text_B, return_index=True)[1]
        words, mask = dataset.words(texts)
        neighbours = opened.neighbours
        assert neighbours is not None
        near, far = (
            (side[MODALITIES[0]], side[MODALITIES[1]])
            for side in (neighbours.nearest_RN, neighbours.farthest_RN)
        )
        return cls(
            clips=(_file(opened, folder, "audio"), _file(opened, folder, "visual")),
            words_TWC=words.numpy(),
            lengths_T=mask.sum(dim=1).numpy(),
            sentences_TC=dataset.question(texts).sentence_BC.numpy(),
            text_B=dataset.text_B,
            clip_B=dataset.examples.clip_row_B,
            target_B=dataset.examples.target_B,
            near_RN=near,
            far_RN=far,
        )

    def reopened(self) -> "Arrays":
        """The same with its files mapped again."""
        files = [part.filename for part in self.clips if isinstance(part, np.memmap)]
        audio, visual = (np.load(str(file), mmap_mode="r") for file in files)
        return replace(self, clips=(audio, visual))

    def batch(self, rows: np.ndarray, missing: int, sides: Sequence[Tensor]) -> Batch:
        """The questions `rows` around their sequences: sound, picture and, in stage II, two of neighbours."""
        lengths = self.lengths_T[self.text_B[rows]]
        longest, clips = int(lengths.max()), self.clip_B[rows]
        words = torch.from_numpy(self.words_TWC[self.text_B[rows], :longest])
        mask_BL = torch.ones(len(rows), SECONDS, dtype=torch.bool)
        neighbour_parts = [
            Neighbours(tokens, torch.ones(tokens.shape[:3], dtype=torch.bool), torch.from_numpy(table[clips]))
            for tokens, table in zip(sides[2:], (self.near_RN[missing], self.far_RN[missing]), strict=False)
        ]
        return Batch(
            audio_BLC=sides[0],
            audio_mask_BL=mask_BL,
            visual_BLC=sides[1],
            visual_mask_BL=mask_BL,
            words_BWC=words,
            words_mask_BW=torch.from_numpy(np.arange(longest) < lengths[:, None]),
            sentence_BC=torch.from_numpy(self.sentences_TC[self.text_B[rows]]),
            present_BM=torch.ones(len(rows), 2, dtype=torch.bool),
            retrieved=neighbour_parts[0] if neighbour_parts else None,
            farthest=neighbour_parts[1] if neighbour_parts else None,
            target_B=torch.from_numpy(self.target_B[rows]),
        )

    def selected_rows(self, rows: np.ndarray, missing: int, neighbours: bool) -> list[tuple[int, np.ndarray]]:
        """(modality, rows of clips) of each of a batch's tensors."""
        clips = self.clip_B[rows]
        own = [(0, clips), (1, clips)]
        neighbour_parts = [(missing, self.near_RN[missing][clips]), (missing, self.far_RN[missing][clips])]
        return own + neighbour_parts if neighbours else own


def mapped(arrays: Arrays, neighbours: bool) -> Make:
    """Rows of the files by numpy's indexing."""

    def make(rows: np.ndarray, missing: int) -> Batch:
        parts = arrays.selected_rows(rows, missing, neighbours)
        return arrays.batch(rows, missing, [torch.from_numpy(arrays.clips[m][at]) for m, at in parts])

    return make


def in_memory(arrays: Arrays, tensors: Sequence[Tensor], neighbours: bool) -> Make:
    """Rows of tensors by torch's indexing."""

    def make(rows: np.ndarray, missing: int) -> Batch:
        parts = arrays.selected_rows(rows, missing, neighbours)
        return arrays.batch(rows, missing, [tensors[m][torch.from_numpy(at)] for m, at in parts])

    return make


def tensors_of(arrays: Arrays) -> list[Tensor]:
    """The sequences, whole, in memory."""
    return [torch.from_numpy(np.array(part)) for part in arrays.clips]


def cool(paths: Sequence[Path], arrays: Arrays) -> None:
    """Have the system drop what it holds of files; what `arrays` has mapped of them it would keep."""
    for part in arrays.clips:
        if isinstance(part.base, mmap.mmap):
            part.base.madvise(mmap.MADV_DONTNEED)
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _file(opened: TrainingData, folder: Path, name: str) -> np.ndarray:
    path = folder / f"{name}.npy"
    if not path.exists():
        new = path.with_suffix(".new")
        shape = (len(opened.clips.ids), SECONDS, DIM)
        out_RLC = np.lib.format.open_memmap(new, "w+", np.float16, shape)
        scan = opened.store.dataset(Table.CLIPS, opened.pins.clips).scanner(
            columns=[name], scan_in_order=True, batch_size=ROWS_AT_ONCE
        )
        at = 0
        for part in scan.to_batches():
            tokens_RLC = part[name].flatten().flatten().to_numpy().reshape(-1, SECONDS, DIM)
            out_RLC[at : at + len(tokens_RLC)] = tokens_RLC
            at += len(tokens_RLC)
        out_RLC.flush()
        new.rename(path)
    return np.load(path, mmap_mode="r")


class RayData:
    """Ray Data, one missing modality, in two ways; `close` ends the session.

    *gather*: questions are the rows; the sequences lie in Ray's object store, and tasks look them up.
    *joined*: a Lance table of questions joined with all their sequences, shuffled in a local buffer.
    """

    def __init__(self, arrays: Arrays, batch_size: int, folder: Path) -> None:
        os.environ.update(RAY_ENVIRONMENT)
        size = sum(part.nbytes for part in arrays.clips)
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(num_cpus=cores(), object_store_memory=size + (2 << 30), **options)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        self._arrays, self._batch_size, self._folder = arrays, batch_size, folder
        self._refs = [ray.put(np.asarray(part)) for part in arrays.clips]

    def gather(self, rows: np.ndarray) -> Iterator[dict[str, Tensor]]:
        """Batches with the questions' numbers under "row"."""
        arrays, refs = self._arrays, self._refs
        near, far, clip_B = arrays.near_RN[0], arrays.far_RN[0], arrays.clip_B
        words, text_B, sentences = arrays.words_TWC, arrays.text_B, arrays.sentences_TC
        target_B = arrays.target_B

        def look_up(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            audio, visual = ray.get(refs)
            at = batch["data"]
            clips = clip_B[at]
            batch = {"row": at, "audio": audio[clips], "visual": visual[clips], "target": target_B[at]}
            batch |= {"near": audio[near[clips]], "far": audio[far[clips]]}
            return batch | {"words": words[text_B[at]], "sentence": sentences[text_B[at]]}

        data = ray.data.from_numpy(np.array_split(rows, 4 * cores()))
        data = data.map_batches(look_up, batch_size=self._batch_size)  # pyright: ignore[reportArgumentType]
        return iter(data.iter_torch_batches(batch_size=self._batch_size, prefetch_batches=2))

    def write_joined(self) -> Path:
        """The table that `joined` reads."""
        path, arrays = self._folder / "joined.lance", self._arrays
        shutil.rmtree(path, ignore_errors=True)
        rows = np.arange(min(JOINED, len(arrays.clip_B)))
        for at in range(0, len(rows), self._batch_size):
            part = rows[at : at + self._batch_size]
            clips = arrays.clip_B[part]
            table = {
                "audio": arrays.clips[0][clips],
                "visual": arrays.clips[1][clips],
                "near": arrays.clips[0][arrays.near_RN[0][clips]],
                "far": arrays.clips[0][arrays.far_RN[0][clips]],
                "words": arrays.words_TWC[arrays.text_B[part]],
                "sentence": arrays.sentences_TC[arrays.text_B[part]],
            }
            columns: dict[str, pa.Array] = {"row": pa.array(part), "target": pa.array(arrays.target_B[part])}
            for name, values in table.items():
                flat = pa.array(values.reshape(-1))
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, values[0].size)
            lance.write_dataset(pa.table(columns), path, mode="append" if at else "create")
        return path

    def joined(self, path: Path) -> Iterator[dict[str, Tensor]]:
        """Batches of the joined table, in a new order each time."""
        data = ray.data.read_lance(str(path))
        return iter(
            data.iter_torch_batches(
                batch_size=self._batch_size, local_shuffle_buffer_size=LOCAL_SHUFFLE, prefetch_batches=2
            )
        )

    def close(self) -> None:
        """End the session."""
        ray.shutdown()
