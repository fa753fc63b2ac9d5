"""SBT's behaviour: what is computed once, what every field of the config changes, single images,
and the trackers that take its backbone.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import timm
import torch
from golden import clouds
from torch import Tensor, nn

from trackkit import costs, official, weights
from trackkit.errors import CheckpointError, DataError, TrackkitError
from trackkit.trackers.base import join, take
from trackkit.trackers.sbt import (
    SBT,
    Answer,
    ConvMlp,
    EoC,
    SBTConfig,
    depthwise_correlation,
    positive_tokens,
)
from trackkit.trackers.sbt_backbone import load_blocks, pvt_name, shift_bias, squares, whole
from trackkit.trackers.sbt_pretraining import Classifier
from trackkit.trackers.siamfc_ca import SiamFCCA, SiamFCCAConfig
from trackkit.trackers.stark_ca import STARKCA, STARKCAConfig
from trackkit.training import train

EQUAL = {"template_size": 128}
AXES = {
    "base": {},
    "vg": {"attention": "vg"},
    "vl": {"attention": "vl", "local": 4},
    "sl": {"attention": "sl", "local": 4, **EQUAL},
    "relative": {"position": "relative"},
    "relative in squares": {"position": "relative", "attention": "sl", "local": 4, **EQUAL},
    "absolute": {"position": "absolute"},
    "no position": {"position": "none"},
    "patches": {"embedding": "patches"},
    "sequential": {"order": "sequential"},
    "eq7": {"head": "eq7"},
    "mlp3": {"head": "mlp3"},
    "mlp5": {"head": "mlp5"},
    "depthwise": {"correlation": "depthwise", "cross": ((), (), ())},
    "embedded and depthwise": {"correlation": "depthwise"},
    "cross at levels": {"correlation": "cross", "cross": ((), (), ())},
    "early CA": {"cross": ((1,), (1,), (1, 3))},
    "one CA": {"cross": ((), (), (1,))},
    "last CA": {"cross": ((), (), (4,))},
    "one stage": {
        "dims": (32,), "heads": (2,), "blocks": (3,), "strides": (8,), "ratios": (4,),
        "reductions": (1,), "cross": ((2,),),
        "attention": "vg", "position": "absolute", "embedding": "patches",
    },
}  # fmt: skip


# three stages, as the paper's have; sbt-tiny itself has two
SMALL = {
    "template_size": 64, "search_size": 128, "template_factor": 2.0, "search_factor": 4.0,
    "train_factor": None, "embedding": "conv", "dims": (16, 32, 64), "heads": (1, 2, 4),
    "blocks": (1, 1, 4), "strides": (4, 2, 1), "ratios": (4, 4, 4), "reductions": (8, 4, 2),
    "cross": ((), (), (2, 4)), "head": "released", "anchored": False, "first_look": False,
    "size_rate": 1.0,
}  # fmt: skip


def small(**changes) -> SBTConfig:
    return SBTConfig.tiny(**{**SMALL, **changes})


def tiny(**changes) -> SBT:
    torch.manual_seed(0)
    return SBT(small(**changes)).eval()


def batch(config: SBTConfig, size: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def noise(side: int) -> Tensor:
        return torch.randint(
            0, 256, (size, 1, 3, side, side), generator=generator, dtype=torch.uint8
        )

    boxes = torch.tensor([0.5, 0.4, 0.3, 0.2]).expand(size, 1, 4)
    return {
        "templates": noise(config.template_size),
        "searches": noise(config.search_size),
        "search_boxes": boxes,
    }


@pytest.fixture(scope="module")
def video() -> list[Tensor]:
    return [clouds(f"sbt:{i}", 96, 128) for i in range(3)]


BOXES = torch.tensor([[30.0, 40.0, 20.0, 30.0], [90.0, 10.0, 30.0, 20.0]], dtype=torch.float64)


@pytest.mark.parametrize("name", AXES)
def test_every_axis_learns_tracks_and_costs(name, video):
    tracker = tiny(**AXES[name])
    losses = tracker.train().loss(batch(tracker.config))
    losses["loss"].backward()
    for key, parameter in tracker.named_parameters():  # no layer is idle
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    tracker.eval()
    state = tracker.start(video[:2], BOXES)
    both, prediction = tracker.step(state, video[1:])
    _, seen = tracker.step(state, video[1:], maps=True)
    assert torch.allclose(seen.box, prediction.box, atol=1e-3)  # without the maps by another way
    _, alone = tracker.step(take(state, [1]), video[2:])
    assert torch.allclose(alone.box, prediction.box[1:], atol=1e-3)
    assert take(both, [1]).template.map.shape[0] == 1
    cost = costs.by_the_paper(tracker)
    assert (
        cost["paper"] == {}
        and cost["parameters"] <= sum(p.numel() for p in tracker.parameters())
        and cost["macs"] > 1e7
    )


def test_axes_differ():
    """Configs with the same parameters say something else; the network has what the config asks
    for.
    """
    weights, answers = tiny().state_dict(), []
    image, template = torch.randn(1, 3, 128, 128), torch.randn(1, 3, 64, 64)
    for changes in (
        {},
        {"order": "sequential"},
        {"cross": ((), (), (2, 3))},
        {"cross": ((), (1,), (2, 4))},
        {"cross": ((), (), (1, 4))},
    ):
        tracker = tiny(**changes)
        tracker.load_state_dict(weights)
        with torch.no_grad():
            answers.append(tracker(tracker.encode(template), image).logits)
    for i, first in enumerate(answers):
        assert all((first - second).abs().max() > 1e-6 for second in answers[i + 1 :])
    blocks = {
        name: tiny(**AXES[name]).backbone.stages[2].blocks
        for name in ("base", "vg", "vl", "relative", "no position")
    }
    assert blocks["base"][0].reduce.stride == (2, 2) and blocks["vg"][0].reduce is None
    assert [block.local for block in blocks["vl"]] == [4, 0, 4, 0] and blocks["vl"][
        1
    ].reduce is not None
    assert [block.offsets is None for block in blocks["relative"]] == [False, True, False, True]
    assert blocks["no position"][0].mlp.position is None


# ---- what is computed, and when ----


def calls(tracker: nn.Module, method: str, block: EoC, function) -> int:
    """How often a block's method is called in `function`."""
    original, count = getattr(EoC, method), 0

    def counted(self, *args, **rest):
        nonlocal count
        count += self is block
        return original(self, *args, **rest)

    with patch.object(EoC, method, counted):
        function()
    return count


