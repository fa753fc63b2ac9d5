"""The ablation tables of the papers as runnable rows: train each row with several seeds, compare it
with its base, pair by pair.

    result = run(TABLES["stark-table6"], seeds=3)
    print(result.text())

The rows of a table start from the same trained tracker, see the same samples in the same order and
are scored on the same videos, so that they differ by their change alone: what is compared is each
video with itself. A run is stored under what it is made of (start, config, stages, seed, data,
version), not under its table: tables share runs, an interrupted table continues, more seeds add to
those that are there. One command at a time may use a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import torch

from trackkit import __version__
from trackkit.errors import DataError, TrackkitError, nearest
from trackkit.evaluation import evaluate
from trackkit.got10k import GOT10k
from trackkit.paths import atomic_write, home, writable
from trackkit.progress import bar
from trackkit.sampling import training_set
from trackkit.stages import Stage, shortened
from trackkit.synth.pool import held_out
from trackkit.trackers.base import Tracker
from trackkit.tracking import device_called
from trackkit.training import train
from trackkit.weights import begin, create, describe, known_classes


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
    or, if it is your own, its class. The first row is the base. `start` names the trained tracker
    (or the file) with whose weights all rows begin; none for random ones.
    """

    name: str
    source: str
    metric: str
    tracker: str | type[Tracker]
    rows: tuple[Row, ...]
    start: str = ""

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
        """A row's tracker, and its stages at `scale`, or shortened to `steps` and with another
        `batch`. Its weights are those of `start` that have the same name and size, all others the
        random ones of the seed.

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
        if self.start:
            begin(tracker, self.start)
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
        "stark-tiny",
    ),
    "stark-table6": Table(
        "stark-table6",
        "STARK, Table 6",
        "LaSOT success of ST50",
        "stark-tiny",
        _TABLE6,
        "stark-tiny",
    ),
    "stark-table7": Table(
        "stark-table7",
        "STARK, Table 7",
        "LaSOT success of ST50",
        "stark-tiny",
        _TABLE7,
        "stark-tiny",
    ),
}


_ABOUT_PAPER = """\
verdict: whether our difference has the sign of the paper's; it cannot be told if our difference \
is less than twice its error.
Other data than the paper's and, for a tiny tracker, another network: compare directions, not sizes.
"""


@dataclass(frozen=True)
class Result:
    """The runs of a table so far: `about` the command, `runs` with row, seed, ao (0..1), videos
    (name -> AO), machine and more.
    """

    table: Table
    about: dict[str, Any]
    runs: list[dict[str, Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The numbers of each row of the table in percent, None where there are no runs to compute
        them from.

        label; ao, of each seed; mean over them; difference, the mean of row minus base over all
        videos and the seeds that both have; error, its standard error: of the videos (`by_video`)
        and of the seeds (`by_seed`, None for one seed), together the root of the sum of their
        squares; paper and paper_difference; verdict, None without a paper's figure.
        """
        first, rows, base = self.table.rows[0], [], {}
        for row in self.table.rows:
            runs = {r["seed"]: r["videos"] for r in self.runs if r["row"] == row.label}
            ao = {r["seed"]: 100 * r["ao"] for r in self.runs if r["row"] == row.label}
            numbers = {"label": row.label, "ao": ao, "mean": _mean(list(ao.values()))}
            numbers |= paired(runs, base)
            known = None not in (row.paper, first.paper)
            papers = row.paper - first.paper if known else None
            verdict = _verdict(numbers["difference"], numbers["error"], papers) if known else None
            paper = {"paper": row.paper, "paper_difference": papers, "verdict": verdict}
            rows.append(numbers | paper)
            base = runs if row is first else base
        return rows

    def text(self) -> str:
        """A Markdown table, and below it what its numbers are."""
        figures = any(row.paper is not None for row in self.table.rows)
        heads = ["row", "AO (seeds)", "difference to base"]
        lines = [heads + (["paper", "paper's difference", "verdict"] if figures else [])]
        for row in self.rows:
            line = [row["label"], f"{_f(row['mean'])} ({len(row['ao'])})"]
            line.append(_f(row["difference"], row["error"], "+"))
            if figures:
                difference = row["paper_difference"] if len(lines) > 1 else None
                line += [_f(row["paper"]), _f(difference, sign="+"), row["verdict"] or "-"]
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
Trained on {self.about["train"]}, from {self.about["start"]}; base: {self.about["stages"]}.
difference: mean over videos and seeds of row minus base of the same seed ± its standard error.
{_ABOUT_PAPER if figures else ""}{self.about["command"]}
{made}; {speed} training samples/s
"""


def paired(runs: dict[int, dict[str, float]], base: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Runs and their base, seed -> video -> AO, compared video by video: difference, error,
    by_video and by_seed in percent as in `Result.rows`, None where there is nothing to compute them
    from.
    """
    seeds = sorted(runs.keys() & base.keys())
    each = [
        [100 * (runs[seed][video] - base[seed][video]) for video in base[seed]] for seed in seeds
    ]
    by_video = _error([statistics.fmean(video) for video in zip(*each, strict=True)])
    by_seed = _error([statistics.fmean(videos) for videos in each])
    known = [error for error in (by_video, by_seed) if error is not None]
    return {
        "difference": _mean([value for videos in each for value in videos]),
        "error": math.hypot(*known) if known else None,
        "by_video": by_video,
        "by_seed": by_seed,
    }


