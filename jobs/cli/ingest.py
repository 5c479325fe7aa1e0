"""Commands that fill a store: `extract`, `index`, and `weights` for the encoder."""

from pathlib import Path
from typing import Annotated

import typer

from r2scp.jobs.cli.options import (
    DEFAULT_STORE,
    DeviceOption,
    EncoderOption,
    FfmpegOption,
    FingerprintOption,
    JsonOption,
    NumWorkersOption,
    RayAddressOption,
    StorageOption,
    StoreOption,
    WeightsOption,
    WheelOption,
    open_store,
    storage_options,
)
from r2scp.jobs.console import EncoderName, exit_on_error, parse_choice, print_result


def extract(
    corpus: Annotated[str, typer.Option(help="vggsound, music-avqa, avqa, folder or demo.")],
    root: Annotated[Path, typer.Option(help="Folder that contains the media files, at any depth.")],
    annotations: Annotated[
        list[Path] | None, typer.Option(help="Annotation file, or a folder of them. Repeatable.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split for rows that have none.")] = "",
    name: Annotated[str, typer.Option(help="Prefix of clip ids (default: the corpus).")] = "",
    encoder: EncoderOption = EncoderName.HUGE,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after N clips.")] = None,
    retry_failed: Annotated[bool, typer.Option(help="Retry failed clips whose files are unchanged.")] = False,
    num_workers: NumWorkersOption = None,
    gpus_per_actor: Annotated[float, typer.Option(min=0.01, help="GPU share per embedding actor.")] = 1.0,
    ray_address: RayAddressOption = None,
    wheel: WheelOption = None,
    ffmpeg: FfmpegOption = None,
    store: StoreOption = DEFAULT_STORE,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Embed a corpus's videos with ImageBind. Decodes and stores the clips not already in the store."""
    with exit_on_error():
        from r2scp.jobs.ingest.encoders import encoder_spec, pick_device
        from r2scp.jobs.ingest.extract import Destination, Source
        from r2scp.jobs.ingest.extract_command import build_resources, exit_if_all_failed, run_with_progress

        paths = tuple(annotations or ())
        source = Source(corpus, root, paths, split, limit, retry_failed, name=name)
        spec = encoder_spec(encoder, weights, pick_device(device))
        resources = build_resources(num_workers, gpus_per_actor, ray_address, wheel, ffmpeg)
        destination = Destination(store, storage_options(storage_option))
        report = run_with_progress(source, destination, spec, resources)
        print_result(report.to_json(), as_json)
        exit_if_all_failed(report)


def index(
    retrieval: Annotated[
        list[str] | None, typer.Option(help="cross, paired or hybrid (default: all). Repeatable.")
    ] = None,
    bank_corpus: Annotated[
        list[str] | None, typer.Option(help="Corpora the memory bank draws from (default: all). Repeatable.")
    ] = None,
    bank_split: Annotated[
        list[str] | None, typer.Option(help="Splits the memory bank draws from (default: train). Repeatable.")
    ] = None,
    disjoint: Annotated[
        bool, typer.Option("--disjoint", help="Split by source video: no video is in two splits.")
    ] = False,
    query_corpus: Annotated[
        list[str] | None,
        typer.Option(help="Corpora whose clips get neighbours (default: all). Repeatable."),
    ] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest and farthest neighbours per clip.")] = 15,
    cross_weight: Annotated[float, typer.Option(min=0, max=1, help="Weight of cross in hybrid.")] = 0.5,
    leak_guard: Annotated[bool, typer.Option(help="Never retrieve from the clip's own source video.")] = True,
    store: StoreOption = DEFAULT_STORE,
    fingerprint: FingerprintOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find each clip's neighbours in the memory bank. One list for each modality that may be missing."""
    with exit_on_error():
        from r2scp.jobs.ingest.index_command import index_with_progress
        from r2scp.pipelines.neighbours.settings import IndexSettings
        from r2scp.store.schema import Retrieval
        from r2scp.store.search.bank import BankScope

        bank = BankScope(
            corpora=tuple(bank_corpus or ()), splits=tuple(bank_split or ("train",)), disjoint=disjoint
        )
        settings = IndexSettings(
            retrieval=tuple(parse_choice(Retrieval, name, "--retrieval") for name in retrieval or Retrieval),
            bank=bank,
            query_corpora=tuple(query_corpus or ()),
            n=neighbours,
            leak_guard=leak_guard,
            cross_weight=cross_weight,
        )
        opened = open_store(store, fingerprint, storage_option)
        print_result(index_with_progress(opened, settings), as_json)


def weights(
    encoder: Annotated[EncoderName, typer.Argument(help="ImageBind variant.")],
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Accept CC BY-NC-SA 4.0 (not for commercial use).")
    ] = False,
    dest: Annotated[
        Path | None, typer.Option(help="Target file (default: in $R2SCP_HOME or ~/.cache/r2scp).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Download the published ImageBind checkpoint (4.8 GB). Resumes, and checks its hash."""
    with exit_on_error():
        from r2scp.jobs.ingest.weights_command import fetch_with_progress

        print_result(fetch_with_progress(encoder, accept_license, dest), as_json)