def test_the_template_goes_through_the_first_blocks_once(video):
    tracker = tiny(blocks=(2, 1, 4))
    state = tracker.start(video[:1], BOXES[:1])
    blocks = {
        (s + 1, b + 1): block
        for s, stage in enumerate(tracker.backbone.stages)
        for b, block in enumerate(stage.blocks)
    }

    def step():
        tracker.step(state, video[1:2])

    absorbed = {at: calls(tracker, "absorb", block, step) for at, block in blocks.items()}
    # CA blocks are 3.2 and 3.4: until 3.1 only the search crop; what 3.4 would make of the template
    # nobody reads
    assert absorbed == {(1, 1): 1, (1, 2): 1, (2, 1): 1, (3, 1): 1, (3, 2): 2, (3, 3): 2, (3, 4): 1}
    asked_for = {at: calls(tracker, "keys_values", block, step) for at, block in blocks.items()}
    assert asked_for[3, 2] == 1  # the search crop's; the template's are kept
    assert asked_for[3, 4] == 1  # the template's; nobody asks the search crop for its own
    tracker.start(video[:1], BOXES[:1])
    assert calls(tracker, "absorb", blocks[3, 1], lambda: tracker.start(video[:1], BOXES[:1])) == 1


def test_what_is_left_out_changes_nothing():
    tracker = tiny()
    image, template = torch.randn(2, 3, 128, 128), torch.randn(2, 3, 64, 64)
    backbone = tracker.backbone
    with torch.no_grad():
        short, _ = backbone.together(
            backbone.alone(image), backbone.prepare(backbone.alone(template))
        )
        x, z = (stage_input.permute(0, 2, 3, 1) for stage_input in (image, template))
        # plainly, as the paper has it
        for stage, cross in zip(backbone.stages, tracker.config.cross, strict=True):
            x, z = stage.embed(x)[0], stage.embed(z)[0]
            for number, block in enumerate(stage.blocks, 1):
                kv_x, kv_z = block.keys_values(block.norm1(x)), block.keys_values(block.norm1(z))
                kv = (kv_z, kv_x) if number in cross else (kv_x, kv_z)
                x, z = (
                    block.absorb(i, block.attend(block.queries(block.norm1(i)), pair, i)[0])
                    for i, pair in zip((x, z), kv, strict=True)
                )
        both, other = backbone.together(backbone.alone(image), backbone.alone(template), both=True)
    assert torch.allclose(short.map, x, atol=1e-5) and torch.allclose(both.map, x, atol=1e-5)
    assert torch.allclose(other.map, z, atol=1e-5)


