"""Generated keys with cluster structure, a store that holds them, and the truth about their neighbours.

A key is one of CENTRES centres, which are random directions about a common mean, with two things added: a
normal vector in a subspace of LATENT dimensions that all clusters share (within a cluster, what clips really
differ in), and white noise in all dimensions; then it is scaled to length 1. Cluster sizes follow Zipf's law:
of 200,000 keys the largest cluster has some 24,000, half of them fewer than 25, the smallest a dozen, so that
the ten nearest of one query are among tens of thousands alike and those of another in several clusters. The
cosine of a query and its nearest key is 0.87 on average, of its tenth 0.84, of any 0.37.

Queries are drawn from the same mixture and are in no store.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Table
from r2scp.store.search.bank import KEY_COLUMNS

DIM = 1024  # as ImageBind's
CENTRES = 2_000
LATENT = 64
MEAN, WITHIN, WHITE = 0.9, 0.6, 0.3  # lengths of the mean and of what is added to a centre of length 1
STEP = 16_384  # keys generated, written or compared at once: 67 MB
AMONG = Modality.VISUAL
CLIPS_PER_SOURCE = 2


class Mixture:
    """The distribution of keys and queries."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._centres = rng.standard_normal((CENTRES, DIM), np.float32) * np.float32(DIM**-0.5)
        self._centres += np.float32(MEAN * DIM**-0.5) * rng.standard_normal(DIM, np.float32)
        basis, _ = np.linalg.qr(rng.standard_normal((DIM, LATENT)))
        self._basis = np.ascontiguousarray(basis.T, np.float32)
        share = 1 / np.arange(1, CENTRES + 1)
        self._share = share / share.sum()

    def draw(self, count: int, seed: int) -> np.ndarray:
        """(count, DIM) float32 of length 1."""
        rng = np.random.default_rng((1, seed))
        keys = self._centres[rng.choice(CENTRES, count, p=self._share)]
        latent = rng.standard_normal((count, LATENT), np.float32) * np.float32(WITHIN * LATENT**-0.5)
        keys += latent @ self._basis
        keys += rng.standard_normal((count, DIM), np.float32) * np.float32(WHITE * DIM**-0.5)
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        return keys


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Keys in a store, and the same in a file as numpy's memmap reads it; key i is that of clip i."""

    folder: Path
    store: FeatureStore
    keys_KD: np.ndarray

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The start and the keys of each block."""
        for start in range(0, len(self.keys_KD), STEP):
            yield start, np.asarray(self.keys_KD[start : start + STEP])

    def truth(self, queries_QD: np.ndarray, n: int) -> np.ndarray:
        """(Q, n): the nearest keys, best first, by a product of all pairs."""
        scores = np.full((len(queries_QD), n), -np.inf, np.float32)
        rows = np.full((len(queries_QD), n), -1)
        for start, keys in self.blocks():
            both = np.concatenate([scores, queries_QD @ keys.T], axis=1)
            place = np.argpartition(-both, n, axis=1)[:, :n]
            old = np.take_along_axis(rows, np.minimum(place, n - 1), axis=1)
            rows = np.where(place < n, old, place - n + start)
            scores = np.take_along_axis(both, place, axis=1)
        return np.take_along_axis(rows, np.argsort(-scores, axis=1), axis=1)


def number(clip_id: str) -> int:
    """The index of a clip's key."""
    return int(clip_id.rpartition("/")[2])


def fill(folder: Path, clips: int, seed: int = 100) -> Bank:
    """A bank of that many clips, created if missing: rows as `extract` writes them, without sequences."""
    path, uri = folder / "keys.npy", str(folder / "store")
    if not path.exists():
        mixture, staged = Mixture(), []
        store = FeatureStore.create(uri, "benchmark", DIM)
        written = np.lib.format.open_memmap(folder / "part.npy", "w+", np.float32, (clips, DIM))
        for start in range(0, clips, STEP):
            keys = mixture.draw(min(STEP, clips - start), seed + start)
            written[start : start + len(keys)] = keys
            staged.append(store.stage(Table.CLIPS, _rows(store, keys, start)))
        store.commit(Table.CLIPS, staged, {"run": "fill"})
        written.flush()
        (folder / "part.npy").rename(path)
    return Bank(folder=folder, store=FeatureStore.open(uri), keys_KD=np.load(path, mmap_mode="r"))


def _rows(store: FeatureStore, keys_KD: np.ndarray, start: int) -> pa.Table:
    schema, count = store.address(Table.CLIPS).schema, len(keys_KD)
    numbers = range(start, start + count)
    known = {
        "clip_id": pa.array([f"bench/{at:08}" for at in numbers]),
        "corpus": pa.array(["bench"] * count),
        "source_id": pa.array([f"source{at // CLIPS_PER_SOURCE}" for at in numbers]),
        "split": pa.array(["train"] * count),
        KEY_COLUMNS[AMONG]: pa.FixedSizeListArray.from_arrays(pa.array(keys_KD.reshape(-1)), DIM),
    }
    columns = [known.get(field.name, pa.nulls(count, field.type)) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)
