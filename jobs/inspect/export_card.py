"""The dataset card of an export: what is in the folder, for a person and, in its header, for `datasets`."""

import json
from collections.abc import Mapping
from typing import Any

from r2scp.jobs.console import printable
from r2scp.store.schema import Table, clips_schema, neighbours_schema, questions_schema

#: What each column is; D is the encoder's width, T the seconds of a clip, W the words of a question.
MEANINGS: dict[str, dict[str, str]] = {
    "clips": {
        "clip_id": "key: corpus and video",
        "corpus": "which corpus it is of",
        "video_id": "its name in the corpus",
        "source_id": "what it was cut from: clips of one source must not stand in for each other",
        "split": "as the corpus has it",
        "labels": "as the corpus has them",
        "uri": "where the file was when it was stored; a place on somebody's machine",
        "content_sha256": "of the file",
        "bytes": "of the file",
        "mtime_ns": "last change of the file, nanoseconds since 1970",
        "duration_s": "seconds",
        "visual": "(T, D) float16, one embedding of unit length a second; null where there is none",
        "audio": "(T, D) float16, of the two seconds of sound around the middle of each second",
        "visual_key": "(D,) float32, the mean of `visual`, of unit length",
        "audio_key": "(D,) float32, the mean of `audio`, of unit length",
        "visual_status": "present, absent, partial or corrupt",
        "audio_status": "present, absent, partial or corrupt",
        "expected_frames": "one a second",
        "decoded_frames": "of these",
        "expected_audio_s": "seconds",
        "decoded_audio_s": "seconds",
        "decode_errors": "what the decoder complained of",
        "decode_fingerprint": "of the decoder and its settings",
        "encoder_fingerprint": "of the encoder's weights",
        "run_id": "of the run that stored it",
        "ingested_at": "when it was stored",
    },
    "questions": {
        "question_id": "key",
        "clip_id": "of the clip that it is about",
        "corpus": "which corpus it is of",
        "split": "as the corpus has it; not always that of its clip",
        "question": "as it is asked",
        "type": "as the corpus has it",
        "answer": "the right one",
        "choices": "to choose from, where the corpus gives them; may hold null",
        "answer_index": "of the right choice; -1 where there are none",
        "words": "(W, D) float16, an embedding a token",
        "sentence": "(D,) float32, of the whole question",
        "choice_sentences": "(choices, D) float16, of the question with each choice; zeros for a null",
        "encoder_fingerprint": "of the encoder's weights",
        "run_id": "of the run that stored it",
        "ingested_at": "when it was stored",
    },
    "neighbours": {
        "neighbour_id": "key: clip, missing modality, way of search, index",
        "clip_id": "whose neighbours",
        "missing": "audio or visual: what is looked for; the other is the query",
        "retrieval": "whose key was compared: cross (of the missing modality), paired (of the same), hybrid",
        "leak_guard": "false: hits may be of the clip's own source",
        "nearest_ids": "clips, best first; they may lie outside this export",
        "nearest_scores": "cosines",
        "farthest_ids": "clips, farthest first",
        "farthest_scores": "cosines",
        "nearest_own_source": "how many of the clip's own source the guard left out",
        "farthest_own_source": "how many of the clip's own source the guard left out",
        "settings": "JSON: bank, number, weight, guard",
        "index": "of settings and program",
        "bank_fingerprint": "of the clips that were searched",
        "bank_version": "of the table of clips, when it was searched",
        "query_fingerprint": "of the clip's source and key",
        "run_id": "of the run that found them",
        "at": "when they were found",
    },
}


def card(account: Mapping[str, Any]) -> str:
    """README.md of an export, from its account."""
    parts = [_header(account), _body(account), _rows(account), _names(account)]
    parts += [_columns(account, name) for name in account["configs"]]
    return "\n".join(part for part in parts if part)


def _header(account: Mapping[str, Any]) -> str:
    """YAML that `datasets` reads. The names of splits in it are ours."""
    lines = [
        "---",
        "# license:   (yours to say: it depends on the videos and on the encoder's weights)",
        "configs:",
    ]
    for config, splits in account["configs"].items():
        lines += [f"- config_name: {config}"]
        lines += ["  default: true"] if config == Table.CLIPS.value else []
        lines += ["  data_files:"]
        for split in splits:
            lines += [f'  - split: "{split}"', f'    path: "data/{config}/{split}-*.parquet"']
    return "\n".join([*lines, "---", ""])


def _body(account: Mapping[str, Any]) -> str:
    choice, versions = account["choice"], account["versions"]
    said = ", ".join(f"{table} {number}" for table, number in versions.items())
    lines = [
        "# Features of audio-visual clips",
        "",
        "Made by `r2scp-pipe store export`: embeddings of the pictures and the sound of videos, the",
        "questions about them, and each clip's neighbours, as they were at one moment of a feature store. No",
        "video is in here.",
        "",
        f"- Encoder: {inert(account['encoder'])}, D = {account['dim']}",
        f"- Versions of the tables: {said}",
        f"- Sequences: {'one embedding a second' if choice['sequences'] else 'left out, keys only'}",
    ]
    for title, key in (("Corpora", "corpora"), ("Splits", "splits")):
        lines += [f"- {title}: {', '.join(map(inert, choice[key])) or 'all'}"]
    lines += [f"- Condition on clips: {inert(choice['where'])}"] if choice["where"] is not None else []
    lines += [
        "- Licence: **not said here.** It depends on the videos and on the encoder's weights (the published",
        "  weights of ImageBind are CC BY-NC-SA 4.0).",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'clips = load_dataset("THIS FOLDER", "clips", split="{next(iter(account["configs"]["clips"]))}")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _rows(account: Mapping[str, Any]) -> str:
    configs = account["configs"]
    names = list(dict.fromkeys(split for splits in configs.values() for split in splits))
    lines = ["| rows | " + " | ".join(configs) + " |", "|---|" + "---:|" * len(configs)]
    lines += [
        f"| {name} | " + " | ".join(f"{configs[c].get(name, 0):,}" for c in configs) + " |" for name in names
    ]
    return "\n".join([*lines, ""])


def _names(account: Mapping[str, Any]) -> str:
    """Splits whose files are called otherwise; the column `split` has their true names."""
    other = {name: split for name, split in account["split_names"].items() if name != split}
    if not other:
        return ""
    lines = ["Splits with names that files cannot have; the column `split` says what they are:", ""]
    lines += ["| files | split |", "|---|---|"]
    lines += [
        f"| {name} | {'null' if split is None else inert(json.dumps(split))} |"
        for name, split in other.items()
    ]
    return "\n".join([*lines, ""])


def _columns(account: Mapping[str, Any], config: str) -> str:
    dim = account["dim"]
    schema = {
        "clips": clips_schema(dim),
        "questions": questions_schema(dim),
        "neighbours": neighbours_schema(),
    }[config]
    gone = () if account["choice"]["sequences"] else ("visual", "audio", "words", "choice_sentences")
    lines = [f"## {config}", "", "| column | type | what it is |", "|---|---|---|"]
    lines += [
        f"| `{field.name}` | {inert(str(field.type))} | {MEANINGS[config][field.name]} |"
        for field in schema
        if field.name not in gone
    ]
    return "\n".join([*lines, ""])


def inert(text: str) -> str:
    """Text from outside as Markdown that shows it and does nothing else; no address becomes a link."""
    plain = " -,"
    return "".join(c if c.isalnum() or c in plain else f"&#{ord(c)};" for c in printable(text))