def test_blocks_behind_the_last_cross_attention_run():
    """The authors' code leaves them out."""
    tracker = tiny(cross=((), (), (2,)))
    image, template = torch.randn(1, 3, 128, 128), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = tracker(tracker.encode(template), image).logits
        tracker.backbone.stages[2].blocks[3].proj.bias[0] += 1
        assert (tracker(tracker.encode(template), image).logits - before).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["base", "depthwise", "cross at levels", "last CA"])
def test_the_answer_depends_on_the_template(name):
    tracker = tiny(**AXES[name])
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        one, two = (
            tracker(tracker.encode(torch.randn(1, 3, 64, 64)), image).logits for _ in range(2)
        )
    assert (one - two).abs().max() > 1e-7


@pytest.mark.parametrize("conditional", [True, False])
def test_the_mlp_is_the_same_without_gradients(conditional):
    torch.manual_seed(0)
    mlp, x = ConvMlp(8, 24, conditional), torch.randn(2, 6, 5, 8)
    before = x.clone()
    with torch.no_grad():
        quick = mlp(x)
    assert torch.equal(x, before) and torch.allclose(quick, mlp(x), atol=1e-6)


def test_maps_are_shares_of_what_was_looked_at(video):
    tracker = tiny()
    state = tracker.start(video[:2], BOXES)
    _, prediction = tracker.step(state, video[1:], maps=True)
    maps = prediction.maps
    assert maps["stage1.block1.attention"].shape == (2, 1, 32 * 32, 4 * 4)
    assert maps["stage3.block1.attention"].shape == (2, 4, 16 * 16, 8 * 8)
    assert maps["stage3.block2.attention"].shape == (2, 4, 16 * 16, 4 * 4)  # keys of the template
    for name, value in maps.items():
        if name.endswith("attention"):
            assert torch.allclose(value.sum(-1), torch.ones(()), atol=1e-5), name
    assert maps["stage3.block4"].shape == (2, 16, 16, 64) and "stage3.block4.template" not in maps
    assert maps["score"].shape == maps["blended"].shape == (2, 16, 16)
    best = maps["blended"].flatten(1).argmax(1)
    assert torch.equal(maps["score"].flatten(1)[torch.arange(2), best], prediction.score)


# ---- tracking ----


def test_states_can_be_joined_taken_and_kept(video):
    tracker = tiny()
    state = tracker.start(video[:2], BOXES)
    parts = [tracker.start(video[i : i + 1], BOXES[i : i + 1]) for i in range(2)]
    later, prediction = tracker.step(join(*parts), video[1:])
    assert torch.allclose(prediction.box, tracker.step(state, video[1:])[1].box, atol=1e-4)
    assert torch.equal(state.box, BOXES)  # a step leaves the state that it is given
    _, again = tracker.step(take(later, [1]), video[:1])  # the first sequence has ended
    assert torch.allclose(
        again.box, tracker.step(later, [video[2], video[0]])[1].box[1:], atol=1e-3
    )


