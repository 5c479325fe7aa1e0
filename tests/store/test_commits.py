"""The commit protocol: staged rows are invisible, a commit is whole or not at all, no key occurs twice.

The oracle of the random sequence is a plain dict.
"""

import random
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from r2scp.store import commits
from r2scp.store.commits import Staged, TableAddress, commit, sql_in, stage
from r2scp.store.errors import StoreError
from r2scp.store.schema import PRIMARY_KEY

SCHEMA = pa.schema(
    [pa.field("key", pa.string(), nullable=False, metadata=PRIMARY_KEY), pa.field("value", pa.int64())]
)
ODD = [
    "plain",
    "it's",
    "''",
    "'; DROP TABLE clips; --",
    "' OR '1' = '1",
    "back\\slash\\",
    "\\'",
    "line\nbreak\r\n\ttab",
    '"double" `tick`',
    "100%_like",
    "naïve 日本語 🎻",
    "e\u0301",  # not the same key as its composed form
    "é",
    "",
    "a" * 5_000,
]


@pytest.fixture
def address(tmp_path: Path) -> TableAddress:
    table = TableAddress(uri=str(tmp_path / "t.lance"), schema=SCHEMA)
    table.create()
    return table


def rows(values: dict[str, int]) -> pa.Table:
    return pa.table({"key": list(values), "value": list(values.values())}, schema=SCHEMA)


def content(address: TableAddress) -> dict[str, int]:
    """What a reader sees; fails if a key occurs twice."""
    table = address.open().to_table()
    values = dict(zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True))
    assert len(values) == table.num_rows, "a key occurs twice"
    assert address.open().count_rows() == table.num_rows
    return values


def put(address: TableAddress, values: dict[str, int], also_delete: tuple[str, ...] = ()) -> int:
    return commit(address, [stage(address, rows(values))], {"run": "r"}, also_delete)


def test_staged_rows_are_invisible_until_they_are_committed(address: TableAddress) -> None:
    staged = stage(address, rows({"a": 1, "b": 2}))
    assert content(address) == {}
    assert address.open().version == 1
    assert commit(address, [Staged.from_json(staged.to_json())], {"run": "r", "sequence": "1"}) == 2
    assert content(address) == {"a": 1, "b": 2}
    [transaction] = address.open().get_transactions(1)
    assert transaction.transaction_properties["run"] == "r"


def test_rows_are_replaced_in_one_version(address: TableAddress) -> None:
    put(address, {"a": 1, "b": 2, "c": 3})
    assert put(address, {"b": 20, "d": 4}, also_delete=("c", "never seen")) == 3
    assert content(address) == {"a": 1, "b": 20, "d": 4}
    assert address.open(2).count_rows() == 3, "the previous version is unchanged"
    batches = [stage(address, rows({f"k{i}": i})) for i in range(7)]
    assert commit(address, batches, {}) == 4
    assert content(address) == {"a": 1, "b": 20, "d": 4} | {f"k{i}": i for i in range(7)}


def test_nothing_to_do_writes_no_version(address: TableAddress) -> None:
    put(address, {"a": 1})
    assert commit(address, [], {}) == 2
    assert commit(address, [stage(address, rows({}))], {}, also_delete=["not there"]) == 2
    assert address.open().version == 2


def test_a_table_can_be_emptied_and_filled_again(address: TableAddress) -> None:
    put(address, {"a": 1, "b": 2})
    commit(address, [], {}, also_delete=["a", "b"])
    assert content(address) == {}
    put(address, {"b": 3})
    assert content(address) == {"b": 3}


def test_a_key_staged_twice_is_refused_and_nothing_changes(address: TableAddress) -> None:
    put(address, {"a": 1})
    twice = [stage(address, rows({"b": 1})), stage(address, rows({"a": 2, "b": 2}))]
    with pytest.raises(ValueError, match=r"staged twice.*'b'"):
        commit(address, twice, {})
    assert content(address) == {"a": 1}


