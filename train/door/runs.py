"""`bash launch.sh runs`: the runs that lie in a folder, and what differs between two of them. Needs no Paddle."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.config import compose
from train.config.schema import RunsConfig
from train.store.checkpoints import read_config
from train.store.lock import is_held
from train.store.names import MARKER, METRICS
from train.store.run_dir import LOCK, RunMarker, read_marker
from vl2.errors import UserError

_PLACE = "outputs"
_OF_ONE_COMMAND = ("run_dir", "command", "resume", "overwrite")  # settings that say nothing of what a run learns


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run as its folder shows it; what is not known is None."""

    folder: str
    problem: str | None = None  # why its run.json tells nothing
    recipe: str | None = None
    state: str | None = None  # running, stopped, finished, diverged, failed or killed
    why: str | None = None  # it diverged or failed
    step: int | None = None  # optimizer steps made, those after the newest checkpoint included
    steps: int | None = None  # of the whole run
    loss_first: float | None = None
    loss: float | None = None  # of the last logged step
    eval_loss: float | None = None  # of the last validation
    best: str | None = None  # checkpoint, with what it is the best by
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    tokens_per_second: float | None = None
    memory_gb: float | None = None  # peak
    seconds_ago: float | None = None  # that it wrote
    size_bytes: int | None = None


def main(arguments: Sequence[str]) -> int:
    """The verb.

    Raises:
        UserError: no such folder, or no two runs to compare.
    """
    folders = [argument for argument in arguments if "=" not in argument]
    keys = compose.read_command_line([argument for argument in arguments if "=" in argument], RunsConfig)
    config = compose.compose(keys, RunsConfig)
    if config.diff:
        if folders or len(config.diff) != 2:
            raise UserError(f"diff={config.diff}: expected two folders of runs, diff=[A,B], and no others")
        print(compare(*map(Path, config.diff), as_json=config.json))
        return 0
    rows = list(find_runs([Path(folder) for folder in folders or [_PLACE]]))
    if config.json:
        print(json.dumps({"runs": [asdict(row) for row in rows]}, ensure_ascii=False))
    else:
        print(_table(rows) if rows else f"no runs in {', '.join(folders or [_PLACE])}")
    return 0


def find_runs(places: Sequence[Path]) -> Iterator[RunRow]:
    """The runs in folders, at any depth, by name; what lies in a run is not searched.

    Raises:
        UserError: no such folder.
    """
    for place in places:
        if not place.is_dir():
            if str(place) == _PLACE:
                return
            raise UserError(f"{place}: expected a folder with runs, there is none")
        for here, inner, files in os.walk(place):
            inner.sort()
            if MARKER in files:
                inner.clear()
                yield read_run(Path(here))


def read_run(folder: Path) -> RunRow:
    """What a run's folder shows."""
    written = max(_mtime(folder / name) for name in (MARKER, METRICS))
    facts: dict[str, Any] = {
        "folder": str(folder),
        "seconds_ago": round(max(0.0, time.time() - written), 1),
        "size_bytes": _size(folder),
    }
    try:
        marker = read_marker(folder)
        assert marker is not None  # just found
        facts |= _of_marker(marker, held=is_held(folder / LOCK))
    except UserError as problem:
        return RunRow(**facts, problem=str(problem))
    try:
        numbers = _of_metrics(folder / METRICS)
    except OSError as problem:
        return RunRow(**facts, problem=f"{METRICS} cannot be read ({problem.strerror})")
    return RunRow(**{**facts, **numbers, "step": max(facts["step"], numbers.get("step", 0))})


def _of_marker(marker: RunMarker, *, held: bool) -> dict[str, Any]:
    state = "running" if held else "killed" if marker.status == "running" else marker.status
    best = marker.best
    return {
        "recipe": marker.recipe + (" (rehearsal)" if marker.rehearsal else ""),
        "state": state,
        "why": marker.why or None if not held else None,
        "step": marker.step,
        "steps": marker.steps,
        "best": f"{best.metric} {best.value:.4g} at {best.step}" if best else None,
        "accuracy_before": marker.evaluation.get("before", {}).get("exact_match"),
        "accuracy_after": marker.evaluation.get("after", {}).get("exact_match"),
    }


