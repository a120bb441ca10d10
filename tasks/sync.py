"""Post the records of finished stages to MLflow: one run per executed stage, exactly once, however often called."""

from __future__ import annotations

import atexit
import gc
import json
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from cola_core.errors import RetryError, UserError, system_told
from cola_core.files import read_json
from cola_core.sealed import read_sealed
from cola_core.secrets import guard, mask, masked
from tasks.pending import new_store, note_synced, orphans, state
from tasks.places import home
from tasks.publish import restore
from tasks.store import Store, locked, open_store, temporaries

__all__ = ["sync"]

Record = dict[str, Any]
NEEDED = {"id", "stage", "status", "experiment", "chain", "started", "seconds", "params", "recipe", "task", "seed"}
NEEDED |= {"metrics", "series", "inputs", "outputs", "artifacts"}
FOLDERS = {".png": "figures", ".svg": "figures"}
FORBIDDEN = re.compile(r"[^\w\-. /:]")


def sync() -> int:
    """Post every record that is not in the store yet, finish runs that were cut off, and mend the registry.

    A run carries its record's id from birth (`cola.record`) and `cola.posted` as the very last thing, so a call
    that was killed anywhere is completed by the next one. A lock file keeps two calls apart.

    Returns:
        how many records were posted.

    Raises:
        RetryError: MLflow is out of reach or full; the records stay.
        UserError: a record that cannot be read or that MLflow refuses.
    """
    records = _records()
    if not records:
        return 0
    with locked("sync"), open_store() as store, temporaries("sync"):
        found = state()  # before the records are read again: what comes later is for the next call
        records = _records()
        runs = _runs(store, {record["experiment"] for record in records})
        posted = _post_all(store, records, runs)
        _close_orphans(store, {record["id"] for record in records})
        restore(store, new_store(found))
        note_synced(found)
    return posted


def _records() -> list[Record]:
    """Every record, in the order in which the stages started."""
    records = [_read(path) for path in sorted((home() / "records").glob("*.json"))]
    return sorted(records, key=lambda record: (record["started"], record["id"]))


def _read(path: Path) -> Record:
    """One record; those of version 0.1 had neither format nor checksum."""
    try:
        content = read_json(path)
        old = isinstance(content, dict) and not content.keys() & {"format", "checksum"}
        found = dict(content) if old else read_sealed(path, "record")
        if lost := NEEDED - found.keys():
            raise UserError(f"{path}: a record without {', '.join(sorted(lost))}")
    except UserError as error:
        raise UserError(f"{error}; or delete the file, its stage ran all the same") from None
    return found


def _runs(store: Store, experiments: set[str]) -> dict[str, tuple[str, bool]]:
    """Record id -> (run id, posted to the end), of binned runs too: what a user threw away does not come back."""
    from mlflow.entities import ViewType

    ids, token, known = [store.experiment(name) for name in sorted(experiments)], None, {}
    while True:
        page = store.client.search_runs(ids, "tags.`cola.record` LIKE '%'", ViewType.ALL, page_token=token)
        for run in page:
            known[run.data.tags["cola.record"]] = (run.info.run_id, "cola.posted" in run.data.tags)
        token = page.token
        if not token:
            return known


def _post_all(store: Store, records: Sequence[Record], runs: dict[str, tuple[str, bool]]) -> int:
    """Post what is missing; records come in time order, so `made` knows the newest earlier run behind every hash."""
    made: dict[str, str] = {}
    posted = 0
    for record in records:
        run_id, done = runs.get(record["id"], ("", False))
        if not done:
            upstream = sorted({made[value] for value in record["inputs"].values() if value in made})
            run_id = _post(store, record, upstream)
            posted += 1
        made.update(dict.fromkeys(record["outputs"].values(), run_id))
    return posted


def _post(store: Store, record: Record, upstream: Sequence[str]) -> str:
    """Write one record into its run. Every step may be repeated: the same values at the same times are one entry."""
    started = int(datetime.fromisoformat(record["started"]).timestamp() * 1000)
    ended = started + int(record["seconds"] * 1000)
    run_id: str = store.run(record, started).info.run_id
    store.log(run_id, "tags", _tags(record, upstream))
    store.log(run_id, "params", _params(record))
    store.log(run_id, "metrics", _metrics(store, run_id, record, ended))
    store.client.log_text(run_id, yaml.safe_dump(masked(record["params"]), sort_keys=False), "params.yaml")
    for path in map(Path, record["artifacts"]):
        _upload(store, run_id, path)
    store.client.set_terminated(run_id, record["status"], ended)
    store.client.set_tag(run_id, "cola.posted", "yes")
    return run_id


def _tags(record: Record, upstream: Sequence[str]) -> list[Any]:
    from mlflow.entities import RunTag

    values = {name: str(record[name]) for name in ("stage", "recipe", "task", "seed")}
    values |= {"chain": record["chain"] or "", "upstream": ",".join(upstream)}
    values |= {f"machine.{name}": str(value) for name, value in record.get("machine", {}).items()}
    values |= {f"in.{path}": value for path, value in record["inputs"].items()}
    values |= {f"out.{path}": value for path, value in record["outputs"].items()}
    return [RunTag(f"cola.{name}", value) for name, value in values.items() if value]


def _params(record: Record) -> list[Any]:
    from mlflow.entities import Param

    flat = _flatten({"recipe": record["recipe"], "task": record["task"], "seed": record["seed"], **record["params"]})
    return [Param(FORBIDDEN.sub("_", key), mask(str(value), key)[:6000]) for key, value in flat]


def _metrics(store: Store, run_id: str, record: Record, ended: int) -> list[Any]:
    """Curves without the points a live run has logged already, then numbers, which count as their curve's last word."""
    from mlflow.entities import Metric

    curves, metrics = record["series"], []
    for name, points in curves.items():
        known = {point.step for point in store.client.get_metric_history(run_id, name)}
        metrics += [Metric(name, value, ended, int(step)) for step, value in points if int(step) not in known]
    last = {name: int(points[-1][0]) for name, points in curves.items() if points}
    return metrics + [Metric(name, value, ended + 1, last.get(name, 0)) for name, value in record["metrics"].items()]


def _upload(store: Store, run_id: str, path: Path) -> None:
    """A file or folder of the run; a workspace that is gone has taken its files along, which is no failure."""
    if path.is_dir():
        store.client.log_artifacts(run_id, str(path), path.name)
    elif path.is_file():
        store.client.log_artifact(run_id, str(path), FOLDERS.get(path.suffix))


def _close_orphans(store: Store, recorded: set[str]) -> None:
    """End live runs whose process died before it could leave a record."""
    for marker in orphans():
        _close_orphan(store, marker, recorded)
        marker.unlink(missing_ok=True)


def _close_orphan(store: Store, marker: Path, recorded: set[str]) -> None:
    try:
        live = json.loads(marker.read_text(encoding="utf-8"))
        identity, experiment = live["id"], live["experiment"]
    except (ValueError, LookupError, TypeError):  # cut off in the writing, before its run was made
        return
    if identity in recorded:
        return
    same = f"tags.`cola.record` = '{identity}'"
    for run in store.client.search_runs([store.experiment(experiment)], same):
        if run.info.status != "FAILED":
            store.client.set_terminated(run.info.run_id, "KILLED")


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _main() -> int:
    guard()
    try:
        with system_told():
            print(f"sync: {sync()} record(s) posted", flush=True)
    except (UserError, RetryError) as error:
        print(f"sync: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    atexit.register(gc.freeze)  # on its way out Python need not look through all of MLflow: half a second
    sys.exit(_main())
