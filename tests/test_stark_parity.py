"""STARK against the authors' code: networks, ablations, tracking, losses, gradients, optimisers.

That these tests can fail is shown in test_stark_mutants.
"""
from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from golden import frames, golden, image, state_dict
from torch import Tensor, nn

from trackkit import checkpoints, official
from trackkit.boxes import clip_with_margin, cxcywh_to_xyxy, xywh_to_cxcywh, xywh_to_xyxy
from trackkit.losses import localisation
from trackkit.profiling import parameters
from trackkit.trackers.stark import Answer, Stark, StarkConfig, Tokens
from trackkit.training import _optimizer, freeze

S50, ST50 = golden("stark_s50"), golden("stark_st50")
ABLATIONS, TRACK, TRAIN = golden("stark_ablations"), golden("stark_track"), golden("stark_train")


@lru_cache(maxsize=1)  # one network in memory at a time
def loaded(name: str, tracking: bool = False) -> Stark:
    network = golden(name.replace("-", "_"))
    return official.load(name, state_dict(network["keys"], TRACK["scale"] if tracking else network["scale"]))


def padding(item: dict) -> Tensor:
    """The mask of an input: True on its padded rows and columns."""
    mask = torch.zeros(item["shape"][0], *item["shape"][2:], dtype=torch.bool)
    for sample, (top, bottom, left, right) in zip(mask, item["pad_tblr"], strict=True):
        height, width = sample.shape
        sample[:top], sample[height - bottom :], sample[:, :left], sample[:, width - right :] = True, True, True, True
    return mask


def encoded(tracker: Stark, inputs: list[dict], case: int) -> tuple[list[Tokens], Tokens]:
    """Templates and search crop of a case as tokens."""
    items = [i for i in inputs if i["case"] == case]
    tokens = {i["role"]: tracker.encode(image(i["name"], i["shape"]), padding(i)) for i in items}
    return [tokens[role] for role in ("template", "dynamic") if role in tokens], tokens["search"]


@torch.no_grad()
def outputs(tracker: Stark, inputs: list[dict], case: int) -> dict[str, Tensor]:
    """What the golden files keep, by their names and in their shapes."""
    features = []
    hook = tracker.backbone.register_forward_hook(lambda module, given, made: features.append(made))
    templates, search = encoded(tracker, inputs, case)
    hook.remove()
    answer, loud = tracker(templates, search), tracker(templates, search, maps=True)  # fused kernels, and the plain ones
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
        return 0.0 if (value.sum(1).tolist(), first) == (expected["n_true"], expected["first_true"]) else math.inf
    got = torch.cat([flat[expected["index"]], torch.stack([flat.mean(), flat.std(unbiased=False), flat.min(), flat.max()])])
    wanted = expected["value"] + [expected[moment] for moment in ("mean", "std", "min", "max")]
    return (got - torch.tensor(wanted, dtype=torch.float64)).abs().max().item()


def case_errors(tracker: Stark, gold: dict, case: str, wanted: dict) -> dict[str, float]:
    """Differences from the authors' network by output, in units of the tolerances."""
    got = outputs(tracker, gold["inputs"], int(case))
    names = [name for name in wanted if not name.endswith("_shape")]
    errors = {name: deviation(got[name], wanted[name]) / gold["tolerance"].get(name, 1) for name in names}
    return {name: math.inf if math.isnan(error) else error for name, error in errors.items()}


def network_errors(tracker: Stark, gold: dict, cases: dict[str, dict]) -> dict[str, float]:
    """The largest over all cases."""
    of_cases = [case_errors(tracker, gold, case, wanted) for case, wanted in cases.items()]
    return {name: max(errors[name] for errors in of_cases) for name in of_cases[0]}


# ---- networks ----

COUNTS = {"stark-s50": (28_095_554, 460), "stark-st50": (28_227_395, 466), "stark-st101": (47_167_299, 721)}


