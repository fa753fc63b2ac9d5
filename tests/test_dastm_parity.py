"""STMTrack against the authors' code, and DASTM's attention against its reference definitions. And
that these tests can fail.
"""

from __future__ import annotations

import copy
import fnmatch
import zlib
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from certificates import not_on_page
from golden import certified, golden, image, mosaic, state_dict, too_far
from torch import Tensor, nn

from trackkit import losses as shared_losses
from trackkit import official
from trackkit.crops import warp_crops
from trackkit.losses import cell_targets, detection_losses
from trackkit.trackers import stmtrack
from trackkit.trackers.dastm import DASTMConfig, MemoryAttention
from trackkit.trackers.stmtrack import (
    Answer,
    PastFrames,
    STMTrack,
    STMTrackState,
    foreground_map,
)

GOLD, BLOCKS = golden("stmtrack"), golden("dastm_blocks")
CASES, TRAIN, TRACK = (
    GOLD["outputs"]["cases"],
    GOLD["outputs"]["train"][0],
    GOLD["outputs"]["tracker"],
)
# the ends of the descriptions of what is compared; the features are sums of up to 13,824 products,
# of values up to 27
TOLERANCE = {
    "scores": 1e-5,
    "boxes, px": 1e-3,
    "features": 1e-4,
    "float64": 1e-9,
    "float64, px": 1e-9,
    "attention": 1e-5,
    "losses": 1e-5,
}
TOLERANCE |= {"tracking, px": 1e-3, "crops, mean grey level": 1e-6, "frames": 0}


@cache
def loaded() -> STMTrack:
    return official.load("stmtrack", state_dict(GOLD["keys"], GOLD["scale"]))


def crop(name: str) -> Tensor:
    """An input of the authors, whose colours are in the order of OpenCV: (1, 3, 289, 289),
    0..255.
    """
    return ((image(name, (1, 3, 289, 289)) + 2) / 4 * 255).flip(1)


def inputs(case: dict) -> tuple[Tensor, Tensor, Tensor]:
    memory = case["inputs"]["memory"]
    boxes = torch.tensor([[item["fg_box_xyxy_inclusive"] for item in memory]])
    return (
        torch.stack([crop(item["image"]) for item in memory], 1),
        foreground_map(boxes.float(), 289),
        crop(case["inputs"]["query"]["image"]),
    )


def deviation(value: Tensor, expected: dict, key: str = "value") -> float:
    """Largest difference from the entries and the moments that a golden file keeps of a tensor."""
    assert value.numel() == torch.Size(expected["shape"]).numel()
    flat, wide = value.double().flatten(), "64" if key == "value64" else ""
    moments = {
        "mean": flat.mean(),
        "std": flat.std(unbiased=False),
        "min": flat.min(),
        "max": flat.max(),
    }
    kept = [name for name in moments if name + wide in expected]
    got = torch.stack([*flat[torch.tensor(expected["index"])], *(moments[name] for name in kept)])
    wanted = expected[key] + [expected[name + wide] for name in kept]
    return (got - torch.tensor(wanted, dtype=torch.float64)).abs().max().item()


TRUNK = (
    "Conv2d_1a_3x3",
    "Conv2d_2b_3x3",
    "Conv2d_4a_3x3",
    *(f"Mixed_{name}" for name in ("5b", "5d", "6a", "6c", "6e")),
)
FEATURES = {
    f"{path[0]}.{layer}": f"{path}.trunk.{layer}" for path in ("memory", "query") for layer in TRUNK
} | {
    "head.cls_ctr": "head.score_tower",
    "head.reg": "head.side_tower",
    "head.cls_score": "head.score",
    "head.ctr_score": "head.centre",
    "head.reg_offsets": "head.sides",
    "memory": "memory",
    "query": "query",
    "readout": "head",
}  # where the features are made that the golden file keeps


