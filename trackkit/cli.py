"""The command line: trackkit train | track | evaluate | ablate | synth | import | profile | doctor
| lessons.

Options come from dataclasses and function signatures (tyro), so `trackkit COMMAND --help` is always
complete. Imports happen inside the commands: `trackkit` alone must not wait for torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

from trackkit import __version__
from trackkit.errors import Range, Stopped, TrackkitError, nearest
from trackkit.paths import command

Config = TypeVar("Config")


@dataclass
class TrainOptions(Generic[Config]):
    """Train a tracker on GOT-10k or, without it, on procedural video. The same command continues a
    run.
    """

    tracker: tyro.conf.Positional[str]
    """Name of the tracker, as in `trackkit profile --all`."""
    config: Config
    """The tracker's own numbers; the ablations of its paper are among them."""
    data: Path | None = None
    """GOT-10k's root, or "stream": procedural video drawn as it is needed (default:
    TRACKKIT_GOT10K, else a pool of 160 procedural videos, made at first use in a few minutes)."""
    out: Path | None = None
    """Folder of the run (default: TRACKKIT_HOME/runs/NAME-SCALE-SEED)."""
    scale: Literal["tiny", "laptop", "gpu", "paper"] | None = None
    """Length of training (default: tiny for a tiny tracker, else paper)."""
    preset: str = ""
    """Which recipe, where a paper and its code or two data sets differ: SBT and USTAM have some."""
    seed: int = 0
    """Seed of the weights and of the samples."""
    steps: int | None = None
    """Steps of the longest stage, in place of the recipe's; the others shrink alike."""
    batch: int | None = None
    """Samples in a step, in place of the recipe's; the learning rate stays as it is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; several GPUs by `accelerate launch -m trackkit.cli train ...`."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    workers: int = 0
    """Loader processes. They change the speed, never the samples."""
    crops: Literal["auto", "loader", "device"] = "auto"
    """Where crops are resized and coloured: device takes the work from the workers (auto: if it is
    a GPU)."""
    start: str | None = None
    """Begin with the weights of this trained tracker (a file, or a name such as sbt-tiny-start) as
    far as they fit."""
    hold: bool = False
    """Leave out the fall of the rate at the end, for a network that is to learn on."""
    pretrained: bool = True
    """Start from the backbone that the paper starts from (ImageNet, MAE), if it starts from one."""


def train(argv: list[str]) -> None:
    import torch

    from trackkit.paths import home
    from trackkit.sampling import training_set
    from trackkit.stages import held, shortened
    from trackkit.tracking import device_called
    from trackkit.training import train as run
    from trackkit.weights import TRACKERS, begin

    name = _positional(argv, TRACKERS)
    if name is None and not {"-h", "--help"} & set(argv):
        raise TrackkitError(f"name the tracker to train: {', '.join(TRACKERS)}")
    chosen, options = _train_options(argv, name or "siamfc-tiny")
    name = options.tracker
    device_called(options.device)
    _in_range(
        steps=(options.steps, COUNT),
        batch=(options.batch, BATCH),
        seed=(options.seed, SEED),
        workers=(options.workers, WORKERS),
    )

    torch.manual_seed(options.seed)
    tracker = type(chosen)(options.config)
    start = begin(tracker, options.start) if options.start else ""
    if options.pretrained and not start:
        tracker.load_pretrained()
    scale = options.scale or ("tiny" if name.endswith("-tiny") else "paper")
    stages = tracker.recipe(scale, options.preset)
    if options.steps is not None:
        stages = shortened(stages, options.steps)
    if options.batch is not None:
        stages = [dataclasses.replace(stage, batch=options.batch) for stage in stages]
    if options.hold:
        stages = held(stages)
    out = options.out or home() / "runs" / f"{name}-{scale}-{options.seed}"
    data = training_set(options.data, options.seed)
    print(
        f"{name}: {sum(stage.steps for stage in stages)} steps on {getattr(data, 'name', data)}, "
        f"into {out}"
    )
    log = run(
        tracker,
        stages,
        data,
        out,
        seed=options.seed,
        device=options.device,
        precision=options.precision,
        workers=options.workers,
        crops=options.crops,
        start=start,
    )
    # each stage has a loss of its own
    rows = [row for row in log if row["stage"] == log[-1]["stage"]]
    course = f"loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}" if rows else "finished"
    print(f"{out / 'tracker.safetensors'}: {stages[-1].name} {course}")


def _train_options(argv: list[str], name: str) -> tuple[Any, TrainOptions]:
    """The tracker that `argv` names, most likely `name`, and its options: with the fields of its
    config only the parser can tell a name from an option's value.
    """
    from trackkit.weights import TRACKERS, create

    mistake = None
    for word in dict.fromkeys([name, *(word for word in argv if word in TRACKERS)]):
        chosen = create(word)
        options_type = TrainOptions[type(chosen.config)]
        default = options_type(tracker=tyro.MISSING, config=chosen.config)
        try:
            options = _parsed("train", argv, options_type, default=default)
        except Mistyped as error:
            mistake = mistake or error
            continue
        if options.tracker == word:
            return chosen, options
        create(options.tracker)  # raises if there is none
    raise mistake


def _positional(argv: list[str], names: Collection[str]) -> str | None:
    """The word of `argv` that is no option and no option's value: the tracker's name, wherever it
    stands. A word behind an option is its value, unless there is no other that could be the name.
    """
    flags = {"--pretrained", "--no-pretrained", "--hold", "--no-hold", "-h", "--help"}
    words, values = [], []
    for before, word in zip(["", *argv], argv, strict=False):
        if not word.startswith("-"):
            value = before.startswith("-") and "=" not in before and before not in flags
            (values if value else words).append(word)
    # an option may take several words, --config.prune-blocks 1 2, and a switch none
    known = [word for word in (*words, *values) if word in names]
    return next(iter([*known, *words, *values]), None)


COUNT, BATCH, WORKERS = Range(1, 10**9), Range(1, 65_536), Range(0, 1024)
SEED, PIXELS = Range(0, 2**32 - 1), Range(32, 8192)


def _in_range(**given: tuple[int | None, Range]) -> None:
    """Options by name, with the numbers that they may be; None is not given."""
    for name, (value, allowed) in given.items():
        if value is not None and value not in allowed:
            option = f"--{name.replace('_', '-')}"
            raise TrackkitError(f"{option} must be {allowed}; got {value}")


def track(argv: list[str]) -> None:
    _parsed("track", argv, _later(_track))()


def _track(
    video: tyro.conf.Positional[Path],
    /,
    tracker: str,
    box: str | None = None,
    out: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Follow an object through a video; writes the annotated video and the boxes.

    Of still images the stored pixels count: a turn in their EXIF data is ignored, as boxes are
    drawn on those pixels. (Videos are turned as their players turn them.)

    Args:
        video: a video file, a folder of images, or a sequence in GOT-10k's layout.
        tracker: a checkpoint (tracker.safetensors), the name of a tracker whose weights come with
            trackkit (siamfc-tiny, stark-tiny), or of one that needs none: ncc, stay.
        box: the object in the first frame as x,y,w,h: left, top, width, height in pixels. A
            sequence with a groundtruth.txt brings its own.
        out: folder for VIDEO-TRACKER.mp4 and .txt (default: where you are).
        device: where to run.
    """
    from torch.nn.functional import pad

    from trackkit.drawing import draw_boxes
    from trackkit.evaluation import average_overlap, sequence_overlaps
    from trackkit.paths import atomic_write, writable
    from trackkit.progress import bar
    from trackkit.tracking import track_many
    from trackkit.video import open_sequence, write_video

    sequence = open_sequence(video, parse_box(box))
    if len(sequence.boxes_xywh) == 0:
        raise TrackkitError(
            f"{video} has no groundtruth.txt; say what to follow: --box x,y,w,h in pixels of the "
            "first frame"
        )
    [name] = _labels([tracker])
    network = _load([tracker], device)[0]
    results = writable(out or Path.cwd()) / f"{sequence.name}-{name}"
    _, result = next(track_many(network, [sequence], batch=1, progress=True))
    with atomic_write(f"{results}.txt") as partial:
        partial.write_text(
            "".join(",".join(f"{v:.3f}" for v in row) + "\n" for row in result.boxes_xywh.tolist())
        )
    scored = sequence.labelled and len(sequence) > 1

    def pictures(numbers):
        height, width = sequence.frame(0).shape[1:]
        for i in numbers:
            boxes = {name: result.boxes_xywh[i]}
            if scored and bool(sequence.visible[i]):
                boxes["truth"] = sequence.boxes_xywh[i]
            picture = draw_boxes(sequence.frame(i), boxes)
            # frames of another size than the first are cut or filled up: a video has one size
            if picture.shape[1:] != (height, width):
                picture = pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1]))
            yield picture

    fps, times = getattr(sequence, "fps", 0) or 10, getattr(sequence, "times", None)
    with bar(range(len(sequence)), desc="video", unit="frame") as shown:
        write_video(f"{results}.mp4", pictures(shown), fps, times)
    fps = len(sequence) / float(result.seconds.sum())
    print(f"{results}.mp4 and .txt: {len(sequence)} frames, {fps:.0f} frames per second")
    if scored:
        overlap = average_overlap(sequence_overlaps(sequence, result.boxes_xywh))
        print(f"average overlap with groundtruth.txt: {overlap:.3f}")


