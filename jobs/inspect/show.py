"""`store show`: all that the store knows of one clip."""

import heapq
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from r2scp.jobs.inspect.tables import cell, facts, listing
from r2scp.store.commits import sql_in, sql_literal
from r2scp.store.errors import TRANSIENT_REASONS, StoreError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import MODALITY_NAMES, Modality, Table

KEYS = ("visual_key", "audio_key")
SEQUENCES = ("visual", "audio")
#: Columns of `clips`, without those of the two streams.
FACTS = ("corpus", "video_id", "source_id", "split", "labels", "duration_s", "decode_errors")
PROVENANCE = (
    "uri",
    "bytes",
    "mtime_ns",
    "content_sha256",
    "decode_fingerprint",
    "encoder_fingerprint",
    "run_id",
    "ingested_at",
)
QUESTION_COLUMNS = ("question_id", "split", "type", "question", "answer", "choices", "answer_index")
SUGGESTIONS = 5  # if there is no such clip
CANDIDATES = 64  # names with the most trigrams in common, which are then compared letter by letter


def clip_facts(store: FeatureStore, clip_id: str) -> dict[str, Any]:
    """All that the store knows of one clip, as plain values.

    `clip` and `provenance` are None for a clip that is only in `failures`, `failure` is None for one that
    never failed, and `failure["past"]` says whether it was stored since. Scores are cosines. Raises
    `StoreError`, with similar names, for a clip that is in neither.
    """
    where = f"clip_id = {clip_id_literal(clip_id)}"
    clip = _only(store.clips(where=where).drop_columns(list(KEYS)).to_pylist())
    failure = _only(store.failures(where).to_pylist())
    if clip is None and failure is None:
        hint = did_you_mean(store, clip_id) or "; `r2scp-pipe status` says what the store has"
        raise StoreError(f"there is no clip {clip_id!a} in {store.uri}, nor a failure of it{hint}")
    neighbours = store.neighbours(where=where).to_pylist() if Table.NEIGHBOURS in store.tables() else []
    return {
        "clip_id": clip_id,
        "store": store.uri,
        "encoder": store.fingerprint,
        "versions": store.versions(),
        "clip": clip and {name: clip[name] for name in FACTS},
        "modalities": clip and {modality.value: _stream(clip, modality) for modality in Modality},
        "provenance": clip and _provenance(store, clip),
        "questions": _questions(store, where),
        "neighbours": _neighbours(store, neighbours),
        "failure": failure and _failure(failure, clip),
    }


def did_you_mean(store: FeatureStore, clip_id: str) -> str:
    """What an error message says of similar ids; "" if there are none."""
    names = ", ".join(similar_ids(store, clip_id))
    return f". Did you mean {names}?" if names else ""


def similar_ids(store: FeatureStore, clip_id: str, limit: int = SUGGESTIONS) -> list[str]:
    """Ids of clips and failures that resemble `clip_id`, the most similar first."""
    query = clip_id.casefold()
    trigrams = {query[at : at + 3] for at in range(max(1, len(query) - 2))}

    def names() -> Iterable[str]:
        for table in (Table.CLIPS, Table.FAILURES):
            for batch in store.dataset(table).to_batches(columns=["clip_id"]):
                yield from batch["clip_id"].to_pylist()

    shared = ((sum(trigram in name.casefold() for trigram in trigrams), name) for name in names())
    candidates = {name for count, name in heapq.nlargest(CANDIDATES, shared) if count}
    matcher = SequenceMatcher(None, b=query, autojunk=False)

    def order(name: str) -> tuple[float, str]:
        matcher.set_seq1(name.casefold())
        return -matcher.ratio(), name

    return sorted(candidates, key=order)[:limit]