def load(path: str | Path) -> Result:
    """The result in a .json file that `run` wrote. Raises DataError if it is something else."""
    try:
        values = json.loads(Path(path).read_text("utf-8"))
        rows = tuple(Row(**row) for row in values["table"].pop("rows"))
        result = Result(Table(**values["table"], rows=rows), values["about"], values["runs"])
        result.text()  # which needs all the rest
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
    start: str | Path | None = None,
    backend: str = "loky",
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
            TRACKKIT_GOT10K, else procedural video and 104 held-out videos, `pool.held_out`).
        rows: labels of the rows to run, beside the base (default: all). All that have results are
            shown.
        jobs: runs side by side, each a process with one thread.
        start: whose weights all rows begin with, a name or a file, "scratch" for none (default: the
            table's).
        backend: joblib's, for jobs: "loky" has processes here; dask's and ray's, once they are
            registered with joblib, have machines that share the folder `out`.

    An error or an interruption stops all; the same call goes on. Raises TrackkitError for an
    unknown row or backend.
    """
    if start is not None:
        table = dataclasses.replace(table, start="" if start == "scratch" else str(start))
    labels = [row.label for row in table.rows]
    if odd := [label for label in rows if label not in labels]:
        raise TrackkitError(
            f"{table.name} has no row {', '.join(map(repr, odd))}{nearest(odd[0], labels)}; it has "
            f"{', '.join(labels)}"
        )
    if min(seeds, jobs) < 1:
        raise TrackkitError(f"seeds and jobs must be at least 1, got {seeds} and {jobs}")
    device_called(device)
    # now, not after the rows before it, and before held-out videos are made
    stages, *_ = (table.build(row, scale, steps, batch)[1] for row in table.rows)
    version = [__version__, *([] if isinstance(table.tracker, str) else [_source(table.tracker)])]
    out, test = writable(out or home() / "ablations"), test_set(data)
    plan, waiting, wanted = [], {}, {labels[0], *(rows or labels)}
    options = {"seeds": seeds, "scale": scale, "steps": steps, "batch": batch, "data": data}
    options["start"] = start
    given = {key: value for key, value in options.items() if value is not None}
    if isinstance(table.tracker, str):
        flags = [f"--{key}={value}" for key, value in {**given, "tracker": table.tracker}.items()]
        command = shlex.join(["trackkit", "ablate", table.name, *flags])
    else:
        arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
        command = f"ablations.run(table, {arguments})"
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
        "test": f"{test.name} ({len(test)} sequences)",
        "start": table.start or "random weights",
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
                begin(tracker, table.start) if table.start else "",
                *version,
            ]
            key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
            folder = out / "runs" / f"{table.tracker_name}-{seed}-{key}"
            plan.append((row, seed, folder))
            if row.label in wanted and not (folder / "result.json").exists():
                waiting[folder] = (folder, table, row, seed, scale, steps, batch, data, device)
    with bar(total=len(waiting), desc=table.name, unit="run", shown=progress) as shown:
        for _ in _measured(list(waiting.values()), jobs, backend, progress):
            shown.update()
            _write(table, about, plan, out)
    return _write(table, about, plan, out)


def test_set(data: str | Path | None) -> GOT10k:
    """GOT-10k's val split where there is one, else `pool.held_out`."""
    return GOT10k(data, "val") if data or os.environ.get("TRACKKIT_GOT10K") else held_out()


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
    scores = evaluate(tracker, test_set(data), folder / "results", folder.name)
    if scores is None:
        raise TrackkitError("the val split has no labels, so no row can be scored on it")
    result = {
        "ao": scores.sequence_mean.ao,
        "videos": {name: rates.ao for name, rates in scores.sequences.items()},
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


def _measured(waiting: list[tuple], jobs: int, backend: str, progress: bool) -> Iterator[None]:
    """Measure in this order, here or as `jobs` jobs of joblib's; yields after each."""
    if jobs == 1:
        for job in waiting:
            yield _measure(progress, *job)
        return
    try:
        parallel = joblib.Parallel(jobs, backend=backend, return_as="generator_unordered")
    except ValueError as error:
        raise TrackkitError(f"--backend {backend}: {error}") from error
    yield from parallel(joblib.delayed(_alone)(*job) for job in waiting)


def _alone(*job: Any) -> None:
    """Measure as one of several, with one thread and no bar. When the parent was killed this
    process ends too, saved, and takes none of the jobs that wait for it.
    """
    torch.set_num_threads(1)
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        _measure(False, *job)
    finally:
        if os.getppid() != parent:
            os._exit(1)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves its state


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


def _verdict(difference: float | None, error: float | None, paper: float | None) -> str:
    if not paper or difference is None or error is None:
        return "-"
    if abs(difference) < 2 * error:
        return "cannot be told"
    return "agrees" if difference * paper > 0 else "disagrees"


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _error(values: list[float]) -> float | None:
    """Standard error of the mean of a sample; one value has none."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _f(mean: float | None, error: float | None = None, sign: str = "") -> str:
    return (
        "-" if mean is None else f"{mean:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")
    )
