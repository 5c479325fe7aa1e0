"""What `jobs torture` keeps a store of: a small generated corpus that changes, and a ledger of what is true.

The ledger is kept apart from the program under test: it knows the bytes of each file and the rows of each
annotation file because it wrote them, and says from that alone what a store must hold.
"""

import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from r2scp.model.imagebind.imagebind import ImageBind, ImageBindConfig, TowerConfig
from r2scp.pipelines.demo.corpus import SPLITS, generate, split_of
from r2scp.pipelines.neighbours.settings import IndexSettings
from r2scp.store.schema import Retrieval

CORPUS = "demo"
INDEX = IndexSettings(retrieval=(Retrieval.CROSS, Retrieval.PAIRED), n=3)
KINDS = ("ivf_sq", "ivf_rq")  # of the serving index, in turn where its building is to be struck
FIRST_MTIME_S = 1_800_000_000  # of files; each write counts on, however coarse the file system's clock
MOST_DEAD, MOST_ABSENT, LEAST_STORED = 3, 3, 6
SEEDS = 4_000  # of worlds that the demo encoder was not trained on
CHANGES = 4  # files that change in a round, beside questions


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What one file holds: a rendering of the pool, made unique by `stamp`; or damaged, and no film."""

    media: str
    stamp: int
    damage: str = ""  # text | cut | empty

    def bytes_of(self, pool: Path) -> bytes:
        """An unknown box behind a film changes its digest and nothing that is seen or heard."""
        if self.damage == "empty":
            return b""
        if self.damage == "text":
            return f"this is a letter and no film, number {self.stamp}\n".encode() * 20
        film = (pool / "videos" / f"{self.media}.mp4").read_bytes()
        payload = str(self.stamp).encode()
        film += struct.pack(">I4s", 8 + len(payload), b"free") + payload
        return film[: len(film) // 2] if self.damage == "cut" else film


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a store must hold: clip id -> (sha256, rendering, split); clip id -> sha256 of dead letters;
    question id -> (clip id, split, answer)."""

    clips: dict[str, tuple[str, str, str]]
    dead: dict[str, str]
    questions: dict[str, tuple[str, str, str]]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What is rendered, and where it is kept."""

    pool: Path
    clips: int
    seed: int
    num_workers: int


@dataclass(kw_only=True)
class Site:
    """A corpus, a job's file, and the ledger; made by `make`."""

    folder: Path
    store: Path
    pool: Path
    num_workers: int
    contents: dict[str, Content] = field(default_factory=dict)  # video id -> of the file that is there
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # video id -> annotations
    splits: dict[str, str] = field(default_factory=dict)
    dropped: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # questions taken out
    kind: str = KINDS[0]
    _written: int = 0
    _digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, store: Path, rendered: Rendered) -> "Site":
        """Render what is not there, save an encoder, and begin with every clip as it was rendered."""
        workers = rendered.num_workers
        generate(rendered.pool, clips=rendered.clips, seed=rendered.seed % SEEDS, workers=workers)
        site = cls(folder=folder, store=store, pool=rendered.pool, num_workers=workers)
        for name in ("videos", "json"):
            (folder / "corpus" / name).mkdir(parents=True)
        _save_encoder(folder / "encoder.safetensors")
        for split in SPLITS:
            for row in json.loads((site.pool / "json" / f"avqa-{split}.json").read_text()):
                site.rows.setdefault(row["video_id"], []).append(row)
        for index, video in enumerate(sorted(site.rows)):
            site.splits[video] = split_of(index)
            site._put(video, Content(media=video, stamp=0))
        site._annotate()
        return site

    def job(self, wait_s: float = 0.0) -> Path:
        """The job's file, as it is now."""
        said = {
            "name": "torture",
            "store": str(self.store),
            "encoder": "imagebind-demo",
            "weights": "encoder.safetensors",
            "corpora": [{"corpus": CORPUS, "root": "corpus"}],
            "index": {"retrieval": [mode.value for mode in INDEX.retrieval], "n": INDEX.n},
            "serving": {"kind": self.kind},
            "gate": {
                "max_dead_share": None,
                "max_lost_share": None,
                "max_partial_share": None,
                "recall_queries": 16,
            },
            "machine": {"num_workers": self.num_workers, "device": "cpu"},
            "keep_days": 0.0,
            "wait_s": wait_s,
        }
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(said))
        return path

    def expected(self) -> Expected:
        """What the ledger says of a store that has followed the corpus."""
        clips, dead, questions = {}, {}, {}
        for video, content in self.contents.items():
            clip_id, digest = f"{CORPUS}/{video}", self._digests[video]
            if content.damage:
                dead[clip_id] = digest
                continue
            clips[clip_id] = (digest, content.media, self.splits[video])
            for row in self.rows[video]:
                question_id = f"{CORPUS}/{row['question_id']}"
                questions[question_id] = (clip_id, self.splits[video], row["anser"])
        return Expected(clips=clips, dead=dead, questions=questions)

    # -- change

    def change(self, draw: random.Random, index_anew: bool = False) -> list[str]:
        """Change the corpus; says what was done. A file is always replaced, and one damaged or mended."""
        if index_anew:
            self.kind = KINDS[1 - KINDS.index(self.kind)]
        done = [self._replace(draw), self._mend(draw) or self._damage(draw)]
        ways: list[Callable[[random.Random], str]]
        ways = [self._add, self._remove, self._replace, self._damage, self._mend]
        while len(list(filter(None, done))) < CHANGES:
            done.append(draw.choice(ways)(draw))
        done += [self._answer(draw), self._drop(draw), self._restore(draw), self._move(draw)]
        self._annotate()
        return [said for said in done if said]

    def _having(self, true: Callable[[Content | None], bool]) -> list[str]:
        return [video for video in self.rows if true(self.contents.get(video))]

    def _fit(self) -> list[str]:
        return self._having(lambda content: content is not None and not content.damage)

    def _fresh(self, draw: random.Random, damage: str = "") -> Content:
        return Content(media=draw.choice(list(self.rows)), stamp=self._written + 1, damage=damage)

    def _replace(self, draw: random.Random) -> str:
        video = draw.choice(self._fit())
        self._put(video, self._fresh(draw))
        return f"replace {video}"

    def _add(self, draw: random.Random) -> str:
        absent = self._having(lambda content: content is None)
        if not absent:
            return ""
        self._put(video := draw.choice(absent), self._fresh(draw))
        return f"add {video}"

    def _remove(self, draw: random.Random) -> str:
        absent, fit = self._having(lambda content: content is None), self._fit()
        if len(absent) >= MOST_ABSENT or len(fit) <= LEAST_STORED:
            return ""
        video = draw.choice(list(self.contents))
        del self.contents[video]
        (self.folder / "corpus" / "videos" / f"{video}.mp4").unlink()
        return f"remove {video}"

    def _damage(self, draw: random.Random) -> str:
        fit = self._fit()
        if len(self.contents) - len(fit) >= MOST_DEAD or len(fit) <= LEAST_STORED:
            return ""
        video = draw.choice(fit)
        self._put(video, self._fresh(draw, draw.choice(("text", "cut", "empty"))))
        return f"damage {video}"

    def _mend(self, draw: random.Random) -> str:
        damaged = self._having(lambda content: content is not None and bool(content.damage))
        if not damaged:
            return ""
        self._put(video := draw.choice(damaged), self._fresh(draw))
        return f"mend {video}"

    def _answer(self, draw: random.Random) -> str:
        row = draw.choice(self.rows[draw.choice(list(self.rows))])
        row["anser"] = draw.choice([word for word in ("yes", "no", "two", "three") if word != row["anser"]])
        return f"answer {row['question_id']} anew"

    def _drop(self, draw: random.Random) -> str:
        many = [video for video, rows in self.rows.items() if len(rows) > 1]  # a clip without rows is no clip
        if not many:
            return ""
        video = draw.choice(many)
        row = self.rows[video].pop(draw.randrange(len(self.rows[video])))
        self.dropped.append((video, row))
        return f"drop question {row['question_id']}"

    def _restore(self, draw: random.Random) -> str:
        if len(self.dropped) < 2:
            return ""
        video, row = self.dropped.pop(draw.randrange(len(self.dropped) - 1))
        self.rows[video].append(row)
        return f"ask question {row['question_id']} again"

    def _move(self, draw: random.Random) -> str:
        """Of a clip to another split: its features stay, its rows are written anew."""
        train = [video for video, split in self.splits.items() if split == "train"]
        others = [video for video in self.splits if video not in train]
        video, split = draw.choice(train), draw.choice(SPLITS[1:])
        if len(train) <= MOST_DEAD + MOST_ABSENT + 1 or draw.random() < 0.5:  # else the bank may be empty
            video, split = draw.choice(others), "train"
        if sum(each == self.splits[video] for each in self.splits.values()) == 1:  # an empty file is no file
            return ""
        self.splits[video] = split
        return f"move {video} to {split}"

    # -- files

    def _put(self, video: str, content: Content) -> None:
        self._written += 1
        path, said = self.folder / "corpus" / "videos" / f"{video}.mp4", content.bytes_of(self.pool)
        path.write_bytes(said)
        os.utime(path, (FIRST_MTIME_S + self._written, FIRST_MTIME_S + self._written))
        self.contents[video] = content
        self._digests[video] = hashlib.sha256(said).hexdigest()

    def _annotate(self) -> None:
        for split in SPLITS:
            rows = [
                row for video in sorted(self.rows) if self.splits[video] == split for row in self.rows[video]
            ]
            (self.folder / "corpus" / "json" / f"avqa-{split}.json").write_text(json.dumps(rows))


def _save_encoder(path: Path) -> None:
    """A random ImageBind, small enough to embed a round's clips in a second."""
    tower = TowerConfig(width=64, depth=2, heads=2)
    text = TowerConfig(width=48, depth=1, heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = ImageBind(ImageBindConfig(vision=tower, audio=tower, text=text, dim=32, patch=14))
    model.save(path)
