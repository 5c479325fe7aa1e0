"""Where the encoders' weights come from: the published checkpoint, the demo model in the package, or a file.

The published weights are under a non-commercial licence. They are not part of this software and are
downloaded only on request, once the licence is accepted.
"""

import os
from importlib import resources
from pathlib import Path

import torch

from r2scp.jobs.ingest.download import OnProgress, RemoteFile, RetryPolicy, download
from r2scp.model.imagebind.imagebind import Description, ImageBind, WeightsError
from r2scp.model.imagebind.weights_file import sha256_of
from r2scp.store.errors import EncoderError

ENCODERS = ("imagebind-huge", "imagebind-demo")
PUBLISHED = RemoteFile(
    url="https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth",
    size=4_803_584_173,
    sha256="d6f6c22bedcc90708448d5d2fbb7b2db9c73f505dc89bd0b2e09b23af1b62157",
)
DEMO_WEIGHTS = "imagebind-demo.safetensors"  # in the package's data folder
LICENCE = "CC BY-NC-SA 4.0 (not for commercial use)"
COMMAND = "r2scp-pipe weights imagebind-huge --accept-license"
TERMS = f"the weights of imagebind-huge are under {LICENCE} and take {PUBLISHED.size / 1e9:.1f} GB"


def default_weights_path() -> Path:
    """`$R2SCP_HOME/imagebind_huge.pth`, or `~/.cache/r2scp/imagebind_huge.pth` where that is not set."""
    home = os.environ.get("R2SCP_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "r2scp") / "imagebind_huge.pth"


def fetch_weights(
    dest: Path | None = None,
    *,
    accept_license: bool,
    remote: RemoteFile = PUBLISHED,
    on_progress: OnProgress | None = None,
    retries: RetryPolicy | None = None,
) -> Path:
    """Download the published checkpoint to `dest` (default: `default_weights_path()`) and return its path.

    A complete file is not downloaded again. Raises `EncoderError`: licence not accepted, network, another
    file than expected, no space.
    """
    dest = dest or default_weights_path()
    if dest.is_file() and dest.stat().st_size == remote.size and sha256_of(dest) == remote.sha256:
        return dest
    if not accept_license:
        raise EncoderError(f"{TERMS}; to accept this and download them: {COMMAND}")
    download(remote, dest, on_progress, retries or RetryPolicy())
    return dest


def resolve_encoder(name: str, weights: str | None = None) -> str:
    """The source for `ImageBind.load`, from `--encoder NAME --weights FILE|random:SEED`.

    Raises `EncoderError`.
    """
    if name not in ENCODERS:
        raise EncoderError(f"the encoder must be one of {', '.join(ENCODERS)}; got {name!r}")
    if weights and weights.startswith("random:"):
        if name != "imagebind-huge":
            raise EncoderError(f"random weights have the size of imagebind-huge; got them for {name}")
        return weights
    if weights:
        if not Path(weights).is_file():
            raise EncoderError(f"--weights must name a .pth or .safetensors file; {weights} does not exist")
        return weights
    if name == "imagebind-demo":
        packaged = Path(str(resources.files("r2scp.model.imagebind") / "data" / DEMO_WEIGHTS))
        if not packaged.is_file():
            raise EncoderError(f"{packaged} is missing from this installation: reinstall r2scp-pipe")
        return str(packaged)
    if not default_weights_path().is_file():
        raise EncoderError(
            f"{default_weights_path()} does not exist; {TERMS}; to accept this and download them: {COMMAND} "
            "(or name a file: --weights FILE)"
        )
    return str(default_weights_path())


def describe_encoder(
    source: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Description:
    """Fingerprint, dimension, dtype and sha256 of an encoder, without loading it. Raises `EncoderError`.

    A file at the default path must be the published checkpoint: an incomplete copy would give wrong features.
    """
    try:
        description = ImageBind.describe(source, device, dtype)
    except WeightsError as error:
        raise EncoderError(str(error)) from error
    if Path(source) == default_weights_path() and description.sha256 != PUBLISHED.sha256:
        raise EncoderError(
            f"{source} must be the published checkpoint, sha256 {PUBLISHED.sha256}; got "
            f"{description.sha256}: remove it and download it again ({COMMAND}), or name it with --weights"
        )
    return description
