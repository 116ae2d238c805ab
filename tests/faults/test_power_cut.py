"""Power cuts with the kernel's own semantics: ext4 on a loop device, shut down at each step of a save.

The shutdown ioctl stops a file system at once, as a power cut does: what was not made durable is gone after the next
mount. Once with the journal flushed at that moment, and once without. What was acknowledged must be there afterwards;
anything else is absent or whole; what gc removed is gone, or back and whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crash_job import Job
from supervisor import Chain, Kill, enumerate_points, litter_on_disk

from distckpt.format.lineage import as_committed

SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32)
LOG_FLUSHED, LOG_LOST = 1, 2
MEGABYTES = 24


class Disk:
    """A file with an ext4 in it, mounted."""

    def __init__(self, image: Path, mounted: Path) -> None:
        self.image, self.mounted = image, mounted
        with image.open("wb") as file:
            file.truncate(MEGABYTES << 20)
        mounted.mkdir()
        done = subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"power cuts need mkfs.ext4, which failed: {done.stderr.strip()}")
        done = self._mount()
        if done.returncode:
            pytest.skip(f"power cuts need loop mounts, which are refused here: {done.stderr.strip()}")

    def _mount(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["mount", "-o", "loop", self.image, self.mounted], capture_output=True, text=True)

    def cut(self, flag: int) -> None:
        fd = os.open(self.mounted, os.O_RDONLY)
        fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", flag))
        os.close(fd)

    def start_again(self) -> None:
        subprocess.run(["umount", self.mounted], check=True)
        done = self._mount()
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.mounted], check=False)


@contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None or shutil.which("mount") is None:
        pytest.skip("power cuts need root, mkfs.ext4 and mount")
    shm = Path("/dev/shm")  # in memory: the cut does not depend on what the image lies on, and it is faster
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as images:
        made = Disk(Path(images) / "image", folder / "mounted")
        try:
            yield made
        finally:
            made.close()


class PowerChain(Chain):
    """Jobs of one rank on that disk, each of which ends with a power cut."""

    def __init__(self, folder: Path, disk: Disk, flag: int, incremental: bool = False) -> None:
        self.disk, self.flag = disk, flag
        super().__init__(folder, world=1, incremental=incremental)
        self.root = disk.mounted / "root"
        self.root.mkdir()
        (self.root / "notes-of-the-user.txt").write_text("mine")
        os.sync()

    def prepared(self, job: Job) -> Job:
        return replace(job, cut=lambda: self.disk.cut(self.flag))

    def recover(self) -> None:
        self.disk.start_again()

    def _learn(self, event: dict[str, Any]) -> None:
        """Once the manifest is published other ranks may acknowledge: from here on it has to be there."""
        super()._learn(event)
        name, _, path = event.get("at", "").partition("@")
        committed = as_committed(path) if name == "commit.after_manifest" else None
        if committed is not None:
            super()._learn({"event": "acknowledged", "generation": committed.generation, "step": committed.step})

    def _litter(self) -> list[str]:
        """A cut may undo removals, so only the amount is bounded here; the last job, in peace, has to clean up."""
        now = litter_on_disk(self.root)
        self.result.most_litter = max(self.result.most_litter, len(now))
        return [f"I6: a cut left {sorted(now)}"] if len(now) > 4 else []


@pytest.mark.parametrize("flag", [LOG_FLUSHED, LOG_LOST], ids=["log-flushed", "log-lost"])
def test_what_was_acknowledged_outlives_a_power_cut_at_every_step(flag: int, tmp_path: Path) -> None:
    with disk(tmp_path) as made:
        points = enumerate_points(tmp_path / "points", background=False, world=1)[0]
        assert {"create.linked", "create.synced", "writer.synced", "gc.after_manifest"} <= {name for name, _ in points}
        chain = PowerChain(tmp_path / "chain", made, flag)
        for point in points:
            chain.kill(Kill((0,), False, point))
        result = chain.finish()
        assert result.violations == []
        assert result.missed == []
        assert result.landed == len(points)
        assert litter_on_disk(chain.root) == set()


def test_the_cut_loses_what_was_not_synced(tmp_path: Path) -> None:
    """The test of the test: a file without fsync is gone afterwards, one with it is there."""
    with disk(tmp_path) as made:
        for name, durable in (("kept", True), ("lost", False)):
            with (made.mounted / name).open("wb") as file:
                file.write(b"x" * 5000)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        made.cut(LOG_LOST)
        made.start_again()
        assert (made.mounted / "kept").read_bytes() == b"x" * 5000
        lost = made.mounted / "lost"
        assert not lost.exists() or lost.read_bytes() != b"x" * 5000