def evaluate(argv: list[str]) -> None:
    _parsed("evaluate", argv, _later(_evaluate))()


def _evaluate(
    trackers: tyro.conf.Positional[tuple[str, ...]],
    /,
    data: Path | None = None,
    split: Literal["train", "val", "test"] = "val",
    out: Path | None = None,
    batch: int = 8,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json_out: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    zip_out: Annotated[Path | None, tyro.conf.arg(name="zip")] = None,
) -> None:
    """Score trackers as GOT-10k does: AO, SR0.5, SR0.75, by attribute, beside one another, with a
    success plot.

    An interrupted evaluation continues; sequences with results are not tracked again.

    The results are in the layout of the official toolkit. For its `ExperimentGOT10k(ROOT,
    result_dir="results").report(NAMES)` give `--out results/GOT-10k`: it looks for
    results/GOT-10k/NAME/SEQUENCE/SEQUENCE_001.txt.

    Args:
        trackers: checkpoints (tracker.safetensors), names of trackers whose weights come with
            trackkit (siamfc-tiny, stark-tiny), or ncc and stay, the references without learning.
        data: GOT-10k's root, or a folder of sequences (default: TRACKKIT_GOT10K, else the embedded
            samples).
        split: which split.
        out: folder of the results, one folder a tracker (default: TRACKKIT_HOME/results/DATA).
        batch: sequences tracked side by side.
        device: where to run.
        json_out: also write the scores as JSON to this file.
        zip_out: also write the archive for GOT-10k's server (one tracker, test split).
    """
    from trackkit import evaluation
    from trackkit.course.figures import figure_success
    from trackkit.got10k import GOT10k
    from trackkit.paths import atomic_write, home
    from trackkit.results import submission_zip

    if not trackers:
        raise TrackkitError("name at least one tracker: a checkpoint, or ncc, stay")
    _in_range(batch=(batch, BATCH))
    if zip_out and (len(trackers) != 1 or split != "test"):
        raise TrackkitError(
            "--zip packs the results of one tracker on the test split: --split test, and a single "
            "tracker"
        )
    dataset = GOT10k(data, split)
    out = out or home() / "results" / dataset.name
    scores, names = {}, _labels(trackers)
    for network, name in zip(_load(trackers, device), names, strict=True):
        scores[name] = evaluation.evaluate(network, dataset, out / name, name, batch=batch)
        if zip_out:
            submission_zip(out / name, dataset, zip_out)
            print(f"{zip_out}: {len(dataset)} sequences, ready for the server")
    labelled = {name: score for name, score in scores.items() if score is not None}
    if labelled:
        plot = out / f"success-{dataset.name}.png"
        with atomic_write(plot) as partial:
            figure_success(labelled).savefig(partial, dpi=120)
        tables = (evaluation.compare(labelled), evaluation.compare_attributes(labelled))
        print(*tables, f"success plot: {plot}", sep="\n\n")
    if json_out:
        with atomic_write(json_out) as partial:
            partial.write_text(
                json.dumps(
                    {name: dataclasses.asdict(score) for name, score in labelled.items()}, indent=1
                )
            )