def show(result: Mapping[str, Any], neighbours: int) -> None:
    """Print the result of `clip_facts`, with up to so many `neighbours` per list."""
    parts: list[RenderableType] = []
    clip, failure = result["clip"], result["failure"]
    title = f"clip {cell(result['clip_id'])}"
    if clip is None:
        parts.append(Text(f"{title}: not stored", style="bold red"))
    else:
        pairs = [(name.replace("_", " "), _joined(clip[name])) for name in FACTS]
        parts += [facts(title, pairs), Text(), _streams(result["modalities"]), Text()]
        parts += [facts("provenance", _origin(result["provenance"])), Text()]
    if failure is not None:
        title = "past failure, stored since" if failure["past"] else "last failure"
        parts += [facts(title, [(name.replace("_", " "), value) for name, value in failure.items()]), Text()]
    if result["questions"]:
        rows = [(q["type"], q["split"], q["question"], q["answer"]) for q in result["questions"]]
        title = f"{len(rows)} questions"
        parts += [listing(title, ("type", "split", "question", "answer"), rows, wide=2), Text()]
    for hits in result["neighbours"]:
        parts += [_neighbour_listing(hits, neighbours), Text(_bank_note(hits), style="dim"), Text()]
    if clip is not None and not result["neighbours"]:
        parts.append(Text("no neighbours: `r2scp-pipe index` computes them", style="dim"))
    Console(markup=False, highlight=False, emoji=False).print(Group(*parts))


def clip_id_literal(text: str) -> str:
    """A clip id as an SQL literal. Raises `StoreError` for what is not valid text, and thus in no store."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"a clip id must be valid UTF-8 text; got {text!a}") from error
    return sql_literal(text)


def _only(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    return rows[0] if rows else None


def _stream(clip: Mapping[str, Any], modality: Modality) -> dict[str, Any]:
    """One modality: status, how much was expected and decoded, and the number of tokens."""
    columns = ("expected_frames", "decoded_frames")
    if modality is Modality.AUDIO:
        columns = ("expected_audio_s", "decoded_audio_s")
    expected, decoded = (clip[name] for name in columns)
    return {
        "status": clip[f"{modality}_status"],
        "expected": expected,
        "decoded": decoded,
        "unit": "frames" if modality is Modality.VISUAL else "s",
        "tokens": len(clip[modality.value] or ()),
    }


def _provenance(store: FeatureStore, clip: Mapping[str, Any]) -> dict[str, Any]:
    run = None
    if clip["run_id"]:
        where = f"run_id = {sql_literal(clip['run_id'])}"
        columns = ["kind", "status", "started_at", "ended_at"]
        run = _only(store.dataset(Table.RUNS).to_table(columns=columns, filter=where).to_pylist())
    return {
        **{name: _plain(clip[name]) for name in PROVENANCE},
        "file": _file_state(clip),
        "run": run and {name: _plain(value) for name, value in run.items()},
    }


def _file_state(clip: Mapping[str, Any]) -> str:
    """`as stored` (same size and time of the last change), `changed`, `gone`, or `elsewhere`."""
    uri = clip["uri"] or ""
    if not uri or "://" in uri:
        return "elsewhere"
    try:
        facts = Path(uri).stat()
    except (OSError, ValueError):  # ValueError: not a possible file name
        return "gone"
    same = (facts.st_size, facts.st_mtime_ns) == (clip["bytes"], clip["mtime_ns"])
    return "as stored" if same else "changed"


def _questions(store: FeatureStore, where: str) -> list[dict[str, Any]]:
    rows = store.questions(list(QUESTION_COLUMNS), where).to_pylist()
    return sorted(rows, key=lambda row: row["question_id"])


def _neighbours(store: FeatureStore, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored hits, each with its labels and split; None for a clip that is no longer in the store."""
    ids = sorted({hit for row in rows for side in ("nearest", "farthest") for hit in row[f"{side}_ids"]})
    columns = ["clip_id", "labels", "split", "source_id"]
    clips = store.clips(columns, sql_in("clip_id", ids)).to_pylist() if ids else []
    clip_of = {row["clip_id"]: row for row in clips}

    def hits(row: Mapping[str, Any], side: str) -> list[dict[str, Any]]:
        unknown = dict.fromkeys(columns)
        pairs = zip(row[f"{side}_ids"], row[f"{side}_scores"], strict=True)
        return [clip_of.get(hit, unknown) | {"clip_id": hit, "score": score} for hit, score in pairs]

    lists = [
        {
            "missing": row["missing"],
            "retrieval": row["retrieval"],
            "leak_guard": row["leak_guard"],
            "nearest": hits(row, "nearest"),
            "farthest": hits(row, "farthest"),
            "nearest_own_source": row["nearest_own_source"],
            "farthest_own_source": row["farthest_own_source"],
            "settings": json.loads(row["settings"] or "{}"),
            "index": row["index"],
            "bank_version": row["bank_version"],
            "run_id": row["run_id"],
            "at": _plain(row["at"]),
        }
        for row in rows
    ]
    return sorted(lists, key=lambda hits: (hits["missing"], hits["retrieval"], hits["index"]))


