"""`store search --html`: the result as a page with pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2scp.jobs.console import absolute, progress_bar
from r2scp.jobs.html.render import page
from r2scp.jobs.html.thumbnails import Previews
from r2scp.jobs.inspect.search import HEADINGS
from r2scp.store.atomic_file import replace_file

MAX_PICTURES = 60  # per list: each takes a quarter of a second to decode
LEDE = (
    "The nearest clips, each at its best matching second. A score is the cosine of the query and the clip's "
    "key; visual and audio scores cannot be compared with each other."
)


def write_page(result: Mapping[str, Any], path: Path) -> Path:
    """Write the result of `run_search` as one HTML file, whole or not at all. Raises `R2SCPError`.

    Pictures show the files as they were stored; the page says if a file is gone or has changed.
    """
    query, previews, lists = result["query"], Previews(), []
    with progress_bar() as bar:
        total = sum(min(len(hits), MAX_PICTURES) for hits in result["found"].values())
        task = bar.add_task("pictures", total=total, note="clips")
        for modality, hits in result["found"].items():
            shown = []
            for hit in hits[:MAX_PICTURES]:
                preview = previews.preview(hit["uri"] or "", (hit["second"],), hit["content_sha256"])
                shown.append((hit, preview))
                bar.advance(task)
            rest = len(hits) - len(shown)
            lists.append({"id": modality, "heading": HEADINGS[modality], "hits": shown, "rest": rest})
    title = f"“{query['text']}”" if query["text"] is not None else f"clips like {query['like']}"
    values = {
        "heading": f"Search: {title}",
        "lede": LEDE,
        "notes": result["notes"],
        "links": [(each["id"], each["heading"]) for each in lists],
        "lists": lists,
        "provenance": [
            ("Store", result["store"]),
            ("Encoder", result["encoder"]),
            ("Version of clips", result["clips_version"]),
            ("Condition", query["where"] or "none"),
        ],
    }
    path = absolute(path)
    replace_file(path, page("search.html", values).encode())
    return path