def ablate(argv: list[str]) -> None:
    _parsed("ablate", argv, _later(_ablate))()


def _ablate(
    table: tyro.conf.Positional[str] = "",
    /,
    seeds: int = 3,
    scale: Literal["tiny", "laptop", "gpu", "paper"] = "tiny",
    rows: tuple[str, ...] = (),
    cut: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    how: Literal["probe", "track"] = "probe",
    out: Path | None = None,
    data: Path | None = None,
    jobs: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    steps: int | None = None,
    batch: int | None = None,
    tracker: str | None = None,
    start: str | None = None,
    backend: str = "loky",
) -> None:
    """Train and score the rows of a paper's ablation table, beside the paper's figures. Without
    TABLE, list the tables.

    An interrupted table continues; rows with a result are not trained again, in whichever table
    they stand.

    With --cut: switch parts of a trained tracker off, without training anything, as
    `trackkit ablate stark-tiny --cut no-encoder --cut template-apart`.

    Args:
        table: a table's name, as `trackkit ablate` lists them; with --cut a tracker whose weights
            come with trackkit, or a checkpoint.
        seeds: each row is trained with so many seeds: all rows with the first, then all with the
            second, ...
        scale: length of training.
        rows: labels of the rows to train, beside the base (default: all).
        cut: a part to switch off; may be given several times. "all", or "list" to print them.
        how: cuts are measured by the "probe", on each frame around the true last box (seconds), or
            as they "track".
        out: folder of the runs and of TABLE_TRACKER_SCALE.md and .json, which are up to date after
            each run (default: TRACKKIT_HOME/ablations).
        data: GOT-10k's root, to train on its train split and score on its val split (default:
            TRACKKIT_GOT10K, else procedural video and 104 held-out videos). Cuts are measured on
            the val split, else on the embedded samples.
        jobs: runs side by side, each a process with one thread.
        device: where to run.
        steps: steps of the longest stage, in place of the recipe's; the others shrink alike.
        batch: samples in a step, in place of the recipe's.
        tracker: another tracker with the same config fields (default: the table's, a tiny one).
        start: the trained tracker, a name or a file, with whose weights all rows begin, as far as
            they fit; "scratch" for random ones (default: the table's, for the table's tracker).
        backend: of joblib, for jobs: loky has processes here; dask's and ray's have machines that
            share the folder `out`.
    """
    from trackkit import ablations
    from trackkit.paths import home
    from trackkit.weights import TRACKERS

    if cut:
        training = {"seeds": seeds != 3, "scale": scale != "tiny", "jobs": jobs != 1, "rows": rows}
        training |= {"steps": steps, "batch": batch, "tracker": tracker, "start": start}
        if odd := [name for name, given in training.items() if given]:
            raise TrackkitError(f"--{odd[0]} is for training, and with --cut nothing is trained")
        _cuts(table, cut, how, out or home() / "ablations", data, device)
        return
    tables = ablations.TABLES
    few = Range(1, 1024)
    _in_range(seeds=(seeds, few), jobs=(jobs, few), steps=(steps, COUNT), batch=(batch, BATCH))
    if not table:
        for one in tables.values():
            print(
                f"{one.name:<16}{one.source} ({one.tracker}): "
                f"{', '.join(row.label for row in one.rows)}"
            )
        return
    if table in TRACKERS:
        raise TrackkitError(f"{table} is a tracker; its cuts: trackkit ablate {table} --cut list")
    if table not in tables:
        near = nearest(table, tables)
        raise TrackkitError(f"no table is called {table!r}{near}; there are {', '.join(tables)}")
    chosen = tables[table]
    if tracker not in (None, chosen.tracker):  # the start is that of the table's own tracker
        chosen = dataclasses.replace(chosen, tracker=tracker, start="")
    options = {"start": start, "backend": backend}
    result = ablations.run(
        chosen, seeds, scale, out, data, rows, jobs, device, steps, batch, **options
    )
    print(f"{result.text()}{(out or home() / 'ablations') / result.about['files']}.md and .json")


