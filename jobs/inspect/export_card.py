"""The dataset card of an export: what is in the folder, for people and, in its header, for `datasets`."""

import json
from collections.abc import Mapping
from typing import Any

from r2scp.jobs.console import printable
from r2scp.store.schema import COLUMNS, Table, table_schema


def card(manifest: Mapping[str, Any]) -> str:
    """The README.md of an export, from its manifest."""
    parts = [_header(manifest), _body(manifest), _rows(manifest), _names(manifest)]
    parts += [_columns(manifest, name) for name in manifest["configs"]]
    return "\n".join(part for part in parts if part)


def _header(manifest: Mapping[str, Any]) -> str:
    """YAML that `datasets` reads. Split names in it are those of the files, which need no quoting."""
    lines = [
        "---",
        "# license:   (for you to fill in: it depends on the videos and on the encoder's weights)",
        "configs:",
    ]
    for config, splits in manifest["configs"].items():
        lines += [f"- config_name: {config}"]
        lines += ["  default: true"] if config == Table.CLIPS.value else []
        lines += ["  data_files:"]
        for split in splits:
            lines += [f'  - split: "{split}"', f'    path: "data/{config}/{split}-*.parquet"']
    return "\n".join([*lines, "---", ""])


def _body(manifest: Mapping[str, Any]) -> str:
    choice, versions = manifest["choice"], manifest["versions"]
    numbers = ", ".join(f"{table} {number}" for table, number in versions.items())
    lines = [
        "# Features of audio-visual clips",
        "",
        "Written by `r2scp-pipe store export`: embeddings of the pictures and the sound of videos, the",
        "questions about them, and each clip's neighbours, from one snapshot of a feature store. The videos",
        "are not included.",
        "",
        f"- Encoder: {escaped(manifest['encoder'])}, D = {manifest['dim']}",
        f"- Versions of the tables: {numbers}",
        f"- Sequences: {'one embedding per second' if choice['sequences'] else 'left out, keys only'}",
    ]
    for title, key in (("Corpora", "corpora"), ("Splits", "splits")):
        lines += [f"- {title}: {', '.join(map(escaped, choice[key])) or 'all'}"]
    lines += [f"- Condition on clips: {escaped(choice['where'])}"] if choice["where"] is not None else []
    lines += [
        "- Licence: **not stated.** It depends on the videos and on the encoder's weights (the published",
        "  weights of ImageBind are CC BY-NC-SA 4.0).",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'clips = load_dataset("THIS FOLDER", "clips", split="{next(iter(manifest["configs"]["clips"]))}")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _rows(manifest: Mapping[str, Any]) -> str:
    configs = manifest["configs"]
    names = list(dict.fromkeys(split for splits in configs.values() for split in splits))
    lines = ["| rows | " + " | ".join(configs) + " |", "|---|" + "---:|" * len(configs)]
    lines += [
        f"| {name} | " + " | ".join(f"{configs[c].get(name, 0):,}" for c in configs) + " |" for name in names
    ]
    return "\n".join([*lines, ""])


def _names(manifest: Mapping[str, Any]) -> str:
    """Splits whose files have other names; the column `split` has the original ones."""
    other = {name: split for name, split in manifest["split_names"].items() if name != split}
    if not other:
        return ""
    lines = ["Splits with names that files cannot have; the column `split` has the original names:", ""]
    lines += ["| files | split |", "|---|---|"]
    lines += [
        f"| {name} | {'null' if split is None else escaped(json.dumps(split))} |"
        for name, split in other.items()
    ]
    return "\n".join([*lines, ""])


def _columns(manifest: Mapping[str, Any], config: str) -> str:
    schema = table_schema(Table(config), manifest["dim"])
    omitted = () if manifest["choice"]["sequences"] else ("visual", "audio", "words", "choice_sentences")
    lines = [f"## {config}", "", "| column | type | description |", "|---|---|---|"]
    lines += [
        f"| `{column.name}` | {escaped(str(schema.field(column.name).type))} | {column.description} |"
        for column in COLUMNS[Table(config)]
        if column.name not in omitted
    ]
    return "\n".join([*lines, ""])


def escaped(text: str) -> str:
    """Text from outside as Markdown that only shows it; no address becomes a link."""
    return "".join(c if c.isalnum() or c in " -," else f"&#{ord(c)};" for c in printable(text))
