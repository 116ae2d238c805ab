"""Names of objects here and in DCP: we keep each part's state as one tree, DCP flattens every tree to its leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element

from distckpt.dcp.leaves import tree_refs
from distckpt.format.typed_json import Ref

Path = tuple[str | int, ...]


def nested_objects(
    flat: Mapping[str, Any], tensors: Collection[str], paths: Mapping[str, Path] | None
) -> dict[str, Any]:
    """Return DCP's flattened values as our objects, one per part of the state.

    ``paths`` is the planner's mapping from flattened name to key path. Values under ``model`` and single optimizer
    values keep their flat names, ``optim.param_groups`` becomes one list, any other top-level key one tree in which
    tensors are references.
    """
    out: dict[str, Any] = {}
    trees: dict[str, Any] = {}
    paths = paths or {}
    for name in [*flat, *tensors]:
        path = paths.get(name, (name,))
        if name in tensors:
            if len(path) > 1 and path[0] not in ("model", "optim"):
                set_element(trees, path, Ref(name))
        elif len(path) == 1 or path[0] == "model" or tuple(path[:2]) == ("optim", "state"):
            out[name] = flat[name]
        else:
            set_element(trees, path, flat[name])
    optim = trees.pop("optim", {})
    for key, value in optim.items():
        out[f"optim.{key}"] = _groups_by_position(value) if key == "param_groups" else value
    return out | {name: tree for name, tree in trees.items() if not _only_refs(tree)}


def _groups_by_position(groups: Any) -> Any:
    """Return param groups as a list; ``flatten_optimizer_state_dict=True`` keys them by parameter instead."""
    if not isinstance(groups, dict):
        return groups
    merged: list[dict[str, Any]] = []
    for fqn, settings in groups.items():
        for group in merged:
            if {k: v for k, v in group.items() if k != "params"} == settings:
                group["params"].append(fqn)
                break
        else:
            merged.append({**settings, "params": [fqn]})
    return merged


def _only_refs(tree: Any) -> bool:
    leaves = flatten_state_dict({"tree": tree})[0].values()
    return bool(leaves) and all(isinstance(leaf, Ref) for leaf in leaves) and any(tree_refs(tree))


def flat_objects(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return our objects under the names that DCP gives their leaves; references to tensors are left out."""
    out: dict[str, Any] = {}
    for name, value in objects.items():
        whole: Any = value
        for key in reversed(name.split(".") if name == "optim.param_groups" else [name]):
            whole = {key: whole}
        flat, _ = flatten_state_dict(whole)
        out |= {key: leaf for key, leaf in flat.items() if not isinstance(leaf, Ref)}
    return out