def _cuts(
    name: str, names: tuple[str, ...], how: str, out: Path, data: Path | None, device: str
) -> None:
    """The cuts of these names of a tracker, or all; writes NAME_cuts_HOW.json and .md."""
    from trackkit import cuts
    from trackkit.got10k import GOT10k
    from trackkit.paths import atomic_write, writable
    from trackkit.weights import TRACKERS, create

    if not name:
        raise TrackkitError("name the tracker to cut: trackkit ablate stark-tiny --cut list")
    if names == ("list",):  # needs no weights
        tracker = create(name) if name in TRACKERS else _load([name], "cpu")[0]
        for one in cuts.cuts_of(tracker).values():
            print(f"{one.name:<26}{one.sentence}")
        return
    tracker, [label] = _load([name], device)[0], _labels([name])
    there = cuts.cuts_of(tracker)
    for wanted in names:
        if wanted != "all" and wanted not in there:
            raise TrackkitError(
                f"{label} has no cut {wanted!r}{nearest(wanted, there)}; it has "
                f"{', '.join(there) or 'none'}"
            )
    if not there:
        raise TrackkitError(f"{label} has no cuts")
    chosen = [one for key, one in there.items() if key in names or "all" in names]
    result = cuts.compare(tracker, chosen, GOT10k(data, "val"), how, label, progress=True)
    files = writable(out) / f"{label}_cuts_{how}"
    everything = dataclasses.asdict(result) | {"rows": result.rows, "trackkit": __version__}
    for suffix, text in ((".json", json.dumps(everything, indent=1)), (".md", result.text())):
        with atomic_write(f"{files}{suffix}") as partial:
            partial.write_text(text, "utf-8")
    print(f"{result.text()}{files}.md and .json")