def test_window_and_factor(video):
    tracker, plain = tiny(window_influence=0.49), tiny(window_influence=0.0)
    state = tracker.start(video[:1], BOXES[:1])
    for one, weight in ((tracker, 0.49), (plain, 0.0)):
        maps = one.step(state, video[1:2], maps=True)[1].maps
        hann = torch.hann_window(16, periodic=False, dtype=torch.float64)
        assert torch.allclose(
            maps["blended"][0], (1 - weight) * maps["score"][0] + weight * hann[:, None] * hann
        )
    sides = [
        tiny(search_factor=f).step(state, video[1:2], maps=True)[1].maps["window"][0, 2].item()
        for f in (4.0, 5.0)
    ]
    assert sides == [98, 123]  # ceil(sqrt(600) * factor)


@pytest.mark.parametrize(
    "box",
    [
        [-5.0, -5.0, 10.0, 10.0],
        [120.0, 90.0, 60.0, 60.0],
        [0.0, 0.0, 128.0, 96.0],
        [60.0, 40.0, 0.5, 0.5],
    ],
)
def test_boxes_at_the_border_and_frames_smaller_than_the_crop(box, video):
    for exact in (True, False):
        tracker = tiny(exact=exact)
        state = tracker.start(video[:1], torch.tensor([box]))
        for frame in (video[1], video[2][:, :20, :30]):
            state, prediction = tracker.step(state, [frame])
            x, y, w, h = prediction.box[0].tolist()
            height, width = frame.shape[1:]
            margin = tracker.config.margin
            assert 0 <= x <= width - margin and 0 <= y <= height - margin and min(w, h) >= margin
            assert 0 <= prediction.score.item() <= 1


def test_bad_boxes_are_refused(video):
    for box in (
        [500.0, 500.0, 10.0, 10.0],
        [float("nan"), 0.0, 10.0, 10.0],
        [10.0, 10.0, 0.0, 10.0],
    ):
        with pytest.raises(DataError):
            tiny().start(video[:1], torch.tensor([box]))


# ---- targets and losses ----


def test_positive_tokens():
    boxes = torch.tensor(
        [
            [0.5, 0.5, 0.5, 0.25],
            [0.0, 0.0, 0.5, 0.5],
            [1.0, 1.0, 0.5, 0.5],
            [0.5, 0.5, 2.0, 2.0],
            [1.5, 0.5, 0.5, 0.5],
        ]
    )
    grid = positive_tokens(boxes, 8).unflatten(1, (8, 8))
    assert grid.sum((1, 2)).tolist() == [8, 4, 4, 64, 0]
    assert grid[0, 3:5, 2:6].all() and grid[1, :2, :2].all() and grid[2, 6:, 6:].all()
    official_ones = positive_tokens(boxes, 8, wrapped=True).unflatten(1, (8, 8))
    assert official_ones.sum((1, 2)).tolist() == [8, 0, 4, 16, 0]
    assert official_ones[3, 4:, 4:].all()


def test_positive_tokens_of_edges_on_a_corner_are_the_authors():
    """Their cell edges are Python's numbers, float64, made of float32 boxes, whatever ours are."""
    drawn = torch.randint(5, 95, (500, 4), generator=torch.Generator().manual_seed(0)) / 100
    boxes = torch.cat([torch.tensor([[0.31, 0.7, 0.12, 0.4], [0.55, 0.52, 0.4, 0.1]]), drawn])
    expected = []
    for cx, cy, w, h in boxes.tolist():
        edges = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
        left, top, right, bottom = (min(max(math.ceil(32 * edge), 0), 32) for edge in edges)
        grid = torch.zeros(32, 32, dtype=torch.bool)
        grid[top:bottom, left:right] = True
        expected.append(grid.flatten())
    assert [int(grid.sum()) for grid in expected[:2]] == [39, 39]
    assert torch.equal(positive_tokens(boxes, 32), torch.stack(expected))
    rounded = (boxes.double() * 100).round() / 100  # as a user types them
    assert torch.equal(positive_tokens(rounded, 32), torch.stack(expected))


