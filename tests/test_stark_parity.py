"""STARK against the authors' code: networks, ablations, tracking, losses, gradients, optimisers.

That these tests can fail is shown in test_stark_mutants.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache

import pytest
import torch
from certificates import not_on_page
from golden import away, certified, frames, golden, image, state_dict, too_far, worst
from test_stark_samples import frame_of, mask_errors, window_of
from torch import Tensor, nn

from trackkit import checkpoints, official
from trackkit.backbones import normalise
from trackkit.boxes import (
    clip_with_margin,
    cxcywh_to_xywh,
    cxcywh_to_xyxy,
    xywh_to_cxcywh,
    xywh_to_xyxy,
)
from trackkit.costs import parameters
from trackkit.crops import Windows, context_side, cut, outside
from trackkit.losses import localisation
from trackkit.sampling import gt_in_crop, jitter_box
from trackkit.trackers.stark import STARK, Answer, STARKConfig, Tokens
from trackkit.trackers.stark_variants import STARKHungarian
from trackkit.training import _optimizer, freeze

S50, ST50 = golden("stark_s50"), golden("stark_st50")
ABLATIONS, TRACK, TRAIN = golden("stark_ablations"), golden("stark_track"), golden("stark_train")


@lru_cache(maxsize=1)  # one network in memory at a time
def loaded(name: str, tracking: bool = False) -> STARK:
    network = golden(name.replace("-", "_"))
    return official.load(
        name, state_dict(network["keys"], TRACK["scale"] if tracking else network["scale"])
    )


def padding(item: dict) -> Tensor:
    """The mask of an input: True on its padded rows and columns."""
    mask = torch.zeros(item["shape"][0], *item["shape"][2:], dtype=torch.bool)
    for sample, (top, bottom, left, right) in zip(mask, item["pad_tblr"], strict=True):
        height, width = sample.shape
        sample[:top], sample[height - bottom :], sample[:, :left], sample[:, width - right :] = (
            True,
            True,
            True,
            True,
        )
    return mask


def encoded(tracker: STARK, inputs: list[dict], case: int) -> tuple[list[Tokens], Tokens]:
    """Templates and search crop of a case as tokens."""
    items = [i for i in inputs if i["case"] == case]
    tokens = {i["role"]: tracker.encode(image(i["name"], i["shape"]), padding(i)) for i in items}
    return [tokens[role] for role in ("template", "dynamic") if role in tokens], tokens["search"]


@torch.no_grad()
def outputs(tracker: STARK, inputs: list[dict], case: int) -> dict[str, Tensor]:
    """What the golden files keep, by their names and in their shapes."""
    features = []
    hook = tracker.backbone.register_forward_hook(lambda module, given, made: features.append(made))
    templates, search = encoded(tracker, inputs, case)
    hook.remove()
    # fused kernels, and the plain ones
    answer, loud = tracker(templates, search), tracker(templates, search, maps=True)
    top_left, bottom_right = answer.corners or (None, None)
    similarity = loud.maps.get("similarity")
    return {
        "pred_boxes": answer.boxes,
        "pred_logits": answer.logits,
        "score_map_tl": top_left,
        "score_map_br": bottom_right,
        "memory": loud.maps["memory"].transpose(0, 1),
        "decoder_out": loud.decoded[None],
        "similarity": None if similarity is None else similarity.transpose(1, 2),
        "layer3_search": features[-1],
        "feat_search": search.features.transpose(0, 1),
        "feat_template": templates[0].features.transpose(0, 1),
        "pos_search": search.position.transpose(0, 1),
        "token_mask": torch.cat([t.ignore for t in (*templates, search)], 1),
    }


def deviation(value: Tensor, expected: dict | list) -> float:
    """Largest difference from the numbers that a golden file keeps of a tensor."""
    flat = value.double().flatten()
    if isinstance(expected, list):
        return (flat - torch.tensor(expected, dtype=torch.float64)).abs().max().item()
    assert list(value.shape) == expected["shape"]
    if "n_true" in expected:  # a mask
        first = [row.nonzero()[0].item() if row.any() else -1 for row in value]
        return (
            0.0
            if (value.sum(1).tolist(), first) == (expected["n_true"], expected["first_true"])
            else math.inf
        )
    got = torch.cat(
        [
            flat[expected["index"]],
            torch.stack([flat.mean(), flat.std(unbiased=False), flat.min(), flat.max()]),
        ]
    )
    wanted = expected["value"] + [expected[moment] for moment in ("mean", "std", "min", "max")]
    return (got - torch.tensor(wanted, dtype=torch.float64)).abs().max().item()


def case_errors(tracker: STARK, gold: dict, case: str, wanted: dict) -> dict[str, float]:
    """Differences from the authors' network by output, in units of the tolerances."""
    got = outputs(tracker, gold["inputs"], int(case))
    names = [name for name in wanted if not name.endswith("_shape")]
    errors = {
        name: deviation(got[name], wanted[name]) / gold["tolerance"].get(name, 1) for name in names
    }
    return {name: math.inf if math.isnan(error) else error for name, error in errors.items()}