@torch.no_grad()
def run(tracker: STMTrack, case: dict) -> tuple[Answer, dict[str, Tensor]]:
    """What the network says and what it went through."""
    seen, hooks = {}, []
    for name, place in FEATURES.items():
        module = tracker.get_submodule(place)
        if name == "readout":
            hooks.append(
                module.register_forward_pre_hook(lambda m, given: seen.update(readout=given[0]))
            )
        else:
            hooks.append(
                module.register_forward_hook(
                    lambda m, given, made, name=name: seen.update({name: made})
                )
            )
    given = [t.to(tracker.head.scale.dtype) for t in inputs(case)]
    answer = tracker(*given)
    for hook in hooks:
        hook.remove()
    seen["memory"] = seen["memory"].transpose(0, 1)[None]
    return answer, seen


@cache
def ran() -> tuple[Answer, dict[str, Tensor]]:
    """The case of three memory frames; the other one is run in float64."""
    return run(loaded(), CASES[1])


def of_answer(answer: Answer, expected: dict, key: str = "value") -> dict[str, float]:
    probabilities = {
        "score": answer.confidence,
        "cls": answer.score.sigmoid(),
        "ctr": answer.centre.sigmoid(),
    }
    scores = max(deviation(value, expected[name], key) for name, value in probabilities.items())
    assert answer.confidence.argmax() == expected["argmax_score"]
    return {"scores": scores, "boxes, px": deviation(answer.boxes, expected["box"], key)}


def of_features(seen: dict[str, Tensor], expected: dict, key: str = "value") -> dict[str, float]:
    """Of the memory's trunk the golden file has the first frame. Kept in float64: memory, query and
    read-out.
    """
    kept = {name: wanted for name, wanted in expected["features"].items() if key in wanted}
    features = max(
        deviation(seen[name][:1] if name.startswith("m.") else seen[name], wanted, key)
        for name, wanted in kept.items()
    )
    tokens = seen["memory"].flatten(2).transpose(1, 2)  # (1, C, T, h, w) -> (1, T h w, C)
    weights = stmtrack.read_out(seen["query"].flatten(2).transpose(1, 2), tokens, maps=True)[1]
    found = (
        {}
        if key == "value64"
        else {"read-out, scores": deviation(weights.transpose(1, 2), expected["read_weights"])}
    )
    return {"features": features, **found}


def network() -> dict[str, float]:
    (answer, seen), expected = ran(), CASES[1]["outputs"]
    assert set(expected["features"]) == set(FEATURES)
    return of_answer(answer, expected) | of_features(seen, expected)


@cache
def strict() -> dict[str, float]:
    """The case of two memory frames, in float64."""
    answer, seen = run(copy.deepcopy(loaded()).double(), CASES[0])
    expected = CASES[0]["outputs"]
    found, features = of_answer(answer, expected, "value64"), of_features(seen, expected, "value64")
    rough = {
        f"two frames, {what}": value
        for what, value in (of_answer(answer, expected) | of_features(seen, expected)).items()
    }
    return {
        "float64": found["scores"],
        "float64, px": found["boxes, px"],
        "features, float64": features["features"],
        **rough,
    }


# ---- tracking ----


def with_parts(tracker: nn.Module, **parts: nn.Module) -> nn.Module:
    other = copy.copy(tracker)
    other._modules = {**tracker._modules, **parts}
    return other


class _Blank(nn.Module):
    def forward(self, crops, foreground):
        return torch.full((1, 512, 25, 25), torch.nan)


