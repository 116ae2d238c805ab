"""``distckpt gc``: remove checkpoints that no rule keeps, and orphans of jobs that died. A dry run unless ``--yes``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from distckpt.cli import options
from distckpt.cli.output import Column, one_line, plain, print_json, print_table, size_text
from distckpt.cli.places import root_of, root_place, run_metric
from distckpt.config import CheckpointConfig
from distckpt.errors import ConfigError
from distckpt.format.doctor import LIVE_S
from distckpt.format.lineage import (
    Committed,
    highest_generation,
    lineage,
    list_committed,
    live_generations,
    read_generations,
    strays,
)
from distckpt.format.verify import quick_check
from distckpt.manager.gc import GcReport, collect
from distckpt.manager.keep_policy import KeepAny, KeepBest, KeepEvery, KeepLast, KeepPolicy, plan_removal, protected
from distckpt.manager.ranking import best
from distckpt.manager.root import RunRoot
from distckpt.storage.base import Store


@dataclass(frozen=True, slots=True)
class Choice:
    """What may go, and of those that no rule keeps but that must stay: (manifest's name, why)."""

    remove: tuple[Committed, ...]
    spared: tuple[tuple[str, str], ...]


def gc(
    path: options.Root,
    keep_last: int = typer.Option(None, min=1, metavar="N", show_default=False, help="Keep the N newest."),
    keep_best: str = typer.Option(None, metavar="METRIC", show_default=False, help="Keep the best by this metric."),
    best_count: int = typer.Option(1, min=1, metavar="K", help="How many of the best."),
    mode: options.MetricMode = None,
    keep_every: int = typer.Option(None, min=1, metavar="N", show_default=False, help="Keep steps divisible by N."),
    drop_strays: bool = typer.Option(False, "--strays", help="Remove strays too (commits outside the lineage)."),
    grace: float = typer.Option(24.0, min=0.0, metavar="HOURS", help="Younger orphans stay."),
    yes: bool = typer.Option(False, "--yes", help="Really remove; without it nothing is touched."),
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Remove checkpoints that none of the --keep rules keeps, and orphans; without a rule only orphans.

    Always kept: the two newest (one with --keep-last 1), pinned ones, the run's best, what a job resumed from, and
    what a running job wrote. Exit status 1 if something could not be removed.
    """
    store = root_place(path).store
    # What is unreadable is in the report.
    logging.getLogger("distckpt").setLevel(logging.ERROR)
    if keep_last == 1:
        typer.echo("--keep-last 1: if that one is damaged, there is nothing to fall back to", err=True)
    policy = _policy(keep_last, keep_best, mode, best_count, keep_every)
    minimum = 1 if keep_last == 1 else 2
    choice = choose(store, policy, minimum=minimum, drop_strays=drop_strays)
    report = collect(
        store,
        remove=choice.remove,
        grace_s=grace * 3600,
        current_generation=highest_generation(store),
        dry_run=not yes,
        minimum_kept=minimum,
    )
    stays = dict(sorted({**report.reasons, **dict(choice.spared)}.items()))
    if json:
        print_json({"root": root_of(store), **plain(report), "kept": list(stays), "reasons": stays})
    else:
        _print(report, {name: why.replace(f"{store.url}/", "") for name, why in stays.items()})
    if yes and any(reason.startswith("could not be removed") for reason in stays.values()):
        raise typer.Exit(1)


def _policy(last: int | None, metric: str | None, mode: str | None, count: int, every: int | None) -> KeepPolicy | None:
    if metric is None and mode is not None:
        raise ConfigError("--mode says which way --keep-best METRIC is better; give both")
    rules: list[KeepPolicy] = []
    rules += [KeepLast(last)] if last is not None else []
    rules += [KeepBest(metric, mode or "min", count)] if metric is not None else []
    rules += [KeepEvery(every)] if every is not None else []
    return KeepAny(tuple(rules)) if rules else None


def choose(store: Store, policy: KeepPolicy | None, *, minimum: int, drop_strays: bool) -> Choice:
    """Apply a keep policy (None keeps all) to a root's lineage, with everything that no policy may remove.

    Raises ``StoreError`` where the store cannot be asked, or which jobs run cannot be found out.
    """
    committed, generations = list_committed(store), read_generations(store)
    live = set(live_generations(store, LIVE_S))
    goes: list[Committed] = []
    spared: list[tuple[str, str]] = []
    if policy is not None:
        root = RunRoot(store, CheckpointConfig(root_of(store)))
        readable = root.readable()
        # A damaged one must not take the place of a whole one that a rule would keep.
        damaged = {c for c, manifest in readable if quick_check(store, c, manifest)}
        spared += [(c.manifest_path, "its files are damaged: it counts for no rule") for c in sorted(damaged)]
        readable = [(c, manifest) for c, manifest in readable if c not in damaged]
        kept = root.kept(readable)
        line = lineage(committed, generations)
        safe = protected(kept, best=best(kept, *run_metric(store, line)), minimum=minimum)
        running = [g for g in generations if g.number in live or g.number == generations[-1].number]
        for record in running:
            safe |= protected(kept, resumed_from=record.resumed_from, minimum=minimum)
        _, removed = plan_removal(kept, policy(kept), safe)
        gone = {(k.step, k.generation) for k in removed}
        goes += [c for c, _ in readable if (c.step, c.generation) in gone]
    if drop_strays:
        goes += strays(committed, generations)
    spared += [(c.manifest_path, f"generation {c.generation} is a running job's") for c in goes if c.generation in live]
    return Choice(tuple(sorted(c for c in goes if c.generation not in live)), tuple(spared))


def _print(report: GcReport, stays: dict[str, str]) -> None:
    rows = [[f"step {c.step}, generation {c.generation}", c.folder] for c in report.removed]
    rows += [["not committed", folder] for folder in report.orphans_removed]
    if rows:
        print("would be removed:" if report.dry_run else "removed:")
        print_table([Column("what"), Column("where")], rows, indent=2)
    else:
        print("nothing to remove")
    if stays:
        print("\nstays, although no rule keeps it:" if rows else "\nstays:")
        _print_stays(stays)
    if rows:
        print(f"\n{size_text(report.freed_bytes)} {'would be freed; --yes does it' if report.dry_run else 'freed'}")


def _print_stays(stays: dict[str, str]) -> None:
    rows: Sequence[Sequence[str]] = [[one_line(name), one_line(why)] for name, why in stays.items()]
    print_table([Column("what", fold=True), Column("why", fold=True)], rows, indent=2)
