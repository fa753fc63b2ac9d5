"""One-pass evaluation with GOT-10k's numbers: start from the first box, never help, compare every
frame.

    scores = evaluate(tracker, dataset, "results/siamfc", "siamfc")
    scores.ao, scores.sr50, scores.sr75                     # averaged over all frames, as the
    toolkit does print(compare({"siamfc": scores, "stay": others}))

The numbers are those of the official toolkit (got-10k/toolkit, `ExperimentGOT10k.report`; Huang,
Zhao, Huang, TPAMI 2021), including how it bounds boxes. Two of its habits are not taken over: the
size that bounds the boxes is that of each frame's image (there: the resolution in meta_info.ini,
once for a sequence, which is wrong where a video changes its size), and speed is frames divided by
time (its biased number is there by another name). The server that scores the test split is closed;
what is known of it is in its toolkit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from trackkit import __version__
from trackkit.errors import DataError
from trackkit.paths import alone, remove_partials
from trackkit.progress import bar
from trackkit.results import claim, has_results, read_results, write_results
from trackkit.sequences import Sequence
from trackkit.trackers.base import Tracker
from trackkit.tracking import track_many

# numpy's values to the last bit, so that an overlap of exactly a threshold falls on the toolkit's
# side
THRESHOLDS = torch.from_numpy(np.linspace(0, 1, 101))


# ---- the metrics ----


def bounded_iou(
    predictions_xywh: Tensor, truth_xywh: Tensor, frame_size: tuple[int, int] | Tensor
) -> Tensor:
    """Overlap of predictions and truth, both bounded to the frame first: (N, 4), (N, 4) -> (N,), in
    [0, 1].

    `frame_size` is (width, height), or a tensor (N, 2) where the size changes. The bounding is the
    toolkit's: the corner is moved into the frame, *then* the size is cut. A box that begins left of
    the frame is thereby moved, not cropped: x = -10, w = 50 becomes x = 0, w = 50, whose overlap
    with the visible part (0, w = 40) is 0.8. Unlike the toolkit's, this function leaves its
    arguments alone.

    Raises DataError for shapes that differ or a prediction that is not finite.
    """
    predictions, truth = (
        torch.as_tensor(predictions_xywh).double(),
        torch.as_tensor(truth_xywh).double(),
    )
    if predictions.shape != truth.shape or predictions.ndim != 2 or predictions.shape[1] != 4:
        raise DataError(
            f"need predictions and truth of the same shape (N, 4), got {tuple(predictions.shape)} "
            "and "
            f"{tuple(truth.shape)}; a prediction has a row for every frame, the first included"
        )
    if not torch.isfinite(predictions).all():
        frame = int((~torch.isfinite(predictions).all(1)).nonzero()[0])
        raise DataError(f"the prediction of frame {frame} is not finite")
    size = torch.as_tensor(frame_size).double().expand(len(truth), 2)
    a, b = _bound(predictions, size), _bound(truth, size)
    corner_min = torch.maximum(a[:, :2], b[:, :2])
    corner_max = torch.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    inter = (corner_max - corner_min).clamp(min=0).prod(1)
    union = a[:, 2:].prod(1) + b[:, 2:].prod(1) - inter
    return (inter / (union + torch.finfo(torch.float64).eps)).clamp(0, 1)


def _bound(boxes: Tensor, size: Tensor) -> Tensor:
    corner = torch.minimum(boxes[:, :2].clamp(min=0), size)
    return torch.cat([corner, torch.minimum(boxes[:, 2:].clamp(min=0), size - corner)], 1)


def overlaps(
    predictions_xywh: Tensor,
    truth_xywh: Tensor,
    frame_size: tuple[int, int] | Tensor,
    cover: Tensor,
) -> Tensor:
    """Overlaps of the frames that count: N frames -> (M,), M <= N - 1.

    The first frame does not count, since its box was given; nor do frames with cover 0, in which
    nothing of the target is visible: whatever is predicted there is neither rewarded nor punished.
    `cover` is (N,), 0..8. The labels `absent` and `cut` play no part. Otherwise as `bounded_iou`.
    """
    all_frames = bounded_iou(predictions_xywh, truth_xywh, frame_size)
    cover = torch.as_tensor(cover)
    if cover.shape != all_frames.shape:
        raise DataError(
            f"need a cover value for each of the {len(all_frames)} frames, got shape "
            f"{tuple(cover.shape)}"
        )
    return all_frames[1:][cover[1:] > 0]


def average_overlap(overlaps: Tensor) -> float:
    """AO, the mean of the overlaps (M,); in [0, 1]. Raises DataError when there are none."""
    return float(_some(overlaps).mean())


def success_rate(overlaps: Tensor, threshold: float) -> float:
    """SR, the share of overlaps (M,) above the threshold; an overlap of exactly the threshold is no
    success.

    Raises DataError when there are none.
    """
    return float((_some(overlaps) > threshold).double().mean())


def success_curve(overlaps: Tensor) -> Tensor:
    """Success rates at the thresholds 0, 0.01, ..., 1 (`THRESHOLDS`): (M,) -> (101,), falling, ends
    at 0.

    SR0.75 is its entry 75. AO is the mean of the overlaps, which is close to the mean of this curve
    but not the same number. Raises DataError when there are no overlaps.
    """
    ordered = _some(overlaps).sort().values
    failures = torch.searchsorted(ordered, THRESHOLDS, right=True)  # overlaps <= threshold
    return (len(ordered) - failures).double() / len(ordered)


def _some(overlaps: Tensor) -> Tensor:
    overlaps = torch.as_tensor(overlaps).double()
    if overlaps.numel() == 0:
        raise DataError(
            "no overlaps to average: apart from the first frame, the target is never visible"
        )
    return overlaps


# ---- the scores of a tracker on a data set ----


@dataclass(frozen=True)
class Rates:
    """AO, SR0.50 and SR0.75 in [0, 1], and how many frames and sequences stand behind them."""

    ao: float
    sr50: float
    sr75: float
    frames: int
    sequences: int

    @classmethod
    def pooled(cls, parts: list[Tensor]) -> Rates:
        """Of all frames of several sequences alike: a long sequence weighs more."""
        pool = torch.cat(parts)
        return cls(
            average_overlap(pool),
            success_rate(pool, 0.5),
            success_rate(pool, 0.75),
            len(pool),
            len(parts),
        )

    @classmethod
    def mean(cls, rates: list[Rates]) -> Rates:
        """Of several rates alike, however many frames each has."""
        ao, sr50, sr75 = (
            sum(getattr(r, k) for r in rates) / len(rates) for k in ("ao", "sr50", "sr75")
        )
        return cls(ao, sr50, sr75, sum(r.frames for r in rates), sum(r.sequences for r in rates))


@dataclass(frozen=True)
class Scores:
    """What a tracker reached on a data set: three averages of the same overlaps, which may differ
    widely.

    Attributes:
        name, dataset: of the tracker and the data set.
        ao, sr50, sr75: over all frames of all sequences, as the toolkit reports them. frames: how
            many.
        sequence_mean: the mean over sequences. class_mean: the mean over object classes of the mean
            over their sequences (the paper's mAO, mSR); None if a sequence has no `object_class` in
            its `meta`.
        curve: success rates at 101 thresholds, over all frames.
        sequences: rates of each sequence. unscored: sequences in which no frame counts.
        attributes: rates over all frames of the sequences that have an attribute.
        fps: frames / seconds, the first frames included; None without times. The times are those in
            the result files: in a run of several sequences at once, each one's share. fps_toolkit:
            the toolkit's number, the mean of 1 / seconds over frames, which a few fast frames push
            up without limit.
    """

    name: str
    dataset: str
    ao: float
    sr50: float
    sr75: float
    frames: int
    sequence_mean: Rates
    class_mean: Rates | None
    curve: tuple[float, ...]
    sequences: dict[str, Rates]
    attributes: dict[str, Rates]
    unscored: tuple[str, ...]
    fps: float | None
    fps_toolkit: float | None

    def to_json(self) -> str:
        """As JSON text, without rounding; `from_json` gives an equal object."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """Read what `to_json` wrote. Raises DataError if it is something else."""
        try:
            values = json.loads(text)
            for key in ("sequences", "attributes"):
                values[key] = {name: Rates(**rates) for name, rates in values[key].items()}
            for key in ("sequence_mean", "class_mean"):
                values[key] = values[key] and Rates(**values[key])
            for key in ("curve", "unscored"):
                values[key] = tuple(values[key])
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"not the scores of a tracker ({error}); make them anew: trackkit evaluate"
            ) from error


def score(dataset, tracks: Iterable[tuple[Tensor, Tensor]], name: str) -> Scores:
    """Score finished runs: boxes (N, 4) in pixels and seconds (N,) for each sequence of `dataset`,
    in order.

    Raises DataError for a sequence without labels, a wrong number of boxes, or if no frame at all
    counts.
    """
    by_sequence: dict[str, Tensor] = {}
    unscored, times, classes, attributes = [], [], {}, {}
    for index, (boxes, seconds) in zip(range(len(dataset)), tracks, strict=True):
        sequence = dataset[index]
        found = sequence_overlaps(sequence, boxes)
        times.append(torch.as_tensor(seconds).double())
        if len(found) == 0:
            unscored.append(sequence.name)
            continue
        by_sequence[sequence.name] = found
        classes.setdefault(sequence.meta.get("object_class"), []).append(sequence.name)
        for attribute in sequence.attributes:
            attributes.setdefault(attribute, []).append(found)
    if not by_sequence:
        raise DataError(
            f"{dataset.name}: no frame counts; after the first frame no target is visible"
        )
    rates = {key: Rates.pooled([found]) for key, found in by_sequence.items()}
    everything = Rates.pooled(list(by_sequence.values()))
    class_rates = [Rates.mean([rates[key] for key in names]) for names in classes.values()]
    seconds = torch.cat(times)
    seconds = seconds[seconds > 0]
    return Scores(
        name=name,
        dataset=dataset.name,
        ao=everything.ao,
        sr50=everything.sr50,
        sr75=everything.sr75,
        frames=everything.frames,
        sequence_mean=Rates.mean(list(rates.values())),
        class_mean=None if None in classes else Rates.mean(class_rates),
        curve=tuple(success_curve(torch.cat(list(by_sequence.values()))).tolist()),
        sequences=rates,
        attributes={key: Rates.pooled(parts) for key, parts in sorted(attributes.items())},
        unscored=tuple(unscored),
        fps=sum(map(len, times)) / float(seconds.sum()) if len(seconds) else None,
        fps_toolkit=float((1 / seconds).mean()) if len(seconds) else None,
    )


def sequence_overlaps(sequence: Sequence, boxes_xywh: Tensor) -> Tensor:
    """`overlaps` of boxes (N, 4) with a sequence's labels, each bounded by its own frame's size.

    Raises DataError when the sequence has no labels or another number of frames.
    """
    if not sequence.labelled:
        raise DataError(
            f"sequence {sequence.name} has only its first box, so it cannot be scored here"
        )
    if len(boxes_xywh) != len(sequence):
        raise DataError(
            f"sequence {sequence.name}: {len(boxes_xywh)} boxes for {len(sequence)} frames"
        )
    sizes = torch.tensor([sequence.frame_size(i) for i in range(len(sequence))])
    return overlaps(boxes_xywh, sequence.boxes_xywh, sizes, sequence.cover)


# ---- running a tracker ----


def evaluate(
    tracker: Tracker, dataset, results_dir: str | Path, name: str, batch: int = 8
) -> Scores | None:
    """Run a tracker on every sequence and score it; None, with a remark, for a data set without
    labels.

    `results_dir` is the folder of this tracker's results, in GOT-10k's layout (`trackkit.results`).
    Each sequence is written when it ends, so a run that was cut off goes on where it was: complete
    results are not computed again, damaged ones are. Scores come from the files alone, hence from
    boxes rounded to 1/1000 pixel, and are the same whether a run was cut off or not. `batch`
    sequences are tracked at once. A bar shows the progress on a terminal.

    Raises DataError if the folder holds results of another tracker or other weights, or of other
    videos.
    """
    identity = fingerprint(tracker)
    with alone(results_dir, "writes results"):
        folder = claim(results_dir, name, identity)
        remove_partials(folder.rglob(".*"))
        waiting = [i for i in range(len(dataset)) if not _done(folder, dataset[i])]
        done = len(dataset) - len(waiting)
        with bar(
            total=len(dataset), initial=done, desc=name, unit="sequence", shown=None
        ) as progress:
            for index, track in track_many(tracker, Subset(dataset, waiting), batch):
                sequence = dataset[waiting[index]]
                found = track.boxes_xywh, track.seconds
                about = name, identity, sequence.fingerprint()
                write_results(folder, sequence.name, *found, *about)
                progress.update()
    hidden = sum(not dataset[i].labelled for i in range(len(dataset)))
    if hidden:
        print(
            f"{folder}: results of {len(dataset)} sequences are written. {hidden} of them have no "
            "labels "
            "beyond the first box, so scores need the server: pack the results with "
            "trackkit.results.submission_zip and upload them"
        )
        return None
    return score_results(folder, dataset, name)


def score_results(results_dir: str | Path, dataset, name: str) -> Scores:
    """Score the result files of a tracker, ours or any in the toolkit's layout (of several runs,
    the first).

    Raises DataError for a missing or damaged file.
    """
    files = (
        read_results(results_dir, dataset[i].name, len(dataset[i])) for i in range(len(dataset))
    )
    return score(dataset, files, name)


def fingerprint(tracker: Tracker) -> str:
    """16 hexadecimal digits that change when trackkit's version or a tracker's class, config or any
    weight changes.
    """
    digest = hashlib.sha256(f"{__version__} {type(tracker).__name__} {tracker.config!r}".encode())
    for key, tensor in tracker.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _done(folder: Path, sequence: Sequence) -> bool:
    """Whether complete results of this very sequence are there."""
    try:
        boxes, _ = read_results(folder, sequence.name, len(sequence))
    except DataError:  # missing, cut short or damaged: computed again
        return False
    if (boxes[0] - sequence.boxes_xywh[0]).abs().max() > 1e-3:  # files have 3 decimals
        raise DataError(
            f"{folder}: the results of {sequence.name} start from another box than this data set's "
            "sequence; they are of other videos of that name, so choose another folder"
        )
    return has_results(folder, sequence.name, sequence.fingerprint())


# ---- tables ----


def compare(scores: dict[str, Scores]) -> str:
    """Trackers side by side as a plain-text table, best AO first; the three averages by their
    names.

    Raises DataError if they were scored on different data.
    """
    _same_data(scores)
    head = ["tracker", "AO", "SR0.50", "SR0.75", "AO/seq", "AO/class", "frames/s"]
    rows = []
    for name, s in sorted(scores.items(), key=lambda item: -item[1].ao):
        by_class = s.class_mean and s.class_mean.ao
        speed = "-" if s.fps is None else f"{s.fps:.1f}"
        rows.append([name, *map(_f, (s.ao, s.sr50, s.sr75, s.sequence_mean.ao, by_class)), speed])
    one = next(iter(scores.values()))
    title = (
        f"{one.dataset}: {len(one.sequences)} sequences, {one.frames} frames. AO, SR: over frames, "
        "as GOT-10k;\n"
        "AO/seq: mean over sequences; AO/class: mean over classes of their sequences' mean."
    )
    return f"{title}\n{_table(head, rows)}"


def compare_attributes(scores: dict[str, Scores]) -> str:
    """AO of each tracker over the frames of the sequences that have an attribute, as a plain-text
    table.

    Raises DataError if they were scored on different data.
    """
    _same_data(scores)
    one = next(iter(scores.values()))
    if not one.attributes:
        return f"{one.dataset}: the sequences have no attributes."
    head = ["attribute", "sequences", "frames", *scores]
    rows = [
        [
            key,
            str(rates.sequences),
            str(rates.frames),
            *(_f(s.attributes[key].ao) for s in scores.values()),
        ]
        for key, rates in one.attributes.items()
    ]
    rows.append(
        ["all", str(len(one.sequences)), str(one.frames), *(_f(s.ao) for s in scores.values())]
    )
    return (
        f"{one.dataset}: AO over all frames of the sequences with each "
        f"attribute.\n{_table(head, rows)}"
    )


def _same_data(scores: dict[str, Scores]) -> None:
    if not scores:
        raise DataError("nothing to compare: give the scores of at least one tracker")
    first, one = next(iter(scores.items()))
    for name, other in scores.items():
        same = [
            (s.dataset, {key: r.frames for key, r in s.sequences.items()}) for s in (one, other)
        ]
        if same[0] != same[1]:
            raise DataError(
                f"{first} was scored on {one.dataset} ({one.frames} frames), {name} on "
                f"{other.dataset} "
                f"({other.frames} frames); such numbers cannot be compared: score both on the same "
                "sequences"
            )


def _f(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = (
        [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        for line in lines
    )
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *cells])
        for line, cells in zip(lines, padded, strict=True)
    )
