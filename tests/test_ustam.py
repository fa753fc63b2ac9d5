"""USTAM and MixViT: state, patches that can be switched off, templates, training, bad input."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from golden import golden
from torch.utils._python_dispatch import TorchDispatchMode

from trackkit import official
from trackkit.crops import Windows
from trackkit.errors import CheckpointError, DataError, TrackkitError
from trackkit.sampling import Samples
from trackkit.sequences import ArraySequence
from trackkit.trackers import ustam
from trackkit.trackers.base import join, take
from trackkit.trackers.mixvit import MixViT, MixViTConfig
from trackkit.trackers.ustam import USTAM, USTAMConfig, realigned, relative
from trackkit.training import freeze
from trackkit.vit import sincos_position
from trackkit.weights import TRACKERS, load, save

SMALL = {"template_size": 16, "search_size": 32}  # for training: 16 search tokens
BOX = torch.tensor([[100.0, 60.0, 40.0, 30.0]], dtype=torch.float64)
SHORT = {"update_interval": 2, "align": "warp"}


def noise(count: int, height: int = 160, width: int = 240, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (3, height, width), generator=rng, dtype=torch.uint8)
        for _ in range(count)
    ]


def tiny(seed: int = 0, **changes) -> USTAM:
    """Random weights, but boxes with an area, a spatial layer that does something and attention
    that is not flat.
    """
    torch.manual_seed(seed)
    tracker = USTAM(USTAMConfig.tiny(**changes)).eval()
    for name, parameter in tracker.named_parameters():
        if "spatial_attention" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif name.endswith("qkv.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    for tower in (tracker.box_head.top_left, tracker.box_head.bottom_right):
        torch.nn.init.normal_(
            (tower.conv5 if tracker.config.head == "pyramid" else tower[-1]).weight, std=4.0
        )
    return tracker


def run(tracker: USTAM, frames: list[torch.Tensor], box: torch.Tensor = BOX) -> list[torch.Tensor]:
    state, boxes = tracker.start(frames[:1], box), []
    for frame in frames[1:]:
        state, prediction = tracker.step(state, [frame])
        boxes.append(prediction.box)
    return boxes


class Attention(TorchDispatchMode):
    """Counts attention of 144 search tokens to them and 72 template tokens: the maps that are
    formed, and the calls of the kernel that forms none.
    """

    maps = fused = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._softmax.default:
            self.maps += made.shape[-2:] == (144, 216)
        self.fused += function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return made


# ---- the patches ----


def test_without_its_patches_it_is_mixvit_bit_for_bit():
    both, frames = tiny(), noise(4)
    plain = MixViT(MixViTConfig.tiny(update_interval=0)).eval()
    plain.start_from(both.state_dict())
    without = USTAM(replace(both.config, spatial=False, temporal=False)).eval()
    without.load_state_dict(plain.state_dict())
    off = USTAM(replace(both.config, temporal=False)).eval()
    off.start_from(plain.state_dict())
    assert not off.spatial_attention.fc.weight.any() and not off.spatial_attention.fc.bias.any(), (
        "the zero start"
    )
    expected = run(plain, frames)
    for same in (without, off):
        assert all(torch.equal(a, b) for a, b in zip(run(same, frames), expected, strict=True))
    start = USTAM(both.config).eval()
    start.start_from(plain.state_dict())
    ours = run(start, frames)
    assert torch.equal(ours[0], expected[0]), "no map before the first frame"
    assert not torch.equal(ours[1], expected[1]), "and one before the second"
    assert not torch.equal(run(both, frames)[0], expected[0])


@pytest.mark.parametrize(
    ("changes", "maps"),
    [
        ({}, 2),
        ({"temporal": False}, 1),
        ({"spatial": False}, 2),
        ({"spatial": False, "temporal": False}, 0),
    ],
    ids=str,
)
def test_only_the_blocks_that_need_a_map_make_one(changes, maps):
    tracker, frames = tiny(**changes), noise(2)
    state = tracker.start(frames[:1], BOX)
    with (
        Attention() as attention,
        patch.object(tracker, "encode", side_effect=AssertionError("templates are encoded once")),
    ):
        tracker.step(state, frames[1:])
    assert (attention.maps, attention.fused) == (maps, tracker.config.depth)


def test_maps_do_not_change_anything():
    tracker, frames = tiny(), noise(3)
    state, _ = tracker.step(tracker.start(frames[:1], BOX), frames[1:2])
    silent, loud = tracker.step(state, frames[2:])[1], tracker.step(state, frames[2:], maps=True)[1]
    assert (
        silent.maps is None
        and torch.equal(silent.box, loud.box)
        and torch.equal(silent.score, loud.score)
    )
    maps, n, known = loud.maps, 144, 72
    for i in range(4):
        assert maps[f"attention_{i}"].shape == (1, 4, n, known + n)
        torch.testing.assert_close(maps[f"attention_{i}"].sum(-1), torch.ones(1, 4, n))
    torch.testing.assert_close(
        maps["temporal"], maps["attention_0"][..., known:] * (1 + maps["carried"])
    )
    share = maps["attention_3"][..., known:]
    torch.testing.assert_close(
        maps["enhanced"],
        share + tracker.spatial_attention.fc(relative(share, "column").softmax(-1)),
    )
    assert maps["top_left"].shape == maps["bottom_right"].shape == (1, 48, 48)
    assert maps["top_left"].sum().item() == pytest.approx(1, abs=1e-4)
    assert maps["crop"].shape == (1, 3, 96, 96)


def test_what_is_subtracted_everywhere_does_not_matter():
    """Eq. 6's mean, under the softmax that follows: of rows or of columns, the result is the
    same.
    """
    torch.manual_seed(0)
    share = torch.rand(2, 3, 16, 16).softmax(-1)
    column, row = (ustam.SpatialAttention(16, "map", mean) for mean in ("column", "row"))
    torch.nn.init.normal_(column.fc.weight)
    row.load_state_dict(column.state_dict())
    torch.testing.assert_close(column(share), row(share), atol=1e-6, rtol=0)
    assert not torch.allclose(relative(share, "column"), relative(share, "row"), atol=1e-4)
    means = share.mean(2)  # over the queries, of what each key receives
    torch.testing.assert_close(
        share - relative(share, "column"), means.amax(-1)[..., None, None].expand_as(share)
    )
    column.residual = "relative"
    torch.testing.assert_close(
        share + column(share), relative(share, "column") + column.fc(share.softmax(-1))
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"carried": "relative"},
        {"carried": "relative", "spatial": False},
        {"residual": "relative"},
        {"head": "corner"},
        {"templates": 1},
        {"align": "warp"},
    ],
    ids=str,
)
def test_alternatives_track(changes):
    boxes = run(tiny(**changes), noise(3))
    assert all(torch.isfinite(box).all() for box in boxes)
    if "carried" in changes:  # a map that goes to the next frame changes nothing before
        other = run(tiny(**{**changes, "carried": "enhanced"}), noise(3))
        assert torch.equal(boxes[0], other[0]) and not torch.equal(boxes[1], other[1])


# ---- realignment ----


def windows(*rows: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_a_map_of_the_same_window_stays():
    maps = torch.rand(2, 3, 36, 36)
    same = windows((10, -20, 60), (0, 0, 7))
    torch.testing.assert_close(realigned(maps, same, same), maps)


def test_a_map_moves_with_its_window():
    """The window goes two cells right and one down: what was at cell (y, x) is now at (y - 1, x -
    2).
    """
    grid = 6
    maps = torch.rand(1, 2, grid**2, grid**2)
    out = realigned(maps, windows((0, 0, 60)), windows((20, 10, 60))).view(2, *[grid] * 4)
    old = maps.view(2, *[grid] * 4)
    torch.testing.assert_close(out[:, :5, :4, :5, :4], old[:, 1:, 2:, 1:, 2:])
    assert (
        not out[:, 5].any()
        and not out[:, :, 4:].any()
        and not out[:, :, :, 5].any()
        and not out[..., 4:].any()
    )


def test_warping_is_the_matrix_of_the_definition():
    grid, before, now = 5, (3, 7, 55), (11, -2, 70)
    maps = torch.rand(1, 1, 25, 25, dtype=torch.float64)
    matrix = torch.zeros(25, 25, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):  # the middle of a cell of `now`, in cells of `before`
            x = (now[0] + (column + 0.5) * now[2] / grid - before[0]) * grid / before[2] - 0.5
            y = (now[1] + (row + 0.5) * now[2] / grid - before[1]) * grid / before[2] - 0.5
            for a in range(grid):
                for b in range(grid):
                    matrix[row * grid + column, a * grid + b] = max(0, 1 - abs(y - a)) * max(
                        0, 1 - abs(x - b)
                    )
    torch.testing.assert_close(
        realigned(maps, windows(before), windows(now))[0, 0], matrix @ maps[0, 0] @ matrix.T
    )


def test_cells_are_those_of_the_crops():
    """The middle of a cell lies where `Windows` says."""
    before, now = (
        Windows(*torch.tensor([[10], [20], [40]]), 96),
        Windows(*torch.tensor([[14], [17], [50]]), 96),
    )
    # middle of column 3, row 5 of `now`
    cell = torch.tensor([[3.5 * 8, 5.5 * 8, 0, 0]], dtype=torch.float64)
    x, y = (before.to_crop(now.to_frame(cell))[0, :2] / 8 - 0.5).tolist()
    maps = torch.zeros(1, 1, 144, 144)
    maps[0, 0, int(y) * 12 + int(x), :] = 1
    got = (
        realigned(maps, windows((10, 20, 40)), windows((14, 17, 50)))[0, 0, 5 * 12 + 3].max().item()
    )
    assert got == pytest.approx((1 - (y - int(y))) * (1 - (x - int(x))), abs=1e-6)


# ---- state ----


def test_a_batch_is_its_sequences():
    tracker = tiny(**SHORT)
    videos = [noise(6, 160, 240, 1), noise(6, 120, 300, 2), noise(6, 200, 200, 3)]
    boxes = torch.tensor(
        [[100.0, 60, 40, 30], [10, 20, 60, 50], [150, 150, 70, 60]], dtype=torch.float64
    )
    alone = [run(tracker, video, box[None]) for video, box in zip(videos, boxes, strict=True)]
    state = tracker.start([video[0] for video in videos], boxes)
    for i in range(1, 6):
        state, prediction = tracker.step(state, [video[i] for video in videos])
        for row, single in zip(prediction.box, alone, strict=True):
            torch.testing.assert_close(row, single[i - 1][0], atol=1e-3, rtol=0)


def test_sequences_join_and_leave_at_different_times():
    tracker, a, b = tiny(**SHORT), noise(7, seed=1), noise(7, seed=2)
    alone = run(tracker, a), run(tracker, b)
    state = tracker.start(a[:1], BOX)
    for frame in a[1:4]:
        state, _ = tracker.step(state, [frame])
    both = join(state, tracker.start(b[:1], BOX))
    # one has its template renewed in its 4th and 6th frame, the other in its 2nd
    for i in range(3):
        both, prediction = tracker.step(both, [a[4 + i], b[1 + i]])
        torch.testing.assert_close(prediction.box[0], alone[0][3 + i][0], atol=1e-3, rtol=0)
        torch.testing.assert_close(prediction.box[1], alone[1][i][0], atol=1e-3, rtol=0)
    rest = take(both, [1])
    _, prediction = tracker.step(rest, [b[4]])
    torch.testing.assert_close(prediction.box[0], alone[1][3][0], atol=1e-3, rtol=0)


def test_a_state_can_be_continued_again():
    tracker, frames = tiny(**SHORT), noise(4)
    state, _ = tracker.step(tracker.start(frames[:1], BOX), frames[1:2])
    before = state.cache.keys.clone(), state.carried.clone(), state.box.clone()
    first, second = tracker.step(state, frames[2:3])[1], tracker.step(state, frames[2:3])[1]
    assert torch.equal(first.box, second.box)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (state.cache.keys, state.carried, state.box), strict=True)
    )


def test_the_second_template_is_renewed_when_due():
    tracker, frames = tiny(update_interval=3, spatial=False, temporal=False), noise(5)
    state = tracker.start(frames[:1] * 2, BOX.repeat(2, 1))
    caches, updated = [state.cache], []
    for i, frame in enumerate(frames[1:]):
        # the second is one ahead
        state = replace(state, frame=state.frame + torch.tensor([0, 1])) if i == 0 else state
        state, prediction = tracker.step(state, [frame] * 2, maps=True)
        caches.append(state.cache)
        updated.append(prediction.maps["updated"].tolist())
    assert updated == [[False, False], [False, True], [True, False], [False, False]]
    for earlier, later, changed in zip(caches, caches[1:], updated, strict=False):
        assert [not torch.equal(earlier.keys[i], later.keys[i]) for i in range(2)] == changed
    never = tiny(spatial=False, temporal=False)
    assert never.start(frames[:1], BOX).first is None


def test_exchanged_templates_change_nothing():
    """They share their positions and see each other."""
    tracker = tiny()
    tokens = [tracker.tokens(torch.randn(1, 3, 48, 48), tracker.position_t) for _ in range(2)]
    search = tracker.tokens(torch.randn(1, 3, 96, 96), tracker.position_s)
    with torch.no_grad():
        one, other = (
            tracker(tracker.encode(torch.cat(pair, 1))[0], search)
            for pair in (tokens, tokens[::-1])
        )
    torch.testing.assert_close(one.boxes, other.boxes, atol=1e-5, rtol=0)


def test_names():
    assert {name for name in TRACKERS if name.startswith(("mixvit", "ustam"))} == {
        "mixvit-b288", "mixvit-l384", "mixvit-tiny",
        "ustam-b288", "ustam-b384", "ustam-l384", "ustam-tiny",
    }  # fmt: skip


# ---- training ----


def video(count: int = 24) -> ArraySequence:
    images, boxes = noise(count, 120, 160), []
    for i, image in enumerate(images):
        image //= 4
        image[:, 40:70, 30 + 2 * i : 70 + 2 * i] = 220
        boxes.append([30.0 + 2 * i, 40, 40, 30])
    return ArraySequence("video", images, torch.tensor(boxes))


def batch(tracker: USTAM, count: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    samples = Samples([video()], tracker.samples(), seed, count)
    return {key: torch.stack([samples[i][key] for i in range(count)]) for key in samples[0]}


def searches_of(data: dict, first: int, end: int) -> dict[str, torch.Tensor]:
    return {key: data[key][:, first:end] for key in ("searches", "search_boxes")}


def test_samples():
    clips, single = batch(tiny()), batch(tiny(temporal=False, templates=1))
    assert clips["templates"].shape == (2, 2, 3, 48, 48) and clips["searches"].shape == (
        2,
        2,
        3,
        96,
        96,
    )
    assert single["templates"].shape == (2, 1, 3, 48, 48) and single["searches"].shape == (
        2,
        1,
        3,
        96,
        96,
    )
    assert tiny().samples().flip_each == 0, "a map of a mirrored crop would tell the wrong places"


def test_the_last_map_gets_no_gradient_and_is_sometimes_forgotten():
    tracker = tiny(forget=1.0, **SMALL).train()
    data = batch(tracker)
    torch.manual_seed(0)
    forgotten = tracker.loss(data)["loss"]
    single = [tracker.loss(data | searches_of(data, i, i + 1))["loss"] for i in range(2)]
    torch.testing.assert_close(forgotten, sum(single) / 2)
    tracker.config = replace(tracker.config, forget=0.0)
    seen: list[torch.Tensor] = []
    forward = USTAM.forward

    def spy(self, cache, search, told, maps=False):
        seen.append(told.get("carried"))
        return forward(self, cache, search, told, maps)

    with patch.object(USTAM, "forward", spy):
        kept = tracker.loss(data)["loss"]
    assert seen[0] is None and seen[1].abs().sum() > 0 and not seen[1].requires_grad
    assert abs(kept.item() - forgotten.item()) > 1e-6
    tracker.config = replace(tracker.config, forget=0.3)
    with patch.object(USTAM, "forward", spy):
        for i in range(25):
            torch.manual_seed(i)
            tracker.loss(data)
    zeros = torch.tensor([float(not row.any()) for maps in seen[3::2] for row in maps])
    assert len(zeros) == 50 and 0.15 < zeros.mean() < 0.45


def test_the_spatial_layer_learns_from_its_zero_start():
    """Each of its outputs, in a first frame as in a second, although it adds nothing yet."""
    torch.manual_seed(0)
    tracker = USTAM(USTAMConfig.tiny(**SMALL)).train()
    data, fc = batch(tracker), tracker.spatial_attention.fc
    assert not fc.weight.any() and not fc.bias.any()
    for searches in (1, 2):
        tracker.zero_grad()
        before = tracker.loss(data | searches_of(data, 0, searches))["loss"]
        before.backward()
        assert fc.weight.grad.any(1).all() and fc.bias.grad.all()
    frozen = [p.requires_grad_(p is fc.weight or p is fc.bias) for p in tracker.parameters()]
    torch.optim.SGD([p for p in frozen if p.requires_grad], 0.1).step()
    torch.manual_seed(0)
    assert tracker.loss(data)["loss"] < before


@pytest.mark.parametrize("kind", ["giou", "ciou"])
def test_training_reduces_the_loss(kind):
    torch.manual_seed(0)
    tracker = USTAM(USTAMConfig.tiny(**SMALL)).train()
    data, optimizer = batch(tracker), torch.optim.AdamW(tracker.parameters(), 1e-3)
    values = []
    for _ in range(12):
        loss = tracker.loss(data, kind)
        assert set(loss) == {"loss", kind, "l1", "corner"}
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        values.append(loss["loss"].item())
    assert min(values[-3:]) < 0.7 * values[0]
    with pytest.raises(TrackkitError, match="giou and ciou"):
        tracker.loss(data, "iou")


def test_recipes():
    with torch.device("meta"):
        base, large = (USTAM(config) for config in (USTAMConfig.b288(), USTAMConfig.l384()))
        mixvit = MixViT(MixViTConfig.l384())
    (paper,), (code,) = base.recipe("paper"), base.recipe("paper", "code")
    rates = [paper.rate(epoch * paper.steps // 500) for epoch in (0, 399, 400, 499)]
    assert (
        rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])
        and paper.loss == "giou"
        and paper.weight_decay == 1e-4
    )
    assert (
        code.rate(0) == 4e-4
        and dict(code.rates) == {"embed.*": 0.1, "blocks.*": 0.1}
        and code.loss == "ciou"
    )
    assert code.steps * code.batch == pytest.approx(500 * 60_000, rel=0.01) and code.clip == 0.1
    (theirs,), (other,) = mixvit.recipe("paper"), mixvit.recipe("paper", "paper")
    assert (other.loss, other.lr, other.trainable) == ("giou", 1e-4, ("*",))
    assert (theirs.loss, theirs.batch, theirs.sample.searches) == ("ciou", 288, 1)
    freeze(mixvit, theirs.trainable)
    frozen = {
        name.split(".")[1] if name.startswith("blocks") else name.split(".")[0]
        for name, p in mixvit.named_parameters()
        if not p.requires_grad
    }
    assert frozen == {"embed", *map(str, range(6))}
    for tracker in (base, large, tiny()):
        for preset in ("paper", "code"):
            for scale in ("tiny", "laptop", "gpu", "paper"):
                for stage in tracker.recipe(scale, preset):
                    freeze(tracker, stage.trainable)
                    assert {
                        name.split(".")[0]
                        for name, p in tracker.named_parameters()
                        if p.requires_grad
                    } >= {"blocks", "box_head", "spatial_attention"}
    with pytest.raises(TrackkitError, match="there are paper, code"):
        base.recipe("paper", "mine")


# ---- weights ----


def test_saved_weights_come_back(tmp_path):
    tracker, frames = tiny(**SHORT), noise(3)
    save(tracker, tmp_path / "tracker.safetensors")
    again = load(tmp_path / "tracker.safetensors")
    assert again.config == tracker.config
    assert all(
        torch.equal(a, b) for a, b in zip(run(tracker, frames), run(again, frames), strict=True)
    )


VIT = {
    "stem": "patch",
    "template_size": 32,
    "search_size": 64,
    "width": 192,
    "heads": 3,
    "hidden": 768,
    "depth": 12,
}


def test_pretrained_transformer():
    """timm's names; and what is missing is named."""
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    torch.nn.init.normal_(vit.blocks[3].mlp.fc1.bias)
    tracker = USTAM(USTAMConfig.tiny(**VIT))
    head = tracker.box_head.top_left.conv1[0].weight.clone()
    tracker.start_from(vit.state_dict())
    assert torch.equal(tracker.blocks[3].mlp.fc1.bias, vit.blocks[3].mlp.fc1.bias)
    assert torch.equal(tracker.embed.weight, vit.patch_embed.proj.weight)
    assert torch.equal(tracker.box_head.top_left.conv1[0].weight, head)
    assert torch.equal(tracker.position_s, sincos_position(4, 192))
    weights = {
        key: value for key, value in vit.state_dict().items() if key != "blocks.3.mlp.fc1.bias"
    }
    with pytest.raises(CheckpointError, match=r"missing: blocks\.3\.mlp\.fc1\.bias"):
        tracker.start_from(weights)


