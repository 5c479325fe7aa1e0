"""The commands of `r2scp-pipe store`; like those of `cli`, each imports its module when it is called."""

from pathlib import Path
from typing import Annotated

import typer

from r2scp.jobs.console import (
    DEFAULT_STORE,
    AtOption,
    DeviceOption,
    EncoderName,
    FingerprintOption,
    JsonOption,
    StorageOption,
    StoreOption,
    WeightsOption,
    print_result,
    exit_on_error,
    storage_options,
)
from r2scp.store.errors import UsageError

store_app = typer.Typer(
    help="Look into a store: one clip, a search by text, or a copy of it as Parquet.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@store_app.command("show")
def store_show(
    clip: Annotated[str, typer.Argument(help="The clip's id, such as my-videos/party.mp4.")],
    neighbours: Annotated[
        int, typer.Option("--neighbours", "-n", min=1, help="How many of each list to print.")
    ] = 3,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    at: AtOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show all that is known of one clip: statuses, where it came from, questions, neighbours, failure."""
    with exit_on_error():
        from r2scp.jobs.inspect.show import clip_facts, show
        from r2scp.store.feature_store import FeatureStore

        opened = FeatureStore.open(store, fingerprint, storage_options(storage_option))
        told = clip_facts(opened.at(at) if at else opened, clip)
        print_result(told, as_json) if as_json else show(told, neighbours)


@store_app.command("search")
def store_search(
    text: Annotated[str | None, typer.Argument(help='What to look for, such as "a dog barking".')] = None,
    like: Annotated[
        str | None, typer.Option("--like", metavar="CLIP", help="Clips like this one, instead of a text.")
    ] = None,
    modality: Annotated[
        str, typer.Option("--in", help="visual, audio or both: each is ranked by itself.")
    ] = "both",
    most: Annotated[int, typer.Option("-n", min=1, help="How many clips of each modality.")] = 10,
    where: Annotated[
        str | None, typer.Option("--where", help="An SQL condition on clips, such as \"split = 'train'\".")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with thumbnails.")
    ] = None,
    encoder: Annotated[
        EncoderName | None,
        typer.Option("--encoder", help="Which ImageBind; the one that fits the store by default."),
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    at: AtOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find clips by a text, through the encoder's text tower, or clips like one that is there."""
    with exit_on_error():
        from r2scp.jobs.ingest.encoders import encoder_of, pick_device
        from r2scp.jobs.inspect.search import Query, run_search, show
        from r2scp.jobs.inspect.search_page import write_page
        from r2scp.store.feature_store import FeatureStore

        if like is not None and (encoder or weights or device):
            raise UsageError("--like needs no encoder; leave out --encoder, --weights and --device")
        query = Query(text=text, like=like, modality=modality, most=most, where=where)
        opened = FeatureStore.open(store, fingerprint, storage_options(storage_option))
        opened = opened.at(at) if at else opened
        spec = None if text is None else encoder_of(opened, encoder, weights, pick_device(device))
        found = run_search(opened, query, spec and spec.load())
        if html is not None:
            write_page(found, html)
        print_result(found, as_json) if as_json else show(found)


@store_app.command("export")
def store_export(
    folder: Annotated[
        Path, typer.Argument(help="A new or empty folder, or one that holds this very export.")
    ],
    corpus: Annotated[
        list[str] | None, typer.Option(help="Only of this corpus; all by default. Repeatable.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Only of this split; all by default. Repeatable.")
    ] = None,
    sequences: Annotated[
        bool, typer.Option(help="Also the embeddings of each second and word, not the keys alone.")
    ] = True,
    where: Annotated[
        str | None, typer.Option("--where", help="An SQL condition on clips; their questions follow.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    at: AtOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy clips, questions and neighbours of one moment as Parquet that `datasets` loads."""
    with exit_on_error():
        from r2scp.jobs.inspect.export import Export, export_with_progress
        from r2scp.store.feature_store import FeatureStore

        opened = FeatureStore.open(store, fingerprint, storage_options(storage_option))
        wanted = Export(
            corpora=tuple(corpus or ()), splits=tuple(split or ()), sequences=sequences, where=where
        )
        print_result(export_with_progress(opened.at(at) if at else opened, folder, wanted), as_json)
