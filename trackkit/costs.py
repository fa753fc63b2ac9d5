"""What a tracker costs: parameters, multiply-accumulates and frames per second.

Papers differ in what they leave out when they count. Each tracker that is to be compared has its
paper's rule and its paper's figures here; `count` is one rule for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, singledispatch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from trackkit.attention import Attention, DecoderLayer
from trackkit.backbones import ConvStack
from trackkit.errors import DataError, TrackkitError
from trackkit.trackers.base import Tracker
from trackkit.trackers.dastm import DASTM, DASTMConfig
from trackkit.trackers.mixvit import MixViT
from trackkit.trackers.ostrack import OSTrack, OSTrackConfig
from trackkit.trackers.procontext import ProContEXT, ProContEXTConfig
from trackkit.trackers.sbt import SBT, SBTConfig
from trackkit.trackers.stark import STARK, Answer, STARKConfig, Tokens
from trackkit.trackers.stark_ca import STARKCAConfig
from trackkit.trackers.stark_variants import STARKUpdatedQuery
from trackkit.trackers.stmtrack import STMTrack, STMTrackConfig, read_out
from trackkit.trackers.ustam import USTAMConfig
from trackkit.tracking import now
from trackkit.weights import create


def profile(name: str) -> dict:
    """Cost of the tracker called `name` as {"name", "parameters", "macs", "paper"}.

    `parameters` and `macs` are counted as the tracker's paper counts them (`by_the_paper`), and
    `paper` holds the numbers that it prints, for comparison ({} if none).

    Raises TrackkitError for an unknown name.
    """
    with torch.device("meta"):  # shapes only: the largest would need gigabytes
        tracker = create(name)
    return {"name": name, **by_the_paper(tracker)}


def table(profiles: list[dict]) -> list[str]:
    """Lines that show what `profile` says: what is counted here beside the paper's figures, with
    the deviation in percent.
    """
    lines = [
        f"{'tracker':<16}{'parameters':>14}  {'paper':<17}{'MACs a frame':>18}  "
        f"{'paper':<17}".rstrip()
    ]
    for row in profiles:
        line = f"{row['name']:<16}"
        for key, width, scale, unit in (("parameters", 14, 1e6, "M"), ("macs", 18, 1e9, "G")):
            printed = row["paper"].get(key)
            beside = (
                "-"
                if printed is None
                else f"{_figure(printed / scale)} {unit}".ljust(9)
                + _percent(row[key] / printed - 1, "+")
            )
            line += f"{row[key]:>{width},}  {beside:<17}"
        lines.append((line + "; ".join(_remarks(row["paper"]))).rstrip())
    return lines


def _figure(value: float) -> str:
    """As papers print it: 23.5, 21.27, 38.0."""
    text = f"{value:.10g}"
    return text if "." in text else f"{text}.0"


def _percent(share: float, sign: str = "") -> str:
    return f"{round(share, 3) + 0.0:{sign}.1%}".replace("%", " %")  # + 0.0: no negative zero


def _remarks(paper: dict) -> list[str]:
    """What a paper says besides counts."""
    said = []
    if "peak_memory_bytes" in paper:
        said.append(f"{paper['peak_memory_bytes'] / 1e9:.2f} GB at most")
    if "frames_per_second" in paper:
        said.append(f"{paper['frames_per_second']} frames/s")
    if "high_computation_share" in paper:
        said.append(f"{_percent(paper['high_computation_share'])} of frames at high computation")
    return [*said, paper["note"]] if "note" in paper else said


def count(tracker: Tracker) -> dict[str, int]:
    """{"parameters", "macs"}: all parameters, and `macs` of one tracked frame, not the first."""
    frame, box = _example()
    state = tracker.eval().start([frame], box)
    with without_shortcuts(tracker):
        total = macs(lambda: tracker.step(state, [frame]))
    return {"parameters": parameters(tracker), "macs": total}


def parameters(module: nn.Module) -> int:
    """Number of parameters, each counted once; buffers such as running means are not parameters."""
    return sum(p.numel() for p in module.parameters())


def macs(function: Callable[[], object]) -> int:
    """Multiply-accumulates of a call of `function`: convolutions and matrix products, attention
    included.

    One multiply-accumulate is two floating-point operations; papers call either of the two a FLOP.
    Additions of biases, norms, activations, softmax and interpolation are not counted.
    """
    # torch's counter does not know nn.MultiheadAttention's fast path
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


def _fused_attention(query, key, value, *rest, out_shape=None, **named) -> int:
    return sdpa_flop_count(query, key, value)


# torch's counter knows the fused kernels of GPUs only
FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention}


@contextmanager
def without_shortcuts(network: nn.Module) -> Iterator[None]:
    """Decoders compute what they are said to compute, not the same result with fewer products, and
    norms stay beside their convolutions.
    """
    kinds = (DecoderLayer, ConvStack)
    layers = [module for module in network.modules() if isinstance(module, kinds)]
    before = [layer.shortcut for layer in layers]
    try:
        for layer in layers:
            layer.shortcut = False
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.shortcut = was


def by_layers(network: nn.Module, function: Callable[[], object], norm: int = 4) -> dict[str, int]:
    """{"parameters", "macs"} of a call of `function` as the counter of the field, thop, has them.

    It sees only layers that the call goes through: linear and convolution layers (without biases),
    and `norm` for each output of a layer or batch norm (0 in its older versions). So the products
    of attention are not counted, nor are parameters outside these layers. Works on the device
    "meta" too.
    """
    total, seen = 0, set()

    def add(module: nn.Module, given: tuple, made: Tensor) -> None:
        nonlocal total
        seen.add(module)
        linear = isinstance(module, (nn.Linear, nn.Conv2d))
        total += made.numel() * (module.weight[0].numel() if linear else norm)

    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)
    hooks = [
        module.register_forward_hook(add)
        for module in network.modules()
        if isinstance(module, kinds)
    ]
    try:
        with torch.no_grad(), without_shortcuts(network):
            function()
    finally:
        for hook in hooks:
            hook.remove()
    return {"parameters": sum(parameters(module) for module in seen), "macs": total}


@dataclass(frozen=True)
class Speed:
    """How fast a tracker is, and on what.

    Attributes:
        fps: sequence frames per second, frames / seconds. milliseconds: median time of a step with
            its batch.
        frames: steps that were timed. batch: sequences in one step. device, threads, precision:
            where.
    """

    fps: float
    milliseconds: float
    frames: int
    batch: int
    device: str
    threads: int
    precision: str

    def __str__(self) -> str:
        return (
            f"{self.fps:.1f} frames/s ({self.milliseconds:.2f} ms a step of {self.batch}, median "
            "of "
            f"{self.frames}; {self.device}, {self.threads} CPU threads, {self.precision})"
        )


def frames_per_second(
    tracker: Tracker,
    frames: list[Tensor] | None = None,
    box_xywh: Tensor | None = None,
    repeats: int = 20,
    warm_up: int = 3,
    batch: int = 1,
) -> Speed:
    """Time the steps of a tracker: cropping, network and decoding of the box, not the reading of
    frames.

    `frames` are consecutive images, uint8 (3, H, W), the first with the target at `box_xywh` (4,),
    pixels; they are repeated as needed. None: noise of 640x480 with a target of 100x80. `warm_up`
    steps are not timed. The clock is read when the device has finished its work. On a GPU the
    transfer of the frame is part of the step. `batch` copies of the sequence are tracked at once.

    Raises DataError for counts below 1, frames without a box, or a box outside the first frame.
    """
    if min(repeats, batch) < 1 or warm_up < 0:
        raise DataError(
            f"need repeats and batch >= 1, warm_up >= 0; got {repeats}, {batch} and {warm_up}"
        )
    if (frames is None) != (box_xywh is None):
        raise DataError("give both frames and the first box, or neither")
    if frames is None:
        frame, box_xywh = _example()
        frames = [frame, frame]
    if len(frames) < 2:
        raise DataError("give at least two frames: the first to start from, the others to time")
    box = torch.as_tensor(box_xywh, dtype=torch.float64).reshape(1, 4)
    state = tracker.eval().start([frames[0]] * batch, box.repeat(batch, 1))
    seconds = []
    for index in range(warm_up + repeats):
        image = frames[1 + index % (len(frames) - 1)]
        began = now(tracker.device)
        state, _ = tracker.step(state, [image] * batch)
        seconds.append(now(tracker.device) - began)
    timed = torch.tensor(seconds[warm_up:], dtype=torch.float64)
    device = tracker.device
    return Speed(
        fps=repeats * batch / float(timed.sum()),
        milliseconds=float(timed.median()) * 1e3,
        frames=repeats,
        batch=batch,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        precision=str(next((p.dtype for p in tracker.parameters()), torch.float64)).removeprefix(
            "torch."
        ),
    )


def _example() -> tuple[Tensor, Tensor]:
    """A frame of noise, uint8 (3, 480, 640), and a box in its middle, (1, 4)."""
    noise = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (3, 480, 640), generator=noise, dtype=torch.uint8)
    return frame, torch.tensor([[270.0, 200.0, 100.0, 80.0]], dtype=torch.float64)


# ---- as the papers count ----


@singledispatch
def by_the_paper(tracker: Tracker) -> dict:
    """{"parameters", "macs", "paper"} of a tracker by its paper's rule; without one, by `count`.

    The tracker's weights do not matter and may lie on the device "meta".
    """
    with torch.device("cpu"):
        own = type(tracker)(tracker.config)
    return {**count(own), "paper": {}}


@by_the_paper.register
def _stark(tracker: STARK, then: Callable[[STARK, Answer], object] | None = None) -> dict:
    """The rule behind STARK's Table 5: its counter knew neither attention (projections included)
    nor layer norms nor the query, and the templates' features are not computed in a tracked frame.
    `then` is what comes after the answer.
    """
    cfg, twin = tracker.config, _twin(tracker)
    templates = [_blank(twin, cfg.template_size)] * (1 + cfg.dynamic)
    uncounted = [
        m for m in twin.modules() if isinstance(m, (Attention, nn.LayerNorm, nn.Embedding))
    ]
    for module in uncounted:
        if isinstance(module, Attention):  # of this twin alone
            module.forward = lambda query, *rest: (torch.zeros_like(query), None)

    def frame() -> None:
        answer = twin(templates, _blank(twin, cfg.search_size))
        if then is not None:
            then(twin, answer)

    with without_shortcuts(twin):
        total = macs(frame)
    return {
        "parameters": parameters(twin) - sum(map(parameters, uncounted)),
        "macs": total,
        "paper": (STARK_TABLE_5 | SBT_TABLE_6).get(cfg, {}),
    }


@by_the_paper.register
def _(tracker: STARKUpdatedQuery) -> dict:
    return _stark(tracker, lambda twin, answer: twin.query_after(answer.decoded))


def _blank(twin: STARK, size: int) -> Tokens:
    """Tokens without values of a crop of `size` pixels, nothing of it outside the frame."""
    images = torch.empty(1, 3, size, size, device="meta")
    with torch.no_grad():
        return twin.encode(images, torch.zeros(1, size, size, dtype=torch.bool))


STARK_TABLE_5 = {  # the paper says FLOPs and counts multiply-accumulates
    STARKConfig.s50(): {"parameters": 23_300_000, "macs": 10_500_000_000},
    STARKConfig.st50(): {"parameters": 23_500_000, "macs": 10_900_000_000},
    STARKConfig.st101(): {"parameters": 42_400_000, "macs": 18_500_000_000},
}

SBT_TABLE_6 = {  # its STARK has 23.3 M and 11.5 G; its other trackers are not here
    STARKCAConfig(): {
        "parameters": 23_600_000,
        "macs": 8_700_000_000,
        "note": 'with a "modified" SBT-small, the paper does not say how; ours is as published',
    },
}


@by_the_paper.register
def _(tracker: SBT) -> dict:
    """The rule that gives SBT's Table 2: its counter knew convolutions (with their biases, one
    operation an output) and linear layers, so no layer norm and no product inside attention; and it
    ran the whole network on a pair, template and all.
    """
    cfg, twin, total = tracker.config, _twin(tracker), 0
    layers = [m for m in twin.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def add(layer: nn.Module, _, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()
        total += output.numel() if isinstance(layer, nn.Conv2d) else 0

    for layer in layers:
        layer.register_forward_hook(add)
    sizes = cfg.search_size, cfg.template_size
    x, z = (torch.empty(1, 3, size, size, device="meta") for size in sizes)
    # with gradients: without them some layers take short cuts
    x, z = twin.backbone.together(twin.backbone.alone(x), twin.backbone.alone(z), both=True)
    features = twin.features(x, z).flatten(1, 2)
    for head in (twin.class_head, twin.box_head):
        head(features)
    return {
        "parameters": sum(map(parameters, layers)),
        "macs": total,
        "paper": SBT_TABLE_2.get(cfg, {}),
    }


SBT_TABLE_2 = {  # the paper says FLOPs and counts multiply-accumulates
    SBTConfig.light(): {
        "parameters": 3_030_000,
        "macs": 3_810_000_000,
        "note": "printed in each other's place",
    },
    SBTConfig.small(): {"parameters": 13_800_000, "macs": 11_920_000_000},
    SBTConfig.base(): {
        "parameters": 21_270_000,
        "macs": 19_270_000_000,
        "note": "21.27 M is a misprint of 21.97 M",
    },
    SBTConfig.large(): {"parameters": 35_200_000, "macs": 31_460_000_000},
}


@by_the_paper.register
def _(tracker: OSTrack) -> dict:
    """As OSTrack's counter (an old thop) has it: convolutions and linear layers, but neither
    attention's products nor tables of positions, and the template's patch embedding in each frame.
    """
    return {**_one_stream(tracker, norm=0), "paper": OSTRACK.get(tracker.config, {})}


@by_the_paper.register
def _(tracker: ProContEXT) -> dict:
    """OSTrack's rule, by a newer thop: it adds four for each output of a norm."""
    return {**_one_stream(tracker, norm=4), "paper": PROCONTEXT_TABLE_4.get(tracker.config, {})}


