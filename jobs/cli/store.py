"""The commands of `r2scp-pipe store`. Each imports its module when it is called, so that --help is quick."""

from pathlib import Path
from typing import Annotated

import typer

from r2scp.jobs.cli.options import (
    DEFAULT_STORE,
    AtOption,
    DeviceOption,
    FingerprintOption,
    JsonOption,
    StorageOption,
    StoreEncoderOption,
    StoreOption,
    WeightsOption,
    open_store,
)
from r2scp.jobs.console import exit_on_error, print_result
from r2scp.store.errors import UsageError

store_app = typer.Typer(
    help="Inspect a store: show a clip, search by text, export as Parquet.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@store_app.command("show")
def store_show(
    clip: Annotated[str, typer.Argument(help="The clip id, such as my-videos/party.mp4.")],
    neighbours: Annotated[
        int, typer.Option("--neighbours", "-n", min=1, help="Number of neighbours to show per list.")
    ] = 3,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    at: AtOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one clip: statuses, origin, questions, neighbours, failure."""
    with exit_on_error():
        from r2scp.jobs.inspect.show import clip_facts, show

        facts = clip_facts(open_store(store, fingerprint, storage_option, at), clip)
        print_result(facts, as_json) if as_json else show(facts, neighbours)


@store_app.command("search")
def store_search(
    text: Annotated[str | None, typer.Argument(help='Text to search for, such as "a dog barking".')] = None,
    like: Annotated[
        str | None,
        typer.Option("--like", metavar="CLIP", help="Search by this clip instead of a text."),
    ] = None,
    modality: Annotated[
        str, typer.Option("--in", help="visual, audio or both, each ranked separately.")
    ] = "both",
    most: Annotated[int, typer.Option("-n", min=1, help="Number of clips per modality.")] = 10,
    where: Annotated[
        str | None, typer.Option("--where", help="SQL condition on clips, such as \"split = 'train'\".")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with thumbnails.")
    ] = None,
    encoder: StoreEncoderOption = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    at: AtOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search clips by a text or by a clip in the store. Texts go through the encoder's text tower."""
    with exit_on_error():
        from r2scp.jobs.ingest.encoders import encoder_of, pick_device
        from r2scp.jobs.inspect.search import Query, run_search, show
        from r2scp.jobs.inspect.search_page import write_page

        if like is not None and (encoder or weights or device):
            raise UsageError("--like needs no encoder; leave out --encoder, --weights and --device")
        query = Query(text=text, like=like, modality=modality, most=most, where=where)
        opened = open_store(store, fingerprint, storage_option, at)
        spec = None if text is None else encoder_of(opened, encoder, weights, pick_device(device))
        result = run_search(opened, query, spec and spec.load())
        if html is not None:
            write_page(result, html)
        print_result(result, as_json) if as_json else show(result)


@store_app.command("export")
def store_export(
    folder: Annotated[Path, typer.Argument(help="Folder: new, empty, or with this same export.")],
    corpus: Annotated[
        list[str] | None, typer.Option(help="Export only this corpus (default: all). Repeatable.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Export only this split (default: all). Repeatable.")
    ] = None,
    sequences: Annotated[
        bool, typer.Option(help="Include embeddings per second and per word, not only the keys.")
    ] = True,
    where: Annotated[
        str | None, typer.Option("--where", help="SQL condition on clips; applies to their questions too.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    at: AtOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export one snapshot as Parquet for `datasets`. Clips, questions and neighbours."""
    with exit_on_error():
        from r2scp.jobs.inspect.export import ExportOptions, export_with_progress

        opened = open_store(store, fingerprint, storage_option, at)
        request = ExportOptions(
            corpora=tuple(corpus or ()), splits=tuple(split or ()), sequences=sequences, where=where
        )
        print_result(export_with_progress(opened, folder, request), as_json)
