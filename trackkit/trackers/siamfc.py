"""SiamFC: a tracker that learns one thing, to tell whether two image patches show the same object.

Bertinetto, Valmadre, Henriques, Vedaldi, Torr: "Fully-Convolutional Siamese Networks for Object
Tracking", ECCV workshops 2016. One network turns the target (exemplar) and the surroundings of its
last position (search crop) into feature maps; sliding the first over the second gives a response
map whose peak is the new position. The structure, the constants and the inference follow the common
PyTorch implementation (huanglianghua/siamfc-pytorch), whose checkpoints load by
`trackkit.official`.

We differ from that code in three places, none of which touches the network: training crops are
resampled once (there: cropped, stretched and cropped again, with a random interpolation), boxes are
0-based as in the rest of trackkit, and the state is kept in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.backbones import ConvStack
from trackkit.boxes import cxcywh_to_xywh, xywh_to_cxcywh
from trackkit.crops import CropSpec, Windows, context_side, cut, mean_colour
from trackkit.devices import constant, to_host
from trackkit.errors import Range, check_fields
from trackkit.frames import FrameRule, SampleSpec
from trackkit.heads import hann_window
from trackkit.losses import balanced_bce
from trackkit.stages import Stage
from trackkit.trackers.base import Prediction, Tracker


@dataclass(frozen=True)
class SiamFCConfig:
    """Numbers of the network, of training and of tracking. Sizes are crop pixels.

    The backbone is five convolutions without padding, conv1 with stride 2; a 3x3 max-pool with
    stride 2 follows the first `pools` of them, so the total stride is 2 ** (1 + pools).
    """

    exemplar_size: int = 127  # side of the exemplar, the crop of the target in the first frame
    search_size: int = 255  # side of the search crop in tracking
    train_search_size: int = 239  # in training: what the authors' random crop leaves
    context: float = 0.5  # margin around the target, in units of (w + h) / 2 on each side
    channels: tuple[int, ...] = (96, 256, 384, 384, 256)  # outputs of the five convolutions
    kernels: tuple[int, ...] = (11, 5, 3, 3, 3)  # sides of their kernels
    groups: tuple[int, ...] = (1, 2, 1, 2, 2)  # of channels, in each of them
    pools: int = 2  # how many of the convolutions are followed by a pooling, 0 to 5
    response_scale: float = 0.001
    """factor on the response, brings sums over ~10,000 products to logits of order 1"""
    positive_radius: int = 16
    """so far from the target's centre cells of the response learn 1, search-crop pixels"""
    train_shift: int = 4
    """training crops are off-centre by up to this many crop pixels, half a response cell"""
    scales: int = 3  # search crops of a frame, each of another scale; an odd number
    scale_step: float = 1.0375  # factor from one scale to the next
    scale_penalty: float = 0.9745  # factor on the responses of the scales that are not 1
    scale_rate: float = 0.59  # how much of a scale change the target size follows, 0 to 1
    window_influence: float = 0.176
    """share of a cosine window in the response in which the peak is sought, 0 to 1"""
    upsample: int = 16
    """cells of the map in which the peak is sought for one response cell, along each axis"""

    def __post_init__(self):
        size, share = Range(1, 4096), Range(0, 1)
        check_fields(
            self, exemplar_size=size, search_size=size, train_search_size=size,
            context=Range(0, 100), channels=size, kernels=size, groups=size, pools=Range(0, 5),
            response_scale=Range(0, above=True), positive_radius=Range(0, 4096),
            train_shift=Range(0, 4096), scales=Range(1, 99), scale_step=Range(0, 10, above=True),
            scale_penalty=share, scale_rate=share, window_influence=share, upsample=Range(1, 64),
        )  # fmt: skip
        if not len(self.channels) == len(self.kernels) == len(self.groups) == 5:
            each = "channels, kernels and groups must have five entries"
            raise ValueError(f"{each}, one for each convolution")
        if self.scales % 2 != 1:
            raise ValueError(
                f"scales must be odd, so that scale 1 is among them; got {self.scales}"
            )
        if self.feature_size(self.exemplar_size) < 1:
            raise ValueError(
                f"an exemplar of {self.exemplar_size} px leaves no features; make it larger"
            )

    @classmethod
    def tiny(cls) -> SiamFCConfig:
        """Half the resolution and a twentieth of the weights: trains in minutes on a laptop's
        CPU.
        """
        return cls(
            exemplar_size=63,
            search_size=127,
            train_search_size=119,
            channels=(24, 48, 64, 64, 48),
            kernels=(7, 5, 3, 3, 3),
            groups=(1, 1, 1, 1, 1),
            pools=1,
            response_scale=0.01,
            positive_radius=8,
            train_shift=2,
        )

    @property
    def stride(self) -> int:
        """Search-crop pixels from one response cell to the next."""
        return 2 ** (1 + self.pools)

    def feature_size(self, crop_size: int) -> int:
        """Side of the feature map of a crop: 6 for 127, 20 for 239, 22 for 255 in the paper's
        network.
        """
        size = crop_size
        for index, kernel in enumerate(self.kernels):
            size = (size - kernel) // (2 if index == 0 else 1) + 1
            if index < self.pools:
                size = (size - 3) // 2 + 1
        return size

    def response_size(self, search_size: int) -> int:
        """Side of the response map: 17 for 255, 15 for 239 in the paper's network."""
        return self.feature_size(search_size) - self.feature_size(self.exemplar_size) + 1


