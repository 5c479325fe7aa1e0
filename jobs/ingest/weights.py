"""Where the encoders' weights come from: the published checkpoint, the demo model in the package, or a file.

The published weights are under a non-commercial licence. They are not part of this software and are fetched
only when somebody asks for them and accepts the licence.
"""

import os
from importlib import resources
from pathlib import Path

import torch

from r2scp.jobs.ingest.download import Patience, Progress, RemoteFile, download
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
    progress: Progress | None = None,
    patience: Patience | None = None,
) -> Path:
    """Fetch the published checkpoint to `dest` (None: `default_weights_path()`) and return where it is.

    A file that is there already and whole is left alone. `progress` is told bytes so far and bytes in all.
    Raises EncoderError: licence not accepted, network, another file than expected, no room.
    """
    dest = dest or default_weights_path()
    if dest.is_file() and dest.stat().st_size == remote.size and sha256_of(dest) == remote.sha256:
        return dest
    if not accept_license:
        raise EncoderError(f"{TERMS}; to accept that and fetch them: {COMMAND}")
    download(remote, dest, progress, patience or Patience())
    return dest


def resolve_encoder(name: str, weights: str | None = None) -> str:
    """What `ImageBind.load` is to read for `--encoder NAME --weights FILE|random:SEED`; or EncoderError."""
    if name not in ENCODERS:
        raise EncoderError(f"the encoder must be one of {', '.join(ENCODERS)}; got {name!r}")
    if weights and weights.startswith("random:"):
        if name != "imagebind-huge":
            raise EncoderError(f"random weights have the size of imagebind-huge; got them for {name}")
        return weights
    if weights:
        if not Path(weights).is_file():
            raise EncoderError(f"--weights must name a .pth or .safetensors file; {weights} is not there")
        return weights
    if name == "imagebind-demo":
        packaged = Path(str(resources.files("r2scp.model.imagebind") / "data" / DEMO_WEIGHTS))
        if not packaged.is_file():
            raise EncoderError(f"{packaged} is missing from this installation: install r2scp-pipe again")
        return str(packaged)
    if not default_weights_path().is_file():
        raise EncoderError(
            f"{default_weights_path()} is not there; {TERMS}; to accept that and fetch them: {COMMAND} "
            "(or name a file: --weights FILE)"
        )
    return str(default_weights_path())


def describe_encoder(
    source: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Description:
    """Fingerprint, dimension, dtype and sha256 of what `source` holds, without loading it; or EncoderError.

    A file at the default place must be the published checkpoint: half a copy would give wrong features.
    """
    try:
        described = ImageBind.describe(source, device, dtype)
    except WeightsError as error:
        raise EncoderError(str(error)) from error
    if Path(source) == default_weights_path() and described.sha256 != PUBLISHED.sha256:
        raise EncoderError(
            f"{source} must be the published checkpoint, sha256 {PUBLISHED.sha256}; got {described.sha256}: "
            f"remove it and fetch it again ({COMMAND}), or name it with --weights"
        )
    return described


def load_encoder(
    source: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    known_sha256: str | None = None,
) -> ImageBind:
    """`ImageBind.load`, with EncoderError for what is wrong with the weights."""
    try:
        return ImageBind.load(source, device, dtype, known_sha256)
    except WeightsError as error:
        raise EncoderError(str(error)) from error
