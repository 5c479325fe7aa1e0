"""`weights`: downloads the published checkpoint, with progress on stderr."""

from pathlib import Path

from r2scp.jobs.console import EncoderName, absolute, progress_bar
from r2scp.jobs.ingest.weights import fetch_weights, resolve_encoder


def fetch_with_progress(encoder: EncoderName, accept_license: bool, dest: Path | None) -> dict[str, object]:
    """The path of the weights, downloaded if need be. Raises `EncoderError`."""
    if encoder is EncoderName.DEMO:
        return {"encoder": encoder.value, "path": resolve_encoder(encoder), "comes_with": "the package"}
    with progress_bar() as bar:
        task = bar.add_task("weights", total=None, note="bytes")
        path = fetch_weights(
            absolute(dest) if dest else None,
            accept_license=accept_license,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return {"encoder": encoder.value, "path": str(path)}
