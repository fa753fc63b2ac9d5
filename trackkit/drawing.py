"""Frames with boxes, and pictures as small PNG files, with Pillow alone.

The command line uses this module without matplotlib; a figure comes in as an object that knows
`savefig`.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Picture = Figure | Image.Image | Tensor | np.ndarray

MAX_WIDTH = 640
# Okabe and Ito's colours: told apart with any colour vision. Every colour also has its own line
# pattern.
COLOURS = ("#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
_DARK, _LIGHT = "#202020", "#FFFFFF"
# drawn and skipped lengths in line widths; (1, 0) is solid
_DASHES = ((1, 0), (8, 4), (3, 3), (12, 3))


def to_image(frame: Tensor | np.ndarray) -> Image.Image:
    """A uint8 frame, (3, H, W) or (H, W, 3) or grey (H, W), as a Pillow image.

    Raises ValueError for another type of number or shape.
    """
    array = frame.detach().cpu().numpy() if isinstance(frame, Tensor) else np.asarray(frame)
    if array.dtype != np.uint8:
        raise ValueError(f"a picture has uint8 pixels, got {array.dtype}; multiply and round first")
    if array.ndim == 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(
            f"a picture has shape (3, H, W), (H, W, 3) or (H, W), got {tuple(array.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def draw_boxes(
    frame: Tensor,
    boxes: Mapping[str, Tensor | ListLike[float] | None],
    legend: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Draw named boxes on a frame: uint8 (3, H, W) -> uint8 (3, round(H * scale), round(W *
    scale)).

    `boxes` maps a name to `xywh` in frame pixels, shape (4,). A box that is None, not finite or
    empty is not drawn and keeps its colour, which follows from its place in the mapping, as does
    its line pattern. Outlines stay thin when the frame is resized by `scale`. `legend` writes the
    names in the corner.
    """
    image = to_image(frame).convert("RGB")
    if scale != 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    line = max(2, round(image.width / 240))
    rings = [_ring(box, scale) for box in boxes.values()]
    for ring in filter(None, rings):
        # a dark rim keeps light colours visible on light frames
        draw.line(ring, fill=_DARK, width=line + 2)
    for index, ring in enumerate(rings):
        for start, end in itertools.pairwise(ring):
            _dashed(draw, start, end, *_style(index), line)
    if legend and boxes:
        _legend(draw, list(boxes), image.width, line)
    # channels innermost in memory, as images are read and videos are written
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _ring(box: Tensor | ListLike[float] | None, scale: float) -> list[tuple[int, int]]:
    """The closed outline of a box, empty for one that cannot be drawn."""
    values = [] if box is None else [float(v) * scale for v in box]
    if not values or not np.isfinite(values).all() or min(values[2:]) <= 0:
        return []
    x1, y1, x2, y2 = (
        round(v) for v in (values[0], values[1], values[0] + values[2], values[1] + values[3])
    )
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]


def _style(index: int) -> tuple[str, tuple[int, int]]:
    return COLOURS[index % len(COLOURS)], _DASHES[index % len(_DASHES)]


def _dashed(draw, start, end, colour: str, dash: tuple[int, int], line: int) -> None:
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    on, off = dash[0] * line, dash[1] * line
    if off == 0 or length == 0:
        draw.line([start, end], fill=colour, width=line)
        return
    step = np.sign([end[0] - start[0], end[1] - start[1]])
    for at in range(0, length, on + off):
        a, b = start + step * at, start + step * min(at + on, length)
        draw.line([tuple(a.tolist()), tuple(b.tolist())], fill=colour, width=line)


