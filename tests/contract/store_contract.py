"""What every store must do. A store's tests subclass ``StoreContract`` and give a fresh, empty ``store``."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from distckpt.errors import AlreadyExists, NotFound, StoreError
from distckpt.storage import Store

BAD_NAMES = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/../b",
    "a/./b",
    "a\0b",
    ".tmp-1-2",
    "a/.tmp-x/b",
]


def names(store: Store, prefix: str = "") -> list[str]:
    return sorted(entry.name for entry in store.list(prefix))


def write(store: Store, name: str, data: bytes) -> None:
    writer = store.open_writer(name, len(data))
    writer.write_at(0, memoryview(data))
    writer.commit()


def in_threads(calls: list[Callable[[], None]]) -> list[BaseException | None]:
    """Run all calls at once and return what each raised."""
    outcome: list[BaseException | None] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(index: int) -> None:
        start.wait(30)
        try:
            calls[index]()
        except BaseException as error:
            outcome[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcome


class StoreContract:
    """Each test takes the fixture ``store``; stores without real folders set ``strict_tree`` to False."""

    strict_tree = True
    """A name is a file or a folder, never both (object stores allow both)."""

    # -- create and read

    def test_create_then_read(self, store: Store) -> None:
        store.create("step-1/manifest.json", b"hello")
        assert store.read("step-1/manifest.json") == b"hello"
        assert store.size("step-1/manifest.json") == 5

    @pytest.mark.parametrize("data", [b"", b"\0", b"x" * 100_000])
    def test_create_keeps_any_bytes(self, store: Store, data: bytes) -> None:
        store.create("a", data)
        assert store.read("a") == data

    def test_create_again_with_the_same_bytes_succeeds(self, store: Store) -> None:
        store.create("a/b", b"one")
        store.create("a/b", b"one")
        assert names(store) == ["a/b"]

    @pytest.mark.parametrize("other", [b"", b"two", b"one more", b"on"])
    def test_create_never_replaces(self, store: Store, other: bytes) -> None:
        store.create("a/b", b"one")
        with pytest.raises(AlreadyExists) as caught:
            store.create("a/b", other)
        assert "a/b" in str(caught.value)
        assert store.read("a/b") == b"one"

    def test_one_of_many_racing_creates_wins(self, store: Store) -> None:
        for turn in range(5):
            name = f"races/{turn}"
            contents = [bytes([65 + i]) * 1000 for i in range(8)]
            calls = [lambda n=name, c=c: store.create(n, c) for c in contents]  # type: ignore[misc]
            outcome = in_threads(calls)
            winners = [content for content, error in zip(contents, outcome, strict=True) if error is None]
            assert len(winners) == 1
            assert all(isinstance(error, AlreadyExists) for error in outcome if error is not None)
            assert store.read(name) == winners[0]
        assert len(names(store)) == 5

    def test_racing_creates_of_the_same_bytes_all_succeed(self, store: Store) -> None:
        assert in_threads([lambda: store.create("x/y", b"same" * 500)] * 8) == [None] * 8
        assert names(store) == ["x/y"]

    def test_read_ranges(self, store: Store) -> None:
        store.create("a", b"0123456789")
        assert store.read("a", 3) == b"3456789"
        assert store.read("a", 3, 4) == b"3456"
        assert store.read("a", 10) == b""
        assert store.read("a", 10, 0) == b""
        assert store.read("a", 0, 0) == b""

    @pytest.mark.parametrize(("offset", "size"), [(11, None), (0, 11), (9, 2), (11, 0), (-1, 2), (0, -1), (1, 1 << 60)])
    def test_read_past_the_end_is_an_error(self, store: Store, offset: int, size: int | None) -> None:
        store.create("a", b"0123456789")
        with pytest.raises(StoreError) as caught:
            store.read("a", offset, size)
        assert not isinstance(caught.value, NotFound)

    def test_read_into(self, store: Store) -> None:
        store.create("a", b"0123456789")
        target = bytearray(b"....")
        store.read_into("a", 2, memoryview(target))
        assert target == b"2345"
        store.read_into("a", 10, memoryview(bytearray()))

    def test_read_into_a_typed_buffer(self, store: Store) -> None:
        store.create("a", bytes(range(8)))
        target = bytearray(8)
        store.read_into("a", 0, memoryview(target).cast("I"))
        assert target == bytes(range(8))

    def test_read_into_refuses(self, store: Store) -> None:
        store.create("a", b"0123456789")
        with pytest.raises(StoreError):
            store.read_into("a", 8, memoryview(bytearray(3)))
        with pytest.raises(StoreError):
            store.read_into("a", 0, memoryview(b"read-only"))
        with pytest.raises(StoreError):
            store.read_into("a", 0, memoryview(bytearray(8))[::2])

    def test_absent_names(self, store: Store) -> None:
        store.create("folder/file", b"x")
        for name in ["absent", "folder/absent", "absent/file", "folder/file/below", "folder"]:
            for call in (store.read, store.size, lambda n: store.read_into(n, 0, memoryview(bytearray(1)))):
                with pytest.raises(NotFound):
                    call(name)

    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_bad_names_are_refused(self, store: Store, name: str) -> None:
        store.create("a/b", b"x")
        calls: list[Callable[[], object]] = [
            lambda: store.create(name, b"evil"),
            lambda: store.open_writer(name, 1),
            lambda: store.replace(name, b"evil"),
            lambda: store.read(name),
            lambda: store.size(name),
            lambda: store.delete(name),
        ]
        if name not in ("", "a/"):  # these name folders
            calls += [lambda: store.make_folder(name), lambda: store.remove_folder(name)]
            calls += [lambda: store.list_folders(name), lambda: list(store.list(name))]
        for call in calls:
            with pytest.raises(StoreError) as caught:
                call()
            assert not isinstance(caught.value, NotFound | AlreadyExists)
        assert names(store) == ["a/b"]

    def test_long_and_odd_names(self, store: Store) -> None:
        store.create("ä €/" + "n" * 255, b"x")
        assert names(store) == ["ä €/" + "n" * 255]
        for name in ["n" * 256, "€" * 86, "\ud800"]:
            with pytest.raises(StoreError):
                store.create(name, b"x")
            with pytest.raises(StoreError):
                store.read(name)

    # -- writers

    def test_writer_in_any_order(self, store: Store) -> None:
        writer = store.open_writer("a/shard", 10)
        pieces = [(0, b"0123"), (4, b""), (4, b"456789")]
        for offset, data in reversed(pieces) if store.capabilities.random_write else pieces:
            writer.write_at(offset, memoryview(data))
        writer.commit()
        store.sync_folder("a")
        assert store.read("a/shard") == b"0123456789"
        assert [(e.name, e.size) for e in store.list()] == [("a/shard", 10)]

    def test_writer_of_an_empty_file(self, store: Store) -> None:
        store.open_writer("a/empty", 0).commit()
        assert store.read("a/empty") == b""
        assert store.size("a/empty") == 0

    def test_writer_takes_typed_and_many_dimensional_views(self, store: Store) -> None:
        data = bytes(range(64))
        writer = store.open_writer("typed", 64)
        writer.write_at(0, memoryview(data).cast("B", (4, 4, 4)))
        writer.commit()
        assert store.read("typed") == data

    def test_writer_refuses_a_taken_name(self, store: Store) -> None:
        store.create("a", b"x")
        with pytest.raises(AlreadyExists):
            store.open_writer("a", 3)
        assert store.read("a") == b"x"

    def test_create_refuses_a_written_name(self, store: Store) -> None:
        write(store, "a", b"abc")
        with pytest.raises(AlreadyExists):
            store.create("a", b"xyz")
        assert store.read("a") == b"abc"

    def test_abort_leaves_nothing_and_frees_the_name(self, store: Store) -> None:
        writer = store.open_writer("f/a", 100)
        writer.write_at(0, memoryview(b"x" * 50))
        writer.abort()
        writer.abort()
        assert names(store) == []
        with pytest.raises(StoreError):
            writer.write_at(50, memoryview(b"y"))
        with pytest.raises(StoreError):
            writer.commit()
        write(store, "f/a", b"again")
        assert store.read("f/a") == b"again"

    def test_abort_after_commit_keeps_the_file(self, store: Store) -> None:
        writer = store.open_writer("a", 1)
        writer.write_at(0, memoryview(b"x"))
        writer.commit()
        writer.abort()
        assert store.read("a") == b"x"
        with pytest.raises(StoreError):
            writer.write_at(0, memoryview(b"y"))
        with pytest.raises(StoreError):
            writer.commit()
        assert store.read("a") == b"x"

    @pytest.mark.parametrize(("offset", "data"), [(8, b"xyz"), (-1, b"x"), (11, b""), (0, b"x" * 11)])
    def test_writing_outside_the_size_kills_the_writer(self, store: Store, offset: int, data: bytes) -> None:
        writer = store.open_writer("a", 10)
        with pytest.raises(StoreError):
            writer.write_at(offset, memoryview(data))
        with pytest.raises(StoreError):
            writer.write_at(0, memoryview(b"0123456789"))
        with pytest.raises(StoreError):
            writer.commit()
        assert names(store) == []

    def test_commit_of_a_half_written_file_is_refused(self, store: Store) -> None:
        writer = store.open_writer("a", 10)
        writer.write_at(0, memoryview(b"12345"))
        with pytest.raises(StoreError, match="5 of 10"):
            writer.commit()
        assert names(store) == []

    def test_writer_refuses_what_it_would_have_to_copy(self, store: Store) -> None:
        writer = store.open_writer("a", 4)
        with pytest.raises(StoreError):
            writer.write_at(0, memoryview(b"01234567")[::2])

    def test_negative_size(self, store: Store) -> None:
        with pytest.raises(StoreError):
            store.open_writer("a", -1)

    def test_one_writer_used_by_many_threads(self, store: Store) -> None:
        if not store.capabilities.random_write:
            pytest.skip("this store takes rising offsets only")
        block, count = 10_000, 16
        writer = store.open_writer("a", block * count)
        pieces = [bytes([i]) * block for i in range(count)]
        calls = [lambda i=i: writer.write_at(i * block, memoryview(pieces[i])) for i in range(count)]  # type: ignore[misc]
        assert in_threads(calls) == [None] * count
        writer.commit()
        assert store.read("a") == b"".join(pieces)

    # -- listing

    def test_list_is_recursive_and_takes_folders(self, store: Store) -> None:
        for name in ["a", "s-1/m", "s-1/g/0", "s-1/g/1", "s-10/m"]:
            store.create(name, name.encode())
        assert names(store) == ["a", "s-1/g/0", "s-1/g/1", "s-1/m", "s-10/m"]
        assert names(store, "s-1") == names(store, "s-1/") == ["s-1/g/0", "s-1/g/1", "s-1/m"]
        assert names(store, "s-1/g") == ["s-1/g/0", "s-1/g/1"]
        assert names(store, "s") == names(store, "absent/below") == names(store, "s-1/m") == []
        assert all(entry.size == len(entry.name) for entry in store.list())

    def test_list_of_an_untouched_store_is_empty(self, store: Store) -> None:
        assert names(store) == []
        assert list(store.list_folders()) == []

    def test_modified_rises(self, store: Store) -> None:
        store.create("a", b"1")
        store.create("b", b"2")
        at = {entry.name: entry.modified for entry in store.list()}
        assert 1.6e9 < at["a"] <= at["b"]

    def test_list_folders(self, store: Store) -> None:
        for name in ["file", "s-2/m", "s-1/g1/0", "s-1/g0/0", "s-1/m"]:
            store.create(name, b"")
        assert list(store.list_folders()) == ["s-1", "s-2"]
        assert list(store.list_folders("s-1")) == list(store.list_folders("s-1/")) == ["g0", "g1"]
        assert list(store.list_folders("absent")) == list(store.list_folders("file")) == []

    # -- removing

    def test_delete(self, store: Store) -> None:
        store.create("f/a", b"x")
        store.delete("f/a")
        store.delete("f/a")
        store.delete("absent/below")
        assert names(store) == []
        store.create("f/a", b"other")
        store.delete("f/a/below-a-file")
        assert store.read("f/a") == b"other"

    def test_racing_deletes_all_succeed(self, store: Store) -> None:
        store.create("a", b"x")
        assert in_threads([lambda: store.delete("a")] * 8) == [None] * 8

    def test_remove_folder_only_when_empty(self, store: Store) -> None:
        store.create("f/g/a", b"x")
        store.remove_folder("f")
        store.remove_folder("f/g/")
        assert names(store) == ["f/g/a"]
        store.delete("f/g/a")
        store.remove_folder("f/g")
        store.remove_folder("f/g")
        store.remove_folder("absent/below")
        store.remove_folder("f")
        assert list(store.list_folders()) == []
        store.remove_folder("")
        store.create("still", b"usable")

    # -- folders

    def test_make_folder(self, store: Store) -> None:
        store.make_folder("a/b")
        store.make_folder("a/b")
        store.make_folder("a/c", exclusive=True)
        assert list(store.list_folders("a")) == ["b", "c"]
        for taken in ["a/b", "a/c", "a"]:
            with pytest.raises(AlreadyExists):
                store.make_folder(taken, exclusive=True)
        store.create("a/b/file", b"x")
        store.sync_folder("a/b")
        store.make_folder("")
        store.sync_folder("")

    def test_one_of_many_racing_exclusive_folders_wins(self, store: Store) -> None:
        outcome = in_threads([lambda: store.make_folder("f/attempt", exclusive=True)] * 8)
        assert outcome.count(None) == 1
        assert sum(isinstance(error, AlreadyExists) for error in outcome) == 7

    def test_sync_of_an_absent_folder(self, store: Store) -> None:
        store.create("file", b"x")
        if self.strict_tree:
            for name in ["absent", "file"]:
                with pytest.raises(NotFound):
                    store.sync_folder(name)

    def test_a_name_is_a_file_or_a_folder(self, store: Store) -> None:
        if not self.strict_tree:
            pytest.skip("this store has no folders")
        store.create("folder/a", b"x")
        store.create("file", b"y")
        for call in (
            lambda: store.create("folder", b"x"),
            lambda: store.open_writer("folder", 1),
            lambda: store.make_folder("file"),
        ):
            with pytest.raises(AlreadyExists):
                call()
        for call in (
            lambda: store.create("file/below", b"x"),
            lambda: store.open_writer("file/below", 1),
            lambda: store.make_folder("file/below"),
            lambda: store.replace("folder", b"x"),
            lambda: store.delete("folder"),
        ):
            with pytest.raises(StoreError):
                call()
        store.remove_folder("file")
        assert names(store) == ["file", "folder/a"]

    # -- replace, counters

    def test_replace(self, store: Store) -> None:
        store.replace("h/beat", b"1")
        store.replace("h/beat", b"longer")
        store.replace("h/beat", b"")
        store.replace("h/beat", b"end")
        assert store.read("h/beat") == b"end"
        assert names(store) == ["h/beat"]

    def test_readers_of_a_replaced_file_see_old_or_new(self, store: Store) -> None:
        contents = [bytes([65 + i]) * 5000 for i in range(10)]
        store.replace("beat", contents[0])
        seen: list[bytes] = []

        def read() -> None:
            seen.extend(store.read("beat") for _ in range(50))

        def replace() -> None:
            for content in contents:
                store.replace("beat", content)

        assert in_threads([read, read, replace]) == [None] * 3
        assert set(seen) <= set(contents)

    def test_counters(self, store: Store) -> None:
        store.create("a/b", b"12345")
        write(store, "a/c", b"123")
        store.read("a/b", 1, 2)
        store.read_into("a/b", 0, memoryview(bytearray(4)))
        list(store.list())
        store.list_folders()
        store.delete("a/b")
        store.delete("a/b")
        counted = store.counters
        assert counted["creates"] == 2
        assert counted["bytes_written"] == 8
        assert counted["opens"] == 2
        assert counted["bytes_read"] == 6
        assert counted["lists"] == 2
        assert counted["deletes"] == 1

    def test_is_a_store(self, store: Store) -> None:
        assert isinstance(store, Store)
        assert "://" in store.url