@pytest.mark.parametrize("name", COUNTS)
def test_network(name):
    gold, tracker = golden(name.replace("-", "_")), loaded(name)
    errors = network_errors(tracker, gold, gold["outputs"])
    assert max(errors.values()) <= 1, errors
    assert {"layer3_search", "memory", "pred_boxes", "token_mask"} <= set(errors)
    assert (parameters(tracker), len(tracker.state_dict())) == COUNTS[name]


CHANGES = {
    "enc0": {"encoder_layers": 0},
    "dec0": {"decoder_layers": 0},
    "nopos": {"position": "none"},
    "learnedpos": {"position": "learned"},
    "mlp": {"head": "mlp"},
    "prenorm": {"pre_norm": True},
    "queries10": {"queries": 10},
}


def ablated(variant: str, **more) -> Stark:
    """The authors' network with one of their switches turned; the file has its entries as a difference to ST50's."""
    about = ABLATIONS["variants"][variant]
    keys = {k: v for k, v in {**ST50["keys"], **about["keys_beside_st50"]}.items() if k not in about["keys_not_in"]}
    tracker = Stark(StarkConfig.st50(**{**CHANGES[variant], **more})).eval()
    weights = state_dict(keys, ABLATIONS["scale"])
    checkpoints.load_strictly(tracker, {official.rename("stark-st50", key): value for key, value in weights.items()}, variant)
    return tracker


@pytest.mark.parametrize("variant", ABLATIONS["variants"])
def test_ablated_network(variant):
    about, tracker = ABLATIONS["variants"][variant], ablated(variant)
    errors = network_errors(tracker, ABLATIONS, about["outputs"])
    assert max(errors.values()) <= 1, errors
    assert set(errors) == {"pred_boxes", "pred_logits", "memory", "decoder_out"}
    assert parameters(tracker) == about["params"]


# ---- tracking ----


@lru_cache(maxsize=1)
def golden_video() -> tuple[list[Tensor], list[list[int]]]:
    spec = TRACK["frame"]
    return frames(spec["name"], spec["n"], spec["height"], spec["width"])


def following(variant: str, **changes) -> Stark:
    """The tracker of the golden run, or with other settings."""
    tracker = copy.copy(loaded(f"stark-{variant}", tracking=True))
    interval = {"update_interval": TRACK["st50_update_interval"]} if variant == "st50" else {}
    tracker.config = replace(tracker.config, **{**interval, **changes})
    return tracker


def tracking_errors(tracker: Stark, rows: list[dict]) -> Iterator[float]:
    """Differences from the authors' tracker in units of the tolerances, each step from their box before it."""
    images, boxes = golden_video()
    state = tracker.start(images[:1], torch.tensor(boxes[:1]))
    for before, row in itertools.pairwise(rows):
        given = replace(state, box=torch.tensor([before["box"]], dtype=torch.float64))
        state, prediction = tracker.step(given, [images[row["frame"]]])
        yield deviation(prediction.box, row["box"]) / TRACK["tolerance"]["box_px"]
        if "score" in row:
            yield abs(prediction.score.item() - row["score"]) / TRACK["tolerance"]["score"]
        if (state.dynamic is not given.dynamic) != row.get("template_updated", False):
            yield math.inf


@pytest.mark.parametrize("variant", list(TRACK["outputs"]))
def test_tracking(variant):
    assert max(tracking_errors(following(variant), TRACK["outputs"][variant])) <= 1


def test_clip_with_margin():
    gold = golden("stark_crop")
    for case in gold["clip_box"]:
        size = torch.tensor([[case["W"], case["H"]]], dtype=torch.float64)
        box = clip_with_margin(torch.tensor([case["box"]], dtype=torch.float64), size, case["margin"])
        assert deviation(box, case["out"]) <= gold["tolerance"]["clip_box"]


# ---- training ----


