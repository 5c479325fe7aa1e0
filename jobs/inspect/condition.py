"""What `--where` says: an SQL condition on the columns of `clips`."""

from r2scp.store.commits import lance_errors
from r2scp.store.errors import StoreError, UsageError
from r2scp.store.feature_store import FeatureStore
from r2scp.store.schema import Table, clips_schema


def count_where(store: FeatureStore, where: str) -> int:
    """How many clips meet a condition. Raises `UsageError` for what is none."""
    dataset = store.dataset(Table.CLIPS)
    try:
        with lance_errors("look for clips in", store.address(Table.CLIPS).uri):
            count = dataset.count_rows(filter=both(where))
            if dataset.count_rows(filter=both(where, "false")):  # "a) OR (b" would undo what stands beside it
                raise ValueError("its parentheses do not match")
            return count
    except StoreError as error:
        names = ", ".join(clips_schema(store.dim).names)
        said = str(error).partition(": ")[2].rstrip(".")
        raise UsageError(
            f"--where must be an SQL condition on clips, such as \"split = 'train' AND duration_s > 5\"; "
            f"got {where!a}: {said}; the columns are {names}"
        ) from error


def both(*conditions: str | None) -> str | None:
    """Conditions that must all hold, as one; None where there are none. Each must be whole in itself."""
    given = [f"({condition}\n)" for condition in conditions if condition is not None]  # may end in a comment
    return " AND ".join(given) or None