def network_errors(tracker: STARK, gold: dict, cases: dict[str, dict]) -> dict[str, float]:
    """The largest over all cases."""
    return worst(*(case_errors(tracker, gold, case, wanted) for case, wanted in cases.items()))


def in_units(errors: dict[str, float], gold: dict, title: str) -> dict[str, tuple[float, float]]:
    """Errors in units of the tolerances -> deviation and tolerance; the file has none for masks,
    which must be equal.
    """
    found = {}
    for name, error in errors.items():
        tolerance = gold["tolerance"].get(name, 0)
        found[f"{title}{name}"] = (error * tolerance if tolerance else error, tolerance)
    return found


# ---- networks ----

COUNTS = {
    "stark-s50": (28_095_554, 460),
    "stark-st50": (28_227_395, 466),
    "stark-st101": (47_167_299, 721),
}


@cache
def network(name: str) -> dict[str, float]:
    gold, tracker = golden(name.replace("-", "_")), loaded(name)
    assert (parameters(tracker), len(tracker.state_dict())) == COUNTS[name]
    return network_errors(tracker, gold, gold["outputs"])


CHANGES = {
    "enc0": {"encoder_layers": 0},
    "dec0": {"decoder_layers": 0},
    "nopos": {"position": "none"},
    "learnedpos": {"position": "learned"},
    "mlp": {"head": "mlp"},
    "prenorm": {"pre_norm": True},
    "queries10": {"queries": 10},
}


def ablated(variant: str, **more) -> STARK:
    """The authors' network with one of their switches turned; the file has its entries as a
    difference to ST50's.
    """
    about = ABLATIONS["variants"][variant]
    keys = {
        k: v
        for k, v in {**ST50["keys"], **about["keys_beside_st50"]}.items()
        if k not in about["keys_not_in"]
    }
    cls = STARKHungarian if variant == "queries10" else STARK
    tracker = cls(cls.Config.st50(**{**CHANGES[variant], **more})).eval()
    weights = state_dict(keys, ABLATIONS["scale"])
    checkpoints.load_strictly(
        tracker,
        {official.rename("stark-st50", key): value for key, value in weights.items()},
        variant,
    )
    return tracker


@cache
def ablated_networks() -> dict[str, float]:
    """The largest errors over all switches."""
    found = []
    for variant, about in ABLATIONS["variants"].items():
        tracker = ablated(variant)
        assert parameters(tracker) == about["params"]
        found.append(network_errors(tracker, ABLATIONS, about["outputs"]))
        assert set(found[-1]) == {"pred_boxes", "pred_logits", "memory", "decoder_out"}
    return worst(*found)


# ---- tracking ----


@lru_cache(maxsize=1)
def golden_video() -> tuple[list[Tensor], list[list[int]]]:
    spec = TRACK["frame"]
    return frames(spec["name"], spec["n"], spec["height"], spec["width"])


