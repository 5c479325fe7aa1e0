"""`store show`: all that is known of one clip."""

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
#: Columns of `clips` by what they tell; `modalities` has those of the two streams.
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
ASKED = ("question_id", "split", "type", "question", "answer", "choices", "answer_index")
NEAR_NAMES = 5  # told where there is no such clip
LOOKED_AT = 64  # of the names that share most, compared letter by letter
PART = 3  # letters of the parts that names are compared by


def clip_facts(store: FeatureStore, clip_id: str) -> dict[str, Any]:
    """All that is known of one clip, as plain values.

    `clip` and `provenance` are None where it is in `failures` only, `failure` is None where it never failed,
    and `failure["past"]` tells whether it was stored since. Scores are cosines. Raises `StoreError` for a
    clip that is in neither, with names like it.
    """
    where = f"clip_id = {literal_id(clip_id)}"
    clip = _only(store.clips(where=where).drop_columns(list(KEYS)).to_pylist())
    failure = _only(store.failures(where).to_pylist())
    if clip is None and failure is None:
        near = ", ".join(near_names(store, clip_id))
        raise StoreError(
            f"there is no clip {clip_id!a} in {store.uri}, nor a failure of it"
            + (f"; near it: {near}" if near else "; `r2scp-pipe status` says what there is")
        )
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


def near_names(store: FeatureStore, clip_id: str, most: int = NEAR_NAMES) -> list[str]:
    """Ids of clips and failures that look like `clip_id`, the likest first."""
    wanted = clip_id.casefold()
    parts = {wanted[at : at + PART] for at in range(max(1, len(wanted) - PART + 1))}

    def names() -> Iterable[str]:
        for table in (Table.CLIPS, Table.FAILURES):
            for batch in store.dataset(table).to_batches(columns=["clip_id"]):
                yield from batch["clip_id"].to_pylist()

    shared = ((sum(part in name.casefold() for part in parts), name) for name in names())
    candidates = {name for count, name in heapq.nlargest(LOOKED_AT, shared) if count}
    compared = SequenceMatcher(None, b=wanted, autojunk=False)

    def likeness(name: str) -> tuple[float, str]:
        compared.set_seq1(name.casefold())
        return -compared.ratio(), name

    return sorted(candidates, key=likeness)[:most]


def show(told: Mapping[str, Any], neighbours: int) -> None:
    """`clip_facts` on stdout; of each list of neighbours so many."""
    parts: list[RenderableType] = []
    clip, failure = told["clip"], told["failure"]
    title = f"clip {cell(told['clip_id'])}"
    if clip is None:
        parts.append(Text(f"{title}: not stored", style="bold red"))
    else:
        pairs = [(name.replace("_", " "), _joined(clip[name])) for name in FACTS]
        parts += [facts(title, pairs), Text(), _streams(told["modalities"]), Text()]
        parts += [facts("where it came from", _origin(told["provenance"])), Text()]
    if failure is not None:
        said = "a failure that is past: it was stored since" if failure["past"] else "its last failure"
        parts += [facts(said, [(name.replace("_", " "), value) for name, value in failure.items()]), Text()]
    if told["questions"]:
        rows = [(q["type"], q["split"], q["question"], q["answer"]) for q in told["questions"]]
        title = f"{len(rows)} questions"
        parts += [listing(title, ("type", "split", "question", "answer"), rows, wide=2), Text()]
    for found in told["neighbours"]:
        parts += [_near(found, neighbours), Text(_footing(found), style="dim"), Text()]
    if clip is not None and not told["neighbours"]:
        parts.append(Text("no neighbours: `r2scp-pipe index` finds them", style="dim"))
    Console(markup=False, highlight=False, emoji=False).print(Group(*parts))


