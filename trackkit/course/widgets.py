"""Panels to explore with: a few named controls and one picture that follows them.

The controls' `observe` callbacks write the `value` of one HTML widget, so an exception in a drawing
function reaches the caller, a test can set `.value` and look at the result, and strict nbval runs a
panel like any other cell. In a notebook page that is not running, a panel is a still picture.

ipywidgets gives its sliders no name that a screen reader could speak. Here every number therefore
has a labelled number field, which the keyboard and a screen reader use, and beside it a slider for
the mouse only.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ipywidgets
import torch
import traitlets
from torch import Tensor

from trackkit.boxes import iou
from trackkit.drawing import animation, draw_boxes, to_png
from trackkit.sequences import Sequence

if TYPE_CHECKING:
    from trackkit.drawing import Picture

# The slider's handle is hidden from the keyboard and from screen readers, and what is painted over
# it is not: the number field is the accessible control. `behavior="snap"` lets the mouse press and
# drag anywhere on the bar.
_STYLE = """<style>
.trackkit-mouse .noUi-handle {visibility: hidden}
.trackkit-mouse .noUi-handle::after {visibility: visible; content: ""; display: block;
  position: absolute; inset: 0; width: auto; height: auto; border-radius: 50%; background: #0072B2}
</style>"""


@dataclass(frozen=True)
class Control:
    """One control of a panel: `field` is the named widget that holds the value, `row` what is
    shown.
    """

    field: ipywidgets.ValueWidget
    row: ipywidgets.Widget


def number(
    start: float, low: float, high: float, step: float | None = None, label: str | None = None
):
    """A number field with a mouse slider. Whole numbers when `start`, `low` and `high` are all
    `int`.

    `step` defaults to 1 for whole numbers and to a hundredth of the range otherwise. `label`
    defaults to the name of the argument that the control feeds.
    """
    whole = all(isinstance(v, int) for v in (start, low, high))
    if not low <= start <= high:
        raise ValueError(f"start {start} is not between {low} and {high}")
    step = step if step is not None else 1 if whole else (high - low) / 100

    def build(name: str) -> Control:
        limits = {"min": low, "max": high, "step": step, "value": start}
        named = _named(label or name)
        field_type = ipywidgets.BoundedIntText if whole else ipywidgets.BoundedFloatText
        slider_type = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        field = field_type(**limits, **named, layout={"width": "16em"})
        slider = slider_type(**limits, readout=False, behavior="snap", tooltip=named["description"])
        slider.add_class("trackkit-mouse")
        traitlets.link((field, "value"), (slider, "value"))
        return Control(field, ipywidgets.HBox([field, slider]))

    return build


def choice(options: list, start: Any = None, label: str | None = None):
    """A list to choose one of `options` from; `start` defaults to the first."""

    def build(name: str) -> Control:
        field = ipywidgets.Dropdown(
            options=options, value=options[0] if start is None else start, **_named(label or name)
        )
        return Control(field, field)

    return build


def switch(start: bool = False, label: str | None = None):
    """A check box."""

    def build(name: str) -> Control:
        field = ipywidgets.Checkbox(value=start, indent=False, **_named(label or name))
        return Control(field, field)

    return build


def _named(label: str) -> dict[str, Any]:
    text = label.replace("_", " ")
    return {"description": text, "tooltip": text, "style": {"description_width": "initial"}}


class Explorer:
    """A picture that follows named controls.

    `draw(**values)` gets the controls' values by name and returns a picture (Figure, Pillow image
    or uint8 array) and its text for screen readers, which has to state the values and what can be
    seen. Each keyword is made by `number`, `choice` or `switch`:

        Explorer(draw, influence=number(0.176, 0.0, 1.0), scales=choice([1, 3, 5]))

    Attributes:
        controls: name -> widget; setting `controls["influence"].value` redraws at once, and an
            exception in `draw` comes out of that assignment.
        values: name -> current value. png: bytes of the current picture. alt: its text.
    """

    def __init__(
        self, draw: Callable[..., tuple[Picture, str]], **controls: Callable[[str], Control]
    ):
        self._draw = draw
        built = {name: build(name) for name, build in controls.items()}
        self.controls: dict[str, ipywidgets.ValueWidget] = {
            name: item.field for name, item in built.items()
        }
        self._picture = ipywidgets.HTML()
        self.box = ipywidgets.VBox(
            [*(item.row for item in built.values()), self._picture, ipywidgets.HTML(_STYLE)]
        )
        self._redraw()
        for field in self.controls.values():
            field.observe(self._redraw, "value")

    @property
    def values(self) -> dict[str, Any]:
        return {name: field.value for name, field in self.controls.items()}

    def _redraw(self, change: Any = None) -> None:
        picture, alt = self._draw(**self.values)
        self._put(to_png(picture), alt)

    def _put(self, png: bytes, alt: str) -> None:
        if not alt.strip():
            raise ValueError("draw must return the picture and a text that says what it shows")
        self.png, self.alt = png, alt
        data = base64.b64encode(png).decode()
        self._picture.value = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.alt}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        live = self.box._repr_mimebundle_()
        return {**live, "image/png": self.png, "text/plain": repr(self)}, {
            "image/png": {"alt": self.alt}
        }


class Player(Explorer):
    """Scrub through a sequence with the boxes of its trackers, or play it from the current frame
    on.

    tracks: name -> boxes (N, 4) `xywh`, one for each frame. The labels of the sequence, if it has
    them, are drawn first under the name "truth", and the text states each tracker's overlap with
    them. Playing shows up to 60 frames as one animation, so it runs smoothly without a kernel call
    for each frame.

    Attributes: as `Explorer`; controls are "frame" (a number) and "play" (a switch).
    """

    def __init__(
        self, sequence: Sequence, tracks: Mapping[str, Tensor] | None = None, width: int = 320
    ):
        self.sequence, self.width = sequence, width
        truth = {"truth": sequence.boxes_xywh} if sequence.labelled else {}
        self.tracks = truth | {
            name: torch.as_tensor(boxes) for name, boxes in (tracks or {}).items()
        }
        for name, boxes in self.tracks.items():
            if len(boxes) != len(sequence):
                raise ValueError(
                    f"track {name!r} has {len(boxes)} boxes for {len(sequence)} frames"
                )
        super().__init__(self._frame, frame=number(0, 0, len(sequence) - 1), play=switch())

    def _redraw(self, change: Any = None) -> None:
        if not self.values["play"]:
            return super()._redraw()
        indices = range(self.values["frame"], min(self.values["frame"] + 60, len(self.sequence)))
        alt = f"Animation of {self.sequence.name}, frames {indices[0]} to {indices[-1]}."
        frames = [self.sequence.frame(i) for i in indices]
        tracks = {name: boxes[indices.start : indices.stop] for name, boxes in self.tracks.items()}
        self._put(
            animation(frames, tracks, alt=alt, width=self.width, max_bytes=4_000_000).data, alt
        )

    def _frame(self, frame: int, play: bool) -> tuple[Tensor, str]:
        image = self.sequence.frame(frame)
        boxes = {name: track[frame] for name, track in self.tracks.items()}
        parts = [f"Frame {frame} of {len(self.sequence)} in {self.sequence.name}"]
        truth = boxes.get("truth")
        for name, box in boxes.items():
            if not _drawable(box):
                parts.append(f"{name}: no box")
            elif box is truth or truth is None or not _drawable(truth):
                parts.append(f"{name} at " + ", ".join(f"{v:.0f}" for v in box.tolist()))
            else:
                parts.append(f"{name}: overlap {float(iou(box.double(), truth)):.2f}")
        return draw_boxes(image, boxes, scale=self.width / image.shape[2]), "; ".join(parts) + "."


def _drawable(box: Tensor) -> bool:
    return bool(torch.isfinite(box).all() and (box[2:] > 0).all())
