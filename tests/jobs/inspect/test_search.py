"""`store search` finds what a matrix product over all keys finds, and a caption finds its own clip.

Its page is one file that needs no network and in which text from outside does no harm.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from r2scp.jobs.cli.main import app
from r2scp.jobs.ingest.encoders import encoder_spec
from r2scp.jobs.inspect import search as store_search
from r2scp.jobs.inspect.search import Query, check_text, run_search, text_key
from r2scp.jobs.inspect.search_page import MAX_PICTURES, write_page
from r2scp.pipelines.demo.captions import VISION_GROUPS, caption, vision_labels
from r2scp.pipelines.demo.render import render_frames
from r2scp.pipelines.demo.scene import make_scene
from r2scp.pipelines.extraction.embed import Encoder, EncoderSpec, key_of
from r2scp.store.errors import FingerprintMismatch, StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table
from r2scp.store.search.vector_search import Hit

AT = datetime(2026, 1, 31, tzinfo=UTC)
CLIPS = 90
TEXT = "a dog barking"
HOSTILE = "folder/<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x1b[2J\u202egpj.mp4"
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def encoder(tiny_encoder: EncoderSpec) -> Encoder:
    return tiny_encoder.load()


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, tiny_encoder: EncoderSpec, write: Callable[..., None]
) -> FeatureStore:
    """Clips of random embeddings, in fragments; every 7th is deaf, every 11th blind. Read-only."""
    rng = np.random.default_rng(3)
    uri = str(tmp_path_factory.mktemp("searched") / "store")
    store = FeatureStore.create(uri, tiny_encoder.fingerprint, tiny_encoder.dim)
    rows = []
    for number in range(CLIPS):
        row: dict[str, Any] = {"clip_id": f"folder/{number:03d}", "corpus": "folder", "ingested_at": AT}
        row |= {
            "split": ("train", "train", "test")[number % 3],
            "duration_s": 4.0,
            "labels": [f"kind {number % 4}"],
        }
        row |= {"uri": f"/nowhere/{number}.mp4", "content_sha256": "0" * 64}
        for name, missing in (("audio", number % 7 == 6), ("visual", number % 11 == 10)):
            drawn_TD = rng.standard_normal((1 + number % 5, tiny_encoder.dim))
            tokens_TD = (drawn_TD / np.linalg.norm(drawn_TD, axis=1, keepdims=True)).astype(np.float16)
            row[name] = None if missing else list(tokens_TD)
            row[f"{name}_key"] = None if missing else key_of(tokens_TD)
            row[f"{name}_status"] = "absent" if missing else "present"
        rows.append(row)
    write(store, Table.CLIPS, rows, parts=3)
    return store


def brute_force(
    store: FeatureStore, name: str, key_D: np.ndarray, n: int, keep: Callable[[dict], bool] = lambda row: True
) -> list[tuple[str, float, int]]:
    """(clip, score, second) of the n best clips, with NumPy alone."""
    hits = []
    for row in store.clips().to_pylist():
        if row[name] is None or not keep(row):
            continue
        second = int((np.array(row[name], np.float32) @ key_D).argmax())
        hits.append((row["clip_id"], float(np.array(row[f"{name}_key"], np.float32) @ key_D), second))
    return sorted(hits, key=lambda hit: (-hit[1], hit[0]))[:n]


def check_same(hits: Sequence[dict[str, Any]], expected: list[tuple[str, float, int]]) -> None:
    assert [hit["clip_id"] for hit in hits] == [clip_id for clip_id, _, _ in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([score for _, score, _ in expected], abs=1e-5)
    assert [hit["second"] for hit in hits] == [second for _, _, second in expected]


def test_a_text_search_equals_a_matrix_product(store: FeatureStore, encoder: Encoder) -> None:
    key_D = text_key(encoder, TEXT)
    assert np.linalg.norm(key_D) == pytest.approx(1, abs=1e-5)
    found = run_search(store, Query(text=TEXT, most=7), encoder)
    assert list(found["found"]) == ["visual", "audio"]
    for name in ("visual", "audio"):
        check_same(found["found"][name], brute_force(store, name, key_D, 7))
    every = run_search(store, Query(text=TEXT, modality="audio", most=1000), encoder)["found"]
    assert list(every) == ["audio"]
    check_same(every["audio"], brute_force(store, "audio", key_D, 1000))


def test_a_condition_loses_no_hits(store: FeatureStore, encoder: Encoder) -> None:
    key_D = text_key(encoder, TEXT)
    query = Query(text=TEXT, most=5, where="split = 'test' -- and nothing else")
    found = run_search(store, query, encoder)
    assert found["matching"] == CLIPS // 3
    for name in ("visual", "audio"):
        check_same(
            found["found"][name], brute_force(store, name, key_D, 5, lambda row: row["split"] == "test")
        )
    empty = run_search(store, Query(text=TEXT, where="split = 'nowhere'"), encoder)
    assert empty["found"] == {"visual": [], "audio": []}
    assert empty["notes"] == ["no clip meets the condition"]


def test_clips_like_one_exclude_the_clip_itself(store: FeatureStore) -> None:
    row = store.clips(where="clip_id = 'folder/004'").to_pylist()[0]
    found = run_search(store, Query(like="folder/004", most=6))
    for name in ("visual", "audio"):
        key_D = np.array(row[f"{name}_key"], np.float32)
        check_same(found["found"][name], brute_force(store, name, key_D, 7)[1:])
    deaf = run_search(store, Query(like="folder/006", most=6))
    assert deaf["found"]["audio"] == []
    assert len(deaf["found"]["visual"]) == 6
    assert deaf["notes"] == ["the clip has no audio key"]
    with pytest.raises(StoreError, match="Did you mean folder/004"):
        run_search(store, Query(like="004"))


def test_hits_are_described_at_the_version_that_was_searched(
    store: FeatureStore, copy: Callable[[FeatureStore], FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy(store)
    expected = run_search(own, Query(like="folder/003", modality="visual", most=5))
    nearest = store_search._nearest

    def delete_hits(*arguments: Any) -> list[Hit]:
        hits = nearest(*arguments)
        own.commit(Table.CLIPS, [], {}, also_delete=[hit.clip_id for hit in hits])
        return hits

    monkeypatch.setattr(store_search, "_nearest", delete_hits)
    assert run_search(own, Query(like="folder/003", modality="visual", most=5)) == expected


@pytest.mark.parametrize(
    "where",
    ["splat = 'x'", "split = ", "split", "true) OR (true", "true; false", "", "a\udcff"],
)
def test_an_invalid_condition_is_one_clear_error(store: FeatureStore, where: str) -> None:
    result = call("store", "search", "--like", "folder/004", "--store", store.uri, "--where", where)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --where must be an SQL condition on clips")
    assert "clip_id, corpus" in result.stderr
    assert result.stderr.count("\n") == 1
    assert ".rs:" not in result.stderr, "a place in Lance's source"


@pytest.mark.parametrize("text", ["", "  \n\t", "\x00\x1b", "\u3000"])
def test_an_empty_text_is_refused(store: FeatureStore, tiny_weights: Path, text: str) -> None:
    with pytest.raises(UsageError, match="is empty"):
        check_text(text, [])
    result = call("store", "search", text, "--store", store.uri, "--weights", tiny_weights)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_a_text_that_is_too_long_is_noted() -> None:
    notes: list[str] = []
    check_text("dog " * 74, notes)
    assert notes == []
    check_text("dog " * 76, notes)
    assert "75 tokens" in notes[0]


def test_invalid_options_are_refused(store: FeatureStore, tiny_weights: Path) -> None:
    for words in ([], [TEXT, "--like", "folder/004"], [TEXT, "--in", "smell"]):
        result = call("store", "search", *words, "--store", store.uri)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
    with pytest.raises(FingerprintMismatch):
        run_search(store, Query(text=TEXT))  # its encoder is unknown
    wrong = call("store", "search", TEXT, "--store", store.uri, "--encoder", "imagebind-demo")
    assert wrong.exit_code == 1
    assert store.fingerprint in wrong.stderr


def test_an_encoder_that_is_not_needed_is_refused(store: FeatureStore, tiny_weights: Path) -> None:
    for words in (("--weights", tiny_weights), ("--device", "cpu"), ("--encoder", "imagebind-demo")):
        result = call("store", "search", "--like", "folder/004", "--store", store.uri, *words)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: --like needs no encoder")


def test_output_as_text_and_as_json(store: FeatureStore, encoder: Encoder, tiny_weights: Path) -> None:
    words = ["store", "search", TEXT, "--store", store.uri, "--weights", tiny_weights, "-n", 3]
    machine = call(*words, "--json")
    assert machine.exit_code == 0, machine.output
    assert machine.stdout.count("\n") == 1
    result = json.loads(machine.stdout)
    assert result["found"] == run_search(store, Query(text=TEXT, most=3), encoder)["found"]
    person = call(*words).stdout
    for hits in result["found"].values():
        assert all(hit["clip_id"] in person and f"{hit['score']:.3f}" in person for hit in hits)


def test_a_caption_finds_its_clip_far_better_than_chance(tmp_path: Path, write: Callable[..., None]) -> None:
    """Forty clips that the demo encoder was not trained on, each described by eight true phrases."""
    spec = encoder_spec("imagebind-demo", None, "cpu")
    encoder, scenes = spec.load(), [make_scene(4901, index) for index in range(40)]
    store = FeatureStore.create(str(tmp_path / "store"), spec.fingerprint, spec.dim)
    rows, second = [], 5
    for one in scenes:
        tokens_TD = encoder.visual(render_frames(one, np.array([second + 0.5]))).astype(np.float16)
        rows.append({"clip_id": one.video_id, "visual": list(tokens_TD), "visual_key": key_of(tokens_TD)})
    write(store, Table.CLIPS, rows)
    rng, found = np.random.default_rng(1), 0
    for one in scenes:
        chosen = rng.choice(len(VISION_GROUPS), 8, replace=False)
        query = Query(
            text=caption(VISION_GROUPS, vision_labels(one, second), chosen), modality="visual", most=3
        )
        hits = run_search(store, query, encoder)["found"]["visual"]
        found += one.video_id in {hit["clip_id"] for hit in hits}
    assert found >= 20, "chance: 3 of 40"


def test_the_page_shows_frames_of_files_that_are_as_stored(
    tmp_path: Path, rendered_media: dict[str, bytes], tiny_encoder: EncoderSpec, write: Callable[..., None]
) -> None:
    store = FeatureStore.create(str(tmp_path / "store"), tiny_encoder.fingerprint, tiny_encoder.dim)
    file = tmp_path / "both.mp4"
    file.write_bytes(rendered_media["both.mp4"])
    key_D = np.eye(tiny_encoder.dim, dtype=np.float32)[0]
    row = {"visual": [key_D.astype(np.float16)], "visual_key": key_D, "ingested_at": AT, "duration_s": 2.0}
    row |= {
        "uri": str(file),
        "labels": [HOSTILE],
        "split": HOSTILE,
        "corpus": HOSTILE,
        "visual_status": HOSTILE,
    }
    hashes = {"folder/good": sha256(file.read_bytes()).hexdigest(), HOSTILE: "1" * 64}
    rows = [row | {"clip_id": clip_id, "content_sha256": known} for clip_id, known in hashes.items()]
    rows.append(row | {"clip_id": "folder/gone", "uri": f"/nowhere/{HOSTILE}", "content_sha256": "2" * 64})
    rows.append(row | {"clip_id": "folder/untold", "uri": None, "labels": None, "content_sha256": None})
    write(store, Table.CLIPS, rows)
    found = run_search(store, Query(like="folder/gone", where="true"))
    found["query"]["like"] = HOSTILE
    page = write_page(found, tmp_path / "new" / "search.html")
    text = page.read_text()
    assert text.count("data:image/webp;base64,") == 1
    assert "not the one that was stored" in text
    assert "alert(1)" in text
    assert not re.search(r"<img src=x|<script>alert", text)
    assert not STEERING.search(text.replace("\n", ""))
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert "Content-Security-Policy" in text


def test_the_page_in_a_browser(
    store: FeatureStore, tmp_path: Path, tiny_weights: Path, open_page: Callable[..., Any]
) -> None:
    page = tmp_path / "search.html"
    words = ["store", "search", TEXT, "--store", store.uri, "--weights", tiny_weights, "--json"]
    result = call(*words, "-n", MAX_PICTURES + 5, "--html", page)
    assert result.exit_code == 0, result.output
    for width in (1280, 360):
        seen = open_page(page, width=width)
        assert (seen.errors, seen.page_errors, seen.requests, seen.dialogs) == ([], [], [], [])
        assert seen.ask("document.querySelectorAll('ol.neighbours li').length") == 2 * MAX_PICTURES
        assert seen.ask("document.documentElement.scrollWidth") <= width
        assert seen.ask("document.querySelectorAll('h1').length") == 1
    assert "5 more are not shown here" in page.read_text()


def test_a_page_that_cannot_be_written_is_one_clear_error(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    place = tmp_path / "file" / "search.html"
    result = call("store", "search", "--like", "folder/004", "--store", store.uri, "--html", place, "-n", 1)
    assert result.exit_code == 1
    assert "cannot write" in result.stderr