def _of_metrics(path: Path) -> dict[str, Any]:
    """Numbers of a metrics.jsonl; a line that was cut off is passed over."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = {}
    tokens = seconds = 0.0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
                step = int(line["step"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            found["step"] = max(found.get("step", 0), step)
            if isinstance(line.get("loss"), float):
                found["loss"] = line["loss"]
                found.setdefault("loss_first", line["loss"])
            if isinstance(line.get("eval_loss"), float):
                found["eval_loss"] = line["eval_loss"]
            if isinstance(line.get("tokens"), int) and isinstance(line.get("seconds"), float):
                tokens, seconds = tokens + line["tokens"], seconds + line["seconds"]
            if isinstance(line.get("memory_gb"), float):
                found["memory_gb"] = max(found.get("memory_gb", 0.0), line["memory_gb"])
    return {**found, "tokens_per_second": tokens / seconds} if seconds else found


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    """Bytes of all files; those that are removed meanwhile count as none."""
    total = 0
    for here, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(here, name)).st_size
            except OSError:
                continue
    return total


# ---- as text


def _table(rows: Sequence[RunRow]) -> str:
    head = ("run", "state", "step", "loss", "validation", "best", "accuracy", "age", "size")
    lines = [head, *((row.folder, *_cells(row)) for row in rows if not row.problem)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"{row.folder}: {row.problem or row.why}" for row in rows if row.problem or row.why]
    return "\n".join(text)


def _cells(row: RunRow) -> tuple[str, ...]:
    accuracy = "-"
    if row.accuracy_before is not None or row.accuracy_after is not None:
        accuracy = f"{_share(row.accuracy_before)} -> {_share(row.accuracy_after)}"
    return (
        row.state or "-",
        f"{row.step:,}/{row.steps:,}",
        _number(row.loss),
        _number(row.eval_loss),
        row.best or "-",
        accuracy,
        _age(row.seconds_ago or 0.0),
        _bytes(row.size_bytes or 0),
    )


def compare(first: Path, second: Path, *, as_json: bool) -> str:
    """Which settings differ between two runs, and their results side by side.

    Raises:
        UserError: no run there, or one whose settings cannot be read.
    """
    settings, rows = [], []
    for folder in (first, second):
        if not (folder / MARKER).is_file():
            raise UserError(f"diff: expected the folder of a run, found no {MARKER} in {folder}")
        settings.append(_flat(read_config(folder)))
        rows.append(read_run(folder))
    names = [name for name in {**settings[0], **settings[1]} if name not in _OF_ONE_COMMAND]
    missing = "(not there)"
    changed = {
        name: [values.get(name, missing) for values in settings]
        for name in names
        if settings[0].get(name, missing) != settings[1].get(name, missing)
    }
    if as_json:
        return json.dumps({"settings": changed, "runs": [asdict(row) for row in rows]}, ensure_ascii=False)
    results = {
        name: [str(getattr(row, name)) if getattr(row, name) is not None else "-" for row in rows]
        for name in ("problem", "recipe", "state", "why", "best")
        if any(getattr(row, name) is not None for row in rows)
    }
    results |= {"step": [f"{row.step}/{row.steps}" for row in rows]}
    for name in ("loss_first", "loss", "eval_loss", "tokens_per_second", "memory_gb"):
        results[name] = [_number(getattr(row, name)) for row in rows]
    for name in ("accuracy_before", "accuracy_after"):
        results[name] = [_share(getattr(row, name)) for row in rows]
    lines = [["", str(first), str(second)], *([name, *values] for name, values in results.items())]
    lines += [
        ["", "", ""],
        *([name, *(json.dumps(v, ensure_ascii=False) for v in both)] for name, both in changed.items()),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, "no setting differs"] if not changed else text)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _bytes(count: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