def following(variant: str, **changes) -> STARK:
    """The tracker of the golden run, or with other settings."""
    tracker = copy.copy(loaded(f"stark-{variant}", tracking=True))
    interval = {"update_interval": TRACK["st50_update_interval"]} if variant == "st50" else {}
    tracker.config = replace(tracker.config, **{**interval, **changes})
    return tracker


def tracked(tracker: STARK, rows: list[dict]) -> Iterator[dict[str, float]]:
    """Differences from the authors' tracker, each step from their box before it."""
    images, boxes = golden_video()
    state = tracker.start(images[:1], torch.tensor(boxes[:1]))
    for before, row in itertools.pairwise(rows):
        given = replace(state, box=torch.tensor([before["box"]], dtype=torch.float64))
        state, prediction = tracker.step(given, [images[row["frame"]]])
        found = {"px": deviation(prediction.box, row["box"])}
        if "score" in row:
            found["score"] = abs(prediction.score.item() - row["score"])
        renewed = state.dynamic is not given.dynamic
        yield found | {
            "templates renewed at other times": 0.0
            if renewed == row.get("template_updated", False)
            else 1.0
        }


def tracking_errors(tracker: STARK, rows: list[dict]) -> Iterator[float]:
    """The same in units of the tolerances, one after the other."""
    allowed = {
        "px": TRACK["tolerance"]["box_px"],
        "score": TRACK["tolerance"]["score"],
        "templates renewed at other times": 1e-9,
    }
    for found in tracked(tracker, rows):
        yield from (value / allowed[kind] for kind, value in found.items())


@cache
def tracking() -> dict[str, float]:
    found = {}
    for variant, rows in TRACK["outputs"].items():
        found |= {
            f"stark-{variant}, tracking, {kind}": value
            for kind, value in worst(*tracked(following(variant), rows)).items()
        }
    return found


def crops() -> dict[str, float]:
    """Differences of crops, in grey levels and normalised, of masks, of boxes in crops and of
    clipped boxes.
    """
    gold, frame, found = golden("stark_crop"), frame_of(golden("stark_crop")["frame"]), []
    for case in gold["crops"]:
        crop = cut([frame[:, :-1, :-1]], window_of(case), torch.zeros(3))
        pixels, normal = crop[0].permute(1, 2, 0).flatten(), normalise(crop)[0].flatten()
        wanted, wanted_normal = case["crop"], case["normalised"]
        found.append(
            {
                "crops, crop_pixel": away(pixels[wanted["index"]], wanted["value"]),
                "crops, normalised": away(normal[wanted_normal["index"]], wanted_normal["value"]),
                "crops of another sum": float(crop.sum() != wanted["sum"]),
            }
        )
    for case in gold["gt_in_crop"]:
        gt, extract = (torch.tensor([case[k]], dtype=torch.float64) for k in ("gt", "extract"))
        centre = xywh_to_cxcywh(extract)[:, :2]
        windows = Windows.around(centre, (context_side(extract) * 5).ceil(), 320)
        found.append(
            {
                "boxes in crops, gt_in_crop": away(
                    cxcywh_to_xywh(gt_in_crop(gt, centre, windows))[0], case["gt_in_crop"]
                )
            }
        )
    for case in gold["clip_box"]:
        size = torch.tensor([[case["W"], case["H"]]], dtype=torch.float64)
        box = clip_with_margin(
            torch.tensor([case["box"]], dtype=torch.float64), size, case["margin"]
        )
        found.append({"clipped boxes, clip_box": away(box[0], case["out"])})
    masks = mask_errors(lambda w, width, height: outside(w, [(width - 1, height - 1)])[0])
    return worst(*found) | {"crops with another mask": masks}


# ---- training ----


def bare(config: STARKConfig) -> nn.Module:
    """What the losses need of a tracker."""
    tracker = nn.Module()
    tracker.config = config
    return tracker


