"""What a manifest must mean, after its types are right: sizes, names, layouts and paths that fit each other.

Nothing here allocates by what a number claims: every loop runs over what stands in the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from distckpt.boxes import Box, tiling_error
from distckpt.errors import ManifestError
from distckpt.format.digest import is_digest
from distckpt.format.dtypes import ITEMSIZES
from distckpt.format.layout import parse_placement
from distckpt.format.limits import (
    MAX_DIMS,
    MAX_NUMBER,
    MAX_TENSORS,
    MAX_WORLD,
    name_problem,
    shape_problem,
    shown,
)
from distckpt.format.names import check_relative_path, parse_attempt_name, parse_shard_name, step_folder
from distckpt.format.runs import MAX_FILES, attempt_problem

if TYPE_CHECKING:
    from distckpt.format.manifest import Manifest, MeshEntry, ShardEntry, TensorEntry

MAX_MESHES: Final = 100_000
MAX_OBJECTS: Final = 1_000_000
_MAX_TEXT: Final = 256


def check_manifest(manifest: Manifest, where: str, *, tensors: bool = True) -> None:
    """Raise ``ManifestError`` naming the file (``where``) and the field for what can't be true.

    Without ``tensors`` their entries are not looked at: they were found right before, for the same meshes.
    """
    problem = (
        _scalar_problem(manifest)
        or _count_problem(manifest)
        or _mesh_problem(manifest.meshes, manifest.world_size)
        or (_tensor_problem(manifest) if tensors else None)
        or _alias_problem(manifest)
        or _object_problem(manifest)
        or _reference_problem(manifest)
    )
    if problem is not None:
        raise ManifestError(f"{where}: {problem}; the manifest is damaged or hostile")
    _check_shards(manifest, where)


def _scalar_problem(manifest: Manifest) -> str | None:
    if not 1 <= manifest.world_size <= MAX_WORLD:
        return f"$.world_size is {manifest.world_size}, outside [1, {MAX_WORLD}]"
    if manifest.epoch is not None and not -MAX_NUMBER < manifest.epoch < MAX_NUMBER:
        return "$.epoch is 2**62 or more"
    for field in ("time", "attempt", "save_id", "engine"):
        if not 0 < len(getattr(manifest, field)) <= _MAX_TEXT:
            return f"$.{field} has {len(getattr(manifest, field))} characters, outside [1, {_MAX_TEXT}]"
    attempt = parse_attempt_name(manifest.attempt)
    if attempt is None or attempt[0] != manifest.generation:
        return f"$.attempt {manifest.attempt!r} is no attempt of generation {manifest.generation}"
    return None


def _count_problem(manifest: Manifest) -> str | None:
    for field, most in (
        ("meshes", MAX_MESHES),
        ("tensors", MAX_TENSORS),
        ("aliases", MAX_TENSORS),
        ("objects", MAX_OBJECTS),
        ("per_rank", MAX_OBJECTS),
        ("shards", MAX_WORLD),
    ):
        if len(getattr(manifest, field)) > most:
            return f"$.{field} has {len(getattr(manifest, field))} entries (at most {most})"
    if len(manifest.shards) not in (1, manifest.world_size):
        return f"$.shards has {len(manifest.shards)} entries for {manifest.world_size} ranks"
    return None


def _mesh_problem(meshes: Sequence[MeshEntry], world_size: int) -> str | None:
    for i, mesh in enumerate(meshes):
        at = f"$.meshes[{i}]"
        if len(mesh.shape) > MAX_DIMS or 0 in mesh.shape:
            return f"{at}.shape must have at most {MAX_DIMS} dimensions, none of them 0"
        end = total = 0
        for run in sorted(mesh.ranks):
            if len(run) != 2 or not run[0] < run[1] <= world_size:
                return f"{at}.ranks has the run {run[:3]}, no [start, stop) of {world_size} ranks"
            if run[0] < end:
                return f"{at}.ranks has rank {run[0]} twice"
            end = run[1]
            total += run[1] - run[0]
        if total != math.prod(mesh.shape):
            return f"{at} has {total} ranks for shape {mesh.shape[:8]}"
    return None


def _tensor_problem(manifest: Manifest) -> str | None:
    fine: set[object] = set()  # many tensors are alike but for their names
    for name, tensor in manifest.tensors.items():
        wrong = name_problem(name)
        if wrong is not None:
            return f"$.tensors[{shown(name)}]: the name {wrong}"
        alike = (tensor.dtype, tuple(tensor.shape), tensor.mesh, tuple(tensor.placements))
        if alike in fine and tensor.boxes is None:
            continue
        wrong = _entry_problem(tensor, manifest.meshes)
        if wrong is not None:
            return f"$.tensors[{shown(name)}]{wrong}"
        if tensor.boxes is None:
            fine.add(alike)
    return None


def _entry_problem(tensor: TensorEntry, meshes: Sequence[MeshEntry]) -> str | None:
    size = ITEMSIZES.get(tensor.dtype)
    if size is None:
        return f".dtype: {shown(tensor.dtype)} is unknown"
    wrong = shape_problem(tensor.shape, size)
    if wrong is not None:
        return f".shape {wrong}"
    if tensor.mesh >= len(meshes):
        return f".mesh is {tensor.mesh}, there are {len(meshes)} meshes"
    mesh = meshes[tensor.mesh]
    if tensor.placements == ["E"]:
        return _explicit_problem(tensor, math.prod(mesh.shape))
    if tensor.boxes is not None:
        return f'.boxes stand beside placements {tensor.placements[:4]}; they go with ["E"] only'
    if len(tensor.placements) != len(mesh.shape):
        return f".placements has {len(tensor.placements)} entries for a mesh of {len(mesh.shape)} dimensions"
    for text in tensor.placements:
        wrong = _placement_problem(text, len(tensor.shape))
        if wrong is not None:
            return f".placements: {wrong}"
    flat = [text for text in tensor.placements if text[0] == "F"]
    if flat and (len(flat) > 1 or any(text != "R" for text in tensor.placements if text[0] != "F")):
        return f".placements {tensor.placements[:4]}: F goes with R only"
    return None


def _placement_problem(text: str, ndim: int) -> str | None:
    if len(text) > 48 or not text.isascii():
        return f"unknown placement {shown(text)}"
    try:
        placement = parse_placement(text)
    except ValueError as cause:
        return str(cause)
    if placement.kind == "E":
        return "E must stand alone"
    if placement.kind in ("S", "SS") and placement.dim >= ndim:
        return f"{text} shards dimension {placement.dim} of a tensor that has {ndim}"
    return None


def _explicit_problem(tensor: TensorEntry, ranks: int) -> str | None:
    if tensor.boxes is None or len(tensor.boxes) != ranks:
        return f".boxes has entries for {len(tensor.boxes or ())} of the mesh's {ranks} ranks"
    ndim = len(tensor.shape)
    boxes = []
    for i, held in enumerate(tensor.boxes):
        for box in held:
            if len(box) != 2 or len(box[0]) != ndim or len(box[1]) != ndim:
                return f".boxes[{i}] has a box that is not [[offsets], [sizes]] in {ndim} dimensions"
            if any(o + s > extent for o, s, extent in zip(box[0], box[1], tensor.shape, strict=True)):
                return f".boxes[{i}] has the box {box[0]}+{box[1]} outside shape {tensor.shape}"
            boxes.append(Box(tuple(box[0]), tuple(box[1])))
    wrong = tiling_error(tensor.shape, boxes)
    return None if wrong is None else f".boxes: {wrong}"


def _alias_problem(manifest: Manifest) -> str | None:
    for name, target in manifest.aliases.items():
        wrong = name_problem(name)
        if wrong is not None:
            return f"$.aliases[{shown(name)}]: the name {wrong}"
        if name in manifest.tensors:
            return f"$.aliases[{shown(name)}] is the name of a stored tensor too"
        if target not in manifest.tensors:
            return f"$.aliases[{shown(name)}] points to {shown(target)}, which is no stored tensor"
    return None


def _object_problem(manifest: Manifest) -> str | None:
    seen: set[str] = set()
    for name in manifest.per_rank:
        if name in seen:
            return f"$.per_rank has {shown(name)} twice"
        seen.add(name)
    return None


def _reference_problem(manifest: Manifest) -> str | None:
    """Every reference is to shards of another attempt, of no later step or generation, and each attempt is named once."""
    references = manifest.references
    if references and manifest.version[0] < 2:
        return f"$.reused: refers to other files, which format {manifest.version} does not do"
    own = f"{step_folder(manifest.step)}/{manifest.attempt}"
    seen, files = {own}, 0
    for i, reference in enumerate(references):
        problem = attempt_problem(reference.attempt, step=manifest.step, generation=manifest.generation)
        if problem is None and reference.attempt in seen:
            problem = f"{reference.attempt} {'is this very attempt' if reference.attempt == own else 'stands twice'}"
        if problem is None and not 1 <= reference.shards <= MAX_WORLD:
            problem = f"{reference.shards} shards, outside [1, {MAX_WORLD}]"
        end = 0
        for run in reference.ranks if problem is None else ():
            if len(run) != 2 or not end <= run[0] < run[1] <= reference.shards:
                problem = f"ranks has the run {run[:3]}, no [start, stop) of {reference.shards} shards after {end}"
                break
            files, end = files + run[1] - run[0], run[1]
        if problem is None and not (reference.ranks and reference.used <= reference.size):
            problem = f"{reference.used} bytes used of {reference.size} in {len(reference.ranks)} runs of ranks"
        if problem is None and files > MAX_FILES * len(manifest.shards):
            problem = f"{files} files for {len(manifest.shards)} shards"
        if problem is not None:
            return f"$.reused[{i}]: {problem}"
        seen.add(reference.attempt)
    return None


def _check_shards(manifest: Manifest, where: str) -> None:
    """Check that shard i is rank i's in an attempt's folder: paths differ, none leaves the step's folder."""
    for i, shard in enumerate(manifest.shards):
        check_relative_path(shard.path, f"{where}: $.shards[{i}].path")
        problem = _shard_problem(shard, i, len(manifest.shards))
        if problem is not None:
            raise ManifestError(f"{where}: $.shards[{i}]{problem}; the manifest is damaged or hostile")


def _shard_problem(shard: ShardEntry, index: int, count: int) -> str | None:
    folder, _, name = shard.path.partition("/")
    if parse_attempt_name(folder) is None:
        return f".path {shown(shard.path)} is not in an attempt's folder"
    if parse_shard_name(name) != (index, count):
        return f".path {shown(shard.path)} is not the shard of rank {index} of {count}"
    if shard.size >= MAX_NUMBER:
        return f".size is {shard.size}"
    if not is_digest(shard.header):
        return ".header is not a digest: 32 lowercase hex digits of xxh3-128"
    return None
