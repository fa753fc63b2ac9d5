"""Deliberate mistakes in STARK: each must push the certificates of test_stark_parity above their
tolerances.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden import entry
from helpers import instead
from test_stark_parity import (
    S50,
    ST50,
    TRACK,
    case_errors,
    following,
    loaded,
    network_errors,
    tracking_errors,
)
from torch import Tensor, nn

from trackkit import attention, backbones, boxes, crops, heads, official
from trackkit.crops import Windows
from trackkit.errors import CheckpointError
from trackkit.trackers import stark
from trackkit.trackers.stark import STARK


def failed(tracker: STARK, gold: dict) -> bool:
    """Whether the certificate sees a mistake; the padded case shows most."""
    cases = reversed(gold["outputs"].items())
    return any(max(case_errors(tracker, gold, case, wanted).values()) > 1 for case, wanted in cases)


# ---- networks ----


def mutant_half_cell(tracker, monkeypatch):
    plain = heads.soft_argmax
    instead(monkeypatch, plain, lambda logits: plain(logits) + 0.5 / logits.shape[-1])


def mutant_positions_in_values(tracker, monkeypatch):
    layer = tracker.encoder.layers[0].self_attn
    plain = layer.forward
    layer.forward = lambda query, key, value, *rest: plain(query, key, key, *rest)


def _other_positions(monkeypatch, change):
    plain = attention.sine_position
    instead(monkeypatch, plain, lambda outside, width: change(plain(outside, width)))


def mutant_x_before_y(tracker, monkeypatch):
    _other_positions(monkeypatch, lambda p: p.roll(p.shape[-1] // 2, -1))


def mutant_sines_before_cosines(tracker, monkeypatch):
    _other_positions(
        monkeypatch, lambda p: p.unflatten(-1, (2, -1, 2)).transpose(-1, -2).flatten(-3)
    )


def mutant_turn_of_one(tracker, monkeypatch):
    def to_one(outside, width):
        """The count along each axis ends at 1, not at 2 pi."""
        inside, half, parts = (~outside).float(), width // 2, []
        index = torch.arange(half)
        for axis in (1, 2):
            count = inside.cumsum(axis)
            share = count / (count.narrow(axis, count.shape[axis] - 1, 1) + 1e-6)
            angle = share[..., None] / 10_000 ** (2 * (index // 2) / half)
            parts.append(torch.where(index % 2 == 0, angle.sin(), angle.cos()))
        return torch.cat(parts, -1).flatten(1, 2)

    instead(monkeypatch, attention.sine_position, to_one)


def mutant_positions_despite_padding(tracker, monkeypatch):
    plain = attention.sine_position
    instead(monkeypatch, plain, lambda outside, width: plain(torch.zeros_like(outside), width))


def mutant_mask_of_any_pixel(tracker, monkeypatch):
    def any_pixel(images, mask):
        cells = F.max_pool2d(mask[:, None].float(), 16)[:, 0].bool()
        return STARK.encode(
            tracker, images, cells.repeat_interleave(16, 1).repeat_interleave(16, 2)
        )

    tracker.encode = any_pixel


def mutant_no_mask(tracker, monkeypatch):
    monkeypatch.setattr(stark, "_needed", lambda ignore, like: None)


def mutant_mask_upside_down(tracker, monkeypatch):
    monkeypatch.setattr(stark, "_needed", lambda ignore, like: ~ignore if ignore.any() else None)


def mutant_scale_of_whole_width(tracker, monkeypatch):
    for layer in tracker.encoder.layers:
        width = layer.linear1.in_features
        layer.self_attn.in_proj_weight.data[:width] /= math.sqrt(layer.self_attn.heads)
        layer.self_attn.in_proj_bias.data[:width] /= math.sqrt(layer.self_attn.heads)


def mutant_queries_and_keys_swapped(tracker, monkeypatch):
    for layer in tracker.decoder.layers:
        q, k, v = layer.cross_attn.in_proj_weight.data.chunk(3)
        layer.cross_attn.in_proj_weight.data = torch.cat([k, q, v])


def mutant_norm_epsilon(tracker, monkeypatch):
    for module in tracker.backbone.modules():
        if hasattr(module, "running_var"):
            module.eps = 1e-3


def mutant_head_norm_epsilon(tracker, monkeypatch):
    for module in tracker.box_head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3


def mutant_stride_on_first_convolution(tracker, monkeypatch):
    block = tracker.backbone.layer2[0]
    block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)


def mutant_dilated_third_stage(tracker, monkeypatch):
    tracker.backbone.layer3[1].conv2.dilation = tracker.backbone.layer3[1].conv2.padding = (2, 2)
    tracker.backbone.training = True  # the plain path, which knows dilation


def mutant_average_pool(tracker, monkeypatch):
    tracker.backbone.maxpool = nn.AvgPool2d(3, 2, 1)


def mutant_no_last_norm(tracker, monkeypatch):
    tracker.decoder.norm = nn.Identity()


def mutant_norm_before(tracker, monkeypatch):
    tracker.encoder.layers[5].pre_norm = True


def mutant_question_as_target(tracker, monkeypatch):
    plain = tracker.run_decoder
    tracker.run_decoder = lambda x, query, *rest: plain(query.clone(), query, *rest)


def mutant_similarity_as_share(tracker, monkeypatch):
    def locate(memory, decoded, seen=None):
        return STARK.locate(tracker, memory, decoded / math.sqrt(memory.shape[-1]), seen)

    tracker.locate = locate


def mutant_columns_first(tracker, monkeypatch):
    def locate(memory, decoded, seen=None):
        turned = memory.unflatten(1, (20, 20)).transpose(1, 2).flatten(1, 2)
        return STARK.locate(tracker, turned, decoded, seen)

    tracker.locate = locate


def mutant_corners_swapped(tracker, monkeypatch):
    tracker.box_head.top_left, tracker.box_head.bottom_right = (
        tracker.box_head.bottom_right,
        tracker.box_head.top_left,
    )


def mutant_corners_as_centre(tracker, monkeypatch):
    instead(monkeypatch, boxes.xyxy_to_cxcywh, lambda found: found)


def mutant_relu_at_the_end_of_the_bottleneck(tracker, monkeypatch):
    tracker.bottleneck = nn.Sequential(tracker.bottleneck, nn.ReLU())


def mutant_decoder_attentions_swapped(tracker, monkeypatch):
    for layer in tracker.decoder.layers:
        layer.self_attn, layer.cross_attn = layer.cross_attn, layer.self_attn


MUTANTS = [value for name, value in dict(globals()).items() if name.startswith("mutant_")]


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda f: f.__name__.removeprefix("mutant_"))
def test_network_certificate_can_fail(mutate, monkeypatch):
    mutant = copy.deepcopy(loaded("stark-s50"))
    mutate(mutant, monkeypatch)
    assert failed(mutant, S50)


# weights that reach no output: the softmax of a single query is 1, and layer 0's queries have no
# content yet
MUTE = ("decoder.layers.0.self_attn.in_proj_weight", "num_batches_tracked")
REPLACED = [key for key in S50["keys"] if not key.endswith(MUTE)][5::37]


@pytest.mark.parametrize("key", REPLACED)
def test_one_other_tensor_fails(key):
    tracker = loaded("stark-s50")
    weight = tracker.state_dict(keep_vars=True)[official.rename("stark-s50", key)]
    with torch.no_grad():
        right = weight.clone()
        other = entry(f"other:{key}", weight.shape)
        weight.copy_(other * right.std() / other.std() if weight.numel() > 1 else -right)
        seen = failed(tracker, S50)
        weight.copy_(right)
    assert seen


def test_the_order_of_templates_shows_in_the_memory_alone():
    tracker = copy.copy(loaded("stark-st50"))
    tracker.forward = lambda templates, *rest, **more: STARK.forward(
        tracker, templates[::-1], *rest, **more
    )
    errors = network_errors(tracker, ST50, ST50["outputs"])
    assert errors.pop("memory") > 1 and max(errors.values()) <= 1, errors


def test_a_missing_relu_in_the_score_head_fails():
    mutant = copy.deepcopy(loaded("stark-st50"))
    mutant.score_head.layers = nn.ModuleList([nn.Sequential(*mutant.score_head.layers)])
    assert failed(mutant, ST50)


@pytest.mark.parametrize("mine", ["backbone.", "", ".cross_attn.", "query."])
def test_a_forgotten_prefix_is_refused(mine, monkeypatch):
    rules = tuple(pair for pair in official.RENAMINGS[STARK].rules if pair[1] != mine)
    monkeypatch.setitem(official.RENAMINGS, STARK, official.Renaming(rules))
    with pytest.raises(CheckpointError, match="missing"):
        official.load("stark-s50", {key: torch.empty(shape) for key, shape in S50["keys"].items()})


# ---- tracking ----


def lost(tracker: STARK) -> bool:
    return any(error > 1 for error in tracking_errors(tracker, TRACK["outputs"]["st50"]))


@pytest.mark.parametrize(
    "change",
    [
        {"search_factor": 4.9},
        {"template_factor": 2.1},
        {"margin": 9.0},
        {"exact": True},
        {"update_interval": 2},
        {"update_interval": 200},
        {"update_threshold": 0.66},
        {"dynamic": False},
    ],
    ids=str,
)
def test_tracking_certificate_can_fail(change):
    assert lost(following("st50", **change))


def mutant_rounded_side(tracker, monkeypatch):
    monkeypatch.setattr(Tensor, "ceil", Tensor.floor)


def mutant_blue_before_red(tracker, monkeypatch):
    plain = backbones.normalise
    instead(monkeypatch, plain, lambda crops: plain(crops.flip(-3)))


def mutant_other_deviation(tracker, monkeypatch):
    monkeypatch.setattr(backbones, "STD", (0.229, 0.229, 0.225))


def mutant_centred_crop(tracker, monkeypatch):
    """The half pixel that the authors' training has and their tracking has not."""
    plain, half = crops.box_to_frame, torch.tensor([0.5, 0.5, 0, 0])

    def shifted(boxes, windows, *rest):
        return plain(boxes - half / windows.size, windows, *rest)

    instead(monkeypatch, plain, shifted)


