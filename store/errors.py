"""All errors that r2scp-pipe raises for a user.

::

    R2SCPError                     one clear line, printed by the command line (exit 1)
    ├── UsageError                 an invalid option or setting (exit 2)
    ├── CorpusError                an invalid annotation file or media folder
    ├── MediaError                 one media file that cannot be used; has a `FailureReason`
    ├── EncoderError               weights that are missing, damaged or of another model
    ├── CheckpointError            a trained model that is missing, damaged or of another program
    ├── GateFailed                 a re-index finished, but its result must not be published
    └── StoreError                 the store cannot be opened, read or written
        ├── FingerprintMismatch    features of another encoder or decoder
        └── LeaseHeld              another writer is active

A message says what is wrong, what is expected, what was given, and what to do next. Faults of *data* (a bad
file, a bad row) are not raised through a job: they are counted, with a `FailureReason`.
"""

from enum import StrEnum


class FailureReason(StrEnum):
    """Why an input could not be stored; the values are those of the table `failures`."""

    EMPTY_FILE = "empty_file"  # zero bytes
    NOT_MEDIA = "not_media"  # no demuxer recognises it
    NO_STREAMS = "no_streams"  # a container with neither picture nor sound
    TRUNCATED = "truncated"  # recognised, but the part needed for decoding is missing
    ENCRYPTED = "encrypted"  # protected content
    UNSUPPORTED_CODEC = "unsupported_codec"  # this ffmpeg has no decoder for it
    CORRUPT = "corrupt"  # has streams, but nothing could be decoded
    FORBIDDEN_REFERENCE = "forbidden_reference"  # a playlist or concat file that points elsewhere
    TOO_LARGE = "too_large"  # more pixels, seconds or bytes than the limits allow
    TIMEOUT = "timeout"  # decoding took longer than allowed
    OUT_OF_MEMORY = "out_of_memory"  # decoding needed more memory than allowed
    UNREADABLE = "unreadable"  # the operating system refused to read it
    DECODER_CRASHED = "decoder_crashed"  # ffmpeg was ended by a signal
    EMBED_FAILED = "embed_failed"  # decoded, but the embedding is not finite
    NOTHING_RECORDED = "nothing_recorded"  # silence and a blank picture: stored, but cannot be asked about


#: Failures that may not occur again; a re-index job retries them.
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
    """An invalid option or setting."""


class CorpusError(R2SCPError):
    """An invalid annotation file or media folder."""


class MediaError(R2SCPError):
    """A media file that cannot be used. `detail`: the last lines of the tool's own message."""

    def __init__(self, reason: FailureReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["MediaError"], tuple[FailureReason, str]]:
        return MediaError, (self.reason, self.detail)


class EncoderError(R2SCPError):
    """Weights that are missing, damaged or of another model."""


class CheckpointError(R2SCPError):
    """A trained model that is missing, damaged or of another program."""


class GateFailed(R2SCPError):
    """The result of a re-index must not be published; the previous snapshot still serves."""


class StoreError(R2SCPError):
    """The store cannot be opened, read or written."""


class FingerprintMismatch(StoreError):
    """Features of another encoder or decoder."""


class LeaseHeld(StoreError):
    """Another writer is active on this store."""