def frame(name: str) -> Tensor:
    height, width = TRACK["frame_hw"]
    small = image(name, (1, 3, height // 16 + 1, width // 16 + 1))
    large = F.interpolate(small, (height, width), mode="bilinear", align_corners=True)
    return ((large + 2) / 4 * 255).round().to(torch.uint8)[0].flip(0)


@cache
def tracked() -> tuple[dict[str, float], tuple[STMTrackState, Tensor, Answer]]:
    """Differences from the authors' run; and its first step: the state, the image, and what the
    network says.
    """
    tracker, frames = loaded(), [frame(name) for name in TRACK["frames"]]
    assert {
        field: getattr(tracker.config, field)
        for field in ("rate", "window", "penalty", "factor", "confidence", "size")
    } == {
        "rate": TRACK["hyper"]["test_lr"],
        "window": TRACK["hyper"]["window_influence"],
        "penalty": TRACK["hyper"]["penalty_k"],
        "factor": TRACK["hyper"]["search_area_factor"],
        "confidence": TRACK["hyper"]["confidence_threshold"],
        "size": TRACK["hyper"]["m_size"],
    }
    tracker = with_parts(tracker)
    answers, honest = [], tracker.answer
    tracker.answer = lambda *given: answers.append(honest(*given)) or answers[-1]
    first = state = tracker.start(frames[:1], torch.tensor([TRACK["init_box_xywh"]]))
    found = {"scores": 0.0, "crops": 0.0, "boxes": 0.0, "frames": 0}
    for image_, box, detail in zip(frames[1:], TRACK["boxes_xywh"], TRACK["detail"], strict=True):
        crops, scale, _ = tracker._look([image_], state, tracker.search_crop)
        found["frames"] += state.memory.looked_at(state.count, state.confident, 4).tolist() != [
            detail["memory_frames_1based"]
        ]
        # no frame from the fifth on is looked at in this run: one second of encoding less for each
        if state.count == 4:
            tracker.memory = _Blank()
        state, prediction = tracker.step(state, [image_])
        found["scores"] = max(found["scores"], abs(prediction.score.item() - detail["pscore"]))
        found["boxes"] = max(
            found["boxes"], (prediction.box[0] - torch.tensor(box)).abs().max().item()
        )
        found["crops"] = max(
            found["crops"],
            abs(crops.double().mean().item() - detail["crop_mean"]),
            abs(scale.item() - detail["scale"]),
        )
    names = {
        "scores": "tracking, scores",
        "boxes": "tracking, px",
        "crops": "crops, mean grey level",
        "frames": "memory frames",
    }
    return {f"STMTrack, {name}": found[kind] for kind, name in names.items()}, (
        first,
        frames[1],
        answers[0],
    )


@pytest.mark.parametrize(("segments", "confidence"), [(4, 0.6), (3, 0.6), (5, 0.6), (4, 0.2)])
def test_memory_certificate_can_fail(segments, confidence):
    """Seven frames, of which the authors look at four at most; none of them was confident."""
    looked_at, memory = [], PastFrames(torch.zeros(1, 0, dtype=torch.long))
    for number, detail in enumerate([{"pscore": 0.0}, *TRACK["detail"][:-1]], 1):
        memory = memory.stored(torch.zeros(1, 1), torch.tensor([number]), segments, None)
        confident = torch.tensor([detail["pscore"] > confidence])
        looked_at.append(memory.looked_at(torch.tensor([number]), confident, segments)[0].tolist())
    assert (looked_at == [detail["memory_frames_1based"] for detail in TRACK["detail"]]) == (
        (segments, confidence) == (4, 0.6)
    )


# ---- training ----


@cache
@torch.no_grad()
def trained() -> Answer:
    given = TRAIN["inputs"]
    memories = torch.cat([torch.stack([crop(name) for name in row], 1) for row in given["im_m"]])
    labels = foreground_map(torch.tensor(given["fg_box_xyxy_inclusive"]).float(), 289)
    return loaded()(memories, labels, torch.cat([crop(name) for name in given["im_q"]]))


def losses() -> dict[str, float]:
    given, expected, answer = TRAIN["inputs"], TRAIN["outputs"], trained()
    truth, shown = torch.tensor(given["gt_box_xyxy"]), ~torch.tensor(given["is_negative_pair"])
    cells = loaded().cells(289)
    label, centre = cell_targets(cells, truth, shown)
    inside = centre > 0
    wrong = 0.0
    for i, wanted in enumerate(expected["target"]):
        assert (label[i] == 1).nonzero()[:, 0].tolist() == wanted["positives"]
        assert ((label[i] == -1).sum(), (label[i] == 0).sum()) == (
            wanted["n_ignored"],
            wanted["n_zero"],
        )
        boxes = torch.where(inside[i][:, None], truth[i], torch.zeros(4))
        wrong = max(wrong, deviation(centre[i], wanted["ctr"]), deviation(boxes, wanted["box"]))
    values = detection_losses(answer.score, answer.centre, answer.boxes, cells, truth, shown)
    pairs = {"score": "cls", "centre": "ctr", "sides": "reg", "iou": "iou"}
    worst = max(
        abs(values[ours].item() - expected["loss_weighted"][theirs])
        for ours, theirs in pairs.items()
    )
    outputs = ((answer.score, "cls_pred"), (answer.centre, "ctr_pred"))
    return {
        "STMTrack, training, targets, losses": wrong,
        "STMTrack, training, losses": max(
            worst, abs(values["loss"].item() - expected["loss_total"])
        ),
        "STMTrack, training, logits, features": max(
            deviation(value, expected[name]) for value, name in outputs
        ),
        "STMTrack, training, boxes, px": deviation(answer.boxes, expected["box_pred"]),
    }


# ---- attention ----

NAMES = {
    "se": "branches.se",
    "ca": "branches.ca",
    "cbam.ChannelGate.mlp.1": "branches.cbam.channel.0",
    "cbam.ChannelGate.mlp.3": "branches.cbam.channel.2",
    "cbam.SpatialGate.spatial.conv": "branches.cbam.spatial.0",
    "cbam.SpatialGate.spatial.bn": "branches.cbam.spatial.1",
    "gate": "gate",
}


def attention(**changes) -> MemoryAttention:
    block = MemoryAttention(DASTMConfig(**changes)).eval()
    weights = {}
    for key, value in state_dict(BLOCKS["keys"], BLOCKS["scale"]).items():
        theirs, ours = next(pair for pair in NAMES.items() if key.startswith(pair[0] + "."))
        if changes.get("gate") != "none" or ours != "gate":
            weights[ours + key.removeprefix(theirs)] = value
    block.load_state_dict(weights)
    return block


def spatial(case: dict) -> Tensor:
    """Features (B, C, h, w) with structure."""
    name, shape = case["inputs"]["spatial"], case["inputs"]["shape"]
    low = F.interpolate(
        image(name + ":lo", (*shape[:2], 4, 4)), shape[2:], mode="bilinear", align_corners=True
    )
    return 0.5 * image(name, shape) + low


@torch.no_grad()
def of_attention(block: MemoryAttention | None = None) -> dict[str, float]:
    block, found = block or attention(), {}

    def note(name: str, error: float) -> None:
        found[f"DASTM, {name}, attention"] = max(error, found.get(f"DASTM, {name}, attention", 0.0))

    def varied(**changes) -> MemoryAttention:
        other = copy.copy(block)
        other.config = replace(block.config, **changes)
        return other

    for case in BLOCKS["outputs"]["cases"]:
        x, expected = spatial(case), case["outputs"]
        for name, branch in block.branches.items():
            note(name, deviation(branch(x), expected[name]))
        hard, choices = block(x[:, None])
        soft = varied(gate="soft")(x[:, None])[0]
        note("hard gate", deviation(hard[:, 0], expected["hard_select"]))
        note("soft gate", deviation(soft[:, 0], expected["soft_mix_tau1"]))
        note(
            "mean of three",
            deviation(varied(gate="none")(x[:, None])[0][:, 0], expected["static_mean_of_three"]),
        )
        note(
            "logits of the gate",
            (block.gate(x) - torch.tensor(expected["gate_logits"])).abs().max().item(),
        )
        assert choices.weights[:, 0].argmax(1).tolist() == expected["gate_argmax"]
        for tau, wanted in expected["gate_probs"].items():
            note(
                "probabilities of the gate",
                (varied(tau=float(tau))(x[:, None])[1].probability[:, 0] - torch.tensor(wanted))
                .abs()
                .max()
                .item(),
            )
    return found


@cache
def deviations() -> dict[str, tuple[float, float, str]]:
    """What was compared -> largest deviation, tolerance, golden file."""
    of_network = {f"STMTrack, {what}": value for what, value in (network() | strict()).items()}
    found = certified(of_network | tracked()[0] | losses(), TOLERANCE, "stmtrack")
    return found | certified(of_attention(), TOLERANCE, "dastm_blocks")


def test_agrees_with_the_authors():
    assert len(deviations()) == 27
    assert too_far(deviations()) == {}
    assert not_on_page("STMTrack and DASTM", deviations()) == []


def test_every_entry_is_used_or_named():
    named = [
        key
        for key in GOLD["keys"]
        if any(
            fnmatch.fnmatchcase(key, pattern) for pattern in official.renaming("stmtrack").unused
        )
    ]
    assert named == [
        key
        for key in GOLD["keys"]
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in GOLD["unused"])
    ]
    assert {official.rename("stmtrack", key) for key in GOLD["keys"] if key not in named} == set(
        loaded().state_dict()
    )
    assert sum(p.numel() for p in loaded().parameters()) == 36_812_532  # the specification: 36.81 M


# ---- the certificates can fail ----


def answered(tracker: STMTrack) -> dict[str, float]:
    """What a changed read-out or head makes of the true features."""
    seen = ran()[1]
    with torch.no_grad():
        answer = tracker.answer(seen["query"], seen["memory"].permute(0, 2, 3, 4, 1), 289)
    probabilities = {
        "score": answer.confidence,
        "cls": answer.score.sigmoid(),
        "ctr": answer.centre.sigmoid(),
    }
    expected = CASES[1]["outputs"]
    scores = max(deviation(value, expected[name]) for name, value in probabilities.items())
    return {"scores": scores, "boxes, px": deviation(answer.boxes, expected["box"])}


def failed(found: dict[str, float]) -> bool:
    return too_far(certified(found, TOLERANCE, "stmtrack")) != {}


def test_features_are_enough_for_an_answer_and_their_order_does_not_matter():
    assert not failed(answered(loaded()))
    turned = copy.copy(loaded())
    turned.answer = lambda query, memory, *rest: STMTrack.answer(
        loaded(), query, memory.flip(1), *rest
    )
    assert not failed(answered(turned))


def _read_with(monkeypatch, function):
    honest = stmtrack.read_out
    monkeypatch.setattr(
        stmtrack, "read_out", lambda query, memory, *rest: function(honest, query, memory, *rest)
    )


def mutant_no_scale(tracker, patch):
    _read_with(
        patch,
        lambda honest, query, memory, *rest: honest(query * query.shape[-1] ** 0.5, memory, *rest),
    )
    return tracker


def mutant_softmax_over_queries(tracker, patch):
    _read_with(
        patch, lambda honest, q, m, *rest: ((q @ m.transpose(1, 2) / 512**0.5).softmax(1) @ m, None)
    )
    return tracker


def mutant_first_frame_only(tracker, patch):
    _read_with(patch, lambda honest, query, memory, *rest: honest(query, memory[:, :625], *rest))
    return tracker


def mutant_query_before_memory(tracker, patch):
    class Swapped(type(tracker.head)):
        def forward(self, x):
            return super().forward(x.roll(512, 1))

    head = copy.copy(tracker.head)
    head.__class__ = Swapped
    return with_parts(tracker, head=head)


def mutant_relu_behind_the_tower(tracker, patch):
    return with_parts(
        tracker,
        head=with_parts(
            tracker.head, score_tower=nn.Sequential(*tracker.head.score_tower, nn.ReLU())
        ),
    )


def mutant_norm_epsilon_of_the_head(tracker, patch):
    for part in tracker.head.modules():
        if isinstance(part, nn.BatchNorm2d):
            patch.setattr(part, "eps", 1e-3)
    return tracker


def mutant_true_cells(tracker, patch):
    cells = tracker.cells(289) - 3
    patch.setattr(tracker, "cells", lambda size: cells, raising=False)
    return tracker


def mutant_rows_before_columns(tracker, patch):
    cells = tracker.cells(289)
    patch.setattr(tracker, "cells", lambda size: cells.flip(1), raising=False)
    return tracker


@pytest.mark.parametrize(
    "mutate", [f for name, f in list(globals().items()) if name.startswith("mutant_")]
)
def test_network_certificate_can_fail(mutate, monkeypatch):
    ran()  # is kept: not of a tracker that a mutant has changed
    assert failed(answered(mutate(loaded(), monkeypatch)))


@torch.no_grad()
def _memory_of(tracker: STMTrack, colours: Tensor, labels: Tensor) -> float:
    """Deviation of the first memory frame's trunk, up to its second convolution or so; cheap."""
    memory = tracker.memory
    x = memory.trunk.stem(colours)
    wrong = deviation(x, CASES[0]["outputs"]["features"]["m.Conv2d_1a_3x3"])
    x = x + memory.label(labels[:, None])
    trunk = memory.trunk
    x = F.max_pool2d(trunk.Conv2d_2b_3x3(trunk.Conv2d_2a_3x3(x)), 3, 2)
    return max(
        wrong,
        deviation(
            trunk.Conv2d_4a_3x3(trunk.Conv2d_3b_1x1(x)),
            CASES[0]["outputs"]["features"]["m.Conv2d_4a_3x3"],
        ),
    )


@pytest.mark.parametrize(
    "change", ["none", "colours", "epsilon", "label ends", "no label", "memory's weights"]
)
def test_trunk_certificate_can_fail(change, monkeypatch):
    tracker, (colours, labels, _) = loaded(), inputs(CASES[0])
    colours, labels = colours[:, 0], labels[:, 0]
    if change == "colours":
        colours = colours.flip(1)
    if change == "epsilon":
        tracker = copy.deepcopy(tracker)
        for part in tracker.memory.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eps = 1e-5
    if change == "label ends":
        labels = foreground_map(torch.tensor([[100.0, 90, 187, 199]]), 289)
    if change == "no label":
        labels = torch.zeros_like(labels)
    if change == "memory's weights":
        tracker = with_parts(tracker, memory=with_parts(tracker.memory, trunk=tracker.query.trunk))
    assert (_memory_of(tracker, colours, labels) > TOLERANCE["features"]) == (change != "none")


class _Nothing(nn.Module):
    def forward(self, *given):
        return None


@pytest.mark.parametrize("change", ["none", "window", "penalty", "rate", "ends", "exact"])
def test_tracking_certificate_can_fail(change):
    state, image_, answer = tracked()[1]
    tracker = with_parts(loaded())
    if change in ("window", "penalty", "rate", "exact"):
        tracker.config = replace(
            tracker.config,
            **{change: {"window": 0.0, "penalty": 0.05, "rate": 0.9, "exact": True}[change]},
        )
    if change == "ends":
        answer = replace(answer, boxes=answer.boxes - torch.tensor([0.0, 0, 1, 1]))
    tracker.query = _Nothing()
    tracker.answer, tracker._memorise = lambda *given: answer, lambda state, frames: state
    _, prediction = tracker.step(state, [image_])
    wrong = (prediction.box[0] - torch.tensor(TRACK["boxes_xywh"][0])).abs().max().item()
    assert (wrong > TOLERANCE["tracking, px"]) == (change != "none")


# centre, side, size, CRC-32 of the pixels that the authors' function makes with OpenCV 5.0.0:
# inside, over a border, over a corner and enlarged, every second pixel, every third, every second
# with another size, ten times enlarged
CROPS = [
    ((153.3, 109.9), 167.2, 289, 3555523616),
    ((12.7, 200.2), 148.49, 289, 2039164269),
    ((300.9, 3.2), 90.5, 97, 324978584),
    ((160.0, 120.0), 640.3, 289, 4054556578),
    ((5.5, 233.8), 950.0, 289, 21238957),
    ((310.2, 7.9), 400.0, 160, 2005562666),
    ((150.5, 20.1), 31.0, 289, 890699629),
]


def same_pixels(number: int, change: tuple[float, float, float, float] = (0, 0, 0, 0)) -> bool:
    """Whether a crop has the authors' pixels; `change` is added to centre, side and fill."""
    (x, y), side, size, expected = CROPS[number]
    pattern = (torch.arange(320) % 7 + (torch.arange(240) % 5)[:, None]).int()
    picture = (mosaic("warped", 240, 320) + pattern).clamp(0, 255).to(torch.uint8)
    fill = torch.tensor([[100.9, 120.2, 7.5 + change[3]]])
    centre, sides = (
        torch.tensor([[x + change[0], y + change[1]]], dtype=torch.float64),
        torch.tensor([side + change[2]], dtype=torch.float64),
    )
    pixels = warp_crops([picture], centre, sides, size, fill)[0][0].permute(1, 2, 0).contiguous()
    return zlib.crc32(pixels.numpy().tobytes()) == expected


def test_crops_are_the_authors_pixel_by_pixel():
    assert all(same_pixels(number) for number in range(len(CROPS)))


@pytest.mark.parametrize("change", [(0.8, 0, 0, 0), (0, -1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_crop_certificate_can_fail(change):
    assert not same_pixels(1, change)


@pytest.mark.parametrize(
    "change", ["none", "touching cells", "negatives ask", "sides without ends", "half a pixel"]
)
def test_loss_certificate_can_fail(change, monkeypatch):
    given, answer, cells = TRAIN["inputs"], trained(), loaded().cells(289)
    truth, shown = torch.tensor(given["gt_box_xyxy"]), ~torch.tensor(given["is_negative_pair"])
    if change == "touching cells":
        monkeypatch.setattr(
            shared_losses,
            "cell_targets",
            lambda cells, truth, shown: cell_targets(
                cells, truth + torch.tensor([-1.0, -1, 1, 1]) * 8, shown
            ),
        )
    if change == "negatives ask":
        monkeypatch.setattr(
            shared_losses,
            "cell_targets",
            lambda *given: (cell_targets(*given)[0].clamp(min=0), cell_targets(*given)[1]),
        )
    if change == "sides without ends":
        answer = replace(answer, boxes=answer.boxes + torch.tensor([0.0, 0, 1, 1]))
    if change == "half a pixel":
        cells = cells + 0.5
    values = detection_losses(answer.score, answer.centre, answer.boxes, cells, truth, shown)
    names = {"score": "cls", "centre": "ctr", "sides": "reg"}
    wrong = max(
        abs(values[ours].item() - TRAIN["outputs"]["loss_weighted"][theirs])
        for ours, theirs in names.items()
    )
    assert (wrong > TOLERANCE["losses"]) == (change != "none")


@pytest.mark.parametrize(
    "change",
    [
        "maximum before mean",
        "channels last",
        "relu for h-swish",
        "rows for columns",
        "choices in another order",
    ],
)
def test_attention_certificate_can_fail(change, monkeypatch):
    block = attention()
    if change == "maximum before mean":
        with torch.no_grad():
            block.branches["cbam"].spatial[0].weight.copy_(
                block.branches["cbam"].spatial[0].weight.flip(1)
            )
    if change == "channels last":
        cbam = block.branches["cbam"]
        honest = cbam.forward
        monkeypatch.setattr(
            cbam,
            "forward",
            lambda x: (
                x * (honest(x) / x.where(x != 0, 1)).transpose(2, 3)
                if x.shape[2] == x.shape[3]
                else honest(x) + 1
            ),
        )
    if change == "relu for h-swish":
        monkeypatch.setattr(F, "hardswish", F.relu)
    if change == "rows for columns":
        ca = block.branches["ca"]
        ca.conv_h, ca.conv_w = ca.conv_w, ca.conv_h
    if change == "choices in another order":
        with torch.no_grad():
            block.gate.fc2.weight.copy_(block.gate.fc2.weight[[1, 0, 2, 3]])
    try:
        found = of_attention(block)
    except AssertionError:
        return
    assert failed(found)