def official_entries(**shapes) -> dict[str, torch.Tensor]:
    """MixViT-B288's, without values: they are refused before any is looked at."""
    keys = {**golden("mixvit_b_288")["keys"], **shapes}
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


def test_checkpoints_of_others_are_refused():
    few = {name: TRACKERS[name] for name in ("mixvit-b288", "ustam-b288", "siamfc")}
    with patch.object(official, "create", _empty), patch.object(official, "TRACKERS", few):
        with pytest.raises(
            CheckpointError, match=r"missing: spatial_attention\.fc\.weight.*it fits mixvit-b288"
        ):
            official.load("ustam-b288", official_entries())
        with pytest.raises(
            CheckpointError, match=r"position_s is \(1, 576, 768\), needs \(1, 324, 768\)"
        ):
            official.load(
                "mixvit-b288", official_entries(**{"backbone.pos_embed_s": [1, 576, 768]})
            )
        with pytest.raises(CheckpointError, match="not expected: neck"):
            official.load("mixvit-b288", official_entries(**{"neck.weight": [3]}))


def _empty(name: str) -> USTAM:
    cls, config = TRACKERS[name]
    with torch.device("meta"):
        return cls(config).eval()


def test_second_stage_checkpoints_are_understood():
    """They have a score branch, which the first stage's tracker does not use; inherited entries may
    be missing.
    """
    entries = official_entries(
        **{
            "score_branch.score_token": [1, 1, 768],
            "score_branch.score_head.layers.0.weight": [768, 768],
        }
    )
    names = set(official._names("mixvit-b288", entries))
    assert names == set(_empty("mixvit-b288").state_dict())
    entries = {
        key: value
        for key, value in entries.items()
        if not key.startswith(("backbone.head", "backbone.cls", "score"))
    }
    assert set(official._names("mixvit-b288", entries)) == names


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": "linear"}, "stem must be one of patch, conv"),
        ({"head": "mlp"}, "head must be one of"),
        ({"templates": 3}, "templates must be at least 1 and at most 2"),
        ({"residual": "none"}, "residual"),
        ({"align": "centre"}, "align"),
        ({"search_size": 100}, "multiples of the stem's stride, 8"),
        ({"width": 66}, "width must be a multiple"),
        ({"depth": 1}, "a first and a last block"),
        ({"search_size": 2**20}, "search_size must be at least 1 and at most 4096"),
        ({"search_factor": float("nan")}, "search_factor must be above 0"),
        ({"templates": 1, "update_interval": 5}, "none to update"),
        ({"forget": 1.5}, "forget must be at least 0 and at most 1"),
    ],
    ids=str,
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        USTAMConfig.tiny(**changes)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((20, 30), [5, 5, 10, 10]),
        ((160, 240), [-20, -20, 30, 30]),
        ((160, 240), [235, 155, 40, 40]),
        ((160, 240), [0, 0, 240, 160]),
        ((160, 240), [100, 100, 0.5, 0.5]),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_odd_but_possible_input(size, box, exact):
    for found in run(
        tiny(exact=exact, **SHORT), noise(4, *size), torch.tensor([box], dtype=torch.float64)
    ):
        assert torch.isfinite(found).all() and (found[:, 2:] >= 4 - 1e-9).all()
        assert (found[:, :2] <= torch.tensor([size[1], size[0]])).all()


def test_impossible_input():
    tracker, frames = tiny(), noise(2)
    for box in ([300, 10, 20, 20], [10, 10, 0, 5], [float("nan"), 0, 5, 5]):
        with pytest.raises(DataError):
            tracker.start(frames[:1], torch.tensor([box]))
    with pytest.raises(DataError, match="one box for each frame"):
        tracker.start(frames, BOX)
    with pytest.raises(DataError, match="uint8"):
        tracker.step(tracker.start(frames[:1], BOX), [frames[1].float()])
