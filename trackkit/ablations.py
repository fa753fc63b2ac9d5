"""The ablation tables of the papers as runnable rows: train each row with several seeds, compare it
with its base.

    result = run(TABLES["stark-table6"], seeds=3)
    print(result.text())

A run is stored under what it is made of (config, stages, seed, data, version), not under its table:
tables share runs, an interrupted table continues, more seeds add to those that are there. One
command at a time may use a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import statistics
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from trackkit import __version__
from trackkit.errors import DataError, TrackkitError, nearest
from trackkit.evaluation import evaluate
from trackkit.got10k import GOT10k
from trackkit.paths import SAMPLES, atomic_write, home, writable
from trackkit.progress import bar
from trackkit.sampling import training_set
from trackkit.stages import Stage, shortened
from trackkit.trackers.base import Tracker
from trackkit.tracking import device_called
from trackkit.training import train
from trackkit.weights import create, describe, known_classes


@dataclass(frozen=True)
class Row:
    """One line of a table: what is changed in the tracker's config, and the paper's figure if there
    is one; `variant` is the class that takes the place of the tracker's (`weights.known_classes`).
    """

    label: str
    changes: dict[str, Any]
    paper: float | None = None
    variant: str = ""


@dataclass(frozen=True)
class Table:
    """A paper's table: what its figures are, and the (tiny) tracker that is changed, by its name
    or, if it is your own, its class. The first row is the base.
    """

    name: str
    source: str
    metric: str
    tracker: str | type[Tracker]
    rows: tuple[Row, ...]

    @property
    def tracker_name(self) -> str:
        """The tracker's name, or that of its class."""
        return self.tracker if isinstance(self.tracker, str) else self.tracker.__name__

    def build(
        self,
        row: Row,
        scale: str,
        steps: int | None = None,
        batch: int | None = None,
        seed: int = 0,
    ) -> tuple[Tracker, list[Stage]]:
        """A row's tracker with the random weights of a seed, and its stages at `scale`, or
        shortened to `steps` and with another `batch`.

        Raises TrackkitError for changes that are no fields of the config or out of range, and for
        a variant of another tracker.
        """
        name = row.variant or self.tracker_name
        chosen = create(self.tracker) if isinstance(self.tracker, str) else self.tracker()
        cls = type(chosen)
        if row.variant:
            variant = known_classes().get(name)
            if variant is None or not issubclass(variant, cls):
                raise TrackkitError(f"{self.name}, {row.label}: {name} is no {self.tracker_name}")
            cls = variant
        fields = [f.name for f in dataclasses.fields(cls.Config)]
        if odd := [key for key in row.changes if key not in fields]:
            raise TrackkitError(
                f"{self.name}, {row.label}: {name} has no {', '.join(odd)}, only "
                f"{', '.join(fields)}"
            )
        torch.manual_seed(seed)  # here, as in `trackkit train`
        try:
            tracker = cls(cls.Config(**{**vars(chosen.config), **row.changes}))
        except ValueError as error:
            raise TrackkitError(f"{self.name}, {row.label}: {error}") from error
        stages = tracker.recipe(scale)
        stages = stages if steps is None else shortened(stages, steps)
        if batch is not None:
            stages = [dataclasses.replace(stage, batch=batch) for stage in stages]
        return tracker, stages


_TABLE6 = (
    Row("base", {}, 66.4),
    Row("no encoder", {"encoder_layers": 0}, 61.1),
    Row("no decoder", {"decoder_layers": 0}, 64.5),
    Row("no position", {"position": "none"}, 66.2),
    Row("MLP head", {"head": "mlp"}, 63.7),
    Row("no score head", {"score": False}, 64.5),
)
_TABLE7 = (
    Row("base", {}, 66.4),
    Row("template as query", {}, 61.2, "STARKTemplateQuery"),
    Row("Hungarian", {}, 63.7, "STARKHungarian"),
    Row("updated query", {"dynamic": False}, 64.8, "STARKUpdatedQuery"),
    Row("joint", {}, 62.5, "STARKJoint"),
)
_TABLE1 = (
    Row("STARK-ST", {}, 68.0),
    Row("STARK-S", {"dynamic": False, "score": False}, 67.2),
)
TABLES = {
    "stark-table1": Table(
        "stark-table1",
        "STARK, Table 1",
        "AO of ST50 and S50 on GOT-10k's test split",
        "stark-tiny",
        _TABLE1,
    ),
    "stark-table6": Table(
        "stark-table6", "STARK, Table 6", "LaSOT success of ST50", "stark-tiny", _TABLE6
    ),
    "stark-table7": Table(
        "stark-table7", "STARK, Table 7", "LaSOT success of ST50", "stark-tiny", _TABLE7
    ),
}