def synth(argv: list[str]) -> None:
    _parsed("synth", argv, _later(_synth))()


def _synth(
    out: tyro.conf.Positional[Path | None] = None,
    /,
    samples: bool = False,
    pool: int | None = None,
    only: tuple[str, ...] = (),
    split: Literal["train", "val", "test"] = "train",
    count: int = 10,
    frames: int = 60,
    width: int = 320,
    height: int = 240,
    seed: int = 0,
) -> None:
    """Write procedural video in GOT-10k's layout.

    Args:
        out: folder to write to; a pool needs none.
        pool: make the pool for training with so many videos, which `trackkit train` would make at
            its first use (with 160), under TRACKKIT_HOME/pool.
        samples: write the sequences that come with trackkit, byte for byte, and nothing else.
        only: attributes to show, all else still, as: --only occlusion scale (default: a mixture of
            all).
        split: which split's textures and outlines.
        count: number of sequences.
        frames: frames of a sequence.
        width: pixels.
        height: pixels.
        seed: another seed, other sequences.
    """
    from trackkit import synth as worlds

    _in_range(
        count=(count, Range(1, 10**6)),
        frames=(frames, Range(1, 100_000)),
        width=(width, PIXELS),
        height=(height, PIXELS),
        seed=(seed, SEED),
        pool=(pool, Range(1, 10**6)),
    )
    if pool is not None:
        from trackkit.synth.pool import pool as make

        made = make(pool, seed)
        print(f"{made.folder.parent}: {len(made)} videos; train with --data and this folder")
        return
    if out is None:
        raise TrackkitError("name the folder to write to: trackkit synth OUT (or --pool N)")
    if samples:
        worlds.make_samples(out)
    else:
        changes = {"frames": frames, "width": width, "height": height, "split": split}
        config = (
            worlds.SynthConfig.only(*only, **changes) if only else worlds.SynthConfig(**changes)
        )
        worlds.write_dataset(out, split, worlds.SynthDataset(config, seed=seed, length=count))
    shown = "val" if samples else split
    again = f"; try `trackkit evaluate ncc --data {out} --split {shown}`" if shown != "test" else ""
    print(_typeable(f"{out}: written{again}"))


def import_(argv: list[str]) -> None:
    _parsed("import", argv, _later(_import))()


