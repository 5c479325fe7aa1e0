"""A small generated corpus that changes during `jobs torture`, and a ledger of its true content.

The ledger is independent of the program under test: it wrote every file and every annotation row, and derives
from that alone what a store must hold.
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
JOB_NAME = "crash-test"
INDEX = IndexSettings(retrieval=(Retrieval.CROSS, Retrieval.PAIRED), n=3)
INDEX_KINDS = ("ivf_sq", "ivf_rq")  # of the serving index, alternating where its build is interrupted
FIRST_MTIME_S = 1_800_000_000  # each write adds 1 s, so coarse file system clocks see every change
MAX_FAILED, MAX_ABSENT, MIN_STORED = 3, 3, 6
SEED_RANGE = 4_000  # worlds that the demo encoder was not trained on
CHANGES_PER_ROUND = 4  # changed files per round, besides questions


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """Content of one file: a rendering from the pool made unique by `stamp`, or a damaged file."""

    media: str
    stamp: int
    damage: str = ""  # text | cut | empty

    def to_bytes(self, pool: Path) -> bytes:
        """An unknown MP4 box at the end changes the digest but neither picture nor sound."""
        if self.damage == "empty":
            return b""
        if self.damage == "text":
            return f"this is a text file and no video, number {self.stamp}\n".encode() * 20
        video = (pool / "videos" / f"{self.media}.mp4").read_bytes()
        payload = str(self.stamp).encode()
        video += struct.pack(">I4s", 8 + len(payload), b"free") + payload
        return video[: len(video) // 2] if self.damage == "cut" else video


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a store must hold: clip id -> (sha256, rendering, split); clip id -> sha256 of dead letters;
    question id -> (clip id, split, answer)."""

    clips: dict[str, tuple[str, str, str]]
    failed: dict[str, str]
    questions: dict[str, tuple[str, str, str]]


@dataclass(frozen=True, kw_only=True)
class RenderSettings:
    """What to render, and the folder that keeps it."""

    pool: Path
    clips: int
    seed: int
    num_workers: int


