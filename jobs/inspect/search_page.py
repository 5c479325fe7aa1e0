"""`store search --html`: what was found as a page with pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2scp.jobs.console import absolute, progress_bar
from r2scp.jobs.html.render import page
from r2scp.jobs.html.thumbnails import Previews
from r2scp.jobs.inspect.search import HEADINGS
from r2scp.store.atomic_file import replace_file

MOST_DRAWN = 60  # clips of each list: a quarter of a second each to decode
LEDE = (
    "The nearest clips, each with the second that fits best. A score is the cosine of the query and the "
    "clip's key; scores by sight and by sound cannot be compared with each other."
)


def write_page(found: Mapping[str, Any], path: Path) -> Path:
    """What `run_search` found as one HTML file, whole or not at all. Raises `R2SCPError`.

    Pictures are of the files as the store knows them; where one is gone or has changed, the page says so.
    """
    query, previews, lists = found["query"], Previews(), []
    with progress_bar() as bar:
        total = sum(min(len(hits), MOST_DRAWN) for hits in found["found"].values())
        task = bar.add_task("pictures", total=total, note="clips")
        for modality, hits in found["found"].items():
            drawn = []
            for hit in hits[:MOST_DRAWN]:
                drawn.append(
                    (hit, previews.preview(hit["uri"] or "", (hit["second"],), hit["content_sha256"]))
                )
                bar.advance(task)
            heading = HEADINGS[modality].capitalize()
            lists.append({"id": modality, "heading": heading, "hits": drawn, "rest": len(hits) - len(drawn)})
    asked = f"“{query['text']}”" if query["text"] is not None else f"clips like {query['like']}"
    values = {
        "heading": f"Search: {asked}",
        "lede": LEDE,
        "notes": found["notes"],
        "links": [(each["id"], each["heading"]) for each in lists],
        "lists": lists,
        "provenance": [
            ("Store", found["store"]),
            ("Encoder", found["encoder"]),
            ("Version of clips", found["clips_version"]),
            ("Condition", query["where"] or "none"),
        ],
    }
    place = absolute(path)
    replace_file(place, page("search.html", values).encode())
    return place