def literal_id(text: str) -> str:
    """A clip's id as SQL has it. Raises `StoreError` for bytes that are no text: no store holds them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"a clip's id must be text (UTF-8); got {text!a}") from error
    return sql_literal(text)


def _only(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    return rows[0] if rows else None


def _stream(clip: Mapping[str, Any], modality: Modality) -> dict[str, Any]:
    """One modality: status, what was expected and decoded, and how many tokens it has (0: none)."""
    measured = ("expected_frames", "decoded_frames")
    if modality is Modality.AUDIO:
        measured = ("expected_audio_s", "decoded_audio_s")
    expected, decoded = (clip[name] for name in measured)
    return {
        "status": clip[f"{modality}_status"],
        "expected": expected,
        "decoded": decoded,
        "unit": "frames" if modality is Modality.VISUAL else "s",
        "tokens": len(clip[modality.value] or ()),
    }


def _provenance(store: FeatureStore, clip: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: _plain(clip[name]) for name in PROVENANCE} | {"file": _file_now(clip), "run": None}
    if clip["run_id"]:
        where = f"run_id = {sql_literal(clip['run_id'])}"
        columns = ["kind", "status", "started_at", "ended_at"]
        run = _only(store.dataset(Table.RUNS).to_table(columns=columns, filter=where).to_pylist())
        told["run"] = run and {name: _plain(value) for name, value in run.items()}
    return told


def _file_now(clip: Mapping[str, Any]) -> str:
    """`as stored` (size and time of the last change are the same), `changed`, `gone`, or `elsewhere`."""
    uri = clip["uri"] or ""
    if not uri or "://" in uri:
        return "elsewhere"
    try:
        found = Path(uri).stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return "gone"
    same = (found.st_size, found.st_mtime_ns) == (clip["bytes"], clip["mtime_ns"])
    return "as stored" if same else "changed"


def _questions(store: FeatureStore, where: str) -> list[dict[str, Any]]:
    return sorted(store.questions(list(ASKED), where).to_pylist(), key=lambda row: row["question_id"])


def _neighbours(store: FeatureStore, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `index` found, each neighbour with its labels and split; None where it is in the store no more."""
    ids = sorted({hit for row in rows for side in ("nearest", "farthest") for hit in row[f"{side}_ids"]})
    columns = ["clip_id", "labels", "split", "source_id"]
    known = {}
    if ids:
        where = sql_in("clip_id", ids)
        known = {row["clip_id"]: row for row in store.clips(columns, where).to_pylist()}

    def hits(row: Mapping[str, Any], side: str) -> list[dict[str, Any]]:
        gone = dict.fromkeys(columns)
        pairs = zip(row[f"{side}_ids"], row[f"{side}_scores"], strict=True)
        return [known.get(hit, gone) | {"clip_id": hit, "score": score} for hit, score in pairs]

    told = [
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
    return sorted(told, key=lambda each: (each["missing"], each["retrieval"], each["index"]))


def _failure(failure: Mapping[str, Any], clip: Mapping[str, Any] | None) -> dict[str, Any]:
    past = clip is not None and failure["at"] <= clip["ingested_at"]
    transient = failure["reason"] in TRANSIENT_REASONS
    told = {name: _plain(value) for name, value in failure.items() if name not in ("clip_id", "corpus")}
    return {"past": past, "may_go_away_by_itself": transient} | told


def _plain(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else value


def _joined(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _streams(modalities: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    rows = []
    for name, stream in modalities.items():
        numbers = (stream["expected"], stream["decoded"])
        told = (None if number is None else f"{number:g} {stream['unit']}" for number in numbers)
        rows.append((name, stream["status"], *told, stream["tokens"]))
    return listing("modalities", ("", "status", "expected", "decoded", "tokens"), rows, wide=0)


def _origin(provenance: Mapping[str, Any]) -> list[tuple[str, object]]:
    changed = provenance["mtime_ns"]
    when = None if changed is None else datetime.fromtimestamp(changed / 1e9, UTC).isoformat(" ", "seconds")
    run, size = provenance["run"], provenance["bytes"]
    return [
        ("file", provenance["uri"]),
        ("the file now", provenance["file"] if provenance["uri"] else None),
        ("size", None if size is None else f"{size:,} bytes"),
        ("last change", when),
        ("content sha256", provenance["content_sha256"]),
        ("decoded by", provenance["decode_fingerprint"]),
        ("embedded by", provenance["encoder_fingerprint"]),
        ("run", provenance["run_id"] and f"{provenance['run_id']}" + (f" ({run['status']})" if run else "")),
        ("stored at", provenance["ingested_at"]),
    ]


def _near(found: Mapping[str, Any], most: int) -> RenderableType:
    gone = MODALITY_NAMES.get(found["missing"], str(cell(found["missing"])))
    shown = found["nearest"][:most]
    rows = [
        (at, hit["clip_id"], hit["score"], hit["split"], _joined(hit["labels"]))
        for at, hit in enumerate(shown, 1)
    ]
    title = (
        f"nearest where its {gone} is missing ({cell(found['retrieval'])}): "
        f"{len(rows)} of {len(found['nearest'])}"
    )
    return listing(title, ("", "clip", "score", "split", "labels"), rows, wide=1)


def _footing(found: Mapping[str, Any]) -> str:
    """What a careful reader should know of one list."""
    scope = found["settings"]
    splits = ", ".join(map(str, scope.get("bank_splits") or [])) or "all"
    corpora = ", ".join(map(str, scope.get("bank_corpora") or [])) or "all"
    own = found["nearest_own_source"]
    kept = "left out" if found["leak_guard"] else "AMONG THEM, as the leak guard was off"
    text = f"bank: splits {splits}; corpora {corpora}; clips version {found['bank_version']}"
    return str(cell(text + (f"; of its own source, {kept}: {own}" if own else "")))