def _one_stream(tracker: OSTrack, norm: int) -> dict:
    twin, sample = _twin(tracker), tracker.samples()
    count = max(1, len(sample.template_factors)) * sample.templates
    z, x = sample.template.size, sample.search.size
    with torch.device("meta"):
        templates = {
            "templates": torch.empty(1, count, 3, z, z),
            "template_boxes": torch.empty(1, count, 4),
        }
        search = torch.empty(1, 3, x, x)

    def frame() -> None:
        twin(twin.sampled(templates), twin.tokens(search, twin.position_x))

    return by_layers(twin, frame, norm)


# neither paper prints parameters; "FLOPs" are multiply-accumulates
OSTRACK = {
    OSTrackConfig.ostrack_256(): {"macs": 21_500_000_000},
    OSTrackConfig.ostrack_256(keep_ratio=1.0): {"macs": 29_000_000_000},
    OSTrackConfig.ostrack_384(): {"macs": 48_300_000_000},
    OSTrackConfig.ostrack_384(keep_ratio=1.0): {"macs": 65_300_000_000},
}
PROCONTEXT_TABLE_4 = {
    ProContEXTConfig.procontext_256(keep_ratio=0.6): {"macs": 36_100_000_000},
    ProContEXTConfig.procontext_256(): {"macs": 38_000_000_000},
    ProContEXTConfig.procontext_256(keep_ratio=0.8): {"macs": 40_100_000_000},
    # of 42.649: rounded twice
    ProContEXTConfig.procontext_256(keep_ratio=0.9): {"macs": 42_700_000_000},
    ProContEXTConfig.procontext_256(keep_ratio=1.0): {"macs": 45_500_000_000},
}


