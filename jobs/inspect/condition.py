"""`--where`: an SQL condition on the columns of `clips`."""

from r2scp.store.commits import lance_errors
from r2scp.store.errors import StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import COLUMNS, Table


def count_where(store: FeatureStore, where: str) -> int:
    """How many clips meet a condition. Raises `UsageError` if it is not valid."""
    dataset = store.dataset(Table.CLIPS)
    try:
        with lance_errors("look for clips in", store.address(Table.CLIPS).uri):
            count = dataset.count_rows(filter=all_of(where))
            if dataset.count_rows(filter=all_of(where, "false")):  # "a) OR (b" would undo other conditions
                raise ValueError("its parentheses do not match")
            return count
    except StoreError as error:
        names = ", ".join(column.name for column in COLUMNS[Table.CLIPS])
        message = str(error).partition(": ")[2].rstrip(".")
        raise UsageError(
            f"--where must be an SQL condition on clips, such as \"split = 'train' AND duration_s > 5\"; "
            f"got {where!a}: {message}; the columns are {names}"
        ) from error


def all_of(*conditions: str | None) -> str | None:
    """Conditions joined by AND; None if there are none. Each must be complete in itself."""
    parts = [f"({condition}\n)" for condition in conditions if condition is not None]  # may end in a comment
    return " AND ".join(parts) or None
