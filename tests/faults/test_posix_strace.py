"""The POSIX store under faults injected into its real system calls."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from posix_support import (
    names,
    on_disk,
)

from distckpt.storage import PosixStore

STRACE = shutil.which("strace")


def under_strace(tmp_path: Path, inject: str, script: str) -> tuple[str, list[str]]:
    """Run Python code (with ``store``) under injection; returns its output and the traced calls."""
    log = tmp_path / "trace"
    code = "import sys, errno\nfrom distckpt.storage import PosixStore\nstore = PosixStore(sys.argv[1])\n" + script
    call = inject.split(":")[0]
    command = [str(STRACE), "-f", "-o", str(log), "-e", f"trace={call}", "-e", f"inject={inject}"]
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)
    done = subprocess.run(
        [*command, sys.executable, "-c", code, str(root)],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip(f"no ptrace here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), [line for line in log.read_text().splitlines() if f" {call}(" in line]


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
class TestRealSystemCalls:
    def test_fsync_fails_once_then_would_succeed(self, tmp_path: Path) -> None:
        script = """
writer = store.open_writer("shard", 3)
writer.write_at(0, memoryview(b"abc"))
try:
    writer.commit()
except OSError as error:
    print(errno.errorcode[error.errno])
try:
    writer.commit()
except OSError as error:
    print(errno.errorcode[error.errno])
"""
        # The first fsync is of the root's parent.
        output, calls = under_strace(tmp_path, "fsync:error=EIO:when=2", script)
        assert output.split() == ["EIO", "EBADF"]
        assert len(calls) == 2
        assert names(PosixStore(tmp_path / "root")) == []

    def test_link_answers_an_error_though_it_worked(self, tmp_path: Path) -> None:
        # strace cannot make the call and fail it, so the name is there before, as when NFS repeats our call.
        PosixStore(tmp_path / "root").create("m", b"abc")
        output, _ = under_strace(tmp_path, "linkat:error=EIO", "store.create('m', b'abc')\nprint('same')")
        assert output == "same"

    @pytest.mark.parametrize("code", ["EPERM", "EOPNOTSUPP", "EXDEV"])
    def test_no_hard_links(self, tmp_path: Path, code: str) -> None:
        script = """
from distckpt.errors import AlreadyExists
store.create('m', b'abc')
try:
    store.create('m', b'xyz')
except AlreadyExists:
    print(1)
"""
        output, calls = under_strace(tmp_path, f"linkat:error={code}", script)
        assert output == "1"
        assert len(calls) == 2
        store = PosixStore(tmp_path / "root")
        assert store.read("m") == b"abc"
        assert on_disk(store) == ["m"]

    def test_interrupted_writes_go_on(self, tmp_path: Path) -> None:
        script = "store.create('m', b'abc' * 1000)\nprint(store.read('m') == b'abc' * 1000)"
        output, calls = under_strace(tmp_path, "pwrite64:error=EINTR:when=1", script)
        assert output == "True"
        assert len(calls) == 2

    def test_killed_at_the_link(self, tmp_path: Path) -> None:
        with pytest.raises(AssertionError):
            under_strace(tmp_path, "linkat:signal=SIGKILL:when=1", "store.create('m', b'abc')")
        assert "killed by SIGKILL" in (tmp_path / "trace").read_text()
        store = PosixStore(tmp_path / "root")
        assert names(store) in ([], ["m"])
        store.create("m", b"abc")
        assert store.read("m") == b"abc"