def _import(file: tyro.conf.Positional[Path], tracker: str, out: Path | None = None) -> None:
    """Turn a checkpoint of a tracker's authors into a file for `trackkit track` and `evaluate`.
    Nothing in it is executed.

    Args:
        file: what the authors publish (torch.save).
        tracker: the tracker that it belongs to, as stark-st50; `trackkit profile --all` lists the
            names.
        out: the file to write (default: TRACKER.safetensors in the present folder).
    """
    from trackkit import official, weights

    out = out or Path(f"{tracker}.safetensors")
    entries = official.read(file)
    weights.save(official.load(tracker, entries), out, source=file.name)
    if dropped := official.left_out(tracker, entries):
        print(f"left out, as the tracker does not use it: {', '.join(dropped)}")
    made = f"{out}: {tracker} with the weights of {file.name}; try `trackkit evaluate {out}`"
    print(_typeable(made))


def profile(argv: list[str]) -> None:
    _parsed("profile", argv, _later(_profile))()


def _profile(
    name: tyro.conf.Positional[str] = "",
    /,
    all: bool = False,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
    speed: bool = False,
) -> None:
    """Count parameters and multiply-accumulates as the tracker's paper counts them, beside the
    paper's figures and how far we are from them.

    Args:
        name: a tracker's name.
        all: all trackers.
        json_output: print JSON.
        speed: also measure frames per second here.
    """
    from trackkit import costs
    from trackkit.weights import TRACKERS, create

    if not name and not all:
        raise TrackkitError(f"name a tracker, or --all; there are {', '.join(TRACKERS)}")
    rows = [costs.profile(n) for n in (TRACKERS if all else [name])]
    for row in rows if speed else []:
        row["frames_per_second"] = dataclasses.asdict(costs.frames_per_second(create(row["name"])))
    if json_output:
        print(json.dumps(rows if all else rows[0]))
        return
    heading, *lines = costs.table(rows)
    print(heading)
    for row, line in zip(rows, lines, strict=True):
        print(line)
        if speed:
            measured = row["frames_per_second"]
            print(
                f"{'':<16}{measured['fps']:.0f} frames per second here ({measured['device']}, "
                f"{measured['threads']} threads)"
            )


def doctor(argv: list[str]) -> None:
    _parsed("doctor", argv, _later(_doctor))()


def _doctor() -> None:
    """Print versions, devices and data paths, and for what is missing the command that mends it."""
    from trackkit.doctor import report

    print(report())


def lessons(argv: list[str]) -> None:
    from trackkit.course import lessons as tools

    commands = {
        "start": tools.start,
        "student": tools.student,
        "build": tools.build,
        "check": tools.check,
    }
    later = {name: _later(function) for name, function in commands.items()}
    _parsed("lessons", argv, later, tyro.extras.subcommand_cli_from_dict)()


class Mistyped(TrackkitError):
    """Options that cannot be understood."""


def _parsed(
    command: str, argv: list[str], what: Any, parse: Callable = tyro.cli, **named: Any
) -> Any:
    """`what`, a dataclass or a function, made or called with the options in `argv`. Raises
    Mistyped, one line, where tyro would print a box.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(what, args=argv, prog=f"trackkit {command}", **named)
    except SystemExit as ended:
        if not ended.code:  # --help
            raise
        raise Mistyped(f"{_unboxed(said.getvalue())}; --help explains the options") from None


def _later(function: Callable) -> Callable:
    """Its call, with the options bound: errors in the options are not those of the work."""

    @functools.wraps(function)
    def bound(*given: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(function, *given, **named)

    return bound


def _unboxed(box: str) -> str:
    """tyro's message in one line, with the nearest name if one was mistyped."""
    lines = "\n".join(line.strip("│╭╮╰╯ ") for line in box.splitlines())
    # a title, the message, perhaps suggestions; the rules are - where there is no UTF-8
    _, said, *more = [*re.split(r"^─ .+ ─*$|^[─-]+$", lines, flags=re.M), ""]
    said, more = " ".join(said.split() or lines.split()).rstrip("."), "\n".join(more)
    # tyro suggests options, but neither choices nor subcommands
    if near := re.search(r"Perhaps you meant:\s+(--[\w.-]+)", more):
        return f"{said} (did you mean {near[1]}?)"
    wrong = re.match(r"invalid choice '(.*?)'|Unrecognized options: (\S+)", said)
    there = re.search(r"(?:one of|subcommands:)(.*)", f"{said} {more}")
    names = re.findall(r"[\w-]+", there[1]) if there else ()
    return said + (nearest(wrong[1] or wrong[2], names) if wrong else "")


