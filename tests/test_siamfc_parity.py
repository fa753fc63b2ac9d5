"""SiamFC against the authors' code: network, crops, tracking, training step. And that these tests
can fail.
"""

from __future__ import annotations

import copy
import itertools
from functools import cache

import pytest
import torch
from certificates import not_on_page
from golden import away, certified, frames, golden, image, state_dict, summary_error, too_far, worst
from torch import Tensor

from trackkit import official
from trackkit.boxes import cxcywh_to_xywh
from trackkit.crops import Windows, context_side, cut
from trackkit.losses import balanced_bce
from trackkit.trackers.siamfc import SiamFC, SiamFCConfig, SiamFCState, label_map

NETWORK, TRACK, TRAIN = golden("siamfc"), golden("siamfc_track"), golden("siamfc_train")


@cache
def loaded() -> SiamFC:
    return official.load("siamfc", state_dict(NETWORK["keys"], NETWORK["scale"]))


@pytest.fixture(scope="module")
def tracker() -> SiamFC:
    return loaded()


@torch.no_grad()
def network(tracker: SiamFC) -> dict[str, float]:
    """Largest differences of features and response maps from the authors', over all cases."""
    cases = []
    for case, outputs in NETWORK["outputs"].items():
        crops = {
            i["role"]: image(i["name"], i["shape"])
            for i in NETWORK["inputs"]
            if i["case"] == int(case)
        }
        found = {
            f"{role}_feature": summary_error(tracker.features(crop), outputs[f"{role}_feature"])
            for role, crop in crops.items()
        }
        response = tracker(crops["exemplar"], crops["instance"])
        cases.append(found | {"response": away(response.flatten(), outputs["response_full"])})
    return worst(*cases)


def mutant_norm_epsilon(tracker):
    tracker.backbone.conv1[1].eps = 1e-3


def mutant_extra_relu(tracker):
    tracker.backbone.conv5.append(torch.nn.ReLU())


def mutant_flipped_kernel(tracker):
    tracker.respond = lambda z, x: SiamFC.respond(tracker, z.flip(-1), x)


def mutant_mispaired(tracker):
    tracker.respond = lambda z, x: SiamFC.respond(tracker, z.roll(1, 0), x)


def mutant_response_scale(tracker):
    tracker.respond = lambda z, x: SiamFC.respond(tracker, z, x) * 1.001


@pytest.mark.parametrize(
    "mutate",
    [
        mutant_norm_epsilon,
        mutant_extra_relu,
        mutant_flipped_kernel,
        mutant_mispaired,
        mutant_response_scale,
    ],
)
def test_network_certificate_can_fail(tracker, mutate):
    mutant = copy.deepcopy(tracker)
    mutate(mutant)
    assert network(mutant)["response"] > NETWORK["tolerance"]["response"]


@cache
def golden_video() -> tuple[list[Tensor], list[list[int]]]:
    spec = TRACK["frame"]
    return frames(spec["name"], spec["n"], spec["height"], spec["width"])


@pytest.fixture(scope="module")
def video() -> tuple[list[Tensor], list[list[int]]]:
    return golden_video()


def crops() -> dict[str, float]:
    """Differences in grey levels, at single pixels and on average, and of the sides of windows."""
    images, fill = golden_video()[0][:1], torch.tensor(TRACK["border_value"])
    found = {"crops, grey levels": 0.0, "crops, mean grey level": 0.0, "sides of windows, px": 0.0}
    for case in TRACK["crops"]:
        cy, cx = case["center_yx"]  # pixel indices; + 0.5 from a pixel's index to its middle
        centre, side = (
            torch.tensor([[cx + 0.5, cy + 0.5]], dtype=torch.float64),
            torch.tensor([case["size"]], dtype=torch.float64),
        )
        crop = cut(images, Windows.around(centre, side, case["out"]), fill)[0].permute(1, 2, 0)
        mean = abs(crop.double().mean().item() - case["crop"]["sum"] / crop.numel())
        found = worst(
            found,
            {
                "crops, grey levels": summary_error(crop, case["crop"]),
                "crops, mean grey level": mean,
            },
        )
    for case in TRACK["crop_sizes"]:
        box = torch.tensor([case["box_1indexed_xywh"]], dtype=torch.float64)
        exemplar = context_side(box, 0.5)
        found = worst(
            found,
            {
                "sides of windows, px": away(
                    torch.cat([exemplar, exemplar * 255 / 127]), [case["z_size"], case["x_size"]]
                )
            },
        )
    return found


def tracking_error(tracker: SiamFC, rows: list[dict]) -> float:
    """Largest difference of a box, or of the side of the next search window, from the authors',
    each frame started from their state of the frame before.
    """
    images, boxes = golden_video()
    start = tracker.start(images[:1], torch.tensor(boxes[:1]))
    worst = 0.0
    for before, row in itertools.pairwise(rows):
        was = {k: torch.tensor(v, dtype=torch.float64) for k, v in before["state"].items()}
        state = SiamFCState(
            start.exemplar,
            start.fill,
            was["center_yx"].flip(0)[None] + 0.5,
            was["target_hw"].flip(0)[None],
            was["x_sz"][None],
        )
        state, prediction = tracker.step(state, [images[row["frame"]]])
        x, y, w, h = row["box"]  # theirs count from 1
        worst = max(
            worst,
            away(prediction.box[0], [x - 1, y - 1, w, h]),
            away(state.side, [row["state"]["x_sz"]]),
        )
    return worst


