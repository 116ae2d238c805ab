"""``distckpt pin`` and ``unpin``: make a step exempt from removal by policy, or lift that."""

from __future__ import annotations

from distckpt.cli import options
from distckpt.cli.output import print_json
from distckpt.cli.places import place, root_of
from distckpt.config import CheckpointConfig
from distckpt.errors import ConfigError


def pin(
    path: options.Where, step: options.Step = None, json: options.Json = False, debug: options.Debug = False
) -> None:
    """Pin a step: neither a policy nor gc removes it."""
    _set(path, step, json, pinned=True)


def unpin(
    path: options.Where, step: options.Step = None, json: options.Json = False, debug: options.Debug = False
) -> None:
    """Unpin a step, so that policies and gc may remove it again."""
    _set(path, step, json, pinned=False)


def _set(path: str, step: int | None, json: bool, *, pinned: bool) -> None:
    from distckpt.manager.root import RunRoot

    at = place(path, step)
    if at.step is None:
        raise ConfigError(f"{path}: which step? Give its folder, or --step")
    RunRoot(at.store, CheckpointConfig(root_of(at.store))).pin(at.step, pinned=pinned)
    if json:
        print_json({"root": root_of(at.store), "step": at.step, "pinned": pinned})
    else:
        print(f"step {at.step} of {root_of(at.store)} is {'pinned' if pinned else 'not pinned'}")
