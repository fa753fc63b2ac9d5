"""Two trackers that learn nothing: the floor that a learned tracker has to stand above.

`StayTracker` repeats the first box. `NccTracker` slides the pixels of the first box over the
surroundings of the last position: what SiamFC does with learned features, done with the colours
themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trackkit.boxes import cxcywh_to_xywh, xywh_to_cxcywh
from trackkit.crops import Windows, context_side, cut, frame_sizes, mean_colour
from trackkit.errors import DataError, Range, check_fields
from trackkit.heads import hann_window
from trackkit.trackers.base import Prediction, Tracker


def normalised_cross_correlation(template: Tensor, image: Tensor) -> Tensor:
    """Similarity of a template to each window: (C, h, w), (C, H, W) -> (H-h+1, W-w+1), in [-1, 1].

    Entry (y, x) compares the template with the window whose top-left pixel is (y, x). From both the
    mean of each channel is subtracted, then their products are summed over all pixels and channels
    and divided by the norms of both: brightness and contrast drop out, so 1 means "the same up to a
    gain and an offset for each channel" (the gain being common to the channels), -1 the negative. A
    window or template without any variation is similar to nothing: 0. With a leading batch, (B, C,
    h, w) and (B, C, H, W), template b meets image b only. Any real dtype and range; the result is
    float64.

    Raises DataError when the shapes do not fit: the image must be at least as large as the
    template.
    """
    shapes = f"template {tuple(template.shape)}, image {tuple(image.shape)}"
    if (
        template.ndim != image.ndim
        or template.ndim not in (3, 4)
        or template.shape[:-2] != image.shape[:-2]
    ):
        raise DataError(
            "correlation needs (C, h, w) and (C, H, W), or both with the same batch first; got "
            f"{shapes}"
        )
    if template.ndim == 3:
        return normalised_cross_correlation(template[None], image[None])[0]
    height, width = template.shape[-2:]
    if image.shape[-2] < height or image.shape[-1] < width or template.numel() == 0:
        raise DataError(
            f"correlation needs an image as large as the template or larger; got {shapes}"
        )

    # variances below are differences of large numbers
    template, image = template.double(), image.double()
    centred = template - template.mean((-2, -1), keepdim=True)
    # the mean of the window need not be subtracted here: the centred template sums to 0, so it
    # cancels
    products = _correlate(centred, image)

    energy = _energy(image, height, width)
    norms = (_energy(template, height, width) * energy).sqrt()
    similar = products / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return torch.where(norms > 0, similar, torch.zeros_like(similar)).clamp(-1, 1)


def _correlate(template: Tensor, image: Tensor) -> Tensor:
    """Sum of products with each window: (B, C, h, w), (B, C, H, W) -> (B, H-h+1, W-w+1).

    By the correlation theorem, which is many times faster than a float64 convolution. It wraps
    around at the border; windows that do so are cut off.
    """
    size = image.shape[-2:]
    spectrum = torch.fft.rfft2(image) * torch.fft.rfft2(template, s=size).conj()
    height, width = size[0] - template.shape[-2] + 1, size[1] - template.shape[-1] + 1
    return torch.fft.irfft2(spectrum.sum(1), s=size)[:, :height, :width]


def _energy(image: Tensor, height: int, width: int) -> Tensor:
    """Squared deviations from the channel means, summed over each window; shapes as
    `_correlate`.
    """
    squares = _window_sums(image * image, height, width)
    variation = squares - _window_sums(image, height, width) ** 2 / (height * width)
    # what is left of a flat window is rounding, about 1e-13 of its squares
    return torch.where(variation > 1e-10 * squares, variation, torch.zeros_like(variation)).sum(1)


def _window_sums(image: Tensor, height: int, width: int) -> Tensor:
    """Sum over each window from an integral image: four look-ups, whatever the window's size."""
    total = F.pad(image.cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    return (
        total[..., height:, width:]
        - total[..., :-height, width:]
        - total[..., height:, :-width]
        + total[..., :-height, :-width]
    )


@dataclass(frozen=True)
class StayConfig:
    """Nothing to choose."""


@dataclass(frozen=True)
class StayState:
    """The first boxes, (B, 4) xywh, frame pixels."""

    box: Tensor


class StayTracker(Tracker):
    """Says in every frame that the target is where it was in the first one."""

    Config = StayConfig

    def __init__(self, config: StayConfig = StayConfig()):
        super().__init__(config)

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> StayState:
        return StayState(self.checked(frames, boxes_xywh)[1])

    def step(
        self, state: StayState, frames: list[Tensor], maps: bool = False
    ) -> tuple[StayState, Prediction]:
        return state, Prediction(
            state.box.clone(), torch.ones(len(state.box), dtype=torch.float64), {} if maps else None
        )


@dataclass(frozen=True)
class NccConfig:
    """Numbers of the template matcher; sizes are crop pixels.

    The template is the square with the target's area, shown as `template_size` pixels, whatever the
    target's size in the frame: large targets are matched as fast as small ones. The defaults come
    from a search over size, region, window, shape, and grey or colour, on real and procedural
    video: none was better by more than 0.01 AO on both.
    """

    template_size: int = 24
    search_size: int = 72  # side of the region, at the template's resolution
    window_influence: float = 0.2

    def __post_init__(self):
        size = Range(2, 4096)
        check_fields(self, template_size=size, search_size=size, window_influence=Range(0, 1))
        if self.template_size >= self.search_size:
            raise ValueError(
                f"search_size must be above template_size, {self.template_size}; got "
                f"{self.search_size}"
            )


@dataclass(frozen=True)
class NccState:
    """What the template matcher remembers of B sequences. The template is never updated."""

    template: Tensor  # (B, 3, T, T) uint8, pixels of the target in the first frame
    anchor: Tensor  # (B, 2), the target's centre from the template's corner, crop pixels, float64
    fill: Tensor  # (B, 3), mean colour of the first frame, shown outside of every later frame
    centre: Tensor  # (B, 2), x and y, frame pixels, float64
    size: Tensor  # (B, 2), target width and height, frame pixels, float64
    side: Tensor  # (B,), side of the search window, frame pixels, float64


class NccTracker(Tracker):
    """Template matching by normalised cross-correlation, at the size that the target had in the
    first frame.

    RGB; a cosine window prefers small motion, as in SiamFC; the peak is placed between the pixels
    by a parabola. The score is the correlation at the peak, negative values as 0. Maps: "crop" (B,
    3, S, S), "response" (the correlation) and "blended" (with the window), both (B, S-T+1, S-T+1).
    Runs on the CPU.
    """

    Config = NccConfig

    def __init__(self, config: NccConfig = NccConfig()):
        super().__init__(config)

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> NccState:
        cfg = self.config
        frames, boxes = self.checked(frames, boxes_xywh)
        box = xywh_to_cxcywh(boxes)
        side = context_side(boxes) * cfg.search_size / cfg.template_size
        fill = torch.stack([mean_colour(frame) for frame in frames])
        # the template is the middle of the first search crop, so both have exactly the same
        # resolution
        windows = Windows.around(box[:, :2], side, cfg.search_size)
        crops = cut(frames, windows, fill)
        corner = (cfg.search_size - cfg.template_size) // 2
        inner = slice(corner, corner + cfg.template_size)
        anchor = windows.to_crop(box)[:, :2] - corner
        return NccState(
            crops[..., inner, inner].clone(), anchor, fill, box[:, :2], box[:, 2:], side
        )

    def step(
        self, state: NccState, frames: list[Tensor], maps: bool = False
    ) -> tuple[NccState, Prediction]:
        cfg, frames = self.config, self.moved(frames)

        # 1. compare the template with every window of the surroundings
        windows = Windows.around(state.centre, state.side, cfg.search_size)
        crops = cut(frames, windows, state.fill)  # (B, 3, S, S)
        response = normalised_cross_correlation(state.template, crops)  # (B, r, r)

        # 2. the best position, with a window that prefers small motion
        window = hann_window(response.shape[-1], "open", torch.float64)
        blended = (1 - cfg.window_influence) * response + cfg.window_influence * window
        score = (
            response.flatten(1).gather(1, blended.flatten(1).argmax(1)[:, None])[:, 0].clamp(0, 1)
        )

        # 3. from crop pixels to frame pixels; a target that leaves is waited for at the border
        centre_size = torch.cat(
            [subpixel_peak(blended) + state.anchor, torch.zeros_like(state.size)], 1
        )
        centre = windows.to_frame(centre_size)[:, :2]
        centre = torch.minimum(centre.clamp(min=0), frame_sizes(frames))

        box = cxcywh_to_xywh(torch.cat([centre, state.size], 1))
        seen = {"crop": crops, "response": response, "blended": blended} if maps else None
        return replace(state, centre=centre), Prediction(box, score.double(), seen)


def subpixel_peak(response: Tensor) -> Tensor:
    """Position (x, y) of the maximum of each map: (B, H, W) -> (B, 2) float64, in cells, between
    the cells.

    Along each axis a parabola through the maximum and its two neighbours moves it by less than half
    a cell; a maximum on the border stays where it is.
    """
    response = response.double()
    peak = response.flatten(1).argmax(1)
    x, y = peak % response.shape[-1], peak // response.shape[-1]
    maps = torch.arange(len(response), device=response.device)
    # the row (B, W) and the column (B, H) through each peak
    return torch.stack([_vertex(response[maps, y], x), _vertex(response[maps, :, x], y)], 1)


def _vertex(line: Tensor, peak: Tensor) -> Tensor:
    left, middle, right = (
        line.gather(1, (peak + step).clamp(0, line.shape[1] - 1)[:, None])[:, 0]
        for step in (-1, 0, 1)
    )
    curvature = left - 2 * middle + right
    inside = (peak > 0) & (peak < line.shape[1] - 1) & (curvature < 0)
    shift = (left - right) / (2 * torch.where(inside, curvature, -torch.ones_like(curvature)))
    return peak + torch.where(inside, shift, torch.zeros_like(shift))
