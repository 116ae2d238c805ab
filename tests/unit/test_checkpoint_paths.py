"""What a path or URL means: roots, steps, manifests, strays, damage, newer formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import build_checkpoint, shard_paths

from distckpt.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    ManifestError,
    UnsupportedVersion,
)
from distckpt.format import names
from distckpt.format.checkpoint import list_checkpoints, open_checkpoint
from distckpt.format.lineage import create_generation, ensure_root
from distckpt.storage import open_store
from distckpt.storage.posix import PosixStore


@pytest.fixture
def store(tmp_path: Path) -> PosixStore:
    return PosixStore(tmp_path / "root")


def flip(store: PosixStore, name: str, offset: int) -> None:
    path = Path(store.path_of(name))
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_root_step_manifest_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    store = PosixStore(root)
    one, two = build_checkpoint(store, 100, tensors={}), build_checkpoint(store, 200, tensors={})
    assert open_checkpoint(root).step == 200
    assert open_checkpoint(str(root) + "/").step == 200
    assert open_checkpoint(store.url).step == 200
    for path in (root / one.folder, root / one.manifest_path, f"{store.url}/{one.folder}/", f"{root}/{one.folder}/"):
        assert open_checkpoint(path).step == 100
    monkeypatch.chdir(root / one.folder)
    assert open_checkpoint(".").step == 100
    monkeypatch.chdir(root)
    assert open_checkpoint(one.folder).step == 100
    (tmp_path / "latest").symlink_to(root / two.folder)
    assert open_checkpoint(tmp_path / "latest").step == 200
    assert open_checkpoint(root).committed == two


def test_a_step_is_found_without_looking_at_the_others(store: PosixStore) -> None:
    committed = [build_checkpoint(store, step, tensors={}) for step in range(100, 120)]
    for name in (committed[3].folder, committed[3].manifest_path):
        found = open_checkpoint(f"{store.root}/{name}")
        assert isinstance(found.store, PosixStore)
        assert (found.step, found.store.counters["lists"]) == (103, 1)


def test_memory_urls() -> None:
    store = open_store("memory://offline-test")
    build_checkpoint(store, 100, generation=1, tensors={"w": np.ones(3, np.float32)})
    build_checkpoint(store, 200, generation=1, tensors={})
    assert open_checkpoint("memory://offline-test").step == 200
    assert open_checkpoint("memory://offline-test/step-0000000100").read("w").tolist() == [1, 1, 1]
    assert [i.step for i in list_checkpoints("memory://offline-test")] == [200, 100]
    assert [open_checkpoint(i.path).step for i in list_checkpoints("memory://offline-test")] == [200, 100]


def test_what_is_not_there(tmp_path: Path) -> None:
    store = PosixStore(tmp_path / "root")
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointNotFound, match="no checkpoint"):
            open_checkpoint(path)
    assert list_checkpoints(tmp_path / "nowhere") == []
    assert not (tmp_path / "nowhere").exists()
    build_checkpoint(store, 100, tensors={})
    with pytest.raises(CheckpointNotFound, match=r"\[100\]"):
        open_checkpoint(tmp_path / "root" / names.step_folder(300))
    with pytest.raises(CheckpointNotFound):
        open_checkpoint(tmp_path / "root" / names.step_folder(100) / names.manifest_name(9))
    with pytest.raises(CheckpointNotFound, match="folder named after its step"):
        open_checkpoint(tmp_path / names.manifest_name(9))
    with pytest.raises(ConfigError):
        open_checkpoint("ftp://x/step-0000000100")


def test_reading_changes_nothing(store: PosixStore) -> None:
    build_checkpoint(store, 100)
    before = {e.name: e.modified for e in store.list()}
    checkpoint = open_checkpoint(store.root)
    checkpoint.state_dict()
    checkpoint.verify(mode="full")
    list_checkpoints(store.root, all=True)
    assert {e.name: e.modified for e in store.list()} == before


def test_a_step_folder_copied_elsewhere_is_whole(store: PosixStore, tmp_path: Path) -> None:
    import shutil

    ensure_root(store)
    create_generation(store, resumed_from=None)
    committed = build_checkpoint(store, 100)
    shutil.copytree(store.path_of(committed.folder), tmp_path / "other" / committed.folder)
    assert open_checkpoint(tmp_path / "other").verify(mode="full").ok
    assert open_checkpoint(tmp_path / "other" / committed.folder).step == 100


def stray_history(store: PosixStore) -> None:
    """Job 1 commits 100, 200; job 2 resumes from 100 and commits 150, 200; then job 1 commits 300."""
    create_generation(store, resumed_from=None)
    for step in (100, 200):
        build_checkpoint(store, step, generation=1, tensors={}, metrics={"loss": step})
    create_generation(store, resumed_from=(1, 100))
    for step in (150, 200):
        build_checkpoint(store, step, generation=2, tensors={}, metrics={"loss": step})
    build_checkpoint(store, 300, generation=1, tensors={})


def test_strays_are_shown_but_never_chosen(store: PosixStore) -> None:
    stray_history(store)
    assert (open_checkpoint(store.root).step, open_checkpoint(store.root).generation) == (200, 2)
    step = open_checkpoint(f"{store.root}/{names.step_folder(200)}")
    assert (step.step, step.generation) == (200, 2)
    # By its own name a stray can be opened.
    assert open_checkpoint(f"{store.root}/{names.step_folder(300)}").generation == 1
    assert open_checkpoint(f"{store.root}/{names.step_folder(200)}/{names.manifest_name(1)}").generation == 1
    listed = list_checkpoints(store.root)
    assert [(i.step, i.generation, i.stray) for i in listed] == [(200, 2, False), (150, 2, False), (100, 1, False)]
    everything = list_checkpoints(store.root, all=True)
    assert [(i.step, i.generation, i.stray) for i in everything[3:]] == [(300, 1, True), (200, 1, True)]
    for info in everything:
        opened = open_checkpoint(info.path)
        assert (opened.step, opened.generation) == (info.step, info.generation)
    assert [i.generation for i in list_checkpoints(f"{store.root}/{names.step_folder(200)}", all=True)] == [2, 1]


def test_listing_says_what_the_manifest_says(store: PosixStore) -> None:
    committed = build_checkpoint(store, 100, world=3, metrics={"loss": 0.5}, epoch=1)
    store.replace(f"{committed.folder}/{names.PINNED}", b"")
    (info,) = list_checkpoints(store.root)
    assert (info.step, info.generation, info.epoch, info.world_size, info.engine) == (100, 1, 1, 3, "test")
    assert info.metrics == {"loss": 0.5}
    assert info.nbytes == sum(store.size(p) for p in shard_paths(store, committed))
    assert info.pinned
    assert info.path == f"{store.root}/{committed.folder}"
    assert info.problem is None


def test_a_damaged_newest_is_passed_over_in_words(store: PosixStore, caplog: pytest.LogCaptureFixture) -> None:
    build_checkpoint(store, 100)
    two, three = build_checkpoint(store, 200), build_checkpoint(store, 300)
    flip(store, three.manifest_path, 200)
    shard = Path(store.path_of(shard_paths(store, two)[0]))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert open_checkpoint(store.root).step == 100
    for text in ("passing over step 300", "passing over step 200", "00000-of-00002"):
        assert text in caplog.text
    with pytest.raises(CorruptCheckpoint, match="manifest-g000001"):
        open_checkpoint(store.root, strict=True)
    with pytest.raises(ManifestError):
        open_checkpoint(f"{store.root}/{three.folder}")
    caplog.clear()
    assert [i.step for i in list_checkpoints(store.root)] == [200, 100]
    assert three.manifest_path in caplog.text
    problems = {i.step: i.problem for i in list_checkpoints(store.root, all=True)}
    assert list(problems) == [300, 200, 100]
    assert problems[300] is not None
    flip(store, "step-0000000100/manifest-g000001.json", 200)
    with pytest.raises(CorruptCheckpoint, match="none of 3"):
        open_checkpoint(store.root)


def test_a_newer_format_is_said_and_not_fallen_back_from(store: PosixStore) -> None:
    from distckpt.format.digest import digest

    build_checkpoint(store, 100, tensors={})
    newest = build_checkpoint(store, 200, tensors={})
    path = Path(store.path_of(newest.manifest_path))
    body = path.read_bytes().partition(b'"body":')[2][:-2].replace(b'"version":[1,0]', b'"version":[3,0]')
    path.write_bytes(b'{"digest":"xxh3-128:' + digest(body).encode() + b'","body":' + body + b"}\n")
    with pytest.raises(UnsupportedVersion, match=r"3\.0"):
        open_checkpoint(store.root)
    store.create(names.ROOT_FILE, b'{"format":"distckpt","version":[3,0],"run_id":"x"}')
    with pytest.raises(UnsupportedVersion):
        list_checkpoints(store.root)
