"""Every error a user of r2scp-pipe can meet, in one tree.

::

    R2SCPError                     one clear line; the command line prints it and exits with 1
    ├── UsageError                 an option or setting that cannot be (exit 2)
    ├── CorpusError                an annotation file or media folder that is not what it should be
    ├── MediaError                 one media file that cannot be used; carries a `FailureReason`
    ├── EncoderError               weights that are missing, foreign or damaged
    ├── CheckpointError            a trained model that is missing, damaged or of another program
    ├── GateFailed                 a re-index did well, but what it made is not fit to serve
    └── StoreError                 the store cannot be opened, read or written
        ├── FingerprintMismatch    features of another encoder or decoder
        └── LeaseHeld              another writer is at work

A message says what is wrong, what must be, what came, and what to do next.
Faults of *data* (one bad file, one bad row) are not raised through a job: they
become a counted row with a `FailureReason`.
"""

from enum import StrEnum


class FailureReason(StrEnum):
    """Why one input could not be stored: the fixed vocabulary of the `failures` table."""

    EMPTY_FILE = "empty_file"  # zero bytes
    NOT_MEDIA = "not_media"  # no demuxer recognises it
    NO_STREAMS = "no_streams"  # a container with neither picture nor sound
    TRUNCATED = "truncated"  # recognised, but the part that tells how to decode it is lost
    ENCRYPTED = "encrypted"  # protected content
    UNSUPPORTED_CODEC = "unsupported_codec"  # this ffmpeg has no decoder for it
    CORRUPT = "corrupt"  # streams are there, nothing could be decoded
    FORBIDDEN_REFERENCE = "forbidden_reference"  # playlist or concat file that points elsewhere
    TOO_LARGE = "too_large"  # more pixels, seconds or bytes than the limits allow
    TIMEOUT = "timeout"  # decoding took longer than allowed
    OUT_OF_MEMORY = "out_of_memory"  # decoding needed more memory than allowed
    UNREADABLE = "unreadable"  # the operating system refused to read it
    DECODER_CRASHED = "decoder_crashed"  # ffmpeg died of a signal
    EMBED_FAILED = "embed_failed"  # decoded, but the encoder gave no finite embedding
    NOTHING_RECORDED = "nothing_recorded"  # silence and a blank picture: stored, but no question is about it


#: Reasons that may go away by themselves; a re-index job tries these again.
TRANSIENT_REASONS = frozenset(
    {
        FailureReason.TIMEOUT,
        FailureReason.OUT_OF_MEMORY,
        FailureReason.UNREADABLE,
        FailureReason.DECODER_CRASHED,
    }
)


class R2SCPError(Exception):
    """Root of the tree above."""


class UsageError(R2SCPError):
    """An option or setting that cannot be."""


class CorpusError(R2SCPError):
    """An annotation file or media folder that is not what it should be."""


class MediaError(R2SCPError):
    """One media file that cannot be used.

    `reason` is one of `FailureReason`; `detail` the last lines of the tool's own words.
    """

    def __init__(self, reason: FailureReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["MediaError"], tuple[FailureReason, str]]:
        return MediaError, (self.reason, self.detail)


class EncoderError(R2SCPError):
    """Weights that are missing, foreign or damaged."""


class CheckpointError(R2SCPError):
    """A trained model that is missing, damaged or of another program."""


class GateFailed(R2SCPError):
    """What a re-index made is not fit to serve; what served before still does."""


class StoreError(R2SCPError):
    """The store cannot be opened, read or written."""


class FingerprintMismatch(StoreError):
    """Features of another encoder or decoder were found where ours should be."""


class LeaseHeld(StoreError):
    """Another writer is at work on this store."""