@by_the_paper.register
def _(tracker: MixViT) -> dict:
    """The rule behind USTAM's Table 4, MixViT's rows too: thop knows linear and convolution layers
    and counts 4 for each element that goes through a norm, but neither the products of queries,
    keys and values nor softmax; and it counts the templates in every frame. The paper cuts its
    figures off after one decimal: 97.28 is 97.2.
    """
    cfg, twin = tracker.config, _twin(tracker)
    with torch.device("meta"):
        template = torch.empty(cfg.templates, 3, cfg.template_size, cfg.template_size)
        search = torch.empty(1, 3, cfg.search_size, cfg.search_size)

    def frame() -> None:
        cache, _ = twin.encode(twin.tokens(template, twin.position_t).flatten(0, 1)[None])
        twin(cache, twin.tokens(search, twin.position_s))

    known = (cfg.head, cfg.templates, cfg.stem) == ("pyramid", 2, "patch")
    spatial = isinstance(cfg, USTAMConfig) and cfg.spatial
    paper = USTAM_TABLE_4.get((cfg.width, cfg.search_size, spatial), {}) if known else {}
    return {**by_layers(twin, frame), "paper": paper}


# by width, search size and spatial attention; temporal attention costs nothing that is counted
USTAM_TABLE_4 = {
    (768, 288, True): {"parameters": 97_200_000, "macs": 43_600_000_000},
    (768, 288, False): {"parameters": 97_100_000, "macs": 43_200_000_000},
    (1024, 384, True): {"parameters": 318_000_000, "macs": 274_600_000_000},
    (1024, 384, False): {"parameters": 317_700_000, "macs": 271_600_000_000},
}