def _legend(draw: ImageDraw.ImageDraw, names: list[str], width: int, line: int) -> None:
    size = max(10, round(width / 32))
    font = ImageFont.load_default(size)
    text_width = max(draw.textlength(name, font=font) for name in names)
    row, swatch = round(size * 1.3), 2 * size
    draw.rectangle((0, 0, swatch + text_width + size, row * len(names) + 3), fill=_DARK)
    for index, name in enumerate(names):
        colour, dash = _style(index)
        middle = row * index + row // 2 + 2
        _dashed(
            draw, (size // 3, middle), (size // 3 + round(1.3 * size), middle), colour, dash, line
        )
        draw.text((swatch, middle), name, fill=_LIGHT, font=font, anchor="lm")


def to_png(picture: Picture) -> bytes:
    """A figure, Pillow image or uint8 array as PNG bytes, at most 640 px wide, with at most 128
    colours.
    """
    if isinstance(picture, (Tensor, np.ndarray)):
        picture = to_image(picture)
    if not isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        width = picture.get_size_inches()[0]
        picture.savefig(buffer, format="png", dpi=min(100, MAX_WIDTH / width))
        picture = Image.open(buffer)
    image = picture.convert("RGB")
    if image.width > MAX_WIDTH:
        image = image.resize(
            (MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)), Image.Resampling.BILINEAR
        )
    buffer = io.BytesIO()
    palette = _palette(image, 128, (*COLOURS, "#000000", _DARK, _LIGHT))
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _palette(image: Image.Image, colours: int, kept: tuple[str, ...]) -> Image.Image:
    """A palette of the image's colours in which the colours `kept`, those of thin lines, stay as
    they are.
    """
    fitted = image.quantize(
        colours - len(kept), Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
    ).getpalette()
    holder = Image.new("P", (1, 1))
    holder.putpalette(
        fitted[: 3 * (colours - len(kept))]
        + [v for colour in kept for v in ImageColor.getrgb(colour)]
    )
    return holder


def spoken(kind: str, alt: str) -> str:
    """The stable text of a picture. Raises ValueError for an empty `alt`."""
    if not alt.strip():
        raise ValueError("alt must say in words what the picture shows")
    return f"{kind}: {alt}"


class APNG:
    """A short animation that a notebook stores and plays as one PNG file.

    Attributes: data, the bytes of the file; alt, its text for screen readers; frames, how many it
    was given.
    """

    def __init__(self, data: bytes, alt: str, frames: int):
        self.data, self.alt, self.frames = data, alt, frames
        self._text = spoken(f"Animation of {frames} frames", alt)

    def __repr__(self) -> str:
        return self._text

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return {"image/png": self.data, "text/plain": self._text}, {"image/png": {"alt": self.alt}}


def animation(
    frames: Iterable[Tensor],
    boxes_by_name: Mapping[str, ListLike] | None = None,
    *,
    alt: str,
    width: int = 320,
    fps: float = 10,
    max_bytes: int = 100_000,
) -> APNG:
    """Frames with moving boxes as an animated PNG of at most `max_bytes`.

    frames: T uint8 (3, H, W) of one size. boxes_by_name: name -> (T, 4) `xywh` in frame pixels
    (None or NaN rows are not drawn). Starts with all frames at `width` pixels in 64 colours; what
    is too large loses first colours (down to 16), then width (down to 60 %), then frames (down to
    every fourth, at the same speed): a still camera keeps everything, a moving one does not. All
    frames share a palette, so nothing flickers.

    Raises ValueError for no frames, tracks of another length, or when even the smallest version is
    too large.
    """
    frames = list(frames)
    tracks = dict(boxes_by_name or {})
    for name, track in tracks.items():
        if len(track) != len(frames):
            raise ValueError(f"track {name!r} has {len(track)} boxes for {len(frames)} frames")
    if not frames:
        raise ValueError("an animation needs at least one frame")
    kept = (*COLOURS[: len(tracks)], _DARK, _LIGHT)
    for every, part, colours in _QUALITIES:
        scale = width * part / frames[0].shape[2]
        drawn = [
            to_image(
                draw_boxes(
                    frames[i], {name: track[i] for name, track in tracks.items()}, scale=scale
                )
            )
            for i in range(0, len(frames), every)
        ]
        data = _encode(drawn, colours, kept, fps / every)
        if len(data) <= max_bytes:
            return APNG(data, alt, len(frames))
    raise ValueError(
        f"{len(frames)} frames need {len(data) // 1000} kB at the lowest quality, "
        f"{max_bytes // 1000} kB are allowed; "
        "give fewer frames, or a smaller width"
    )


# (every n-th frame, share of the width, colours), the best first
_QUALITIES = (
    (1, 1, 64), (1, 1, 32), (1, 0.75, 32), (1, 0.75, 16), (1, 0.6, 16),
    (2, 0.75, 16), (2, 0.6, 16), (3, 0.6, 16), (4, 0.6, 16),
)  # fmt: skip


def _encode(images: list[Image.Image], colours: int, kept: tuple[str, ...], fps: float) -> bytes:
    sample = images[:: max(1, len(images) // 6)]
    mosaic = Image.new("RGB", (images[0].width, images[0].height * len(sample)))
    for row, image in enumerate(sample):
        mosaic.paste(image, (0, row * image.height))
    palette = _palette(mosaic, colours, kept)
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    buffer = io.BytesIO()
    first.save(buffer, "png", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return buffer.getvalue()
