"""What every test shares: single-threaded maths (fork safety), import paths, seeds, the gpu marker."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch or numpy is imported: an OpenMP pool in the parent would hang OpenMP in forked ranks.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ["HF_HUB_OFFLINE"] = "1"  # models and tokenizers of tests are made here; nothing may be fetched
# A TCPStore server looks up the name of every peer that connects, and all ranks wait while it does: a lost DNS
# packet costs 5 s. No test needs DNS, so the resolver may ask no server (names in /etc/hosts still resolve).
os.environ.setdefault("RES_OPTIONS", "attempts:0")

_TESTS = Path(__file__).resolve().parent
_LONGEST = ("faults", "dist")
"""Folders with files that take half a minute and more."""
for _folder in (str(_TESTS.parent), str(_TESTS)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

import random  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

import pytest  # noqa: E402

if TYPE_CHECKING:
    from s3_support import S3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, so that none is left at the end, and skip those marked ``gpu`` without a CUDA device."""
    items.sort(key=lambda item: _LONGEST.index(item.path.parent.name) if item.path.parent.name in _LONGEST else len(_LONGEST))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random streams, whichever tests ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """One S3 server for the session; obstore finds it through the environment."""
    from s3_support import running

    with running() as server:
        yield server


@pytest.fixture
def bucket(s3: S3) -> str:
    """Return the name of a new, empty bucket of ``s3``, whose faults and counts are forgotten."""
    s3.ask("watch")
    return s3.bucket()