@pytest.mark.parametrize("case", TRAIN["loss"], ids=["usual", "inside out", "beyond the crop"])
def test_losses(case):
    boxes, truth = torch.tensor(case["pred_cxcywh"]), torch.tensor(case["gt_xywh"])
    for exact in (False, True):
        answer = Answer(boxes[:, None], None, boxes, None, {})
        tracker = nn.Module()
        tracker.config = StarkConfig.s50(exact=exact)
        losses = Stark._losses(tracker, answer, xywh_to_cxcywh(truth), torch.ones(len(boxes)), "box")
        assert losses["l1"].item() == pytest.approx(case["l1"], abs=1e-6)
        if case["giou_loss"] or not exact:
            assert losses["giou"].item() == pytest.approx(case["giou_loss"], abs=1e-6)
            assert losses["loss"].item() == pytest.approx(case["total"], abs=1e-5)
        else:  # the authors drop the term of the whole batch; exactly, the good box counts and the bad one does not overlap
            good = TRAIN["loss"][0]
            one, _ = localisation(cxcywh_to_xyxy(torch.tensor(good["pred_cxcywh"][:1])), xywh_to_xyxy(truth[:1]))
            assert losses["giou"].item() >= (one.item() + 1) / 2
            assert losses["loss"].item() == pytest.approx(2 * losses["giou"].item() + 5 * case["l1"], abs=1e-5)


def test_score_loss():
    case, tracker = TRAIN["stage2_bce"], nn.Module()
    tracker.config = StarkConfig.st50()
    logits = torch.tensor(case["logits"])[:, None]
    answer = Answer(torch.zeros(4, 1, 4), logits, logits, None, {})
    loss = Stark._losses(tracker, answer, torch.zeros(4, 4), torch.tensor(case["labels"]), "score")["loss"]
    assert loss.item() == pytest.approx(case["value"], abs=1e-6)


@pytest.mark.parametrize("variant", list(TRAIN["gradients"]))
def test_gradients(variant):
    gold, network = TRAIN["gradients"][variant], {"s50": S50, "st50": ST50}[variant]
    tracker = loaded(f"stark-{variant}")
    freeze(tracker, tracker.recipe("paper")[0].trainable)
    tracker.eval()
    try:
        answer = tracker(*encoded(tracker, network["inputs"], 0))
        losses = tracker._losses(answer, xywh_to_cxcywh(torch.tensor([gold["gt_xywh"]])), torch.ones(1), "box")
        for name in ("loss", "giou", "l1"):
            assert losses[name].item() == pytest.approx(gold[name], rel=1e-5)
        losses["loss"].backward()
        gradients = {name: p.grad.norm().item() for name, p in tracker.named_parameters() if p.grad is not None}
        for key, expected in gold["grad_norm"].items():
            assert gradients[official.rename(f"stark-{variant}", key)] == pytest.approx(expected, rel=1e-3), key
        assert math.hypot(*gradients.values()) == pytest.approx(gold["total_grad_norm"], rel=1e-3)
        without = tuple(official.rename(f"stark-{variant}", f"{key}.") for key in gold["params_without_grad"])
        assert {name for name, _ in tracker.named_parameters() if name.startswith(without)} == {
            name for name, _ in tracker.named_parameters() if name not in gradients
        }
    finally:
        tracker.zero_grad(set_to_none=True)
        tracker.requires_grad_(True)


@pytest.mark.parametrize("variant", ["s50", "st50"])
def test_optimisers(variant):
    tracker = Stark(getattr(StarkConfig, variant)())
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
        assert groups == sorted(wanted, key=lambda group: group["lr"] != groups[0]["lr"]), stage.name
        assert isinstance(optimizer, torch.optim.AdamW) and stage.clip == 0.1
        epoch = 60_000 // 128
        drop = TRAIN["optimizer"][f"stage{number}_step_size"] * epoch
        assert stage.rate(0) == stage.rate(drop - 1) == 1e-4
        assert stage.rate(drop) == stage.rate(stage.steps - 1) == pytest.approx(1e-4 * TRAIN["optimizer"][f"stage{number}_gamma"])
        assert stage.steps == {1: 500, 2: 50}[number] * epoch