@by_the_paper.register
def _(tracker: STMTrack) -> dict:
    """Parameters, and multiply-accumulates of a frame with a full memory.

    STMTrack's paper has no such numbers. DASTM's has only the peak memory of an RTX 3060 and frames
    per second. Its baseline is STMTrack as published, so what is MobileOne's and what the
    attention's merit cannot be told.
    """
    cfg = tracker.config
    return {
        "parameters": parameters(tracker),
        "macs": frame_macs(cfg),
        "paper": DASTM_TABLE_4.get(cfg, {}),
    }


def _twin(tracker: Tracker) -> Tracker:
    """A tracker of the same config without values: on it nothing is computed."""
    with torch.device("meta"):
        return type(tracker)(tracker.config).eval()


# ---- what a frame of DASTM costs, part by part, and its budgets (DASTM, Table 4) ----
#
# A frame is encoded twice, as query and as memory. The "34.7 % less overhead" of the paper's
# abstract is (1.99 - 1.30) / 1.99, from the table's column of peak GPU memory, not of operations.

DASTM_TABLE_4 = {  # its first and fourth rows, and Table 2
    STMTrackConfig(): {"peak_memory_bytes": 1_240_000_000, "frames_per_second": 37},
    DASTMConfig.sastm(): {"peak_memory_bytes": 1_990_000_000, "frames_per_second": 31},
    DASTMConfig(): {
        "peak_memory_bytes": 1_300_000_000,
        "frames_per_second": 36,
        "high_computation_share": 0.335,
    },
    # the last is how often the gate chose the "high-computation mode"; its text calls CBAM that,
    # though coordinate attention costs more
}


