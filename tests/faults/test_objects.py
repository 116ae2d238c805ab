"""What goes wrong between us and an object store: lost replies, conflicts, silence, cut uploads, forks."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from ranks import run_ranks
from s3_support import PAGE

from distckpt import clock
from distckpt.config import ObjectStoreConfig
from distckpt.errors import AlreadyExists, ConfigError, NotFound, StoreError
from distckpt.format.catalog import find_checkpoint
from distckpt.storage import ObjectStore, open_store
from distckpt.storage.objects_writer import part_bytes

if TYPE_CHECKING:
    from s3_support import S3

MIB = 1 << 20
LONG = ObjectStoreConfig(deadline_s=40.0, part_bytes=5 * MIB)
SHORT = ObjectStoreConfig(deadline_s=2.0, part_bytes=5 * MIB)  # for what is meant to fail


@pytest.fixture
def store(bucket: str) -> ObjectStore:
    made = ObjectStore("s3", bucket, "run", LONG)
    made.create("first", b"makes the probe")
    return made


@pytest.fixture
def hasty(bucket: str, store: ObjectStore) -> ObjectStore:
    """The same store for one that gives up soon."""
    return ObjectStore("s3", bucket, "run", SHORT)


def names(store: ObjectStore) -> list[str]:
    return [entry.name for entry in store.list() if entry.name != "first"]


def shard(nbytes: int) -> bytes:
    return bytes(range(256)) * (nbytes // 256)


# ---------------------------------------------------------------- the conditional put


@pytest.mark.parametrize("action", ["lose", "500 after", "409", "503", "drop"])
def test_one_bad_answer_to_a_commit_is_no_answer(s3: S3, store: ObjectStore, action: str) -> None:
    s3.ask("fault", action=action, method="PUT", match="/run/manifest")
    store.create("manifest", b"ours")
    assert store.read("manifest") == b"ours"
    puts = [r for r in s3.ask("seen")["requests"] if r.startswith("PUT") and r.endswith("/manifest")]
    assert len(puts) == (1 if action in ("lose", "500 after") else 2)


@pytest.mark.parametrize("action", ["lose", "500 after", "409", "503", "drop"])
def test_another_job_s_bytes_are_never_taken_for_ours(s3: S3, store: ObjectStore, action: str) -> None:
    store.create("manifest", b"theirs")
    s3.ask("fault", action=action, method="PUT", match="/run/manifest")
    with pytest.raises(AlreadyExists, match="manifest"):
        store.create("manifest", b"ours")
    assert store.read("manifest") == b"theirs"


def test_a_conflict_that_stays_is_an_error_in_time(s3: S3, bucket: str, store: ObjectStore, hasty: ObjectStore) -> None:
    s3.ask("fault", action="409", method="PUT", match="/run/manifest", times=0)
    with pytest.raises(StoreError) as caught:
        hasty.create("manifest", b"ours")
    assert not isinstance(caught.value, AlreadyExists)
    assert f"s3://{bucket}/run/manifest" in str(caught.value)
    s3.ask("watch")
    assert names(store) == []


def test_a_lost_reply_and_no_way_to_read_back_is_an_error(s3: S3, store: ObjectStore, hasty: ObjectStore) -> None:
    s3.ask("fault", action="lose", method="PUT", match="/run/manifest", times=0)
    s3.ask("fault", action="drop", method="GET", match="/run/manifest", times=0)
    with pytest.raises(StoreError):
        hasty.create("manifest", b"ours")
    s3.ask("watch")
    store.create("manifest", b"ours")  # found out later


@pytest.mark.parametrize("action", ["unconditional", "501"])
def test_a_store_without_conditional_put_is_refused_but_can_be_read(s3: S3, bucket: str, action: str) -> None:
    s3.ask("fault", action=action, method="PUT", times=0)
    fresh = ObjectStore("s3", bucket, "run", LONG)
    for _ in range(2):
        with pytest.raises(StoreError, match="if-none-match") as caught:
            fresh.create("manifest", b"ours")
        assert caught.value.errno == errno.EOPNOTSUPP
        assert f"s3://{bucket}" in str(caught.value)
    assert s3.ask("keys", name=bucket) == []
    s3.ask("watch")
    open_store(f"s3://{bucket}/run").create("manifest", b"theirs")
    assert fresh.read("manifest") == b"theirs"


def test_a_conflict_during_the_probe_does_not_condemn_the_store(s3: S3, bucket: str) -> None:
    s3.ask("fault", action="409", method="PUT", match="probe")
    s3.ask("fault", action="lose", method="PUT", match="probe", skip=1)
    ObjectStore("s3", bucket, "", LONG).create("a", b"x")
    assert s3.ask("keys", name=bucket) == ["a"]


def test_the_probe_is_made_once_and_leaves_nothing(s3: S3, bucket: str) -> None:
    for name in ("a", "b"):
        open_store(f"s3://{bucket}/run").create(name, b"x")
    assert s3.ask("keys", name=bucket) == ["run/a", "run/b"]
    puts = [r for r in s3.ask("seen")["requests"] if r.startswith("PUT")]
    assert len([r for r in puts if "probe" in r]) == 2
    assert len(puts) == 4


def test_probes_of_killed_processes_are_swept_when_old(s3: S3, bucket: str, store: ObjectStore) -> None:
    store.bucket.put("run/.tmp-probe-dead", b"first")
    store.make_folder("attempt", exclusive=True)
    assert names(store) == []
    assert store.sweep_temporaries("", 3600.0) == 0
    assert store.sweep_temporaries("attempt", 0.0) == 0
    assert store.sweep_temporaries("", 0.0) == 1
    assert s3.ask("keys", name=bucket) == ["run/attempt/.tmp-folder", "run/first"]


# ---------------------------------------------------------------- uploads


def test_parts_are_in_flight_together_and_requests_are_as_few_as_parts(s3: S3, store: ObjectStore) -> None:
    data = shard(40 * MIB)
    s3.ask("watch", delay=0.05)
    writer = store.open_writer("shard", len(data))
    for start in range(0, len(data), MIB):  # in small pieces, as the last ones of a shard are
        writer.write_at(start, memoryview(data)[start : start + MIB])
    assert names(store) == []
    writer.commit()
    seen = s3.ask("seen")
    kinds = [r.partition(" ")[0] for r in seen["requests"]]
    assert [kinds.count(k) for k in ("HEAD", "POST", "PUT", "GET")] == [2, 2, 8, 1]  # the GET is our listing
    assert seen["most"] >= 4
    s3.ask("watch", delay=0.05)
    target = bytearray(len(data) - 7)
    store.read_into("shard", 7, memoryview(target))
    assert target == data[7:]
    seen = s3.ask("seen")
    assert [r.partition(" ")[0] for r in seen["requests"]].count("GET") == 8
    assert seen["most"] >= 4


def test_a_small_shard_is_one_put(s3: S3, store: ObjectStore) -> None:
    s3.ask("watch")
    writer = store.open_writer("shard", 4 * MIB)
    writer.write_at(0, memoryview(shard(4 * MIB)))
    writer.commit()
    assert [r.partition(" ")[0] for r in s3.ask("seen")["requests"]] == ["HEAD", "PUT", "HEAD"]


def test_parts_grow_with_the_shard() -> None:
    config = ObjectStoreConfig()
    for size in (0, 1, MIB, 10 << 30, 72 << 30, 1 << 40, 5 << 40):
        part = part_bytes(size, config)
        assert part >= config.part_bytes
        assert part % MIB == 0
        assert -(-size // part) <= 10_000


@pytest.mark.parametrize(
    ("where", "action"), [("?uploads", "500"), ("partNumber=1", "drop"), ("partNumber=3", "500"), ("?uploadId", "drop")]
)
def test_an_upload_that_fails_leaves_nothing_and_is_aborted(
    s3: S3, bucket: str, store: ObjectStore, hasty: ObjectStore, where: str, action: str
) -> None:
    data = memoryview(shard(24 * MIB))
    s3.ask("fault", action=action, match=where, times=0, method="POST" if where.startswith("?") else "PUT")
    writer = hasty.open_writer("shard", len(data))

    def upload() -> None:
        for start in range(0, len(data), 6 * MIB):
            writer.write_at(start, data[start : start + 6 * MIB])
        writer.commit()

    with pytest.raises(StoreError, match=f"s3://{bucket}/run/shard"):
        upload()
    with pytest.raises(StoreError, match="dead"):
        writer.commit()
    writer.abort()
    s3.ask("watch")
    assert names(store) == []
    assert s3.ask("uploads", name=bucket) == []
    again = store.open_writer("shard", len(data))
    again.write_at(0, memoryview(data))
    again.commit()
    assert store.read("shard") == data


def test_an_upload_that_is_given_up_is_aborted(s3: S3, bucket: str, store: ObjectStore) -> None:
    writer = store.open_writer("shard", 30 * MIB)
    writer.write_at(0, memoryview(shard(12 * MIB)))
    assert s3.ask("uploads", name=bucket) == ["run/shard"]
    writer.abort()
    assert s3.ask("uploads", name=bucket) == []
    assert s3.ask("keys", name=bucket) == ["run/first"]


def test_bad_answers_during_an_upload_are_made_good(s3: S3, store: ObjectStore) -> None:
    data = shard(20 * MIB)
    for match in ("?uploads", "partNumber=2", "partNumber=3"):
        s3.ask("fault", action="503", match=match)
    s3.ask("fault", action="lose", match="partNumber=1")
    s3.ask("fault", action="lose", method="POST", match="?uploadId")  # completed, and nobody told us
    writer = store.open_writer("shard", len(data))
    writer.write_at(0, memoryview(data))
    writer.commit()
    assert store.read("shard") == data


def die_while_uploading(rank: int, url: str) -> None:
    writer = ObjectStore("s3", url, "run", LONG).open_writer("shard", 30 * MIB)
    writer.write_at(0, memoryview(shard(12 * MIB)))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_upload_is_invisible_and_in_nobody_s_way(s3: S3, bucket: str, store: ObjectStore) -> None:
    s3.ranks.run_ranks(1, die_while_uploading, bucket, backend=None, expect={0: signal.SIGKILL})
    assert s3.ask("uploads", name=bucket) == ["run/shard"]  # only the bucket's lifecycle rule can remove it
    assert names(store) == []
    with pytest.raises(NotFound):
        store.size("shard")
    writer = store.open_writer("shard", 256)
    writer.write_at(0, memoryview(shard(256)))
    writer.commit()
    assert store.read("shard") == shard(256)


# ---------------------------------------------------------------- reading


def test_a_cut_reply_is_read_to_its_end(s3: S3, store: ObjectStore) -> None:
    data = shard(3 * MIB)
    store.create("shard", data)
    s3.ask("fault", action="cut", method="GET", match="/run/shard", times=2)
    assert store.read("shard", 5, 2 * MIB) == data[5 : 5 + 2 * MIB]


def test_what_is_refused_says_which_variables_to_check_and_tells_no_secret(s3: S3, store: ObjectStore) -> None:
    s3.ask("fault", action="403", times=0)
    calls: list[Callable[[], object]] = [
        lambda: store.create("a", b"x"),
        lambda: store.read("first"),
        lambda: store.list(),
        lambda: store.delete("first"),
        lambda: store.open_writer("a", 1),
    ]
    for call in calls:
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.errno == errno.EACCES
        assert "AWS_ACCESS_KEY_ID" in str(caught.value)
        assert "canary" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_named(s3: S3) -> None:
    s3.ask("watch")
    with pytest.raises(StoreError, match=r"no such bucket.*s3://typo-in-bucket"):
        find_checkpoint("s3://typo-in-bucket/run")
    with pytest.raises(StoreError, match="no such bucket"):
        ObjectStore("s3", "typo-in-bucket", "", SHORT).create("a", b"x")


def test_listings_longer_than_a_page_of_the_service_are_whole(s3: S3, bucket: str, store: ObjectStore) -> None:
    folders = [f"step-{step:010}" for step in range(1, 2 * PAGE + 6)]
    s3.ask("fill", name=bucket, keys=[f"run/{folder}/manifest-g000001.json" for folder in folders])
    s3.ask("watch")
    assert names(store) == [f"{folder}/manifest-g000001.json" for folder in folders]
    assert list(store.list_folders()) == folders
    pages = [r for r in s3.ask("seen")["requests"] if "continuation-token" in r]
    assert len(pages) == 2 * 2  # they were longer


# ---------------------------------------------------------------- no server, no answer, no threads


@pytest.fixture(params=["nobody listens", "nobody answers"])
def gone(request: pytest.FixtureRequest, s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A store whose server is down, or takes connections and never says anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "nobody answers":
            listener.listen(64)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield ObjectStore("s3", "far-away", "run", ObjectStoreConfig(deadline_s=1.2))


@pytest.mark.parametrize("operation", ["create", "read", "list", "writer"])
def test_every_operation_ends_within_the_deadline(gone: ObjectStore, operation: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "create": lambda: gone.bucket.put_new("run/a", b"x"),
        "read": lambda: gone.read("a"),
        "list": lambda: gone.list(),
        "writer": lambda: gone.open_writer("a", 1),
    }
    begun = clock.monotonic()
    with pytest.raises(StoreError, match="s3://far-away/run") as caught:
        calls[operation]()
    assert clock.monotonic() - begun < 1.2 + 3.0  # a busy machine gets three seconds
    assert not isinstance(caught.value, NotFound | AlreadyExists)
    assert "DISTCKPT_STORE_DEADLINE_S" in str(caught.value)


def use_after_fork(rank: int, bucket: str) -> None:
    open_store(f"s3://{bucket}/run").read("first")


def test_a_fork_is_told_that_it_cannot_use_obstore_instead_of_hanging(bucket: str, store: ObjectStore) -> None:
    (outcome,) = run_ranks(1, use_after_fork, bucket, backend=None, timeout_s=20, check=False)
    assert (outcome.kind, outcome.timed_out) == ("StoreError", False)
    assert "forked" in outcome.error


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCKPT_STORE_DEADLINE_S", "7.5")
    monkeypatch.setenv("DISTCKPT_STORE_PART_MIB", "16")
    monkeypatch.setenv("DISTCKPT_STORE_IN_FLIGHT", "3")
    assert ObjectStoreConfig.from_env() == ObjectStoreConfig(7.5, 16 * MIB, 3)
    monkeypatch.setenv("DISTCKPT_STORE_PART_MIB", "4")
    with pytest.raises(ConfigError, match="5 MiB"):
        open_store("s3://bucket/run")
    monkeypatch.setenv("DISTCKPT_STORE_PART_MIB", "many")
    with pytest.raises(ConfigError, match="DISTCKPT_STORE_PART_MIB='many'"):
        open_store("s3://bucket/run")
    with pytest.raises(ConfigError, match="credentials") as caught:
        open_store("s3://key:canary@bucket/run")
    assert "canary" not in str(caught.value)


def test_the_other_services_are_set_up_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "Y2FuYXJ5")
    for scheme, service in (("gs", "Google Cloud Storage"), ("az", "Azure Blob Storage")):
        store = open_store(f"{scheme}://bucket/run")
        assert isinstance(store, ObjectStore)
        assert (store.url, store.bucket.service) == (f"{scheme}://bucket/run", service)
        clients = store.bucket._clients()  # made, without a request
        assert "canary" not in f"{clients} {store!r}"
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(ConfigError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://bucket/run").size("a")
