"""STMTrack: a memory of past frames in place of a template.

Fu, Liu, Fu, Wang: "STMTrack: Template-Free Visual Tracking with Space-Time Memory Networks", CVPR
2021. Past frames are encoded with a map of where the target was, and kept. Each cell of the present
frame (query) gathers from all cells of the memory what resembles it, and a head says for each cell
whether the target is there and how far its sides are.

This is the authors' code (fzh0917/STMTrack), whose checkpoints load by `trackkit.official`; two of
its faults are not kept: its foreground map wraps around where a box is larger than the crop, and
its memory grows without end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.backbones import Inception, SmallTrunk
from trackkit.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from trackkit.crops import CropSpec, Windows, cut, frame_sizes, mean_colour, warp_crops
from trackkit.devices import constant, to_host
from trackkit.errors import Range, check_fields
from trackkit.frames import FrameRule, SampleSpec
from trackkit.heads import SidesHead, hann_window
from trackkit.losses import detection_losses
from trackkit.stages import HOLD_AND_FALL, Stage
from trackkit.trackers.base import Prediction, Tracker


@dataclass(frozen=True)
class STMTrackConfig:
    """The defaults are STMTrack's for GOT-10k, LaSOT and TrackingNet; for others see
    `STMTRACK_SEARCHED`.
    """

    trunks = ("inception", "tiny")  # not a field: what `trunk` may be

    trunk: str = "inception"  # "inception" or "tiny"
    size: int = 289  # side of the crops, pixels; at least 33
    factor: float = 4.0  # a window's side in units of the square root of the target's area
    trim: int = 4  # cells that are cut off on each side of the trunk's output
    width: int = 512  # channels of memory and query; at least 16
    head_width: int = 256  # channels of the head's towers
    head_layers: int = 7  # convolutions in each of the head's towers
    memory: str = "bounded"  # to `capacity` frames, or "unbounded", the authors' rule
    capacity: int = 64  # frames that are kept, at least segments + 2; no effect if unbounded
    segments: int = 4  # the stored frames are parted in so many, to look at the middle of each
    confidence: float = 0.6  # the latest frame is looked at too if its score exceeded this, 0 to 1
    train_frames: int = 3  # memory frames of a training sample
    epoch_steps: int = 150_000 // 32  # steps of each of 20 epochs at the scales that have epochs
    rate: float = 0.95  # how far the box's size follows, 0 to 1, times the cell's score
    window: float = 0.21  # share of a cosine window in the score by which a cell is chosen, 0 to 1
    penalty: float = 0.04  # strength of the penalty on changes of size and shape, 0 for none
    min_size: float = 10.0  # least width and height of a box, frame pixels
    exact: bool = False
    """Boxes go into and out of crops by the crops' own geometry (`crops.Windows`). The authors'
    crop (`crops.warp_crops`) ignores on the way out that windows are snapped to whole pixels."""

    def __post_init__(self):
        check_fields(
            self, trunk=self.trunks, memory=("bounded", "unbounded"), size=Range(1, 4096),
            factor=Range(0, 100, above=True), trim=Range(0, 4096), width=Range(16, 4096),
            head_width=Range(1, 4096), head_layers=Range(1, 100), capacity=Range(1),
            segments=Range(1, 4096), confidence=Range(0, 1), train_frames=Range(1, 4096),
            epoch_steps=Range(1), rate=Range(0, 1), window=Range(0, 1), penalty=Range(0, 1000),
            min_size=Range(0, 4096, above=True),
        )  # fmt: skip
        least = self.segments + 2
        if self.memory == "bounded" and self.capacity < least:
            raise ValueError(
                f"need a capacity of at least segments + 2, {least}; got {self.capacity}"
            )
        self.check_crop(self.size)

    def check_crop(self, size: int) -> None:
        if size < 33 or self.cells(size) < 1:
            text = f"a crop of {size} px leaves no cells when {self.trim_of(size)} are cut off"
            raise ValueError(f"{text} on each side")

    def trim_of(self, size: int) -> int:
        """Cells that are cut off on each side for a crop of `size` pixels."""
        return self.trim

    def cells(self, size: int) -> int:
        """Cells that are left along each side of a crop of `size` pixels; 25 for 289."""
        return cells_of(self.trunk, size) - 2 * self.trim_of(size)

    @classmethod
    def tiny(cls, **changes) -> STMTrackConfig:
        """A hundredth of the weights: learns from scratch on a laptop's CPU."""
        small = {
            "trunk": "tiny", "size": 97, "factor": 3.0, "trim": 1, "width": 64, "head_width": 48,
            "head_layers": 3, "rate": 0.3, "min_size": 4.0, "exact": True,
        }  # fmt: skip
        return cls(**{**small, **changes})