def test_training_crops_are_those_of_tracking():
    tracker = tiny(exact=False)
    spec = tracker.samples()
    assert spec.template == tracker.template_crop
    assert replace(spec.search, jitter_size=0.0, jitter_centre=0.0) == tracker.search_crop


def test_losses_by_hand():
    tracker = tiny(search_size=64, background=0.5)
    logits = torch.zeros(1, 64, 2)
    logits[0, 18] = torch.tensor([2.0, 0.0])
    boxes = torch.full((1, 64, 4), 0.25)
    # between corners: it has the next token, in row and column 2
    truth = torch.tensor([[0.2, 0.2, 0.08, 0.08]])
    losses = tracker.compare(Answer(logits, boxes, {}), truth)
    log2, rest = torch.log(torch.tensor(2.0)), torch.log1p(torch.exp(torch.tensor(-2.0)))
    assert losses["class"].item() == pytest.approx(
        ((rest + 63 * 0.5 * log2) / (1 + 63 * 0.5)).item(), rel=1e-6
    )
    assert losses["l1"].item() == pytest.approx(2 * 0.05 + 2 * 0.17)
    # the true box lies in the other
    assert losses["giou"].item() == pytest.approx(1 - 0.08**2 / 0.25**2, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(
        12 * losses["class"].item() + 7 * 0.44 + 5 * losses["giou"].item(), rel=1e-6
    )
    tenfold = replace(tracker.config, weights=(120.0, 70.0, 50.0))
    with patch.object(tracker, "config", tenfold):
        assert tracker.compare(Answer(logits, boxes, {}), truth)["loss"].item() == pytest.approx(
            10 * losses["loss"].item()
        )


def test_no_positive_token_in_a_batch():
    tracker = tiny(positives="wrapped")
    sample = batch(tracker.config) | {
        "search_boxes": torch.tensor([[[0.0, 0.5, 0.5, 0.5]]]).expand(2, 1, 4)
    }
    losses = tracker.loss(sample)
    losses["loss"].backward()
    assert losses["l1"] == losses["giou"] == 0 and torch.isfinite(losses["loss"])


def test_drop_path_rises_block_by_block():
    blocks = [block for stage in tiny(drop_path=0.1).backbone.stages for block in stage.blocks]
    assert [block.drop_path.rate for block in blocks] == pytest.approx(
        [0, 0.02, 0.04, 0.06, 0.08, 0.1]
    )


def test_it_learns(tmp_path):
    """The whole way: samples, loss, optimiser, file."""
    from trackkit.synth import SynthConfig, SynthDataset

    torch.manual_seed(0)
    tracker = SBT(small())
    (stage,) = tracker.recipe("tiny")
    stage = dataclasses.replace(stage, steps=6, batch=4, warmup=1)
    log = train(
        tracker,
        [stage],
        SynthDataset(SynthConfig(), seed=0, length=50),
        tmp_path,
        log_steps=2,
        progress=False,
        device="cpu",
    )
    assert log[-1]["loss"] < log[0]["loss"]
    again = weights.load(tmp_path / "tracker.safetensors")
    assert again.config == tracker.config and isinstance(again.config.cross[2], tuple)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), tracker.state_dict().values(), strict=True)
    )


# ---- single images ----


@pytest.fixture(scope="module")
def pvt() -> nn.Module:
    torch.manual_seed(3)
    model = timm.create_model("pvt_v2_b0", num_classes=7).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


LIKE_B0 = {"blocks": (2, 2, 2), "cross": ((), (), (2,)), "levels": (1,)}