@dataclass(kw_only=True)
class ChangingCorpus:
    """A corpus, a job's file, and the ledger; made by `create`."""

    folder: Path
    store: Path
    pool: Path
    num_workers: int
    contents: dict[str, Content] = field(default_factory=dict)  # video id -> current file
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # video id -> annotations
    splits: dict[str, str] = field(default_factory=dict)
    removed_questions: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    index_kind: str = INDEX_KINDS[0]
    _written: int = 0
    _digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path, store: Path, settings: RenderSettings) -> "ChangingCorpus":
        """Render missing clips, save an encoder, and start with every clip as rendered."""
        workers = settings.num_workers
        generate(settings.pool, clips=settings.clips, seed=settings.seed % SEED_RANGE, workers=workers)
        corpus = cls(folder=folder, store=store, pool=settings.pool, num_workers=workers)
        for name in ("videos", "json"):
            (folder / "corpus" / name).mkdir(parents=True)
        _save_encoder(folder / "encoder.safetensors")
        for split in SPLITS:
            for row in json.loads((corpus.pool / "json" / f"avqa-{split}.json").read_text()):
                corpus.rows.setdefault(row["video_id"], []).append(row)
        for index, video in enumerate(sorted(corpus.rows)):
            corpus.splits[video] = split_of(index)
            corpus._write_video(video, Content(media=video, stamp=0))
        corpus._write_annotations()
        return corpus

    def write_job(self, wait_s: float = 0.0) -> Path:
        """Write the job's YAML file for the current state."""
        values = {
            "name": JOB_NAME,
            "store": str(self.store),
            "encoder": "imagebind-demo",
            "weights": "encoder.safetensors",
            "corpora": [{"corpus": CORPUS, "root": "corpus"}],
            "index": {"retrieval": [mode.value for mode in INDEX.retrieval], "n": INDEX.n},
            "serving": {"kind": self.index_kind},
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
        path.write_text(yaml.safe_dump(values))
        return path

    def expected(self) -> Expected:
        """What an up-to-date store must hold."""
        clips, failed, questions = {}, {}, {}
        for video, content in self.contents.items():
            clip_id, digest = f"{CORPUS}/{video}", self._digests[video]
            if content.damage:
                failed[clip_id] = digest
                continue
            clips[clip_id] = (digest, content.media, self.splits[video])
            for row in self.rows[video]:
                question_id = f"{CORPUS}/{row['question_id']}"
                questions[question_id] = (clip_id, self.splits[video], row["anser"])
        return Expected(clips=clips, failed=failed, questions=questions)

    # -- change

    def change(self, rng: random.Random, switch_index: bool = False) -> list[str]:
        """Change the corpus at random and describe the changes.

        At least one file is replaced, and one repaired or damaged. `switch_index`: use the other index kind.
        """
        if switch_index:
            self.index_kind = INDEX_KINDS[1 - INDEX_KINDS.index(self.index_kind)]
        changes = [self._replace(rng), self._repair(rng) or self._damage(rng)]
        actions: list[Callable[[random.Random], str]]
        actions = [self._add, self._remove, self._replace, self._damage, self._repair]
        while len(list(filter(None, changes))) < CHANGES_PER_ROUND:
            changes.append(rng.choice(actions)(rng))
        changes += [
            self._change_answer(rng),
            self._remove_question(rng),
            self._restore_question(rng),
            self._change_split(rng),
        ]
        self._write_annotations()
        return [change for change in changes if change]

    def _videos_where(self, matches: Callable[[Content | None], bool]) -> list[str]:
        return [video for video in self.rows if matches(self.contents.get(video))]

    def _intact(self) -> list[str]:
        return self._videos_where(lambda content: content is not None and not content.damage)

    def _new_content(self, rng: random.Random, damage: str = "") -> Content:
        return Content(media=rng.choice(list(self.rows)), stamp=self._written + 1, damage=damage)

    def _replace(self, rng: random.Random) -> str:
        video = rng.choice(self._intact())
        self._write_video(video, self._new_content(rng))
        return f"replace {video}"

    def _add(self, rng: random.Random) -> str:
        absent = self._videos_where(lambda content: content is None)
        if not absent:
            return ""
        self._write_video(video := rng.choice(absent), self._new_content(rng))
        return f"add {video}"

    def _remove(self, rng: random.Random) -> str:
        absent, intact = self._videos_where(lambda content: content is None), self._intact()
        if len(absent) >= MAX_ABSENT or len(intact) <= MIN_STORED:
            return ""
        video = rng.choice(list(self.contents))
        del self.contents[video]
        (self.folder / "corpus" / "videos" / f"{video}.mp4").unlink()
        return f"remove {video}"

    def _damage(self, rng: random.Random) -> str:
        intact = self._intact()
        if len(self.contents) - len(intact) >= MAX_FAILED or len(intact) <= MIN_STORED:
            return ""
        video = rng.choice(intact)
        self._write_video(video, self._new_content(rng, rng.choice(("text", "cut", "empty"))))
        return f"damage {video}"

    def _repair(self, rng: random.Random) -> str:
        damaged = self._videos_where(lambda content: content is not None and bool(content.damage))
        if not damaged:
            return ""
        self._write_video(video := rng.choice(damaged), self._new_content(rng))
        return f"repair {video}"

    def _change_answer(self, rng: random.Random) -> str:
        row = rng.choice(self.rows[rng.choice(list(self.rows))])
        row["anser"] = rng.choice([word for word in ("yes", "no", "two", "three") if word != row["anser"]])
        return f"change the answer of {row['question_id']}"

    def _remove_question(self, rng: random.Random) -> str:
        # annotations define the clips: one without rows would be no clip
        many = [video for video, rows in self.rows.items() if len(rows) > 1]
        if not many:
            return ""
        video = rng.choice(many)
        row = self.rows[video].pop(rng.randrange(len(self.rows[video])))
        self.removed_questions.append((video, row))
        return f"remove question {row['question_id']}"

    def _restore_question(self, rng: random.Random) -> str:
        if len(self.removed_questions) < 2:
            return ""
        video, row = self.removed_questions.pop(rng.randrange(len(self.removed_questions) - 1))
        self.rows[video].append(row)
        return f"restore question {row['question_id']}"

    def _change_split(self, rng: random.Random) -> str:
        """Move a clip to another split: its features stay, its rows are rewritten."""
        train = [video for video, split in self.splits.items() if split == "train"]
        others = [video for video in self.splits if video not in train]
        video, split = rng.choice(train), rng.choice(SPLITS[1:])
        # keep enough training clips that the bank is never empty
        if len(train) <= MAX_FAILED + MAX_ABSENT + 1 or rng.random() < 0.5:
            video, split = rng.choice(others), "train"
        # an annotation file without rows would be rejected
        if sum(each == self.splits[video] for each in self.splits.values()) == 1:
            return ""
        self.splits[video] = split
        return f"move {video} to {split}"

    # -- files

    def _write_video(self, video: str, content: Content) -> None:
        self._written += 1
        path, content_bytes = self.folder / "corpus" / "videos" / f"{video}.mp4", content.to_bytes(self.pool)
        path.write_bytes(content_bytes)
        os.utime(path, (FIRST_MTIME_S + self._written, FIRST_MTIME_S + self._written))
        self.contents[video] = content
        self._digests[video] = hashlib.sha256(content_bytes).hexdigest()

    def _write_annotations(self) -> None:
        for split in SPLITS:
            rows = [
                row for video in sorted(self.rows) if self.splits[video] == split for row in self.rows[video]
            ]
            (self.folder / "corpus" / "json" / f"avqa-{split}.json").write_text(json.dumps(rows))


def _save_encoder(path: Path) -> None:
    """Save a random ImageBind, small enough to embed a round's clips in a second."""
    tower = TowerConfig(width=64, depth=2, heads=2)
    text = TowerConfig(width=48, depth=1, heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = ImageBind(ImageBindConfig(vision=tower, audio=tower, text=text, dim=32, patch=14))
    model.save(path)