@cache
def part_macs(config: STMTrackConfig) -> dict[str, int]:
    """Multiply-accumulates of "memory", "query" and "head", of the read-out of one memory frame
    ("read_out"), and for one memory frame of DASTM's "gate" and of each of its attention modules.
    Counted on tensors without values, so nothing is computed.
    """
    with torch.device("meta"), torch.no_grad():
        twin = (DASTM if isinstance(config, DASTMConfig) else STMTrack)(config).eval()
        crop, query = (
            torch.empty(1, 3, spec.size, spec.size, dtype=torch.uint8)
            for spec in (twin.template_crop, twin.search_crop)
        )
        foreground = torch.empty(1, config.size, config.size)
        past, seen = twin.memory(crop, foreground), twin.query(query)
        tokens = [features.flatten(2).transpose(1, 2) for features in (seen, past)]
        parts = {
            "memory": macs(lambda: twin.memory(crop, foreground)),
            "query": macs(lambda: twin.query(query)),
            "head": macs(lambda: twin.head(torch.cat([seen, seen], 1))),
            "read_out": macs(lambda: read_out(*tokens)),
        }
        for name in attention_of(config):
            parts[name] = macs(lambda branch=twin.attention.branches[name]: branch(past))
        if isinstance(config, DASTMConfig) and config.gate != "none":
            parts["gate"] = macs(lambda: twin.attention.gate(past))
    return parts


def attention_of(config: STMTrackConfig) -> tuple[str, ...]:
    """The modules that strengthen DASTM's memory; STMTrack has none."""
    return config.attention if isinstance(config, DASTMConfig) else ()


def frame_macs(config: STMTrackConfig) -> int:
    """Multiply-accumulates of a tracked frame with all the memory frames that may be looked at; of
    a gate's modules the dearest.
    """
    parts, looked_at = part_macs(replace(config, segments=1)), config.segments + 2
    network = parts["memory"] + parts["query"] + parts["head"] + looked_at * parts["read_out"]
    if not attention_of(config):
        return network
    costs = [parts[name] for name in config.attention]
    attention = max(costs) if config.gate in ("hard", "random") else sum(costs)
    attention += parts.get("gate", 0)
    return network + (looked_at if config.granularity == "memory" else 1) * attention


def within(config: STMTrackConfig, budget: int) -> STMTrackConfig:
    """The config with fewer memory frames, then fewer modules (the dearest go first), so that a
    frame costs at most `budget`.

    Table 4 has budgets of 8 and 7 GFLOPs and does not say what of. All attention together is less
    than a thousandth of the tracker, so a gate alone can keep no such budget; and only a query of
    160 pixels comes near it, as the head costs 7.4 G multiply-accumulates for one of 289.
    TrackkitError, with what is needed at least, when the rest costs more.
    """
    plans = [replace(config, segments=count) for count in range(config.segments, 0, -1)]
    cheap_first = sorted(attention_of(config), key=part_macs(replace(config, segments=1)).get)
    for count in range(len(cheap_first) - 1, 0, -1):
        plans.append(
            replace(
                plans[-1],
                attention=tuple(name for name in config.attention if name in cheap_first[:count]),
            )
        )
    for plan in plans:
        if (least := frame_macs(plan)) <= budget:
            return plan
    text = (
        f"no memory is small enough for {budget:,} multiply-accumulates a frame: the least is "
        f"{least:,}"
    )
    raise TrackkitError(f"{text}; take a smaller query_size or trunk")
