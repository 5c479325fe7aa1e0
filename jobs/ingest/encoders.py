"""The encoder and the device that the options of the command line name."""

from pathlib import Path

import torch

from r2scp.jobs.ingest.weights import ENCODERS, describe_encoder, resolve_encoder
from r2scp.model.imagebind.imagebind import DTYPE_NAMES
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.store.errors import EncoderError, FingerprintMismatch, UsageError
from r2scp.store.feature_store import FeatureStore


def pick_device(requested: str | None) -> str:
    """`cpu` or `cuda`: as requested, by default the GPU if there is one."""
    available = "cuda" if torch.cuda.is_available() else "cpu"
    if requested not in (None, "cpu", "cuda") or (requested == "cuda" and available == "cpu"):
        raise UsageError(
            f"--device must be cpu{', or cuda' if available == 'cuda' else ' here'}; got {requested!r}"
        )
    return requested or available


def encoder_spec(name: str, weights: str | None, device: str) -> EncoderSpec:
    """The encoder of `--encoder NAME --weights FILE`. Raises `EncoderError`."""
    source = resolve_encoder(name, weights)
    if not source.startswith("random:"):
        source = str(Path(source).resolve())  # actors work in other folders
    description = describe_encoder(source, device)
    return EncoderSpec(
        source=source,
        fingerprint=description.fingerprint,
        dim=description.dim,
        dtype=DTYPE_NAMES[description.dtype],
        device=device,
        sha256=description.sha256,
    )


def encoder_of(store: FeatureStore, name: str | None, weights: str | None, device: str) -> EncoderSpec:
    """The encoder that filled a store: the one named, or the known one with the store's fingerprint.

    Raises `FingerprintMismatch` if the one named is another, `EncoderError` if its weights do not exist.
    """
    if name or weights:
        spec = encoder_spec(name or ENCODERS[0], weights, device)
        if spec.fingerprint != store.fingerprint:
            raise FingerprintMismatch(
                f"the store at {store.uri} holds features of {store.fingerprint}; {name or weights} is "
                f"{spec.fingerprint}: name the encoder that filled it (--encoder, --weights)"
            )
        return spec
    for candidate in reversed(ENCODERS):  # the demo encoder first: it comes with the package
        try:
            spec = encoder_spec(candidate, None, device)
        except EncoderError:
            continue
        if spec.fingerprint == store.fingerprint:
            return spec
    raise FingerprintMismatch(
        f"the store at {store.uri} was filled by encoder {store.fingerprint}, which is none of "
        f"{', '.join(ENCODERS)} as installed on this machine; name its weights with --weights FILE, or "
        "download the published ones with `r2scp-pipe weights imagebind-huge`"
    )