# the authors searched these for each benchmark; for VOT every last frame counts as confident
STMTRACK_SEARCHED = {
    "otb": {"rate": 0.550, "window": 0.205, "penalty": 0.0759},
    "uav123": {"rate": 0.541, "window": 0.203, "penalty": 0.0707, "factor": 4.172},
    "vot": {"rate": 0.963, "window": 0.267, "penalty": 0.0412, "factor": 4.056, "confidence": 0.0},
}


# ---- the network: crops to features ----


def cells_of(trunk: str, size: int) -> int:
    """Cells along each side of the trunk's output: 33 for 289 pixels in Inception, 37 if padded."""
    if trunk != "inception":
        return (size + 7) // 8
    for kernel, stride in ((3, 2), (3, 1), (3, 2), (3, 1), (3, 2)):
        size = (size - kernel) // stride + 1
    return size


def cell_centres(config: STMTrackConfig, size: int) -> Tensor:
    """Where the cells of a query crop of `size` are: x and y (N, 2), crop pixels, row by row. For
    289: 25 x 25 of them, at 48, 56, ... 240.

    STMTrack counts 25 cells around the middle, although Inception's layers without padding see 3
    pixels further up and left; the network learns that. Padded layers see cell k at pixel 8 k,
    which for 289 is the same 25 cells.
    """
    first = 8 * config.trim_of(size) + (16 if config.trunk == "inception" else 0)
    at = first + 8 * torch.arange(config.cells(size))
    return torch.stack([at.repeat(len(at)), at.repeat_interleave(len(at))], 1)


def foreground_map(boxes_xyxy: Tensor, size: int) -> Tensor:
    """1 in the pixels of each box, cut to integers, both ends included, else 0: (..., 4) crop
    pixels -> (..., size, size).
    """
    steps = torch.arange(size, device=boxes_xyxy.device)
    low, high = boxes_xyxy.trunc()[..., None, None].unflatten(-3, (2, 2)).unbind(-4)
    x, y = ((steps >= low) & (steps <= high)).unbind(-3)  # each (..., 1, size)
    return (y.transpose(-1, -2) & x).float()


class FrameEncoder(nn.Module):
    """Trunk and neck, of memory frames or of query frames: crops, RGB, 0..255 -> (B, C, h, w).

    A memory frame comes with its foreground map (B, S, S), 1 where the target is, which is added
    behind the trunk's stem.
    """

    def __init__(self, config: STMTrackConfig, trunk: nn.Module, memory: bool):
        super().__init__()
        self.config, self.trunk = config, trunk
        if memory:
            padding = trunk.stem_padding
            self.label = nn.Conv2d(1, trunk.stem_channels, 3, 2, padding, bias=False)
        self.neck = nn.Conv2d(trunk.channels, config.width, 3, padding=1)
        for layer in [self.neck, self.label] if memory else [self.neck]:
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.neck.bias)

    def forward(self, crops: Tensor, foreground: Tensor | None = None) -> Tensor:
        trim = self.config.trim_of(crops.shape[-1])
        x = self.trunk.stem(crops)  # (B, c, S / 2, S / 2)
        if foreground is not None:
            x = x + self.label(foreground[:, None].to(x))
        x = self.trunk.rest(x)  # (B, c', S / 8, S / 8)
        return self.neck(x[:, :, trim : x.shape[2] - trim, trim : x.shape[3] - trim])

    @torch.no_grad()
    def load_matching(self) -> None:
        """Give a tiny trunk and the middle of the neck's kernels the features of matching-tiny."""
        project = nn.Conv2d(self.trunk.channels, self.config.width, 1)
        self.trunk.load_pretrained(project)
        nn.init.zeros_(self.neck.weight)
        self.neck.weight[:, :, 1, 1] = project.weight[:, :, 0, 0]
        self.neck.bias.copy_(project.bias)