def test_the_classifier_is_a_pvt(pvt):
    classifier = Classifier(SBTConfig.light(**LIKE_B0), classes=7).eval()
    classifier.load_state_dict({pvt_name(key): value for key, value in pvt.state_dict().items()})
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(classifier(images), pvt(images), atol=1e-4, rtol=1e-4)


def test_single_images_prepare_the_tracker(pvt):
    tracker = SBT(SBTConfig.light(**LIKE_B0))
    load_blocks(tracker.backbone, pvt.state_dict())
    state, theirs = (
        tracker.backbone.state_dict(),
        {pvt_name(k): v for k, v in pvt.state_dict().items()},
    )
    assert all(torch.equal(value, theirs[key]) for key, value in state.items())


@pytest.mark.parametrize(
    "count, loaded",
    [
        (0, set()),
        (1, {"stages.0"}),
        (3, {"stages.0", "stages.1"}),
        (6, {"stages.0", "stages.1", "stages.2"}),
    ],
)
def test_the_first_blocks_alone(pvt, count, loaded):
    tracker = SBT(SBTConfig.light(**LIKE_B0))
    before = copy.deepcopy(tracker.backbone.state_dict())
    load_blocks(tracker.backbone, pvt.state_dict(), count)
    changed = {
        key
        for key, value in tracker.backbone.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert {key[:8] for key in changed} == loaded
    assert sum(".fc1.weight" in key for key in changed) == count
    assert ("stages.2.norm.weight" in changed) == (count == 6)


def test_pretrained_weights_that_do_not_fit(pvt):
    light = SBT(SBTConfig.light())
    load_blocks(light.backbone, pvt.state_dict())  # the blocks that there are
    with pytest.raises(CheckpointError, match="is missing"):
        load_blocks(light.backbone, pvt.state_dict(), 8)
    with pytest.raises(CheckpointError, match="instead of"):
        load_blocks(tiny().backbone, pvt.state_dict())
    with pytest.raises(CheckpointError, match="has 10 blocks"):
        load_blocks(light.backbone, pvt.state_dict(), 11)
    with pytest.raises(CheckpointError, match="is missing"):
        load_blocks(light.backbone, {})


def test_where_pretrained_weights_come_from(pvt):
    asked = []

    def create(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return pvt

    with patch.object(timm, "create_model", create):
        assert SBT(SBTConfig.light(**LIKE_B0, pretrained_blocks=1)).load_pretrained()
        assert not tiny().load_pretrained()
        assert not SBT(SBTConfig.light(**LIKE_B0, position="none")).load_pretrained()
    assert asked == [("pvt_v2_b0", True)]
    with (
        patch.object(timm, "create_model", side_effect=OSError("no route to host")),
        pytest.raises(TrackkitError, match="no-pretrained"),
    ):
        SBT(SBTConfig.light()).load_pretrained()


def test_authors_names_of_backbone_entries():
    for theirs, ours in {
        "patch_embed2.proj.weight": "stages.1.embed.proj.weight",
        "patch_embed.norm.bias": "stages.0.embed.norm.bias",
        "backbone.block3.17.attn.sr.weight": "backbone.stages.2.blocks.17.reduce.weight",
        "block1.0.norm1.weight": "stages.0.blocks.0.norm1.weight",
        "backbone.norm3.weight": "backbone.stages.2.norm.weight",
        "block2.1.mlp.dwconv.dwconv.bias": "stages.1.blocks.1.mlp.position.bias",
        "stages.1.downsample.proj.weight": "stages.1.embed.proj.weight",
        "stages.3.blocks.2.attn.norm.weight": "stages.3.blocks.2.reduce_norm.weight",
    }.items():
        assert pvt_name(theirs) == ours


# ---- checkpoints and configs ----


def test_a_checkpoint_of_another_variant_says_which_fits():
    with torch.device("meta"):
        state = SBT(SBTConfig.light()).state_dict()
    state = {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in state.items()}
    with pytest.raises(CheckpointError, match="it fits sbt-light"):
        official.load("sbt-tiny", state)
    tracker = official.load("sbt-light", state)  # by our names too, and from half precision
    assert tracker.class_head.channel[0].weight.dtype == torch.float32
    with pytest.raises(CheckpointError, match="class_head"):
        official.load(
            "sbt-light",
            {key: value for key, value in state.items() if key != "class_head.channel.0.weight"},
        )
    unused = {"backbone.norm1.weight": torch.ones(32), "backbone.norm2.bias": torch.ones(64)}
    official.load("sbt-light", state | unused)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head": "mlp7"}, "head must be one of"),
        ({"blocks": (1, 1)}, "3 stages"),
        ({"heads": (1, 2, 5)}, "shared"),
        ({"cross": ((), (), (2, 5))}, "blocks 1 to 4"),
        ({"cross": ((), (), (0,))}, "cross must be at least 1"),
        ({"cross": ((), (), ())}, "looks at the template"),
        ({"search_size": 100}, "multiples"),
        ({"template_size": 16}, "too small"),
        ({"attention": "vl", "local": 5}, "no multiple"),
        ({"attention": "sl", "local": 4}, "equal grids"),
        ({"correlation": "depthwise", "levels": (5,)}, "levels"),
        ({"correlation": "depthwise", "template_size": 32}, "7 x 7"),
        ({"window_influence": 1.5}, "window_influence"),
        ({"search_factor": float("nan")}, "search_factor must be above 0"),
        ({"search_size": 8192}, "at most 4096"),
        ({"drop_path": 1.0}, "below 1"),
        ({"blocks": (1, 1, 4.0)}, "a whole number"),
        ({"weights": (12.0, 7.0, -5.0)}, "weights must be at least 0"),
        ({"pretrained_blocks": -1}, "pretrained_blocks must be"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


# ---- pieces ----


def test_squares_and_back():
    x = torch.arange(2 * 8 * 12 * 3.0).view(2, 8, 12, 3)
    for side, shift in ((0, 0), (4, 0), (4, 2)):
        parts = squares(x, side, shift)
        assert torch.equal(whole(parts.flatten(1, 2), x, side, shift), x)
    parts = squares(x, 4)
    assert parts.shape == (12, 4, 4, 3)
    assert torch.equal(parts[1], x[0, :4, 4:8]) and torch.equal(parts[6], x[1, :4, :4])


def test_shifted_squares_do_not_join_opposite_borders():
    """A token sees what lies in its square of the plane, and nothing from the other side."""
    bias = shift_bias(torch.zeros(1, 8, 8, 1), 4, 2)
    place = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1)[
        None
    ]
    near = squares(place, 4, 2).flatten(1, 2)  # (n, 16, 2)
    apart = (near[:, :, None] - near[:, None]).abs().amax(-1)
    assert torch.equal(bias[:, 0] == 0, apart < 4) and bias.shape == (4, 1, 16, 16)
    block = tiny(**AXES["sl"]).backbone.stages[2].blocks[1]
    assert block.shift == 2
    x = torch.randn(1, 16, 16, 64, requires_grad=True)
    block.attend(block.queries(x), block.keys_values(x), x, own=True)[0][0, 0, 0].sum().backward()
    seen = x.grad[0].abs().sum(-1) > 0
    assert seen[:2, :2].all() and seen.sum() == 4  # the corner's square is cut by both borders


def test_relative_positions():
    """A bias depends on the offset between query and key alone, and with zeros for offsets nothing
    changes.
    """
    tracker = tiny(position="relative")
    block = tracker.backbone.stages[2].blocks[0]
    x = torch.randn(1, 16, 16, 64)
    # (heads, y, x, keys y, keys x)
    bias = block._bias(x, own=True)[0].unflatten(1, (16, 16)).unflatten(3, (8, 8))
    assert torch.equal(bias[:, 6, 4, 3, 2], bias[:, 8, 8, 4, 4]) and torch.equal(
        bias[:, 2, 4, 3, 2], bias[:, 0, 2, 2, 1]
    )
    assert not torch.equal(bias[:, 6, 4, 3, 2], bias[:, 6, 5, 3, 2])
    assert block._bias(x, own=False) is None
    with torch.no_grad():
        block.offsets.zero_()
        plain = tiny(position="none").backbone.stages[2].blocks[0]
        plain.load_state_dict(
            {key: value for key, value in block.state_dict().items() if key != "offsets"}
        )
        assert torch.allclose(block(x)[0], plain(x)[0], atol=1e-5)
    # the template's offsets are among the search crop's
    smaller = block._bias(torch.randn(1, 8, 8, 64), own=True)
    assert torch.equal(
        smaller[0].unflatten(1, (8, 8)).unflatten(3, (4, 4))[:, 2, 2, 1, 1],
        block.offsets[:, 15, 15],
    )


def test_depthwise_correlation():
    x, z = torch.randn(2, 9, 9, 3), torch.randn(2, 8, 8, 3)
    response = depthwise_correlation(x, z)
    expected = (x[1, 1:8, 1:8, 2] * z[1, :7, :7, 2]).mean()  # at the middle cell 4: rows 1 to 7
    assert response.shape == x.shape and torch.allclose(response[1, 4, 4, 2], expected, atol=1e-6)


# ---- trackers with SBT's features (section 5.3) ----


CORRELATED = {
    "STARK-CA": lambda: STARKCA(STARKCAConfig.tiny()),
    "SiamFC-CA": lambda: SiamFCCA(SiamFCCAConfig.tiny()),
}


@pytest.mark.parametrize("name", CORRELATED)
def test_correlation_aware_trackers(name, video, tmp_path):
    torch.manual_seed(0)
    tracker = CORRELATED[name]().eval()
    state = tracker.start(video[:2], BOXES)
    later, prediction = tracker.step(state, video[1:])
    _, alone = tracker.step(take(state, [1]), video[2:])
    assert torch.allclose(alone.box, prediction.box[1:], atol=1e-3)
    blocks = tracker.backbone.stages[0].blocks, tracker.backbone.stages[-1].blocks
    # the search crops'
    assert calls(tracker, "absorb", blocks[0][0], lambda: tracker.step(later, video[:2])) == 1
    # both: both are compared
    assert calls(tracker, "absorb", blocks[1][3], lambda: tracker.step(later, video[:2])) == 2
    weights.save(tracker, tmp_path / "t.safetensors")
    again = weights.load(tmp_path / "t.safetensors")
    assert torch.allclose(again.step(state, video[1:])[1].box, prediction.box)
    (stage,) = tracker.recipe("tiny")[:1]
    assert stage.sample.search.size % 8 == 0


@pytest.mark.parametrize("name", CORRELATED)
def test_correlation_aware_features_know_of_one_another(name):
    torch.manual_seed(0)
    backbone = CORRELATED[name]().backbone
    x, z = (torch.randn(1, 3, size, size, requires_grad=True) for size in (128, 64))
    search, template = backbone.meet(backbone(x), backbone(z))
    for features, other in ((search, z), (template, x)):
        (grad,) = torch.autograd.grad(features.square().sum(), other, retain_graph=True)
        assert grad.abs().max() > 0
    assert search.shape == (1, 64, 16, 16) and template.shape == (1, 64, 8, 8)


def test_correlation_aware_configs():
    config = SiamFCCAConfig()
    assert (
        config.stride,
        config.feature_size(128),
        config.response_size(256),
        config.response_size(240),
    ) == (8, 16, 17, 15)
    with pytest.raises(ValueError, match="multiples"):
        SiamFCCAConfig(search_size=255)
    with pytest.raises(ValueError, match="light, small"):
        SiamFCCAConfig(sbt="huge")
    with pytest.raises(ValueError, match="one template"):
        STARKCAConfig(dynamic=True)
    with torch.device("meta"):
        stark = STARKCA()
    assert stark.backbone.stride == 16 and stark.bottleneck.weight.shape[:2] == (256, 320)
