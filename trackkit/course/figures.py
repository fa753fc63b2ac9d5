"""Figures for lessons, and how a notebook shows them.

Functions called `figure_*` return a matplotlib `Figure`; `show` puts it into a notebook as a small
PNG with a text for screen readers. matplotlib is imported when the first figure is made.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trackkit.drawing import COLOURS, draw_boxes, spoken, to_image, to_png
from trackkit.evaluation import THRESHOLDS, Scores, average_overlap, success_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trackkit.drawing import Picture

_LINESTYLES = ("-", "--", ":", "-.")


def show(picture: Picture, *, alt: str, caption: str | None = None) -> None:
    """Display a figure, Pillow image or uint8 frame in a notebook as a PNG of at most 640 px.

    `alt` says in words what the picture shows, with the numbers that matter: screen readers read
    it, and strict nbval compares it (but not the pixels). `caption` is set below in italics. A
    pyplot figure is closed.
    """
    from IPython.display import display

    bundle = {"image/png": to_png(picture), "text/plain": spoken("Picture", alt)}
    display(bundle, metadata={"image/png": {"alt": alt}}, raw=True)
    if caption is not None:
        display({"text/markdown": f"*{caption}*", "text/plain": caption}, raw=True)
    if "matplotlib.pyplot" in sys.modules and not isinstance(
        picture, (Image.Image, Tensor, np.ndarray)
    ):
        # or the inline backend shows it a second time
        sys.modules["matplotlib.pyplot"].close(picture)


def show_source(*objects: Any) -> None:
    """Display the source of library functions or classes as highlighted code.

    The listing is part of the notebook's compared output, so a lesson that shows old code fails
    strict nbval.
    """
    from IPython.display import display

    for item in objects:
        source = inspect.getsource(item).rstrip()
        title = f"{item.__module__}.{item.__qualname__}"
        display(
            {"text/markdown": f"`{title}`\n```python\n{source}\n```", "text/plain": source},
            raw=True,
        )


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def figure_frames(
    frames: ListLike[Tensor],
    boxes: ListLike[Mapping[str, Any]] | None = None,
    titles: ListLike[str] | None = None,
    columns: int = 5,
) -> Figure:
    """A contact sheet: frames side by side, `columns` in a row, with named boxes and titles.

    frames: uint8 (3, H, W). boxes: for each frame a mapping from name to `xywh`; the legend is on
    the first.
    """
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    cell = 6.4 / columns
    height = cell * frames[0].shape[1] / frames[0].shape[2] + (0.3 if titles else 0.05)
    fig = _figure(6.4, rows * height)
    for index, frame in enumerate(frames):
        ax = fig.add_subplot(rows, columns, index + 1)
        scale = cell * 100 / frame.shape[2]
        ax.imshow(
            to_image(
                draw_boxes(frame, boxes[index] if boxes else {}, legend=index == 0, scale=scale)
            )
        )
        ax.set_axis_off()
        if titles:
            ax.set_title(titles[index], fontsize=8)
    return fig


def figure_heatmap(
    maps: Mapping[str, Tensor], image: Tensor | None = None, mark_peak: bool = True
) -> Figure:
    """Score, label or attention maps side by side, each with its own colour bar.

    maps: title -> float (h, w). image: a uint8 (3, H, W) picture shown first, such as the search
    crop. `mark_peak` puts a cross on each map's maximum.
    """
    panels = len(maps) + (image is not None)
    fig = _figure(6.4, 6.4 / panels * (0.8 if panels > 1 else 0.6) + 0.2)
    if image is not None:
        ax = fig.add_subplot(1, panels, 1)
        ax.imshow(to_image(image))
        ax.set_axis_off()
    for index, (title, values) in enumerate(maps.items(), start=panels - len(maps) + 1):
        values = torch.as_tensor(values).detach().cpu().numpy()
        ax = fig.add_subplot(1, panels, index)
        fig.colorbar(ax.imshow(values, cmap="viridis"), ax=ax, shrink=0.8).ax.tick_params(
            labelsize=7
        )
        ax.set_title(title, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.locator_params(integer=True)
        if mark_peak:
            row, column = divmod(int(values.argmax()), values.shape[1])
            ax.plot(column, row, marker="x", color="#D55E00", markersize=9, markeredgewidth=2)
    return fig


def figure_lines(
    curves: Mapping[str, ListLike[float]],
    x: ListLike[float] | None = None,
    xlabel: str = "",
    ylabel: str = "",
) -> Figure:
    """Curves over a common axis: name -> values, all of one length, each with its own colour and
    line pattern.

    x: their positions; None numbers them from 0.
    """
    fig = _figure(6.4, 3.0)
    ax = fig.add_subplot()
    for index, (name, values) in enumerate(curves.items()):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": _LINESTYLES[index % len(_LINESTYLES)],
        }
        ax.plot(range(len(values)) if x is None else x, values, label=name, **style)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return fig


def figure_curves(log: ListLike[Mapping[str, Any]], keys: ListLike[str] = ("loss",)) -> Figure:
    """Training curves from the log that `training.train` returns: rows with "step" and the given
    keys.

    Rows without a key (another stage) leave a gap in its curve.
    """
    curves = {key: [row.get(key, float("nan")) for row in log] for key in keys}
    return figure_lines(curves, [row["step"] for row in log], xlabel="step", ylabel=", ".join(keys))


def figure_success(scores: Mapping[str, Scores | Tensor]) -> Figure:
    """Success plot: for each tracker the share of frames whose overlap exceeds the threshold on the
    x-axis.

    scores: name -> `evaluation.Scores`, or (N,) IoU of each frame that counts. The legend states
    the average overlap (AO).
    """
    curves = {}
    for name, score in scores.items():
        whole = isinstance(score, Scores)
        ao, curve = (
            (score.ao, Tensor(score.curve))
            if whole
            else (average_overlap(score), success_curve(score))
        )
        curves[f"{name} (AO {ao:.3f})"] = curve
    fig = figure_lines(curves, THRESHOLDS, xlabel="overlap threshold", ylabel="success rate")
    fig.axes[0].set(xlim=(0, 1), ylim=(0, 1))
    return fig