def _failure(failure: Mapping[str, Any], clip: Mapping[str, Any] | None) -> dict[str, Any]:
    past = clip is not None and failure["at"] <= clip["ingested_at"]
    transient = failure["reason"] in TRANSIENT_REASONS
    columns = {name: _plain(value) for name, value in failure.items() if name not in ("clip_id", "corpus")}
    return {"past": past, "may_go_away_by_itself": transient} | columns


def _plain(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else value


def _joined(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _streams(modalities: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    rows = []
    for name, stream in modalities.items():
        amounts = (
            None if stream[key] is None else f"{stream[key]:g} {stream['unit']}"
            for key in ("expected", "decoded")
        )
        rows.append((name, stream["status"], *amounts, stream["tokens"]))
    return listing("modalities", ("", "status", "expected", "decoded", "tokens"), rows, wide=0)


def _origin(provenance: Mapping[str, Any]) -> list[tuple[str, object]]:
    changed = provenance["mtime_ns"]
    when = None if changed is None else datetime.fromtimestamp(changed / 1e9, UTC).isoformat(" ", "seconds")
    run, size = provenance["run"], provenance["bytes"]
    return [
        ("file", provenance["uri"]),
        ("file today", provenance["file"] if provenance["uri"] else None),
        ("size", None if size is None else f"{size:,} bytes"),
        ("last change", when),
        ("content sha256", provenance["content_sha256"]),
        ("decoded by", provenance["decode_fingerprint"]),
        ("embedded by", provenance["encoder_fingerprint"]),
        ("run", provenance["run_id"] and f"{provenance['run_id']}" + (f" ({run['status']})" if run else "")),
        ("stored at", provenance["ingested_at"]),
    ]


def _neighbour_listing(hits: Mapping[str, Any], limit: int) -> RenderableType:
    modality = MODALITY_NAMES.get(hits["missing"], str(cell(hits["missing"])))
    rows = [
        (rank, hit["clip_id"], hit["score"], hit["split"], _joined(hit["labels"]))
        for rank, hit in enumerate(hits["nearest"][:limit], 1)
    ]
    count = f"{len(rows)} of {len(hits['nearest'])}"
    title = f"nearest clips if {modality} is missing ({cell(hits['retrieval'])}): {count}"
    return listing(title, ("", "clip", "score", "split", "labels"), rows, wide=1)


def _bank_note(hits: Mapping[str, Any]) -> str:
    """The bank that was searched, and same-source hits."""
    scope = hits["settings"]
    splits = ", ".join(map(str, scope.get("bank_splits") or [])) or "all"
    corpora = ", ".join(map(str, scope.get("bank_corpora") or [])) or "all"
    text = f"bank: splits {splits}; corpora {corpora}; clips version {hits['bank_version']}"
    if own_source := hits["nearest_own_source"]:
        guard = "excluded" if hits["leak_guard"] else "INCLUDED, as the leak guard was off"
        text += f"; same-source hits {guard}: {own_source}"
    return str(cell(text))