def parse_box(text: str | None) -> tuple[float, ...] | None:
    """ "x,y,w,h" -> four numbers; TrackkitError says what is wrong."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.replace(" ", "").split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise TrackkitError(
            f"--box {text!r}: give four numbers, left, top, width and height in pixels, as --box "
            "120,80,40,60"
        )
    return numbers


def _labels(trackers: Sequence[str]) -> list[str]:
    """A name for each: a checkpoint's run folder names it better than "tracker", and the folders
    above it tell equal ones apart.
    """
    parts = []
    for tracker in trackers:
        path = Path(tracker)
        if path.suffix != ".safetensors":
            parts.append([tracker])
            continue
        folders = path.resolve().parts[1:-1]
        own = [] if path.stem in ("tracker", "state") else [path.stem]
        parts.append([*folders, *own][::-1] or [path.stem])
    if len(set(map(tuple, parts))) < len(parts):
        twice = next(t for i, t in enumerate(trackers) if parts[i] in parts[:i])
        raise TrackkitError(f"{twice} is named twice (tracker and state of a run are one)")
    depths = [1] * len(parts)
    while True:
        names = ["-".join(part[:depth][::-1]) for part, depth in zip(parts, depths, strict=True)]
        if len(set(names)) == len(names):
            return names
        depths = [depth + (names.count(n) > 1) for n, depth in zip(names, depths, strict=True)]


def _load(trackers: Sequence[str], device: str) -> list[Any]:
    """All of them before any of the work."""
    from trackkit.tracking import device_called
    from trackkit.weights import load, shipped

    where = device_called(device)
    for tracker in trackers:
        if path := shipped(tracker):
            print(f"{tracker}: with the weights that come with trackkit, {path}")
    return [load(tracker).to(where) for tracker in trackers]


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (train, "train a tracker, or continue its training"),
    "track": (track, "follow an object through a video"),
    "evaluate": (evaluate, "score trackers as GOT-10k does"),
    "ablate": (ablate, "train a paper's ablation table, or cut parts of a trained tracker"),
    "synth": (synth, "write procedural video in GOT-10k's layout"),
    "import": (import_, "turn a checkpoint of a tracker's authors into one of ours"),
    "profile": (profile, "count parameters, multiply-accumulates, frames per second"),
    "doctor": (doctor, "say what is installed, what is found, and how to mend what is not"),
    "lessons": (lessons, "start a lesson, make student versions, build and check notebooks"),
}


def _typeable(text: str) -> str:
    """A message, and what to type for the commands in it if `trackkit` is not on the PATH."""
    here = command("trackkit")
    named = re.search(rf"\btrackkit ({'|'.join(COMMANDS)})\b", text)
    return f"{text} (`trackkit` is {here} here)" if named and here != "trackkit" else text


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors that the user can mend are one line, not a
    traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
        print(
            f"usage: trackkit COMMAND ...\n\n{rows}\n\n`trackkit COMMAND --help` explains a "
            f"command; `trackkit --version` prints {__version__}."
            + ("" if (here := command("trackkit")) == "trackkit" else f"\nHere it is {here}.")
        )
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        near = nearest(argv[0], COMMANDS)
        there = f"there are {', '.join(COMMANDS)}"
        print(f"trackkit: no command {argv[0]!r}{near}; {there}", file=sys.stderr)
        return 2
    try:
        COMMANDS[argv[0]][0](argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # as behind `| head -1`: nobody reads on, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except TrackkitError as error:
        print(f"trackkit {argv[0]}: {_typeable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, Mistyped) else 1
    except Stopped as stopped:
        again = f"{command('trackkit')} {shlex.join(argv)}"
        print(f"\ntrackkit {argv[0]}: {stopped}. It goes on with: {again}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(
            f"\ntrackkit {argv[0]}: interrupted; the same command continues from the last file "
            "that was written, if there is one",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