_ABOUT_PAPER = """\
direction: whether our difference has the sign of the paper's; within the spread: it is \
smaller than that.
Other data than the paper's and, for a tiny tracker, another network: compare directions, not sizes.
"""


@dataclass(frozen=True)
class Result:
    """The runs of a table so far: `about` the command, `runs` with row, seed, ao (0..1), machine
    and more.
    """

    table: Table
    about: dict[str, Any]
    runs: list[dict[str, Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The numbers of each row of the table in percent, None where there are no runs to compute
        them from.

        label; ao, of each seed; mean and std over them; difference, the mean of row minus base over
        the seeds that both have; spread, the std of these differences; paper and paper_difference;
        direction, whether the two differences have the same sign, None without a paper's figure.
        Stds are of a sample, so one seed has none.
        """
        first, rows, base = self.table.rows[0], [], {}
        for row in self.table.rows:
            ao = {r["seed"]: 100 * r["ao"] for r in self.runs if r["row"] == row.label}
            mean, std = _mean_std(list(ao.values()))
            difference, spread = _mean_std([ao[seed] - base[seed] for seed in ao if seed in base])
            numbers = {
                "label": row.label,
                "ao": ao,
                "mean": mean,
                "std": std,
                "difference": difference,
                "spread": spread,
            }
            known = None not in (row.paper, first.paper)
            papers = row.paper - first.paper if known else None
            direction = _direction(difference, spread, papers) if known else None
            paper = {"paper": row.paper, "paper_difference": papers, "direction": direction}
            rows.append(numbers | paper)
            base = ao if row is first else base
        return rows

    def text(self) -> str:
        """A Markdown table, and below it what its numbers are."""
        figures = any(row.paper is not None for row in self.table.rows)
        heads = ["row", "AO mean ± std (n)", "difference to base"]
        lines = [heads + (["paper", "paper's difference", "direction"] if figures else [])]
        for row in self.rows:
            line = [row["label"], f"{_f(row['mean'], row['std'])} ({len(row['ao'])})"]
            line.append(_f(row["difference"], row["spread"], "+"))
            if figures:
                difference = row["paper_difference"] if len(lines) > 1 else None
                line += [_f(row["paper"]), _f(difference, sign="+"), row["direction"] or "-"]
            lines.append(line)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        shown = "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
        seeds = ", ".join(map(str, sorted({r["seed"] for r in self.runs}))) or "none yet"
        made = (
            "; ".join(sorted({f"{r['machine']}, trackkit {r['trackkit']}" for r in self.runs}))
            or "no runs yet"
        )
        speed = (
            f"{statistics.median(r['samples_per_second'] for r in self.runs):.0f}"
            if self.runs
            else "-"
        )
        paper = f"Paper: {self.table.metric}, percent. " if figures else ""
        return f"""{self.table.name} ({self.table.source}): {self.table.tracker_name}

{shown}

{paper}Ours: AO, percent, on {self.about["test"]}; seeds {seeds}.
Trained on {self.about["train"]}; base: {self.about["stages"]}.
difference: mean over seeds of row minus base of the same seed ± the std of these \
differences, the spread.
{_ABOUT_PAPER if figures else ""}{self.about["command"]}
{made}; {speed} training samples/s
"""


_WORDS = (
    "difference: mean over seeds of row minus base of the same seed ± the std of these "
    "differences, the spread.\ndirection: whether our difference has the sign of the paper's; "
    "within the spread: it is smaller than that."
)


def load(path: str | Path) -> Result:
    """The result in a .json file that `run` wrote. Raises DataError if it is something else."""
    try:
        values = json.loads(Path(path).read_text("utf-8"))
        rows = tuple(Row(**row) for row in values["table"].pop("rows"))
        result = Result(Table(**values["table"], rows=rows), values["about"], values["runs"])
        result.text()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not the result of an ablation ({error!r}); make it anew: trackkit ablate"
        ) from error
    return result


def run(
    table: Table,
    seeds: int = 3,
    scale: str = "tiny",
    out: str | Path | None = None,
    data: str | Path | None = None,
    rows: tuple[str, ...] = (),
    jobs: int = 1,
    device: str = "auto",
    steps: int | None = None,
    batch: int | None = None,
    progress: bool = True,
) -> Result:
    """Train and evaluate the rows that have no result yet: all with seed 0, then all with seed 1,
    ...

    Args:
        scale: of the tracker's `recipe`. steps: of the longest stage, in place of the recipe's; the
            others shrink alike.
        batch: samples in a step, in place of the recipe's.
        out: folder (default: TRACKKIT_HOME/ablations) of TABLE_TRACKER_SCALE.json and .md, written
            anew after each run, and of the runs themselves.
        data: GOT-10k's root, to train on its train and evaluate on its val split (default:
            TRACKKIT_GOT10K, else procedural video and the embedded samples).
        rows: labels of the rows to run, beside the base (default: all). All that have results are
            shown.
        jobs: runs side by side, each a process with one thread.

    An error or an interruption stops all; the same call goes on. Raises TrackkitError for an
    unknown row.
    """
    labels = [row.label for row in table.rows]
    if odd := [label for label in rows if label not in labels]:
        raise TrackkitError(
            f"{table.name} has no row {', '.join(map(repr, odd))}{nearest(odd[0], labels)}; it has "
            f"{', '.join(labels)}"
        )
    if min(seeds, jobs) < 1:
        raise TrackkitError(f"seeds and jobs must be at least 1, got {seeds} and {jobs}")
    device_called(device)
    out, test, wanted = (
        writable(out or home() / "ablations"),
        GOT10k(data, "val"),
        {labels[0], *(rows or labels)},
    )
    plan, waiting, stages = [], {}, table.build(table.rows[0], scale, steps, batch)[1]
    options = {"seeds": seeds, "scale": scale, "steps": steps, "batch": batch, "data": data}
    given = {key: value for key, value in options.items() if value is not None}
    if isinstance(table.tracker, str):
        flags = [f"--{key}={value}" for key, value in {**given, "tracker": table.tracker}.items()]
        command, version = shlex.join(["trackkit", "ablate", table.name, *flags]), [__version__]
    else:
        arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
        command, version = (
            f"ablations.run(table, {arguments})",
            [__version__, _source(table.tracker)],
        )
    about = {
        "files": f"{table.name}_{table.tracker_name}_{scale}"
        + ("" if steps is None else f"_{steps}-steps")
        + ("" if batch is None else f"_batch-{batch}"),
        "command": command,
        "stages": ", ".join(
            f"{stage.name} {stage.steps} steps of {stage.batch}" for stage in stages
        ),
        "train": "procedural video"
        if getattr(training_set(data), "procedural", False)
        else training_set(data).name,
        "test": f"{'the procedural samples' if SAMPLES in test.folder.parents else test.name} "
        f"({len(test)} sequences)",
    }
    for seed in range(seeds):
        sequences = training_set(data, seed)
        for row in table.rows:
            tracker, stages = table.build(row, scale, steps, batch, seed)
            parts = [
                describe(tracker),
                list(map(dataclasses.asdict, stages)),
                seed,
                repr(sequences),
                repr(test),
                *version,
            ]
            key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
            folder = out / "runs" / f"{table.tracker_name}-{seed}-{key}"
            plan.append((row, seed, folder))
            if row.label in wanted and not (folder / "result.json").exists():
                waiting[folder] = (folder, table, row, seed, scale, steps, batch, data, device)
    with bar(total=len(waiting), desc=table.name, unit="run", shown=progress) as shown:
        for _ in _measured(list(waiting.values()), jobs, progress):
            shown.update()
            _write(table, about, plan, out)
    return _write(table, about, plan, out)


def _source(tracker: type[Tracker]) -> str:
    """The file of a class of the user's own: when it changes, trackkit's version does not."""
    try:
        return inspect.getsource(sys.modules[tracker.__module__])
    except (OSError, TypeError) as error:
        raise TrackkitError(
            f"{tracker.__name__} is in no file, so its runs could not be told from those of a "
            "changed class; put it into one and import it"
        ) from error


def _write(table: Table, about: dict, plan: list[tuple[Row, int, Path]], out: Path) -> Result:
    """Collect the results that there are, and write them to the table's files."""
    done = [
        (row, seed, folder / "result.json")
        for row, seed, folder in plan
        if (folder / "result.json").exists()
    ]
    runs = [
        {"row": row.label, "seed": seed, "changes": row.changes, **json.loads(file.read_text())}
        for row, seed, file in done
    ]
    result = Result(table, about, runs)
    named = dataclasses.replace(
        result, table=dataclasses.replace(table, tracker=table.tracker_name)
    )
    everything = json.dumps(dataclasses.asdict(named) | {"rows": result.rows}, indent=1)
    for suffix, text in ((".json", everything), (".md", result.text())):
        with atomic_write(out / f"{about['files']}{suffix}") as partial:
            partial.write_text(text, "utf-8")
    return result


def _measure(
    progress: bool,
    folder: Path,
    table: Table,
    row: Row,
    seed: int,
    scale: str,
    steps,
    batch,
    data,
    device: str,
) -> None:
    """Train and evaluate, or go on with it; what comes out is folder/result.json."""
    tracker, stages = table.build(row, scale, steps, batch, seed)
    tracker.to(device_called(device))
    try:
        log = train(
            tracker,
            stages,
            training_set(data, seed),
            folder,
            seed=seed,
            device=device,
            progress=progress,
        )
    except TrackkitError as error:
        raise TrackkitError(
            f"{row.label}, seed {seed}: {error}; to go on without this row, name the others by "
            "--rows"
        ) from error
    scores = evaluate(tracker, GOT10k(data, "val"), folder / "results", folder.name)
    if scores is None:
        raise TrackkitError("the val split has no labels, so no row can be scored on it")
    result = {
        "ao": scores.ao,
        "sr50": scores.sr50,
        "sr75": scores.sr75,
        "loss": log[-1]["loss"],
        "folder": folder.name,
    }
    result["samples_per_second"] = statistics.median(line["samples_per_second"] for line in log)
    with atomic_write(folder / "result.json") as partial:
        partial.write_text(
            json.dumps(result | {"machine": _machine(tracker.device), "trackkit": __version__})
        )
    # three times the size of tracker.safetensors, which stays
    (folder / "state.safetensors").unlink()


def _measured(waiting: list[tuple], jobs: int, progress: bool) -> Iterator[None]:
    """Measure in this order, here or in `jobs` processes; yields after each."""
    if jobs == 1:
        for job in waiting:
            yield _measure(progress, *job)
        return
    alive, mine = multiprocessing.Pipe(duplex=False)
    with ProcessPoolExecutor(
        max(1, min(jobs, len(waiting))), multiprocessing.get_context("spawn"), _alone, (alive,)
    ) as pool:
        try:
            for future in as_completed([pool.submit(_measure, False, *job) for job in waiting]):
                yield future.result()
        except BaseException:
            mine.close()  # ends the processes in the middle of their runs
            pool.shutdown(cancel_futures=True)
            raise


def _alone(alive: Connection) -> None:
    """Make this process one of several: one thread, no interest in ctrl-C, and its end when its
    parent closes or dies.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (alive.poll(None), os._exit(1)), daemon=True).start()


def _machine(device: torch.device) -> str:
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    name = cpu[1] if cpu else platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    return (
        f"{name}, {os.cpu_count()} cores, torch {torch.__version__} with "
        f"{torch.get_num_threads()} "
        "thread(s)"
    )


def _direction(difference: float | None, spread: float | None, paper: float | None) -> str:
    if None in (difference, paper):
        return "-"
    word = "agrees" if difference * paper > 0 else "disagrees" if difference else "no difference"
    if spread is None:
        return f"{word} (one seed)"
    return f"{word} (within the spread)" if abs(difference) < spread else word


def _mean_std(values: list[float]) -> tuple[float | None, float | None]:
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(
        values
    ) > 1 else None


def _f(mean: float | None, std: float | None = None, sign: str = "") -> str:
    return "-" if mean is None else f"{mean:{sign}.1f}" + ("" if std is None else f" ± {std:.1f}")