@cache
def tracking() -> dict[str, float]:
    images, boxes = golden_video()
    state = loaded().start(images[:1], torch.tensor(boxes[:1]))
    first = TRACK["outputs"]["1.0"][0]["state"]
    assert cxcywh_to_xywh(torch.cat([state.centre, state.size], 1))[0].tolist() == boxes[0]
    found = {
        "first frame, colour around it": away(state.fill[0], TRACK["border_value"]),
        "first frame, exemplar_feature": summary_error(state.exemplar, TRACK["exemplar_feature"]),
        "first frame, sides of windows, px": away(state.side, [first["x_sz"]]),
    }
    for penalty, rows in TRACK["outputs"].items():
        other = SiamFC(SiamFCConfig(scale_penalty=float(penalty))).eval()
        other.load_state_dict(loaded().state_dict())
        found[f"tracking with scale penalty {penalty}, px"] = tracking_error(other, rows)
    return found


@pytest.mark.parametrize(
    "change",
    [{"window_influence": 0.3}, {"scale_rate": 0.9}, {"scale_step": 1.05}, {"upsample": 8}],
)
def test_tracking_certificate_can_fail(tracker, change):
    mutant = SiamFC(SiamFCConfig(scale_penalty=1.0, **change)).eval()
    mutant.load_state_dict(tracker.state_dict())
    assert tracking_error(mutant, TRACK["outputs"]["1.0"]) > TRACK["tolerance"]["box_px"]


def test_positives_of_a_label_map():
    assert all(label_map(size, 8, 16).sum() == TRAIN["n_pos_per_map"] for size in (15, 17))


@cache
def training() -> dict[str, float]:
    """Labels, losses and two steps of training from the golden weights."""
    found = {
        "labels": max(
            away(label_map(size, 8, 16), TRAIN[f"label_{size}x{size}"]) for size in (15, 17)
        )
    }
    examples = TRAIN["balanced_loss_examples"]
    losses = [
        balanced_bce(torch.tensor(example["input"]), torch.tensor(example["target"])).item()
        for example in examples
    ]
    found["balanced loss"] = max(
        abs(loss - example["loss"]) for loss, example in zip(losses, examples, strict=True)
    )

    tracker = copy.deepcopy(loaded()).train()
    pair = {i["name"]: image(i["name"], i["shape"]) for i in TRAIN["inputs"]}
    batch = {
        "templates": pair["siamfc:train_z"][:, None],
        "searches": pair["siamfc:train_x"][:, None],
    }
    optimizer = torch.optim.SGD(tracker.parameters(), **TRAIN["sgd"])
    loss = tracker.loss(batch)["loss"]
    found["loss of the first step"] = abs(loss.item() - TRAIN["loss_first_train_step"])
    loss.backward()
    relative, absolute = TRAIN["tolerance"]["grad_norm_rel"], TRAIN["tolerance"]["grad_norm_abs"]
    gradients = {
        name: parameter.grad.norm().item() for name, parameter in tracker.named_parameters()
    }
    assert set(gradients) == set(TRAIN["grad_norm_step0"])
    found["norms of gradients (relative)"] = max(
        abs(gradients[name] - norm) / max(norm, absolute / relative)
        for name, norm in TRAIN["grad_norm_step0"].items()
    )
    optimizer.step()
    state = tracker.state_dict()
    found["running statistics (relative)"] = max(
        abs(state[name].norm().item() / norm - 1)
        for name, norm in TRAIN["bn_running_norms_after_first_step"].items()
    )
    found["loss of the second step"] = abs(
        tracker.loss(batch)["loss"].item() - TRAIN["loss_second_train_step"]
    )

    stage = SiamFC().recipe("paper")[0]
    steps = stage.schedule_steps
    assert stage.steps == 50 * steps and stage.rate(steps - 1) == stage.rate(0)
    rates = TRAIN["lr_by_epoch_0based"]
    found["learning rates (relative)"] = max(
        abs(stage.rate(epoch * steps) / rate - 1) for epoch, rate in enumerate(rates)
    )
    assert len(rates) == 50
    return found


def deviations() -> dict[str, tuple[float, float, str]]:
    """What was compared -> largest deviation from the authors' code, tolerance, golden file."""
    found = certified(network(loaded()), NETWORK["tolerance"], "siamfc")
    allowed = {
        "grey levels": TRACK["tolerance"]["crop_pixel"],
        "px": TRACK["tolerance"]["box_px"],
        "mean grey level": 0.1,
    }
    allowed |= {
        "sides of windows, px": 1e-4,
        "colour around it": 1e-3,
        "exemplar_feature": TRACK["tolerance"]["exemplar_feature"],
    }
    found |= certified(crops() | tracking(), allowed, "siamfc_track")
    loss = TRAIN["tolerance"]["loss"]
    allowed = {
        "labels": 0,
        "loss": loss,
        "step": loss,
        "statistics (relative)": 1e-4,
        "rates (relative)": 1e-9,
    }
    return found | certified(
        training(),
        allowed | {"gradients (relative)": TRAIN["tolerance"]["grad_norm_rel"]},
        "siamfc_train",
    )


def test_agrees_with_the_authors():
    found = deviations()
    assert len(found) == 3 + 3 + 5 + 7
    assert too_far(found) == {}
    assert not_on_page("SiamFC", found) == []


def test_counts(tracker):
    assert sum(p.numel() for p in tracker.parameters()) == 2_336_320
    assert len(tracker.state_dict()) == 30
