"""Nothing of a recording's own sources stands in for it, however many there are, and no hit is lost for that.

The oracle is plain numpy over all rows of the store.
"""

from collections.abc import Callable

import numpy as np
import pytest

from r2scp.pipelines.extraction.embed import key_of
from r2scp.pipelines.recordings.retriever import RetrievalQuery, Retriever
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Modality, Retrieval, Table
from r2scp.store.search.bank import KEY_COLUMNS, BankScope, Search
from r2scp.store.sources import source_of

EVERYTHING = BankScope(splits=())
DIGEST = "a" * 64


def brute(store: FeatureStore, key_D: np.ndarray, how: Search, barred: set[str]) -> list[str]:
    """Ids of the best clips of other sources, by plain numpy."""
    column = KEY_COLUMNS[how.missing if how.retrieval is Retrieval.CROSS else how.missing.other]
    scored = [
        (-float(np.dot(np.array(row[column], np.float32), key_D)), row["clip_id"])
        for row in store.clips().to_pylist()
        if row[KEY_COLUMNS[how.missing]] is not None
        and row[column] is not None
        and source_of(row["clip_id"], row["source_id"]) not in barred
    ]
    return [clip_id for _, clip_id in sorted(scored)[: how.n]]


@pytest.mark.parametrize("retrieval", [Retrieval.CROSS, Retrieval.PAIRED])
@pytest.mark.parametrize("told", ["", "youtube5", "youtube1"])
def test_no_source_of_a_recording_stands_in(
    own_store: FeatureStore, write: Callable[..., None], retrieval: Retrieval, told: str
) -> None:
    rows = {row["clip_id"]: row for row in own_store.clips().to_pylist()}
    same = ["music-avqa/004", "avqa/009", "music-avqa/012"]  # one file, stored thrice, of three sources
    write(own_store, Table.CLIPS, [rows[name] | {"content_sha256": DIGEST} for name in same])
    barred = {rows[name]["source_id"] for name in same} | ({told} if told else set())
    key_D = np.array(rows["music-avqa/004"]["visual_key"], np.float32)
    how = Search(missing=Modality.AUDIO, retrieval=retrieval, n=12)
    [found] = Retriever(own_store, EVERYTHING).retrieve(
        [RetrievalQuery(key_D=key_D, content_sha256=DIGEST, source_id=told)], how
    )
    assert [one.clip_id for one in found] == brute(own_store, key_D, how, barred)
    assert len(found) == how.n


def test_recordings_asked_about_together_get_what_each_gets_alone(
    own_store: FeatureStore, write: Callable[..., None]
) -> None:
    rows = {row["clip_id"]: row for row in own_store.clips().to_pylist()}
    write(own_store, Table.CLIPS, [rows["avqa/009"] | {"content_sha256": DIGEST}])
    asked = [
        RetrievalQuery(key_D=np.array(rows[name]["visual_key"], np.float32), content_sha256=digest, source_id=source)
        for name, digest, source in (
            ("avqa/009", DIGEST, "youtube3"),
            ("music-avqa/012", "b" * 64, ""),
            ("avqa/001", "c" * 64, "youtube0"),
        )
    ]
    stand_ins = Retriever(own_store, EVERYTHING)
    how = Search(missing=Modality.AUDIO, retrieval=Retrieval.CROSS, n=5)
    together = stand_ins.retrieve(asked, how)
    for one, found in zip(asked, together, strict=True):
        [alone] = stand_ins.retrieve([one], how)
        assert [each.clip_id for each in found] == [each.clip_id for each in alone]
        assert len(found) == how.n


@pytest.mark.parametrize("retrieval", list(Retrieval))
def test_how_like_the_recording_a_clip_is_does_not_depend_on_the_search(
    question_store: FeatureStore, retrieval: Retrieval
) -> None:
    rows = {row["clip_id"]: row for row in question_store.clips().to_pylist()}
    key_D = np.array(rows["music-avqa/004"]["visual_key"], np.float32)
    how = Search(missing=Modality.AUDIO, retrieval=retrieval, n=99)
    [found] = Retriever(question_store, EVERYTHING).retrieve([RetrievalQuery(key_D=key_D, content_sha256="b" * 64)], how)
    alike = {one.clip_id: one.similarity for one in found}
    assert alike["music-avqa/004"] == pytest.approx(1, abs=1e-5)
    for clip_id, value in alike.items():
        if rows[clip_id]["visual"] is None:
            assert np.isnan(value)
        else:
            own_D = key_of(np.array(rows[clip_id]["visual"], np.float16))
            assert value == pytest.approx(float(own_D @ key_D), abs=1e-5)
