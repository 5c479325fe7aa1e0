"""Which encoder, and on which device: what the options of the command line mean."""

from pathlib import Path

import torch

from r2scp.jobs.ingest.weights import ENCODERS, describe_encoder, resolve_encoder
from r2scp.model.imagebind.imagebind import DTYPE_NAMES
from r2scp.pipelines.extraction.embed import EncoderSpec
from r2scp.store.errors import EncoderError, FingerprintMismatch, UsageError
from r2scp.store.feature_store import FeatureStore


def pick_device(wanted: str | None) -> str:
    """`cpu` or `cuda`: as asked for, or the GPU where there is one."""
    available = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted not in (None, "cpu", "cuda") or (wanted == "cuda" and available == "cpu"):
        raise UsageError(
            f"--device must be cpu{', or cuda' if available == 'cuda' else ' here'}; got {wanted!r}"
        )
    return wanted or available


def encoder_spec(name: str, weights: str | None, device: str) -> EncoderSpec:
    """The encoder that `--encoder NAME --weights FILE` means. Raises `EncoderError`."""
    source = resolve_encoder(name, weights)
    if not source.startswith("random:"):
        source = str(Path(source).resolve())  # actors work in other folders
    described = describe_encoder(source, device)
    return EncoderSpec(
        source=source,
        fingerprint=described.fingerprint,
        dim=described.dim,
        dtype=DTYPE_NAMES[described.dtype],
        device=device,
        sha256=described.sha256,
    )


def encoder_of(store: FeatureStore, name: str | None, weights: str | None, device: str) -> EncoderSpec:
    """The encoder that filled a store; by itself, the one of our own that fits.

    Raises `FingerprintMismatch` where the one that is named is another, `EncoderError` where its weights are
    not there.
    """
    if name or weights:
        spec = encoder_spec(name or ENCODERS[0], weights, device)
        if spec.fingerprint != store.fingerprint:
            raise FingerprintMismatch(
                f"the store at {store.uri} holds features of {store.fingerprint}; {name or weights} is "
                f"{spec.fingerprint}: name the encoder that filled it (--encoder, --weights)"
            )
        return spec
    for known in reversed(ENCODERS):  # the small one first: it is always there
        try:
            spec = encoder_spec(known, None, device)
        except EncoderError:
            continue
        if spec.fingerprint == store.fingerprint:
            return spec
    raise FingerprintMismatch(
        f"the store at {store.uri} was filled by encoder {store.fingerprint}, which is none of "
        f"{', '.join(ENCODERS)} as they are on this machine; name its weights with --weights FILE, or fetch "
        "the published ones with `r2scp-pipe weights imagebind-huge`"
    )
