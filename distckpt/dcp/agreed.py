"""How ranks agree on a plan: one digest each where nothing changed, where all ranks hold alike, and after a resume.

Each rank sends the digest of its own table and the id of the plan that it has, if any: from the save before, or from
the checkpoint that it resumed from. If these fit, that is all. If all tables are equal, every rank makes the plan
alone. Otherwise (pipeline stages, and no checkpoint to start from) each distinct table travels to the leader once, and
each class of equal tables gets the part of the merged plan that concerns it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from distckpt.clock import Deadline
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.cover import cover_of, whole_cover
from distckpt.dcp.leaves import GROUPS, REPLICATED
from distckpt.dcp.planner import Plan, Row, check_layouts, gathered, pieces_for
from distckpt.dcp.tables import Table, decode_plan, decode_table, encode_plan, merge_tables, part_of
from distckpt.errors import SaveFailed
from distckpt.format import digest as digests
from distckpt.format.layout import Layout
from distckpt.format.manifest import Manifest, PlanEntry
from distckpt.format.placing import Piece, Placed, place
from distckpt.format.shard_index import layout_of, mesh_of

log = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True)
class AgreedPlan:
    """A plan that all ranks have. ``id`` stands for all ranks' tables.

    ``held`` says who holds what, ``written`` who writes what: the same, except in a full save. The leader's are whole,
    another rank's may lack tensors that it does not hold. ``table`` is the digest of this rank's own. ``cover`` stands for
    the boxes that this rank writes, ``whole`` (leader) for what all ranks' must add up to (see ``cover.py``).
    """

    id: str
    table: str
    held: Plan
    written: Plan
    placed: Placed
    cover: int
    whole: int | None = None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The boxes that this rank writes."""
        return self.placed.pieces

    def entry(self) -> PlanEntry | msgspec.UnsetType:
        """Return what the manifest keeps besides the tensors, so that a job which resumes has this plan already."""
        if self.held is not self.written:
            return msgspec.UNSET
        sources = {name: list(ranks) for name, ranks in self.held.sources.items()}
        return PlanEntry(id=self.id, objects=dict(self.held.objects), sources=sources, shared=dict(self.held.shared))


def agree_plan(
    agreement: Agreement,
    key: str,
    table: Table,
    cached: AgreedPlan | None,
    *,
    step: int,
    timeout_s: float,
    full: bool = False,
    resumed: Manifest | None = None,
) -> AgreedPlan:
    """Return the plan for all ranks' tables: one that this rank has if it fits all of them, else a new one.

    ``cached``: the plan of the save before. ``resumed``: the manifest of the checkpoint that was loaded, if there is
    no plan yet. ``full``: rank 0 writes every tensor whole (see ``dcp/full.py``). Raises ``ReplicasDiffer`` or
    ``IncompatibleState``, or the ``AgreementError`` of a leader that found one of them: on all ranks, naming ranks.
    """
    if cached is None and resumed is not None and not full:
        cached = recall(resumed, table, agreement.rank, agreement.world_size)

    def decide(payloads: list[bytes]) -> bytes:
        steps, found, plans = zip(*(msgspec.json.decode(p) for p in payloads), strict=True)
        if len(set(steps)) > 1:
            raise SaveFailed(f"ranks save different steps: {list(steps)[:16]}")
        distinct = sorted(set(found))
        place = {d: i for i, d in enumerate(distinct)}
        order[:] = found
        agreed = digests.digest(msgspec.json.encode([distinct, [place[d] for d in found]]))
        return msgspec.json.encode([agreed, len(distinct), set(plans) == {agreed}])

    order: list[str] = []  # the leader's: every rank's table
    payload = msgspec.json.encode([step, table.digest, cached.id if cached is not None else ""])
    deadline = Deadline.after(timeout_s)
    agreed, classes, fits = msgspec.json.decode(agreement.round(f"{key}/plan", payload, decide, deadline=deadline))
    if fits:
        assert cached is not None
        return cached
    if classes == 1:
        held = merge_tables([table] * agreement.world_size)
        check_layouts(held)
    else:
        held = _merged(agreement, f"{key}/tables", agreed, table, order, deadline, full=full)
    return _planned(agreed, table, held, agreement.rank, full=full)


