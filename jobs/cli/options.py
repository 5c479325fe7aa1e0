"""Options that several commands share, and opening the store that they name."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r2scp.jobs.console import EncoderName
from r2scp.store.errors import UsageError

if TYPE_CHECKING:
    from r2scp.store.feature_store import FeatureStore

DEFAULT_STORE = "./r2scp-store"

StoreOption = Annotated[
    str, typer.Option("--store", envvar="R2SCP_STORE", help="Folder or object store address of the store.")
]
RunStoreOption = Annotated[
    str | None,
    typer.Option("--store", envvar="R2SCP_STORE", help="The store (default: the one RUN was trained on)."),
]
StorageOption = Annotated[
    list[str] | None,
    typer.Option("--storage-option", help="KEY=VALUE for an object store, with Lance's keys. Repeatable."),
]
FingerprintOption = Annotated[
    str | None, typer.Option("--fingerprint", help="Encoder fingerprint, if the store has several encoders.")
]
AtOption = Annotated[
    str | None, typer.Option("--at", help="Snapshot to read, such as serving (default: the latest version).")
]
BankAtOption = Annotated[
    str | None, typer.Option("--at", help="Snapshot to retrieve from (default: serving).")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
]
EncoderOption = Annotated[EncoderName, typer.Option("--encoder", help="ImageBind variant.")]
StoreEncoderOption = Annotated[
    EncoderName | None,
    typer.Option("--encoder", help="ImageBind variant (default: the one that filled the store)."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights", help="Encoder weights: a .pth or .safetensors file, or random:SEED (benchmarks only)."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda (default: the GPU if there is one).")
]
NumWorkersOption = Annotated[
    int | None, typer.Option("--num-workers", min=1, help="Number of cores to use (default: all).")
]
RayAddressOption = Annotated[
    str | None, typer.Option("--ray-address", help="Address of a Ray cluster (default: a local Ray).")
]
WheelOption = Annotated[
    Path | None, typer.Option("--wheel", help="r2scp-pipe wheel to install on the cluster.")
]
FfmpegOption = Annotated[
    str | None, typer.Option("--ffmpeg", help="Path to ffmpeg (default: the bundled one).")
]
RunOption = Annotated[Path, typer.Option("--run", help="Folder of a training run.", show_default=False)]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Random seed.")]
PresetOption = Annotated[str, typer.Option("--preset", help="demo, paper_music_avqa or paper_avqa.")]
SettingsOption = Annotated[
    list[str] | None, typer.Option("--set", help="SETTING=VALUE, such as model.k=3. Repeatable.")
]
ReportSplitOption = Annotated[
    str, typer.Option("--split", help="Split to report: test, or val while tuning.")
]


def storage_options(pairs: list[str] | None) -> dict[str, str]:
    """`KEY=VALUE` pairs as a dict. Raises `UsageError`."""
    options = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UsageError(f"--storage-option must be KEY=VALUE; got {pair!r}")
        options[key] = value
    return options


def open_store(
    uri: str, fingerprint: str | None, storage_option: list[str] | None, at: str | None = None
) -> "FeatureStore":
    """The store at `uri`, pinned to the snapshot `at` if there is one. Raises `R2SCPError`."""
    from r2scp.store.feature_store import FeatureStore

    store = FeatureStore.open(uri, fingerprint, storage_options(storage_option))
    return store.at(at) if at else store
