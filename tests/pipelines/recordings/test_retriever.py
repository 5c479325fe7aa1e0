"""No clip of a recording's own sources is retrieved, however many there are, and no other hit is lost.

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


def brute(store: FeatureStore, key_D: np.ndarray, search: Search, excluded: set[str]) -> list[str]:
    """Ids of the best clips of other sources, by plain numpy."""
    column = KEY_COLUMNS[search.missing if search.retrieval is Retrieval.CROSS else search.missing.other]
    scored = [
        (-float(np.dot(np.array(row[column], np.float32), key_D)), row["clip_id"])
        for row in store.clips().to_pylist()
        if row[KEY_COLUMNS[search.missing]] is not None
        and row[column] is not None
        and source_of(row["clip_id"], row["source_id"]) not in excluded
    ]
    return [clip_id for _, clip_id in sorted(scored)[: search.n]]


@pytest.mark.parametrize("retrieval", [Retrieval.CROSS, Retrieval.PAIRED])
@pytest.mark.parametrize("source_id", ["", "youtube5", "youtube1"])
def test_no_clip_of_the_recordings_sources_is_retrieved(
    own_store: FeatureStore, write: Callable[..., None], retrieval: Retrieval, source_id: str
) -> None:
    rows = {row["clip_id"]: row for row in own_store.clips().to_pylist()}
    same = ["music-avqa/004", "avqa/009", "music-avqa/012"]  # one file, stored thrice, of three sources
    write(own_store, Table.CLIPS, [rows[name] | {"content_sha256": DIGEST} for name in same])
    excluded = {rows[name]["source_id"] for name in same} | ({source_id} if source_id else set())
    key_D = np.array(rows["music-avqa/004"]["visual_key"], np.float32)
    search = Search(missing=Modality.AUDIO, retrieval=retrieval, n=12)
    [clips] = Retriever(own_store, EVERYTHING).retrieve(
        [RetrievalQuery(key_D=key_D, content_sha256=DIGEST, source_id=source_id)], search
    )
    assert [each.clip_id for each in clips] == brute(own_store, key_D, search, excluded)
    assert len(clips) == search.n


def test_a_batch_of_queries_gives_what_each_gives_alone(
    own_store: FeatureStore, write: Callable[..., None]
) -> None:
    rows = {row["clip_id"]: row for row in own_store.clips().to_pylist()}
    write(own_store, Table.CLIPS, [rows["avqa/009"] | {"content_sha256": DIGEST}])
    queries = [
        RetrievalQuery(
            key_D=np.array(rows[name]["visual_key"], np.float32), content_sha256=digest, source_id=source
        )
        for name, digest, source in (
            ("avqa/009", DIGEST, "youtube3"),
            ("music-avqa/012", "b" * 64, ""),
            ("avqa/001", "c" * 64, "youtube0"),
        )
    ]
    retriever = Retriever(own_store, EVERYTHING)
    search = Search(missing=Modality.AUDIO, retrieval=Retrieval.CROSS, n=5)
    together = retriever.retrieve(queries, search)
    for each, clips in zip(queries, together, strict=True):
        [alone] = retriever.retrieve([each], search)
        assert [each.clip_id for each in clips] == [each.clip_id for each in alone]
        assert len(clips) == search.n


@pytest.mark.parametrize("retrieval", list(Retrieval))
def test_similarity_does_not_depend_on_the_kind_of_search(
    question_store: FeatureStore, retrieval: Retrieval
) -> None:
    rows = {row["clip_id"]: row for row in question_store.clips().to_pylist()}
    key_D = np.array(rows["music-avqa/004"]["visual_key"], np.float32)
    search = Search(missing=Modality.AUDIO, retrieval=retrieval, n=99)
    [clips] = Retriever(question_store, EVERYTHING).retrieve(
        [RetrievalQuery(key_D=key_D, content_sha256="b" * 64)], search
    )
    similarities = {each.clip_id: each.similarity for each in clips}
    assert similarities["music-avqa/004"] == pytest.approx(1, abs=1e-5)
    for clip_id, value in similarities.items():
        if rows[clip_id]["visual"] is None:
            assert np.isnan(value)
        else:
            own_D = key_of(np.array(rows[clip_id]["visual"], np.float16))
            assert value == pytest.approx(float(own_D @ key_D), abs=1e-5)
