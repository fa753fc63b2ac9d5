"""SiamFC against the authors' code: network, crops, tracking, training step. And that these tests can fail."""
from __future__ import annotations

import copy
import itertools

import pytest
import torch
from golden import assert_summary, frames, golden, image, state_dict

from trackkit import official
from trackkit.boxes import cxcywh_to_xywh
from trackkit.crops import Windows, context_side, cut
from trackkit.losses import balanced_bce
from trackkit.trackers.siamfc import SiamFC, SiamFCConfig, SiamFCState, label_map

NETWORK, TRACK, TRAIN = golden("siamfc"), golden("siamfc_track"), golden("siamfc_train")


@pytest.fixture(scope="module")
def tracker() -> SiamFC:
    return official.load("siamfc", state_dict(NETWORK["keys"], NETWORK["scale"]))


def network_error(tracker: SiamFC) -> float:
    """Largest difference of the response maps from the authors', over all cases."""
    worst = 0.0
    for case, outputs in NETWORK["outputs"].items():
        crops = {i["role"]: image(i["name"], i["shape"]) for i in NETWORK["inputs"] if i["case"] == int(case)}
        with torch.no_grad():
            response = tracker(crops["exemplar"], crops["instance"])
        expected = torch.tensor(outputs["response_full"])
        worst = max(worst, (response.flatten() - expected).abs().max().item())
    return worst


def test_network(tracker):
    assert network_error(tracker) <= NETWORK["tolerance"]["response"]
    for case, outputs in NETWORK["outputs"].items():
        for item in NETWORK["inputs"]:
            if item["case"] == int(case):
                with torch.no_grad():
                    features = tracker.features(image(item["name"], item["shape"]))
                name = f"{item['role']}_feature"
                assert_summary(features, outputs[name], NETWORK["tolerance"][name])


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
    "mutate", [mutant_norm_epsilon, mutant_extra_relu, mutant_flipped_kernel, mutant_mispaired, mutant_response_scale]
)
def test_network_certificate_can_fail(tracker, mutate):
    mutant = copy.deepcopy(tracker)
    mutate(mutant)
    assert network_error(mutant) > NETWORK["tolerance"]["response"]


@pytest.fixture(scope="module")
def video():
    spec = TRACK["frame"]
    return frames(spec["name"], spec["n"], spec["height"], spec["width"])


def test_crops(video):
    fill = torch.tensor(TRACK["border_value"])
    for case in TRACK["crops"]:
        cy, cx = case["center_yx"]  # pixel indices; + 0.5 from a pixel's index to its middle
        centre, side = torch.tensor([[cx + 0.5, cy + 0.5]], dtype=torch.float64), torch.tensor([case["size"]], dtype=torch.float64)
        crop = cut(video[0][:1], Windows.around(centre, side, case["out"]), fill)[0].permute(1, 2, 0)
        assert list(crop.shape) == case["crop"]["shape"]
        values = crop.flatten()[torch.tensor(case["crop"]["index"])].double()
        assert (values - torch.tensor(case["crop"]["value"])).abs().max() <= TRACK["tolerance"]["crop_pixel"]
        assert abs(crop.double().mean() - case["crop"]["sum"] / crop.numel()) < 0.1


def test_crop_sizes():
    for case in TRACK["crop_sizes"]:
        box = torch.tensor([case["box_1indexed_xywh"]], dtype=torch.float64)
        exemplar = context_side(box, 0.5).item()
        assert exemplar == pytest.approx(case["z_size"], abs=1e-4)
        assert exemplar * 255 / 127 == pytest.approx(case["x_size"], abs=1e-4)