def mutant_window_to_the_left(tracker, monkeypatch):
    plain = Windows.around
    monkeypatch.setattr(
        Windows, "around", lambda centre, side, size: plain(centre - 0.5, side, size)
    )


def mutant_template_around_the_box_before(tracker, monkeypatch):
    plain, last = tracker._renewed, []
    look = tracker._look

    def noting(frames, boxes, *rest):
        last.append(boxes)
        return look(frames, boxes, *rest)

    tracker._look = noting
    tracker._renewed = lambda dynamic, frames, boxes, due: plain(dynamic, frames, last[-1], due)


def mutant_first_template_replaced(tracker, monkeypatch):
    plain = tracker.forward
    tracker.forward = lambda templates, *rest: plain([templates[1], templates[1]], *rest)


def mutant_counting_from_one(tracker, monkeypatch):
    plain = tracker.start
    tracker.start = lambda *given: replace(plain(*given), frame=torch.ones(1, dtype=torch.long))


def mutant_logit_as_score(tracker, monkeypatch):
    monkeypatch.setattr(Tensor, "sigmoid", lambda logits: logits)


TRACKING_MUTANTS = [
    value
    for name, value in dict(globals()).items()
    if name.startswith("mutant_") and value not in MUTANTS
]


@pytest.mark.parametrize(
    "mutate", TRACKING_MUTANTS, ids=lambda f: f.__name__.removeprefix("mutant_")
)
def test_tracking_certificate_sees_mistakes(mutate, monkeypatch):
    mutant = following("st50")
    mutate(mutant, monkeypatch)
    assert lost(mutant)