def losses() -> dict[str, float]:
    """Of three batches: usual boxes, boxes inside out (whose GIoU term the authors drop), boxes
    beyond the crop; and of scores.
    """
    found = []
    for case in TRAIN["loss"]:
        boxes, truth = torch.tensor(case["pred_cxcywh"]), torch.tensor(case["gt_xywh"])
        answer = Answer(boxes[:, None], None, boxes, None, {})
        got = STARK.losses(
            bare(STARKConfig.s50(exact=False)),
            answer,
            xywh_to_cxcywh(truth),
            torch.ones(len(boxes)),
            "box",
        )
        wanted = {"l1": case["l1"], "giou": case["giou_loss"]}
        found.append(
            {
                "losses of boxes, loss": max(
                    abs(got[name].item() - value) for name, value in wanted.items()
                )
            }
        )
        found.append({"losses of boxes, total": abs(got["loss"].item() - case["total"])})
    case = TRAIN["stage2_bce"]
    logits = torch.tensor(case["logits"])[:, None]
    answer = Answer(torch.zeros(4, 1, 4), logits, logits, None, {})
    got = STARK.losses(
        bare(STARKConfig.st50()), answer, torch.zeros(4, 4), torch.tensor(case["labels"]), "score"
    )["loss"]
    return worst(*found) | {"losses of scores, loss": abs(got.item() - case["value"])}


@pytest.mark.parametrize("case", TRAIN["loss"], ids=["usual", "inside out", "beyond the crop"])
def test_exact_losses(case):
    """Where the authors drop the GIoU term of a whole batch for one box, the others' still
    counts.
    """
    boxes, truth = torch.tensor(case["pred_cxcywh"]), torch.tensor(case["gt_xywh"])
    answer = Answer(boxes[:, None], None, boxes, None, {})
    found = STARK.losses(
        bare(STARKConfig.s50(exact=True)),
        answer,
        xywh_to_cxcywh(truth),
        torch.ones(len(boxes)),
        "box",
    )
    assert found["l1"].item() == pytest.approx(case["l1"], abs=1e-6)
    if case["giou_loss"]:
        assert found["giou"].item() == pytest.approx(case["giou_loss"], abs=1e-6)
        assert found["loss"].item() == pytest.approx(case["total"], abs=1e-5)
    else:  # exactly, the good box counts and the bad one does not overlap
        good = TRAIN["loss"][0]
        one, _ = localisation(
            cxcywh_to_xyxy(torch.tensor(good["pred_cxcywh"][:1])), xywh_to_xyxy(truth[:1])
        )
        assert found["giou"].item() >= (one.item() + 1) / 2
        assert found["loss"].item() == pytest.approx(
            2 * found["giou"].item() + 5 * case["l1"], abs=1e-5
        )


@cache
def gradients(variant: str) -> dict[str, float]:
    """Relative differences of losses and of the norms of gradients in stage 1."""
    gold, inputs = TRAIN["gradients"][variant], {"s50": S50, "st50": ST50}[variant]["inputs"]
    tracker = loaded(f"stark-{variant}")
    freeze(tracker, tracker.recipe("paper")[0].trainable)
    tracker.eval()
    try:
        answer = tracker(*encoded(tracker, inputs, 0))
        losses = tracker.losses(
            answer, xywh_to_cxcywh(torch.tensor([gold["gt_xywh"]])), torch.ones(1), "box"
        )
        losses["loss"].backward()
        norms = {
            name: p.grad.norm().item()
            for name, p in tracker.named_parameters()
            if p.grad is not None
        }
        pairs = [
            (norms[official.rename(f"stark-{variant}", key)], norm)
            for key, norm in gold["grad_norm"].items()
        ]
        pairs.append((math.hypot(*norms.values()), gold["total_grad_norm"]))
        without = tuple(
            official.rename(f"stark-{variant}", f"{key}.") for key in gold["params_without_grad"]
        )
        names = {name for name, _ in tracker.named_parameters()}
        assert {name for name in names if name.startswith(without)} == names - set(norms)
        return {
            f"stark-{variant}, loss (relative)": max(
                abs(losses[name].item() / gold[name] - 1) for name in ("loss", "giou", "l1")
            ),
            f"stark-{variant}, norms of gradients (relative)": max(
                abs(got / norm - 1) for got, norm in pairs
            ),
        }
    finally:
        tracker.zero_grad(set_to_none=True)
        tracker.requires_grad_(True)