def tracking_error(tracker, video, rows) -> float:
    """Largest difference of a box from the authors', each frame started from their state of the frame before."""
    images, boxes = video
    start = tracker.start(images[:1], torch.tensor(boxes[:1]))
    worst = 0.0
    for before, row in itertools.pairwise(rows):
        was = {k: torch.tensor(v, dtype=torch.float64) for k, v in before["state"].items()}
        state = SiamFCState(
            start.exemplar, start.fill, was["center_yx"].flip(0)[None] + 0.5, was["target_hw"].flip(0)[None], was["x_sz"][None]
        )
        _, prediction = tracker.step(state, [images[row["frame"]]])
        expected = torch.tensor(row["box"], dtype=torch.float64) - torch.tensor([1, 1, 0, 0])  # theirs count from 1
        worst = max(worst, (prediction.box[0] - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("penalty", list(TRACK["outputs"]))
def test_tracking(tracker, video, penalty):
    other = SiamFC(SiamFCConfig(scale_penalty=float(penalty))).eval()
    other.load_state_dict(tracker.state_dict())
    assert tracking_error(other, video, TRACK["outputs"][penalty]) <= TRACK["tolerance"]["box_px"]


def test_start(tracker, video):
    images, boxes = video
    state = tracker.start(images[:1], torch.tensor(boxes[:1]))
    assert torch.allclose(state.fill[0].double(), torch.tensor(TRACK["border_value"], dtype=torch.float64), atol=1e-3)
    assert_summary(state.exemplar, TRACK["exemplar_feature"], TRACK["tolerance"]["exemplar_feature"])
    first = TRACK["outputs"]["1.0"][0]["state"]
    assert state.side.item() == pytest.approx(first["x_sz"], abs=1e-4)
    assert cxcywh_to_xywh(torch.cat([state.centre, state.size], 1))[0].tolist() == boxes[0]


@pytest.mark.parametrize("change", [{"window_influence": 0.3}, {"scale_rate": 0.9}, {"scale_step": 1.05}, {"upsample": 8}])
def test_tracking_certificate_can_fail(tracker, video, change):
    mutant = SiamFC(SiamFCConfig(scale_penalty=1.0, **change)).eval()
    mutant.load_state_dict(tracker.state_dict())
    assert tracking_error(mutant, video, TRACK["outputs"]["1.0"]) > TRACK["tolerance"]["box_px"]


@pytest.mark.parametrize("size", [15, 17])
def test_label_map(size):
    labels = label_map(size, 8, 16)
    assert labels.tolist() == TRAIN[f"label_{size}x{size}"]
    assert labels.sum() == TRAIN["n_pos_per_map"]


def test_balanced_loss():
    for example in TRAIN["balanced_loss_examples"]:
        loss = balanced_bce(torch.tensor(example["input"]), torch.tensor(example["target"]))
        assert loss.item() == pytest.approx(example["loss"], abs=TRAIN["tolerance"]["loss"])


def test_training_step(tracker):
    tracker = copy.deepcopy(tracker).train()
    pair = {i["name"]: image(i["name"], i["shape"]) for i in TRAIN["inputs"]}
    batch = {"templates": pair["siamfc:train_z"][:, None], "searches": pair["siamfc:train_x"][:, None]}
    optimizer = torch.optim.SGD(tracker.parameters(), **TRAIN["sgd"])
    loss = tracker.loss(batch)["loss"]
    assert loss.item() == pytest.approx(TRAIN["loss_first_train_step"], abs=TRAIN["tolerance"]["loss"])
    loss.backward()
    for name, parameter in tracker.named_parameters():
        expected = TRAIN["grad_norm_step0"][name]
        relative, absolute = TRAIN["tolerance"]["grad_norm_rel"], TRAIN["tolerance"]["grad_norm_abs"]
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=relative, abs=absolute), name
    optimizer.step()
    for name, expected in TRAIN["bn_running_norms_after_first_step"].items():
        assert tracker.state_dict()[name].norm().item() == pytest.approx(expected, rel=1e-4), name
    second = tracker.loss(batch)["loss"].item()
    assert second == pytest.approx(TRAIN["loss_second_train_step"], abs=TRAIN["tolerance"]["loss"])


def test_learning_rates():
    stage = SiamFC().recipe("paper")[0]
    steps = stage.schedule_steps
    assert stage.steps == 50 * steps
    rates = [stage.rate(epoch * steps) for epoch in range(50)]
    assert rates == pytest.approx(TRAIN["lr_by_epoch_0based"], rel=1e-9)
    assert stage.rate(steps - 1) == stage.rate(0)


def test_counts(tracker):
    assert sum(p.numel() for p in tracker.parameters()) == 2_336_320
    assert len(tracker.state_dict()) == 30
