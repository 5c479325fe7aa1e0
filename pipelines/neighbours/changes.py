"""What became of `clips` from one version to another, told from small columns alone.

A clip's features change only when it is extracted again, which gives it another run and another time; so a
row with the same of these is the same row, wherever compaction has put it. Of 200,000 clips this reads some
20 MB a version and no feature.
"""

from dataclasses import dataclass

import pyarrow as pa

from r2scp.store.feature_store import FeatureStore

COMPARED = ("clip_id", "source_id", "corpus", "split", "run_id", "ingested_at")


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """Rows that only the old version has and rows that only the new one has, in columns COMPARED.

    A clip that changed is in both. Texts that a table has as null are "" here.
    """

    vanished: pa.Table
    appeared: pa.Table

    def __bool__(self) -> bool:
        return bool(self.vanished.num_rows or self.appeared.num_rows)


def clip_changes(store: FeatureStore, old: int | str, new: int | str) -> Changes:
    """Compare two versions of `clips`. Raises `StoreError` where one of them is not there."""
    before, after = _states(store, old), _states(store, new)
    if before.equals(after):
        return Changes(vanished=before.slice(0, 0), appeared=after.slice(0, 0))
    keys = list(COMPARED)
    return Changes(
        vanished=before.join(after, keys, join_type="left anti"),
        appeared=after.join(before, keys, join_type="left anti"),
    )


def _states(store: FeatureStore, version: int | str) -> pa.Table:
    table = store.clips(columns=COMPARED, version=version)
    for at, name in enumerate(COMPARED):
        if pa.types.is_string(table.schema.field(name).type):
            table = table.set_column(at, name, table[name].fill_null(""))  # a join takes no null for equal
    return table