class Backbone(nn.Module):
    """Five convolutions without padding (paper, Table 1): (B, 3, S, S), 0..255 -> (B, C, s, s).

    No padding: a padded border would tell the network where it is, and the response would no longer
    move with the target (section 3, "translation"). The last convolution has no norm and no ReLU.
    """

    def __init__(self, config: SiamFCConfig):
        super().__init__()
        inputs = (3, *config.channels[:-1])
        for index, (c_in, c_out, kernel, groups) in enumerate(
            zip(inputs, config.channels, config.kernels, config.groups, strict=True)
        ):
            layers = [nn.Conv2d(c_in, c_out, kernel, stride=2 if index == 0 else 1, groups=groups)]
            if index < 4:
                layers += [nn.BatchNorm2d(c_out, eps=1e-6, momentum=0.05), nn.ReLU(inplace=True)]
            if index < config.pools:
                layers += [nn.MaxPool2d(3, stride=2)]
            self.add_module(f"conv{index + 1}", ConvStack(*layers))
            nn.init.xavier_uniform_(layers[0].weight)
            nn.init.zeros_(layers[0].bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def cross_correlation(exemplar: Tensor, search: Tensor) -> Tensor:
    """Slide each exemplar over its own search map: (B, C, h, w), (B, C, H, W) -> (B, 1, H-h+1,
    W-w+1).

    Paper, Eq. 2: f(z, x) = phi(z) * phi(x). It is a convolution whose kernel is a feature map; with
    the batch folded into the channels, groups keep the pairs apart.
    """
    batch, channels, height, width = search.shape
    response = F.conv2d(search.reshape(1, batch * channels, height, width), exemplar, groups=batch)
    return response.transpose(0, 1)


def label_map(size: int, stride: int, radius: float) -> Tensor:
    """Training target of the response map, float32 (size, size): 1 near the centre, else 0.

    A cell is positive if it is at most `radius` search-crop pixels from the centre, counted in
    whole cells of `stride` pixels along the two axes: |dx| + |dy| <= radius / stride (paper, Eq. 6
    has the Euclidean distance; at the default radius both mark the same 13 cells).
    """
    cells = torch.arange(size) - (size - 1) / 2
    distance = cells.abs()[:, None] + cells.abs()[None, :]
    return (distance <= radius / stride).float()


def peak_shift(
    response: Tensor, stride: int, upsample: int, side: Tensor, search_size: int
) -> Tensor:
    """How far the peak of each map lies from its centre: (B, n, n) and window sides (B,) -> x, y in
    frame pixels (B, 2), on the device of both.

    One response cell is `stride` search-crop pixels, `upsample` map cells are one response cell,
    and the crop's `search_size` pixels show `side` frame pixels.
    """
    size = response.shape[-1]
    peak = response.flatten(1).argmax(1)
    cells = torch.stack([peak % size, peak // size], 1).double() - (size - 1) / 2
    return cells * stride / upsample * (side / search_size)[:, None]


def damped(factor: Tensor, rate: float) -> Tensor:
    """What a size is multiplied by when the best scale is `factor`: the old and the new size, mixed
    by `rate`.
    """
    return (1 - rate) + rate * factor


@dataclass(frozen=True)
class SiamFCState:
    """What SiamFC remembers of B sequences. The exemplar is never updated."""

    exemplar: Tensor  # (B, C, h, w), features of the target in the first frame
    fill: Tensor  # (B, 3), mean colour of the first frame, shown outside of every later frame
    centre: Tensor  # (B, 2), x and y, frame pixels, float64
    size: Tensor  # (B, 2), target width and height, frame pixels, float64
    side: Tensor  # (B,), side of the search window, frame pixels, float64


class SiamFC(Tracker):
    """The network and the way it tracks."""

    Config = SiamFCConfig

    def __init__(self, config: SiamFCConfig | None = None):
        super().__init__(config or self.Config())
        self.add_backbone()

    def add_backbone(self) -> None:
        self.backbone = Backbone(self.config)

    def features(self, crops: Tensor) -> Tensor:
        """Crops (B, 3, S, S), RGB, 0..255 without any normalisation -> features (B, C, s, s)."""
        return self.backbone(crops.float())

    def respond(self, exemplar: Tensor, search: Tensor) -> Tensor:
        """Features of exemplars and search crops -> logits (B, 1, r, r)."""
        return cross_correlation(exemplar, search) * self.config.response_scale

    def forward(self, exemplars: Tensor, searches: Tensor) -> Tensor:
        """Crops (B, 3, z, z) and (B, 3, x, x) -> logits (B, 1, r, r)."""
        return self.respond(self.features(exemplars), self.features(searches))

    # ---- tracking (paper, section 2.3; constants of the authors' 3-scale version) ----

    @property
    def template_crop(self) -> CropSpec:
        return CropSpec(self.config.exemplar_size, 1.0, self.config.context)

    @property
    def search_crop(self) -> CropSpec:
        """At the resolution of the exemplar."""
        cfg = self.config
        return CropSpec(cfg.search_size, cfg.search_size / cfg.exemplar_size, cfg.context)

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> SiamFCState:
        z, x = self.template_crop, self.search_crop
        frames, boxes = self.checked(frames, boxes_xywh)
        box = xywh_to_cxcywh(boxes)
        side = context_side(boxes, z.context)
        fill = torch.stack([mean_colour(frame) for frame in frames])
        crops = cut(frames, Windows.around(box[:, :2], side, z.size), fill)
        side = side * x.size / z.size
        return SiamFCState(self.features(crops), fill, box[:, :2], box[:, 2:], side)

    def step(
        self, state: SiamFCState, frames: list[Tensor], maps: bool = False
    ) -> tuple[SiamFCState, Prediction]:
        cfg, frames, batch = self.config, self.moved(frames), len(frames)
        pixels = self.search_crop.size

        # 1. the surroundings of the last position at each scale, as one batch
        exponents = torch.arange(cfg.scales, dtype=torch.float64) - cfg.scales // 2
        factors = cfg.scale_step**exponents  # (S,)
        sides = state.side[:, None] * factors  # (B, S)
        windows = Windows.around(
            state.centre.repeat_interleave(cfg.scales, 0), sides.flatten(), pixels
        )
        crops = cut(
            [frame for frame in frames for _ in range(cfg.scales)],
            windows,
            state.fill.repeat_interleave(cfg.scales, 0),
        )  # (B*S, 3, x, x)

        # 2. correlate with the exemplar of the first frame
        exemplar = state.exemplar.repeat_interleave(cfg.scales, 0)
        raw = self.respond(exemplar, self.features(crops))  # (B*S, 1, r, r)
        size = raw.shape[-1] * cfg.upsample
        fine = F.interpolate(raw, (size, size), mode="bicubic").view(batch, cfg.scales, size, size)

        # 3. the best scale; the penalty makes "the size has not changed" the default answer
        steps = torch.arange(cfg.scales, device=fine.device) - cfg.scales // 2
        weights = torch.where(steps == 0, 1.0, cfg.scale_penalty).to(fine)
        peak_of_scale = (fine * weights[None, :, None, None]).flatten(2).amax(2)  # (B, S)
        best = peak_of_scale.argmax(1)  # (B,)
        response = (
            fine[torch.arange(batch, device=fine.device), best] * weights[best][:, None, None]
        )
        score = torch.sigmoid(peak_of_scale.amax(1))

        # 4. the best position, with a window that prefers small motion
        response = response - response.amin((1, 2), keepdim=True)
        response = response / (response.sum((1, 2), keepdim=True) + 1e-16)
        window = constant(hann_window, size, "zero", device=response.device)
        window = (window / window.sum()).to(response)
        blended = (1 - cfg.window_influence) * response + cfg.window_influence * window

        # 5. from map cells to frame pixels
        side = sides.to(best.device).gather(1, best[:, None])[:, 0]
        shift = peak_shift(blended, cfg.stride, cfg.upsample, side, pixels)
        shift, best, score = to_host(shift, best, score)
        best, centre = best.long(), state.centre + shift
        growth = damped(factors[best], cfg.scale_rate)

        new = replace(
            state, centre=centre, size=state.size * growth[:, None], side=state.side * growth
        )
        box = cxcywh_to_xywh(torch.cat([new.centre, new.size], 1))
        seen = None
        if maps:
            seen = {
                "crop": crops.view(batch, cfg.scales, 3, pixels, pixels),
                "raw": raw.view(batch, cfg.scales, *raw.shape[-2:]),
                "response": response,
                "blended": blended,
                "scale": best,
            }
        return new, Prediction(box, score, seen)

    # ---- training (paper, section 2.2) ----

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Balanced logistic loss of the response maps of a batch of pairs."""
        logits = self(batch["templates"][:, 0], batch["searches"][:, 0])
        given = logits.shape[-1], self.config.stride, self.config.positive_radius
        labels = constant(label_map, *given, device=logits.device).to(logits)
        return {"loss": balanced_bce(logits, labels.expand_as(logits))}

    def samples(self) -> SampleSpec:
        """Pairs at most 100 frames apart, each crop shifted by up to `train_shift` and scaled by up
        to 5 %.
        """
        cfg = self.config
        # the crop keeps the resolution of a full search crop and shows less of it
        factor = cfg.train_search_size / cfg.exemplar_size
        search = replace(self.search_crop, size=cfg.train_search_size, factor=factor)
        jitter = {"shift_px": cfg.train_shift, "scale": 0.05}
        return SampleSpec(
            template=replace(self.template_crop, **jitter),
            search=replace(search, **jitter),
            max_gap=100,
            rule=FrameRule(
                min_area=20,
                min_side=20,
                max_side=500,
                min_share=0.01,
                max_share=0.5,
                max_aspect=4,
                min_cover_share=0.3,
            ),
        )

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """One stage of pairs. `paper` is 50 epochs of GOT-10k's 9,335 pairs by SGD, the rate
        falling to a thousandth.

        The short runs of the tiny network use AdamW, with which a few thousand pairs are enough.
        """
        self.check_preset(preset)
        steps, batch = {
            "tiny": (300, 16),
            "laptop": (1850, 16),
            "gpu": (12_000, 32),
            "paper": (50 * 1166, 8),
        }[scale]
        short = scale in ("tiny", "laptop")
        return [
            Stage(
                "pairs",
                steps=steps,
                batch=batch,
                sample=self.samples(),
                lr=2e-3 if short else 1e-2,
                lr_end=1e-5,
                schedule_steps=max(steps // 50, 1),
                momentum=None if short else 0.9,
                weight_decay=1e-4 if short else 5e-4,
            )
        ]