def test_deleting_a_key_twice_deletes_nothing_else(
    address: TableAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the two are in different predicates and as many as the fragment has rows."""
    monkeypatch.setattr(commits, "IDS_PER_PREDICATE", 1)
    put(address, {"a": 1, "b": 2})
    commit(address, [], {}, also_delete=["a", "a"])
    assert content(address) == {"b": 2}


def test_more_keys_than_fit_one_predicate(address: TableAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "IDS_PER_PREDICATE", 7)
    put(address, {f"k{i}": i for i in range(40)})
    put(address, {f"k{i}": -i for i in range(0, 40, 2)}, also_delete=("k1", "k39"))
    expected = {f"k{i}": -i if i % 2 == 0 else i for i in range(40) if i not in (1, 39)}
    assert content(address) == expected


def test_any_text_is_a_key(address: TableAddress) -> None:
    put(address, {"bystander": 0})
    for key in ODD:
        put(address, {key: 1})
        put(address, {key: 2})
        assert content(address) == {"bystander": 0, key: 2}
        commit(address, [], {}, also_delete=[key])
    assert content(address) == {"bystander": 0}
    put(address, dict.fromkeys(ODD, 1))
    for key in ODD:
        assert address.open().to_table(filter=sql_in("key", [key]))["key"].to_pylist() == [key]
    assert address.open().count_rows(filter=sql_in("key", ODD)) == len(ODD)


def test_rows_that_do_not_fit_the_schema_are_refused(address: TableAddress) -> None:
    with pytest.raises((pa.ArrowInvalid, ValueError)):
        stage(address, pa.table({"key": ["a"], "value": ["no number"]}))
    assert content(address) == {}


@pytest.mark.parametrize("seed", range(3))
def test_random_commits_match_a_dict(address: TableAddress, seed: int) -> None:
    draw = random.Random(seed)
    keys = ODD + [f"k{i}" for i in range(20)]
    oracle: dict[str, int] = {}
    for step in range(25):
        draw.shuffle(keys)
        fresh = {key: draw.randrange(1000) for key in keys[: draw.randrange(0, 9)]}
        parts = [dict(list(fresh.items())[at::2]) for at in (0, 1)]
        deleted = draw.sample(keys, draw.randrange(0, 5))
        before = address.open().version
        version = commit(address, [stage(address, rows(part)) for part in parts], {}, also_delete=deleted)
        changes = bool(fresh) or any(key in oracle for key in deleted)
        assert version == before + changes, f"step {step}"
        oracle = {key: value for key, value in oracle.items() if key not in deleted} | fresh
        assert content(address) == oracle, f"step {step}"
        if draw.random() < 0.15:
            address.open().optimize.compact_files()
            assert content(address) == oracle, f"compaction after step {step}"


def test_readers_see_whole_batches_only(address: TableAddress) -> None:
    """Every batch rewrites the same ten keys with one value: a mixture would be a torn read."""
    put(address, {f"k{i}": 0 for i in range(10)})
    stop, torn = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            values = content(address)
            if len(values) != 10 or len(set(values.values())) != 1:
                torn.append(values)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for value in range(1, 25):
            put(address, {f"k{i}": value for i in range(10)})
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not torn
    assert set(content(address).values()) == {24}


def test_concurrent_creators_do_not_overwrite_each_other(tmp_path: Path) -> None:
    for attempt in range(8):
        address = TableAddress(uri=str(tmp_path / f"{attempt}.lance"), schema=SCHEMA)
        gate = threading.Barrier(6)

        def create(address: TableAddress = address, gate: threading.Barrier = gate) -> None:
            gate.wait()
            address.create()

        creators = [threading.Thread(target=create) for _ in range(6)]
        for creator in creators:
            creator.start()
        for creator in creators:
            creator.join()
        assert address.open().version == 1
        assert address.open().schema.equals(SCHEMA, check_metadata=True)


def test_creating_again_keeps_the_rows(address: TableAddress) -> None:
    put(address, {"a": 1})
    assert address.create().version == 2
    assert content(address) == {"a": 1}


def test_an_impossible_address_is_one_clear_error() -> None:
    address = TableAddress(uri="nosuch://place/t.lance", schema=SCHEMA)
    for attempt in (address.exists, address.open, address.create):
        with pytest.raises(StoreError, match=r"cannot \w+ nosuch://place/t\.lance") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    address = TableAddress(uri="s3://b/t", schema=SCHEMA, storage_options={"aws_secret_access_key": "hush"})
    assert "hush" not in repr(address)