def jitter() -> float:
    """Largest difference of a box that is jittered for a search crop, px."""
    found = []
    for case in TRAIN["jitter"]:
        box, normal, uniform = (
            torch.tensor(case[k], dtype=torch.float64) for k in ("box", "normal", "uniform")
        )
        found.append(away(jitter_box(box, 0.5, 4.5, normal, uniform), case["search_jittered"]))
    return max(found)


@cache
def deviations() -> dict[str, tuple[float, float, str]]:
    """What was compared -> largest deviation from the authors' code, tolerance, golden file.

    Ordered such that each network is loaded once.
    """
    found, training = {}, losses() | {"jittered boxes, px": jitter()}
    for name in COUNTS:
        file = name.replace("-", "_")
        found |= {
            what: (*entry, file)
            for what, entry in in_units(network(name), golden(file), f"{name}, ").items()
        }
        if name.removeprefix("stark-") in TRAIN["gradients"]:
            training |= gradients(name.removeprefix("stark-"))
    ablations = in_units(ablated_networks(), ABLATIONS, "seven switches of stark-st50, ")
    found |= {what: (*entry, "stark_ablations") for what, entry in ablations.items()}
    allowed = {
        "px": TRACK["tolerance"]["box_px"],
        "score": TRACK["tolerance"]["score"],
        "other times": 0,
    }
    found |= certified(tracking(), allowed, "stark_track")
    found |= certified(
        crops(),
        golden("stark_crop")["tolerance"]
        | {"crops of another sum": 0, "crops with another mask": 0},
        "stark_crop",
    )
    # only for gradients the file has a tolerance
    allowed = {
        "loss": 1e-6,
        "total": 1e-5,
        "loss (relative)": 1e-5,
        "gradients (relative)": 1e-3,
        "px": 2e-5,
    }
    return found | certified(training, allowed, "stark_train")


def test_agrees_with_the_authors():
    found = deviations()
    assert {"layer3_search", "memory", "pred_boxes", "token_mask"} <= set(network("stark-s50"))
    assert len(found) == 11 + 12 + 12 + 4 + 5 + 6 + 8
    assert too_far(found) == {}
    assert not_on_page("STARK", found) == []


@pytest.mark.parametrize("variant", ["s50", "st50"])
def test_optimisers(variant):
    tracker = STARK(getattr(STARKConfig, variant)())
    stages = tracker.recipe("paper")
    assert [stage.batch for stage in stages] == [128] * len(stages)
    for number, stage in enumerate(stages, start=1):
        optimizer = _optimizer(stage, tracker)
        groups = [
            {
                "n_tensors": len(group["params"]),
                "n_elements": sum(p.numel() for p in group["params"]),
                **{name: group[name] for name in ("lr", "weight_decay", "eps")},
                "betas": list(group["betas"]),
            }
            for group in optimizer.param_groups
        ]
        wanted = TRAIN["optimizer"][f"stage{number}"]
        assert groups == sorted(wanted, key=lambda group: group["lr"] != groups[0]["lr"]), (
            stage.name
        )
        assert isinstance(optimizer, torch.optim.AdamW) and stage.clip == 0.1
        epoch = 60_000 // 128
        drop = TRAIN["optimizer"][f"stage{number}_step_size"] * epoch
        assert stage.rate(0) == stage.rate(drop - 1) == 1e-4
        assert (
            stage.rate(drop)
            == stage.rate(stage.steps - 1)
            == pytest.approx(1e-4 * TRAIN["optimizer"][f"stage{number}_gamma"])
        )
        assert stage.steps == {1: 500, 2: 50}[number] * epoch