# ---- the memory: which past frames are kept, and which are looked at ----
#
# Frames are numbered from 1. The authors keep all frames and look at a few; a bounded memory keeps
# those that will be looked at, or frames close to them.


def wanted(count: int, segments: int) -> list[int]:
    """Which of `count` past frames STMTrack looks at: the first, and the middle of each of
    `segments` parts. Up to `segments` frames: all of them.
    """
    if count <= segments:
        return list(range(1, count + 1))
    length = count // segments
    return sorted({1, *(part * length + length // 2 + 1 for part in range(segments))})


def nearest(held: list[int], frame: int) -> int:
    """The held frame that is nearest to the wanted one, of two equally near ones the older."""
    return min(held, key=lambda h: (abs(h - frame), h))


def victim(held: list[int], segments: int) -> int:
    """Which frame a full memory forgets; `held`, in order, ends with the new frame, which stays, as
    does the first.

    What is `wanted` only moves forward: what lies before the middle of the first part, n / 8 for
    four parts, is never wanted again. So of the frames up to it the oldest goes, unless there is
    only one, which may still be the nearest. If none can go for that reason, the frame goes whose
    two neighbours are nearest to each other, of several the oldest: the others stay evenly spread.

    Until frame 5 / 4 K, a memory of K frames is the authors'. From then on it looks at frames that
    are at most n / K away from theirs: with 64, within a sixteenth of the length of a part.
    """
    middle = held[-1] // segments // 2 + 1
    passed = [frame for frame in held[1:] if frame <= middle]
    if len(passed) > 1:
        return passed[0]
    between = zip(held[:-2], held[1:-1], held[2:], strict=True)
    return min((after - before, frame) for before, frame, after in between)[1]


@dataclass(frozen=True)
class PastFrames:
    """Features of past frames of B sequences, in a row of K slots.

    A slot holds a frame of each sequence, not the same one. Storing a frame replaces one slot and
    shares the others with the memory before it.
    """

    held: Tensor  # (B, K) int64 on the CPU, numbers of the frames in the slots, 0 for none
    slots: tuple[Tensor, ...] = ()  # K x (B, ...), their features

    def stored(
        self, features: Tensor, numbers: Tensor, segments: int, capacity: int | None
    ) -> PastFrames:
        """With the features (B, ...) of the frames `numbers` (B,); `capacity` None forgets none."""
        held, places = self.held.tolist(), []
        for row, number in zip(held, numbers.tolist(), strict=True):
            if 0 not in row and (capacity is None or len(row) < capacity):
                row.append(0)
            places.append(row.index(0 if 0 in row else victim([*sorted(row), number], segments)))
            row[places[-1]] = number
        slots = [*self.slots]
        slots += [torch.zeros_like(features)] * (max(map(len, held)) - len(slots))
        for place in set(places):
            mine = [p == place for p in places]
            if all(mine):
                slots[place] = features
                continue
            here = torch.tensor(mine).to(features.device).view(-1, *[1] * (features.ndim - 1))
            slots[place] = torch.where(here, features, slots[place])
        return PastFrames(_filled(held), tuple(slots))

    def looked_at(self, count: Tensor, latest: Tensor, segments: int) -> Tensor:
        """The frames to look at (B, T) when `count` (B,) have been seen, 0 for none; the latest too
        where `latest` (B,) says so.
        """
        rows = []
        for row, seen, also in zip(*(t.tolist() for t in (self.held, count, latest)), strict=True):
            held = [frame for frame in row if frame]
            frames = {nearest(held, frame) for frame in wanted(seen, segments)}
            rows.append(sorted(frames | {seen} if also else frames))
        return _filled(rows)

    def recalled(self, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, T, ...) of the frames `numbers` (B, T); which are real, None if all are."""
        rows = zip(numbers.tolist(), self.held.tolist(), strict=True)
        features = torch.stack([
            self.slots[held.index(number) if number else 0][sequence]
            for sequence, (row, held) in enumerate(rows) for number in row
        ]).unflatten(0, numbers.shape)  # fmt: skip
        real = numbers > 0
        return features, None if real.all() else real.to(features.device)


def _filled(rows: list[list[int]]) -> Tensor:
    """Rows of different lengths as one tensor (B, longest), with 0 at the ends."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def read_out(
    query: Tensor, memory: Tensor, known: Tensor | None = None, maps: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What each query cell (B, Q, C) finds in the memory (B, M, C): (B, Q, C), and with `maps`
    where, (B, Q, M). softmax(q m^T / sqrt(C)) m.

    The memory is key and value at once, nothing is projected, and the order of its frames does not
    matter. Q and M need not be equal. `known` (B, M) bool: which cells count.
    """
    allowed = None if known is None else known[:, None]  # (B, 1, M)
    if not maps:
        q, m = query[:, None], memory[:, None]  # one head
        allowed = None if allowed is None else allowed[:, None]
        return F.scaled_dot_product_attention(q, m, m, allowed)[:, 0], None
    logits = query @ memory.transpose(1, 2) / query.shape[-1] ** 0.5
    weights = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(-1)
    return weights @ memory, weights


# ---- the tracker ----


@dataclass(frozen=True)
class Answer:
    """What the network says of B query crops, cell by cell, row by row."""

    score: Tensor  # (B, N) logits: is the target here
    centre: Tensor  # (B, N) logits: is its centre near
    boxes: Tensor  # (B, N, 4), xyxy, crop pixels; the middle of the first pixel is at 0
    weights: Tensor | None  # with `maps`: where in the memory each cell found it, (B, N, M)

    @property
    def confidence(self) -> Tensor:
        return self.score.sigmoid() * self.centre.sigmoid()


@dataclass(frozen=True)
class STMTrackState:
    """What the tracker remembers of B sequences."""

    centre: Tensor  # (B, 2), x and y, frame pixels, float64
    size: Tensor  # (B, 2), width and height, frame pixels, float64
    fill: Tensor  # (B, 3), mean colour of the first frame, shown outside of every frame
    count: Tensor  # (B,) int64, frames seen
    confident: Tensor  # (B,) bool, whether the latest frame is worth a look
    memory: PastFrames  # features (B, h, w, C)

    def fitted(self, other: STMTrackState) -> STMTrackState:
        """The same with as many slots of memory as `other` at least; for `trackers.join`."""
        held, slots = self.memory.held, self.memory.slots
        missing = max(0, len(other.memory.slots) - len(slots))
        slots += (torch.zeros_like(slots[0]),) * missing
        return replace(self, memory=PastFrames(F.pad(held, (0, missing)), slots))


class STMTrack(Tracker):
    """The network and the way it tracks."""

    Config = STMTrackConfig

    def __init__(self, config: STMTrackConfig | None = None):
        super().__init__(config or self.Config())
        self.pretrained, cfg = False, self.config
        self.add_encoders()
        self.head = SidesHead(2 * cfg.width, cfg.head_width, cfg.head_layers)
        if cfg.trunk == "tiny":
            self._start_as_lookup()

    def add_encoders(self) -> None:
        """What makes features of crops: `memory` and `query`, which share nothing."""
        self.memory = FrameEncoder(self.config, self.new_trunk(), memory=True)
        self.query = FrameEncoder(self.config, self.new_trunk(), memory=False)

    def new_trunk(self) -> nn.Module:
        return SmallTrunk() if self.config.trunk == "tiny" else Inception()

    def load_pretrained(self) -> bool:
        """Start both trunks from ImageNet's weights; see `Tracker.load_pretrained`. The tiny ones
        start from matching-tiny.
        """
        if self.config.trunk == "tiny":
            for part in (self.memory, self.query):
                part.load_matching()
            return True
        self.memory.trunk.load_pretrained()
        self.query.trunk.load_pretrained()
        self.pretrained = True
        return True

    @torch.no_grad()
    def _start_as_lookup(self) -> None:
        """First weights for a short training, not in the paper: both encoders begin alike, so that
        a query cell finds in the memory what resembles it; and the head begins with few cells in
        the target (in STMTrack's head, the norm behind the bias that was to say so removes it).
        """
        nn.init.kaiming_normal_(self.memory.neck.weight, nonlinearity="linear")
        nn.init.normal_(self.memory.label.weight, std=0.1)  # so that the map is felt
        for name, parameter in self.query.named_parameters():
            parameter.copy_(self.memory.get_parameter(name))
        for layer in (part for part in self.head.modules() if isinstance(part, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.constant_(self.head.score[1].bias, -2.0)

    @property
    def template_crop(self) -> CropSpec:
        """How memory frames are cropped; outside of the frame is the first frame's mean colour."""
        return CropSpec(self.config.size, self.config.factor)

    @property
    def search_crop(self) -> CropSpec:
        """How query frames are cropped in tracking."""
        return self.template_crop

    def cells(self, size: int) -> Tensor:
        """Where the cells of a query crop are, see `cell_centres`."""
        return constant(cell_centres, self.config, size, device=self.device).to(self.head.scale)

    def encoded(self, memories: Tensor, foreground: Tensor) -> Tensor:
        """Memory crops (B, T, 3, S, S), foreground maps (B, T, S, S) -> (B, T, C, h, w)."""
        features = self.memory(memories.flatten(0, 1), foreground.flatten(0, 1))
        return features.unflatten(0, memories.shape[:2])

    def answer(
        self, query: Tensor, memory: Tensor, size: int, known: Tensor | None = None,
        maps: bool = False,
    ) -> Answer:  # fmt: skip
        """Features of queries (B, C, h, w) from crops of `size` and of memories (B, T, h', w', C),
        `known` (B, T) -> boxes.
        """
        tokens = memory.flatten(1, 3)  # (B, M, C)
        if known is not None:
            known = known.repeat_interleave(tokens.shape[1] // memory.shape[1], 1)
        found, weights = read_out(query.flatten(2).transpose(1, 2), tokens, known, maps)
        found = found.transpose(1, 2).unflatten(2, query.shape[2:])
        score, centre, distances = self.head(torch.cat([found, query], 1))
        cells, (low, high) = self.cells(size), (8 * distances).split(2, 2)
        return Answer(score, centre, torch.cat([cells - low, cells + high], 2), weights)

    def forward(self, memories: Tensor, foreground: Tensor, queries: Tensor) -> Answer:
        """Crops (B, T, 3, S, S) with their foreground maps (B, T, S, S), and crops (B, 3, S, S)."""
        memory = self.encoded(memories, foreground).permute(0, 1, 3, 4, 2)
        return self.answer(self.query(queries), memory, queries.shape[-1])

    # ---- tracking ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> STMTrackState:
        frames, boxes = self.checked(frames, boxes_xywh)
        return self._memorise(self._first(frames, boxes), frames)

    def _first(self, frames: list[Tensor], boxes: Tensor) -> STMTrackState:
        batch = len(frames)
        return STMTrackState(
            centre=boxes[:, :2] + self._half(boxes[:, 2:]),
            size=boxes[:, 2:],
            fill=torch.stack([mean_colour(frame) for frame in frames]),
            count=torch.ones(batch, dtype=torch.long),
            confident=torch.zeros(batch, dtype=torch.bool),
            memory=PastFrames(torch.zeros(batch, 0, dtype=torch.long)),
        )

    def _half(self, size: Tensor) -> Tensor:
        """From a box's corner to its centre, which for the authors is the middle of a pixel."""
        return size / 2 if self.config.exact else (size - 1) / 2

    def step(
        self, state: STMTrackState, frames: list[Tensor], maps: bool = False
    ) -> tuple[STMTrackState, Prediction]:
        cfg, frames, shown = self.config, self.moved(frames), self.search_crop.size

        # 1. the past, and the surroundings of the last position
        numbers = state.memory.looked_at(state.count, state.confident, cfg.segments)  # (B, T)
        past, known, state = self._recalled(state, numbers)  # (B, T, h, w, C)
        crops, scale, origin = self._look(frames, state, self.search_crop)
        answer = self.answer(self.query(crops), past, shown, known, maps)

        # 2. the best cell's box
        box, rate, score, response = self._choose(answer, state.size * scale[:, None])
        centre = origin + box[:, :2] / scale[:, None]
        size = state.size * (1 - rate) + box[:, 2:] / scale[:, None] * rate
        limit = frame_sizes(frames)  # (B, 2)
        centre = torch.minimum(centre.clamp(min=0), limit)
        size = torch.minimum(size.clamp(min=cfg.min_size), limit)

        # 3. remember this frame
        state = replace(state, centre=centre, size=size, count=state.count + 1)
        state = self._memorise(replace(state, confident=score > cfg.confidence), frames)
        seen = None
        if maps:
            grid = [cfg.cells(shown)] * 2
            seen = {
                "crop": crops,
                "score": answer.score.sigmoid().unflatten(1, grid),
                "centre": answer.centre.sigmoid().unflatten(1, grid),
                "response": response.to(answer.score).unflatten(1, grid),
                "read_out": answer.weights.unflatten(2, past.shape[1:4]),  # (B, N, T, h, w)
                "memory": numbers,  # (B, T), the frames looked at, from 1; 0 for none
                "window": torch.cat([origin, (shown / scale)[:, None]], 1),
            }
        return state, Prediction(torch.cat([centre - self._half(size), size], 1), score, seen)

    def _look(
        self, frames: list[Tensor], state: STMTrackState, crop: CropSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Crops around the targets, crop pixels per frame pixel (B,), and where the middle of crop
        pixel 0 is in the frame (B, 2).
        """
        side = crop.factor * state.size.prod(1).sqrt()
        if not self.config.exact:
            crops, scale = warp_crops(frames, state.centre, side, crop.size, state.fill)
            return crops, scale, state.centre - crop.size // 2 / scale[:, None]
        windows = Windows.around(state.centre, side, crop.size)
        origin = windows.rows[:, :2] + 0.5 / windows.scale[:, None]
        return cut(frames, windows, state.fill), windows.scale, origin

    def _choose(self, answer: Answer, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best box (B, 4) cxcywh, crop pixels, how far to follow its size (B, 1), its score
        (B,), the response (B, N).

        A box counts for less if its size or shape differs from the last one, (B, 2) crop pixels, or
        if it is far away.
        """
        cfg, (score, boxes) = self.config, to_host(answer.confidence, answer.boxes)
        boxes = xyxy_to_cxcywh(boxes)
        boxes[..., 2:] += 1  # both corners are inside
        sides, size = boxes[..., 2:], size[:, None]  # (B, N, 2), (B, 1, 2)

        def change(ratio: Tensor) -> Tensor:
            return torch.maximum(ratio, 1 / ratio)

        def extent(sides: Tensor) -> Tensor:
            return (sides + sides.mean(-1, keepdim=True)).prod(-1).sqrt()

        shape = change(size[..., 0] / size[..., 1] / (sides[..., 0] / sides[..., 1]))
        penalty = torch.exp((1 - shape * change(extent(sides) / extent(size))) * cfg.penalty)
        window = round(score.shape[1] ** 0.5), "zero", torch.float64
        hann = constant(hann_window, *window, device=score.device).flatten()
        response = penalty * score * (1 - cfg.window) + hann * cfg.window  # (B, N)
        best = response.argmax(1, keepdim=True)
        rate = (penalty * score).gather(1, best) * cfg.rate
        box = boxes[torch.arange(len(boxes)), best[:, 0]]
        return box, rate, response.gather(1, best)[:, 0], response

    def _memorise(self, state: STMTrackState, frames: list[Tensor]) -> STMTrackState:
        """Encode the frames with their boxes, and keep them in place of what can best be missed."""
        cfg = self.config
        crops, scale, origin = self._look(frames, state, self.template_crop)
        middle = (state.centre - origin) * scale[:, None]
        if not cfg.exact:  # the authors ignore that the crop was moved to a whole pixel
            middle = torch.full_like(middle, (cfg.size - 1) / 2)
        half = (state.size * scale[:, None] - 1) / 2
        box = torch.cat([middle - half, middle + half], 1).to(crops.device)
        return self._stored(state, self.memory(crops, foreground_map(box, cfg.size)))

    def _stored(self, state: STMTrackState, features: Tensor) -> STMTrackState:
        """The latest frames' features (B, C, h, w) into the memory."""
        features = features.permute(0, 2, 3, 1).contiguous()
        capacity = self.config.capacity if self.config.memory == "bounded" else None
        memory = state.memory.stored(features, state.count, self.config.segments, capacity)
        return replace(state, memory=memory)

    def _recalled(
        self, state: STMTrackState, numbers: Tensor
    ) -> tuple[Tensor, Tensor | None, STMTrackState]:
        """What the memory holds of the frames `numbers` (B, T), and the state to go on with."""
        return *state.memory.recalled(numbers), state

    # ---- training ----

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Losses of a batch: focal + centreness + 3 * IoU. "labels", if there, say which queries
        show the target.
        """
        return self.judged(self(*self.inputs(batch)), batch)

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Memory crops, their foreground maps, and query crops, as `forward` takes them."""
        size = self.config.size
        foreground = foreground_map(_in_pixels(batch["template_boxes"], size), size)
        return batch["templates"], foreground, batch["searches"][:, 0]

    def judged(self, answer: Answer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of what was answered to a batch."""
        size = batch["searches"].shape[-1]
        truth = _in_pixels(batch["search_boxes"][:, 0], size)
        shown = torch.ones_like(truth[:, 0], dtype=torch.bool)
        if "labels" in batch:
            shown = batch["labels"][:, 0] > 0
        given = answer.score, answer.centre, answer.boxes
        return detection_losses(*given, self.cells(size), truth, shown)

    def samples(self) -> SampleSpec:
        """Memory frames and a query in any order, within 50 frames; every third query is of
        something else.

        The authors also push each window into the frame as far as it fits, and draw its side from
        U(1 / 1.3, 1.3); here the target's size is drawn from U(0.735, 1.265). Their boxes cover
        0.001 to 0.6 of the frame's area; here sides are limited.
        """
        crop = replace(self.template_crop, shift_px=0.2 * self.config.size, scale=0.265)
        # the tiny one, which forgets its targets otherwise, searches farther off
        far = 0.42 if self.config.trunk == "tiny" else 0.2
        search = replace(crop, shift_px=far * self.config.size)
        rule = FrameRule(min_share=0.01, max_share=0.8, max_aspect=10)
        frames = {"templates": self.config.train_frames, "order": "any", "max_gap": 50}
        return SampleSpec(template=crop, search=search, rule=rule, negatives=1 / 3, **frames)

    # parameters without pretrained weights; Inception's norms learn with them, its Mixed layers
    # later, its stem never
    fresh = ("memory.label.*", "memory.neck.*", "query.neck.*", "head.*")
    norms, later = ("*.trunk.*.bn.*",), ("*.trunk.Mixed_*",)

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """Everything but the trunks' convolutions, then those too. `paper` is by the authors' code:
        20 epochs of GOT-10k's 150,000 samples, 0.08 after an epoch's rise, then half a cosine down
        to 1e-6; the trunks' Mixed layers learn from the 11th epoch on, all of their norms from the
        first, both at a tenth of the rate. Without `load_pretrained` there is nothing to keep
        frozen, and all learns at once.
        """
        self.check_preset(preset)
        if scale in ("tiny", "laptop") or self.config.trunk == "tiny":
            steps = {"tiny": 300, "laptop": 5000, "gpu": 20_000, "paper": 100_000}[scale]
            batch = {"tiny": 16, "laptop": 16, "gpu": 64, "paper": 64}[scale]
            rest = {"lr": 1e-3, "lr_end": 1e-5, "cosine": HOLD_AND_FALL, "warmup": 30, "clip": 1.0}
            return [self.stage("memory", steps, batch=batch, momentum=None, **rest)]
        epoch, rest = self.epoch(scale), {"lr": 0.08, "lr_end": 1e-6}
        if not self.pretrained:
            rest |= {"cosine": (-1 / 19, 1.0), "warmup": epoch, "clip": 1.0}
            return [self.stage("all", 20 * epoch, **rest)]
        rest["rates"], first = (("*.trunk.*", 0.1),), (*self.fresh, *self.norms)
        one = {"trainable": first, "cosine": (-1 / 19, 9 / 19), "warmup": epoch}
        two = {"trainable": (*first, *self.later), "cosine": (9 / 19, 1.0)}
        return [
            self.stage("frozen trunk", 10 * epoch, **one, **rest),
            self.stage("all", 10 * epoch, **two, **rest),
        ]

    def epoch(self, scale: str) -> int:
        """Steps of one of the 20 epochs."""
        return 1000 if scale == "gpu" else self.config.epoch_steps

    def stage(self, name: str, steps: int, **rest) -> Stage:
        """With what all stages share: SGD on batches of 32, but for what `rest` says."""
        shared = {"batch": 32, "sample": self.samples(), "momentum": 0.9, "weight_decay": 1e-4}
        return Stage(name, steps=steps, **{**shared, **rest})


def _in_pixels(boxes: Tensor, size: int) -> Tensor:
    """cxcywh in units of the crop -> xyxy, crop pixels, counted from the middle of the first pixel,
    both ends inside.
    """
    boxes = cxcywh_to_xyxy(boxes * size)
    return torch.cat([boxes[..., :2], boxes[..., 2:] - 1], -1)