def _planned(agreed: str, table: Table, held: Plan, rank: int, *, full: bool = False) -> AgreedPlan:
    written = gathered(held) if full else held
    placed = place(pieces_for(written, rank))
    cover = cover_of(((p.fqn, p.box) for p in placed.pieces), agreed)
    whole = whole_cover(((fqn, row.shape) for fqn, row in written.tensors.items()), agreed) if rank == 0 else None
    return AgreedPlan(agreed, table.digest, held, written, placed, cover, whole)


def _merged(
    agreement: Agreement,
    key: str,
    agreed: str,
    table: Table,
    order: Sequence[str],
    deadline: Deadline,
    *,
    full: bool,
) -> Plan:
    """Send each distinct table to the leader, and return this rank's part of the plan (full saves: the whole)."""
    agreement.post_blob(table.digest, table.encoded)
    merged: list[Plan] = []

    def name(digest: str) -> str:
        return f"{agreed}.{'all' if full else digest}"

    def decide(_: list[bytes]) -> bytes:
        found = {d: table.encoded if d == table.digest else agreement.get_blob(d) for d in sorted(set(order))}
        tables = {d: decode_table(encoded) for d, encoded in found.items()}
        plan = merge_tables([tables[d] for d in order])
        check_layouts(plan)
        for d, one in [*tables.items()][: 1 if full else None]:
            agreement.post_blob(name(d), encode_plan(plan if full else part_of(plan, one)))
        merged.append(plan)
        return b""

    agreement.round(key, b"", decide, deadline=deadline)
    return merged[0] if merged else decode_plan(agreement.get_blob(name(table.digest)))


def recall(manifest: Manifest, table: Table, rank: int, world_size: int) -> AgreedPlan | None:
    """Return the plan of the save that wrote a manifest, if it can be this rank's plan too; reads nothing.

    That it is every rank's is for the agreement to find out: its id stands for the tables of all of them.
    """
    entry = manifest.plan
    if not isinstance(entry, PlanEntry) or manifest.world_size != world_size:
        return None
    if rank != 0 and not table.tensors.keys() <= manifest.tensors.keys():
        return None
    meshes = [mesh_of(mesh) for mesh in manifest.meshes]
    wanted = manifest.tensors if rank == 0 else table.tensors
    rows = {}
    for fqn in sorted(wanted):
        saved = manifest.tensors[fqn]
        rows[fqn] = Row(saved.dtype, tuple(saved.shape), layout_of(saved, meshes))
    for fqn, row in table.tensors.items():
        if fqn not in rows or not _fits(row, rows[fqn]):
            return None
    if not all(entry.objects.get(name) == kind for name, kind in table.objects.items()) or not _complete(
        entry, world_size
    ):
        return None
    sources = {name: tuple(ranks) for name, ranks in entry.sources.items()}
    held = Plan(world_size, rows, dict(manifest.aliases), dict(entry.objects), sources, dict(entry.shared))
    try:
        check_layouts(held)
        return _planned(entry.id, table, held, rank)
    except (ValueError, LookupError) as error:  # written by another version, or by hand: plan afresh
        log.info("the plan of step %d is not used: %s", manifest.step, error)
        return None


def _complete(entry: PlanEntry, world_size: int) -> bool:
    """Whether every object has what its kind needs, from ranks that exist."""
    for name, kind in entry.objects.items():
        senders = entry.sources.get(name, [])
        if kind in (REPLICATED, GROUPS) and not (senders and max(senders) < world_size):
            return False
        if kind == REPLICATED and name not in entry.shared:
            return False
    return True


def _fits(own: Row, saved: Row) -> bool:
    """Whether a rank's own row can be the saved one: equal, or joined over sub-meshes, or plain and now replicated."""
    if (own.dtype, own.shape) != (saved.dtype, saved.shape):
        return False
    assert saved.layout is not None
    if own.layout is None:
        return saved.layout.placements == ("R",)
    joined: Layout = saved.layout
    return own.layout == joined or joined.placements == ("R", *own.layout.placements)
