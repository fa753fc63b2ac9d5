"""MixViT against the authors' code, USTAM against the definition in its spec: networks, tracking,
losses, costs. And that these tests can fail.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import lru_cache
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from certificates import not_on_page
from golden import certified, golden, image, state_dict, too_far
from torch import Tensor, nn

from trackkit import attention, heads, official
from trackkit.boxes import xyxy_to_cxcywh
from trackkit.costs import by_the_paper
from trackkit.heads import soft_argmax
from trackkit.losses import ciou, localisation
from trackkit.trackers.mixvit import (
    Answer,
    MixViT,
    MixViTConfig,
    MixViTState,
    TemplateCache,
    attention_map,
    box_losses,
)
from trackkit.trackers.ustam import USTAM, SpatialAttention, USTAMConfig, relative
from trackkit.vit import VitAttention, sincos_position
from trackkit.weights import create

MIXVIT, GOLD, UNITS = golden("mixvit_b_288"), golden("ustam_b_288"), golden("mixformer_units")

# The files give no tolerances. The spec does, 4 times the noise between float32 and float64 or
# more; attention maps are small.
ALLOWED = {
    "features": 5e-5,
    "corner logits": 5e-5,
    "boxes": 1e-5,
    "boxes, px": 0.01,
    "maps": 1e-6,
    "losses": 1e-6,
    "tables": 1e-6,
    "px": 1e-3,
}


def position_table(grid: int, width: int) -> Tensor:
    """The authors' table of positions, cell by cell: it is in their checkpoints, but drawing it
    would not do.
    """

    def axis(place: int) -> list[float]:
        angles = [place / 10_000 ** (2 * k / (width // 2)) for k in range(width // 4)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    axes = [axis(place) for place in range(grid)]
    return torch.tensor([[axes[i % grid] + axes[i // grid] for i in range(grid * grid)]])


@lru_cache
def checkpoint() -> dict[str, Tensor]:
    """USTAM's, which is MixViT's and the spatial layer."""
    keys = {**MIXVIT["keys"], **GOLD["keys_beside_mixvit"]}
    tables = {
        "backbone.pos_embed_s": position_table(18, 768),
        "backbone.pos_embed_t": position_table(8, 768),
    }
    drawn = {key: shape for key, shape in keys.items() if key not in tables}
    return {**state_dict(drawn, {**MIXVIT["scale"], **GOLD["scale_beside_mixvit"]}), **tables}


@lru_cache
def mixvit() -> MixViT:
    return official.load(
        "mixvit-b288", {key: value for key, value in checkpoint().items() if key in MIXVIT["keys"]}
    )


@lru_cache
def loaded() -> USTAM:
    return official.load("ustam-b288", checkpoint())


def variant(tracker: MixViT, **changes) -> MixViT:
    """The same weights, shared, with another config."""
    with torch.device("meta"):
        other = type(tracker)(replace(tracker.config, **changes)).eval()
    weights = tracker.state_dict()
    other.load_state_dict({key: weights[key] for key in other.state_dict()}, assign=True)
    return other


def deviation(value: Tensor, expected: dict) -> float:
    """Largest difference from the numbers that a golden file keeps of a tensor; infinite for
    another shape.
    """
    if list(value.shape) != expected["shape"]:
        return math.inf
    flat = value.detach().double().flatten()
    if "index" not in expected:
        return (flat - torch.tensor(expected["value"], dtype=torch.float64)).abs().max().item()
    got = torch.cat(
        [
            flat[expected["index"]],
            torch.stack([flat.mean(), flat.std(unbiased=False), flat.min(), flat.max()]),
        ]
    )
    wanted = expected["value"] + [expected[moment] for moment in ("mean", "std", "min", "max")]
    return (got - torch.tensor(wanted, dtype=torch.float64)).abs().max().item()


def worst(errors: dict[str, float]) -> float:
    """The largest deviation in units of what is allowed; what it is of stands after the last
    colon.
    """
    return max(error / ALLOWED[name.rsplit(": ", 1)[1]] for name, error in errors.items())


# ---- MixViT's network ----


def grids(tokens: Tensor, *counts: int) -> list[Tensor]:
    """Tokens (B, T, D) of several square crops -> a feature map (B, D, s, s) for each."""
    parts = tokens.transpose(1, 2).split(list(counts), 2)
    return [part.unflatten(2, (math.isqrt(part.shape[2]), -1)) for part in parts]


@torch.no_grad()
def mixvit_outputs(tracker: MixViT, case: dict) -> tuple[dict[str, Tensor], tuple]:
    """What the golden file keeps, by its names; and cache, search tokens before the last block and
    after it.
    """
    z = [
        tracker.tokens(image(**case[role]), tracker.position_t)
        for role in ("template", "online_template")
    ]
    x = tracker.tokens(image(**case["search"]), tracker.position_s)
    # tokens after these blocks: templates, then search
    through: dict[int, list[Tensor]] = {0: [], 5: [], 10: []}
    hooks = [
        tracker.blocks[i + 1].norm1.register_forward_hook(
            lambda module, given, made, i=i: through[i].append(given[0])
        )
        for i in through
    ]
    cache, templates = tracker.encode(torch.cat(z, 1))
    answer = tracker(cache, x)
    for hook in hooks:
        hook.remove()
    first, second = grids(templates, 64, 64)
    return {
        "tokens: features": torch.cat([*z, x], 1),
        "block0: features": torch.cat(through[0], 1),
        "block5: features": torch.cat(through[5], 1),
        "block11: features": torch.cat([templates, answer.tokens], 1),
        "template_feat: features": first,
        "online_feat: features": second,
        "search_feat: features": grids(answer.tokens, 324)[0],
        **head_outputs(tracker, answer.tokens),
    }, (cache, through[10][1], answer.tokens)


@torch.no_grad()
def head_outputs(tracker: MixViT, tokens: Tensor) -> dict[str, Tensor]:
    boxes, corners = tracker.locate(tokens)
    return {
        "score_map_tl: corner logits": corners[0][:, None],
        "score_map_br: corner logits": corners[1][:, None],
        "pred_boxes_cxcywh: boxes": boxes[:, None],
    }


def compared(got: dict[str, Tensor], expected: dict, title: str = "") -> dict[str, float]:
    return {
        f"{title}{name}": deviation(value, expected[name.split(": ")[0]])
        for name, value in got.items()
    }


@lru_cache
def mixvit_run() -> tuple[dict[str, float], tuple[TemplateCache, Tensor, Tensor]]:
    """Deviations over both cases; of the first: cache, search tokens before the last block and
    after it.
    """
    errors: dict[str, float] = {}
    for case in MIXVIT["inputs"]:
        got, inside = mixvit_outputs(mixvit(), case)
        expected = MIXVIT["outputs"][f"case{case['case']}"]
        assert set(expected) - {"corners_xyxy"} == {name.split(": ")[0] for name in got}
        for name, error in compared(got, expected, "MixViT-B288, ").items():
            errors[name] = max(errors.get(name, 0.0), error)
        if case["case"] == 0:
            first = inside
    return errors, first


def test_mixvit_network():
    errors, _ = mixvit_run()
    assert worst(errors) <= 1, errors
    assert len(mixvit().state_dict()) == len(MIXVIT["keys"]) - 6, "all but the six unused ones"
    assert {block.norm1.eps for block in mixvit().blocks} == {1e-6}, (
        "too small a difference to be seen in outputs"
    )


def test_position_tables():
    assert worst(table_errors()) <= 1, table_errors()
    for name, buffer in (
        ("pos_embed_s", mixvit().position_s),
        ("pos_embed_t", mixvit().position_t),
    ):
        assert deviation(buffer, MIXVIT["constants"][name]) <= ALLOWED["tables"]
    exchanged = sincos_position(18, 768).unflatten(1, (18, 18)).transpose(1, 2).flatten(1, 2)[0]
    assert deviation(exchanged, UNITS["sincos"]["grid18_dim768"]) > ALLOWED["tables"]


def table_errors() -> dict[str, float]:
    small = torch.tensor(UNITS["sincos"]["grid3_dim8"])
    errors = {
        "positions, 3 x 3 cells: tables": (sincos_position(3, 8)[0] - small).abs().max().item()
    }
    for grid, width in ((8, 768), (18, 768), (24, 1024)):
        error = deviation(
            sincos_position(grid, width)[0], UNITS["sincos"][f"grid{grid}_dim{width}"]
        )
        errors[f"positions, {grid} x {grid} cells: tables"] = error
    for name, unit in (("soft_argmax", "units.corner"), ("soft_argmax_18", "units.corner18")):
        gold = UNITS[name]
        logits = 3 * image(unit, (3, 1, gold["feat"], gold["feat"]))[:, 0]
        expected = torch.tensor([gold["x_pixels"], gold["y_pixels"]]).T
        errors[f"soft-argmax, {gold['feat']} x {gold['feat']} cells: px"] = (
            (soft_argmax(logits) * gold["normaliser"] - expected).abs().max().item()
        )
    return errors


def mutant_gelu(tracker):
    gelu = F.gelu
    return patch.object(attention.F, "gelu", lambda x: gelu(x, approximate="tanh"))


def mutant_entry(tracker):
    layer = tracker.blocks[-1].mlp.fc1
    return patch.object(layer, "bias", nn.Parameter(layer.bias * 1.02))


def mutant_order(tracker):
    split = VitAttention.split
    return patch.object(
        tracker.blocks[-1].attn,
        "split",
        lambda x: [split(tracker.blocks[-1].attn, x)[i] for i in (1, 0, 2)],
    )


def mutant_scale(tracker):
    return patch.object(
        F, "scaled_dot_product_attention", lambda q, k, v: attention_map(q * 1.01, k) @ v
    )


@pytest.mark.parametrize("mutate", [mutant_gelu, mutant_entry, mutant_order, mutant_scale])
@torch.no_grad()
def test_block_certificate_can_fail(mutate):
    """In the last of twelve blocks alone."""
    tracker, (_, (cache, before, _)) = mixvit(), mixvit_run()
    expected = MIXVIT["outputs"]["case0"]
    assert (
        worst(compared(head_outputs(tracker, last_block(tracker, before, cache).tokens), expected))
        <= 1
    )
    with mutate(tracker):
        tokens = last_block(tracker, before, cache).tokens
    logits = compared(head_outputs(tracker, tokens), expected)
    assert worst({name: error for name, error in logits.items() if name.endswith("logits")}) > 1


@torch.no_grad()
def test_templates_that_do_not_meet_are_noticed():
    tracker, case = mixvit(), MIXVIT["inputs"][0]
    parts = [
        tracker.encode(tracker.tokens(image(**case[role]), tracker.position_t))
        for role in ("template", "online_template")
    ]
    tokens = torch.cat([tokens for _, tokens in parts], 1)
    assert (
        deviation(grids(tokens, 64, 64)[0], MIXVIT["outputs"]["case0"]["template_feat"])
        > 100 * ALLOWED["features"]
    )


def mutant_bilinear(head):
    return patch.object(
        heads, "_doubled", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")
    )


def mutant_norm_epsilon(head):
    return patch.object(head.bottom_right.conv1[1], "eps", 1e-3)


def mutant_without_a_resolution(head):
    return patch.object(head.top_left, "adjust4", nn.Sequential(head.top_left.adjust4, _Zero()))


def mutant_middle_of_cells(head):
    locate = MixViT.locate

    def shifted(self, tokens):
        boxes, corners = locate(self, tokens)
        half = torch.tensor([0.5, 0.5, 0, 0]) / corners[0].shape[-1]
        return boxes + half, corners

    return patch.object(MixViT, "locate", shifted)


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    "mutate",
    [mutant_bilinear, mutant_norm_epsilon, mutant_without_a_resolution, mutant_middle_of_cells],
)
def test_head_certificate_can_fail(mutate):
    tracker, (_, (_, _, tokens)) = mixvit(), mixvit_run()
    expected = MIXVIT["outputs"]["case0"]
    assert worst(compared(head_outputs(tracker, tokens), expected)) <= 1
    with mutate(tracker.box_head):
        assert worst(compared(head_outputs(tracker, tokens), expected)) > 1
    assert worst(compared(head_outputs(tracker, tokens), expected)) <= 1


# ---- MixViT's tracking ----


def frame(name: str) -> Tensor:
    cells = ((image(name, (60, 80, 3)) + 2) * 64).floor().clamp(0, 255).to(torch.uint8)
    return cells.repeat_interleave(8, 0).repeat_interleave(8, 1).permute(2, 0, 1)


@lru_cache
def tracking_run() -> tuple[dict[str, float], list[MixViTState]]:
    """Deviation over the run, and the states before each frame."""
    gold = MIXVIT["tracking"]
    tracker = variant(mixvit(), update_interval=gold["online_template_update_interval"])
    first, *others = (frame(name) for name in gold["frames"])
    states, error = [tracker.start([first], torch.tensor([gold["init_bbox_xywh"]]))], 0.0
    for image_, expected in zip(others, gold["boxes_xywh_after_each_frame"], strict=True):
        state, prediction = tracker.step(states[-1], [image_])
        states.append(state)
        error = max(
            error,
            (prediction.box[0] - torch.tensor(expected, dtype=torch.float64)).abs().max().item(),
        )
    return {"MixViT-B288, tracking with template updates: boxes, px": error}, states


def test_tracking():
    errors, _ = tracking_run()
    assert worst(errors) <= 1, errors


@pytest.mark.parametrize("changes", [{"exact": True}, {"search_factor": 4.4}], ids=str)
def test_tracking_certificate_can_fail(changes):
    assert tracking_error(changes, 2, tracking_run()[1][2]) > ALLOWED["boxes, px"]


def test_the_second_template_counts():
    _, states = tracking_run()
    stale = replace(states[2], cache=states[0].cache)
    assert tracking_error({}, 2, stale) > ALLOWED["boxes, px"]
    assert states[1].cache is states[0].cache and states[3].cache is states[2].cache, (
        "made when due, and kept"
    )


def tracking_error(changes: dict, number: int, state: MixViTState) -> float:
    """Of one step from a state."""
    gold = MIXVIT["tracking"]
    _, prediction = variant(mixvit(), **changes).step(state, [frame(gold["frames"][number + 1])])
    expected = torch.tensor(gold["boxes_xywh_after_each_frame"][number], dtype=torch.float64)
    return (prediction.box[0] - expected).abs().max().item()


# ---- USTAM's network ----


class Skip(nn.Module):
    """In place of a block: leaves the tokens as they are."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (x.new_zeros(len(x), 12, x.shape[1], 64),) * 3

    def gather(self, x: Tensor, mixed: Tensor) -> Tensor:
        return x

    def think(self, x: Tensor) -> Tensor:
        return x


def last_block(tracker: MixViT, tokens: Tensor, cache: TemplateCache, maps: bool = False) -> Answer:
    """What the network answers when tokens come to its last block."""
    end = copy.copy(tracker)
    end._modules = {**tracker._modules, "blocks": nn.ModuleList([Skip(), tracker.blocks[-1]])}
    end.config = replace(tracker.config, depth=2)
    return end(TemplateCache(cache.keys[:, -2:], cache.values[:, -2:]), tokens, maps=maps)


@lru_cache
@torch.no_grad()
def inputs() -> tuple[TemplateCache, list[Tensor]]:
    tracker = loaded()
    z = [
        tracker.tokens(image(**GOLD["inputs"][role]), tracker.position_t)
        for role in ("template", "online_template")
    ]
    searches = [
        tracker.tokens(image(**item), tracker.position_s)
        for item in GOLD["inputs"]["search_sequence"]
    ]
    return tracker.encode(torch.cat(z, 1))[0], searches


def ustam_errors(answer: Answer, map_: Tensor, variant_: str, number: int) -> dict[str, float]:
    boxes, corners = answer.boxes, answer.corners
    got = {
        "search_feat: features": grids(answer.tokens, 324)[0],
        "score_map_tl: corner logits": corners[0][:, None],
        "score_map_br: corner logits": corners[1][:, None],
        "pred_boxes_cxcywh: boxes": boxes[:, None],
        "attention_map: maps": map_,
    }
    return compared(got, GOLD["outputs"][variant_][number], f"USTAM-B288 {variant_}, ")


@lru_cache
@torch.no_grad()
def plain_run() -> tuple[list[dict[str, float]], list[Tensor], Answer]:
    """Neither module: deviations in each frame, the tokens that come to the last block, the first
    answer.
    """
    (cache, searches), tracker = inputs(), mixvit()
    tokens: list[Tensor] = []
    hook = tracker.blocks[-1].norm1.register_forward_hook(
        lambda module, given, made: tokens.append(given[0])
    )
    answers = [tracker(cache, search) for search in searches]
    hook.remove()
    maps = [
        last_block(tracker, x, cache, maps=True).notes["attention_1"][..., -324:] for x in tokens
    ]
    return (
        [ustam_errors(a, m, "none", i) for i, (a, m) in enumerate(zip(answers, maps, strict=True))],
        tokens,
        answers[0],
    )


@lru_cache
@torch.no_grad()
def spatial_run() -> list[dict[str, float]]:
    """Spatial attention only: up to the last block it is the network without both."""
    (cache, _), (_, tokens, _), tracker = inputs(), plain_run(), variant(loaded(), temporal=False)
    answers = [last_block(tracker, x, cache, maps=True) for x in tokens]
    return [ustam_errors(a, a.notes["enhanced"], "spatial", i) for i, a in enumerate(answers)]


TEMPORAL = {
    "spatial+temporal": {},
    "temporal": {"spatial": False},
    "spatial+temporal,residual=relative": {"residual": "relative"},
}


@lru_cache
@torch.no_grad()
def temporal_run(name: str) -> tuple[list[dict[str, float]], Tensor]:
    """Deviations in each frame of a run, and the map after its first; the first frame, without a
    map, needs the last block only.
    """
    (cache, searches), (_, tokens, _), tracker = (
        inputs(),
        plain_run(),
        variant(loaded(), **TEMPORAL[name]),
    )
    answer = last_block(tracker, tokens[0], cache)
    errors, first = (
        [ustam_errors(answer, answer.notes["enhanced"], name, 0)],
        answer.notes["enhanced"],
    )
    for i in (1, 2):
        answer = tracker(cache, searches[i], {"carried": answer.notes["enhanced"]})
        errors.append(ustam_errors(answer, answer.notes["enhanced"], name, i))
    return errors, first


def all_runs() -> list[dict[str, float]]:
    return plain_run()[0] + spatial_run() + [e for name in TEMPORAL for e in temporal_run(name)[0]]


def test_ustam_network():
    for errors in all_runs():
        assert worst(errors) <= 1, errors
    assert len(all_runs()) == sum(len(frames) for frames in GOLD["outputs"].values()) == 15


@torch.no_grad()
def test_zero_start_is_mixvit_bit_for_bit():
    (cache, searches), (*_, mixed), tracker = inputs(), plain_run(), variant(loaded())
    tracker.spatial_attention = SpatialAttention(324, "map", "column")
    ours = tracker(cache, searches[0], {"carried": torch.zeros(1, 12, 324, 324)})
    for a, b in zip(
        (ours.boxes, ours.tokens, *ours.corners),
        (mixed.boxes, mixed.tokens, *mixed.corners),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.allclose(
        ours.notes["enhanced"].sum(-1), ours.notes["enhanced"].sum(-1).clamp(0, 1)
    ), "a share of the attention"


def spatial_mutants():
    layer = SpatialAttention

    def without_softmax(self, share):
        return self.fc(relative(share, "column"))

    def transposed(self, share):
        return F.linear(share.softmax(-1), self.fc.weight.T, self.fc.bias)

    def without_bias(self, share):
        return F.linear(share.softmax(-1), self.fc.weight)

    def of_queries(self, share):
        return layer.forward(self, share.transpose(-1, -2)).transpose(-1, -2)

    return {f.__name__: f for f in (without_softmax, transposed, without_bias, of_queries)}


@pytest.mark.parametrize("name", spatial_mutants())
@torch.no_grad()
def test_spatial_certificate_can_fail(name):
    (cache, _), (_, tokens, _), tracker = inputs(), plain_run(), variant(loaded())
    layer = tracker.spatial_attention
    with patch.object(layer, "forward", lambda share: spatial_mutants()[name](layer, share)):
        answer = last_block(tracker, tokens[0], cache)
    errors = ustam_errors(answer, answer.notes["enhanced"], "spatial+temporal", 0)
    assert worst({k: v for k, v in errors.items() if "attention_map" not in k}) > 1


@pytest.mark.parametrize(
    "changes", [{"mean": "row"}, {"residual": "map"}, {"carried": "relative"}], ids=str
)
@torch.no_grad()
def test_alternatives_are_others(changes):
    (cache, _), (_, tokens, _) = inputs(), plain_run()
    answer = last_block(variant(loaded(), **{"residual": "relative", **changes}), tokens[0], cache)
    errors = ustam_errors(answer, answer.notes["enhanced"], "spatial+temporal,residual=relative", 0)
    assert worst(errors) > 1


@torch.no_grad()
def test_temporal_certificate_can_fail():
    """The same heads in another order: the least that could go wrong with a map."""
    (cache, searches), (_, first) = inputs(), temporal_run("spatial+temporal")
    answer = loaded()(cache, searches[1], {"carried": first.roll(1, 1)})
    errors = ustam_errors(answer, answer.notes["enhanced"], "spatial+temporal", 1)
    assert worst({k: v for k, v in errors.items() if k.endswith(": features")}) > 1
    without = GOLD["outputs"]["spatial"][1]["search_feat"]["value"]
    with_ = GOLD["outputs"]["spatial+temporal"][1]["search_feat"]["value"]
    assert max(abs(a - b) for a, b in zip(with_, without, strict=True)) > 10 * ALLOWED["features"]


# ---- losses and costs ----


def loss_errors() -> dict[str, float]:
    errors = {}
    for name in ("ciou", "giou"):
        gold = UNITS[name]
        boxes, truth = torch.tensor(gold["pred_xyxy"]), torch.tensor(gold["gt_xyxy"])
        got = box_losses(xyxy_to_cxcywh(boxes), xyxy_to_cxcywh(truth), name)
        errors[f"{name} loss: losses"] = abs(got[name].item() - gold["loss"])
        l1 = localisation(boxes, truth)[1].item()
        assert got["loss"].item() == pytest.approx(5 * l1 + 2 * gold["loss"], abs=1e-6)
        if name == "giou":
            errors["L1 loss: losses"] = abs(l1 - gold["l1"])
        else:
            each = 1 - ciou(boxes, truth)
            errors["ciou of each box: losses"] = (
                (each - torch.tensor(gold["per_box"])).abs().max().item()
            )
    return errors


def test_losses():
    assert worst(loss_errors()) <= 1, loss_errors()


COSTS = {
    "mixvit-b288": "MixViT-B/288",
    "mixvit-l384": "MixViT-L/384",
    "ustam-b288": "USTAM-B/288",
    "ustam-b384": "USTAM-B/384 (templates 128)",
    "ustam-l384": "USTAM-L/384",
}
OTHERS = {
    "MixViT-B/288 one template (does not fit)": MixViTConfig.b288(templates=1, update_interval=0),
    "MixViT-B/288 plain corner head (does not fit)": MixViTConfig.b288(head="corner"),
    "MixViT-L/384 plain corner head (does not fit)": MixViTConfig.l384(head="corner"),
    "MixViT-B/384 (templates 128)": MixViTConfig.b288(search_size=384),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs(name):
    with torch.device("meta"):
        profile = by_the_paper(create(name))
    gold = UNITS["macs"][COSTS[name]]
    assert (profile["parameters"], profile["macs"]) == (gold["params_called_layers"], gold["thop"])
    if "paper" not in gold:
        assert profile["paper"] == {}
        return
    assert profile["paper"] == {
        "parameters": round(gold["paper"]["params_M"] * 1e6),
        "macs": round(gold["paper"]["MACs_G"] * 1e9),
    }
    for what, unit in (("parameters", 1e5), ("macs", 1e8)):  # cut off after one decimal
        assert profile["paper"][what] == profile[what] // unit * unit


@pytest.mark.parametrize("name", OTHERS)
def test_costs_of_what_the_paper_does_not_mean(name):
    with torch.device("meta"):
        profile = by_the_paper(MixViT(OTHERS[name]))
    gold = UNITS["macs"][name]
    assert (profile["parameters"], profile["macs"], profile["paper"]) == (
        gold["params_called_layers"],
        gold["thop"],
        {},
    )


def test_table_4():
    """The rows that have no name: temporal attention costs nothing, and what is counted is what is
    printed.
    """
    for spatial, temporal in ((True, False), (False, True)):
        with torch.device("meta"):
            tracker = USTAM(USTAMConfig.b288(spatial=spatial, temporal=temporal))
        profile = by_the_paper(tracker)
        assert (
            profile["macs"] // 1e8 / 10
            == profile["paper"]["macs"] / 1e9
            == (43.6 if spatial else 43.2)
        )
        assert (
            profile["parameters"] // 1e5 / 10
            == profile["paper"]["parameters"] / 1e6
            == (97.2 if spatial else 97.1)
        )


@lru_cache
def deviations() -> dict[str, tuple[float, float, str]]:
    """What was compared -> largest deviation, tolerance, golden file."""
    found = certified(mixvit_run()[0] | tracking_run()[0], ALLOWED, "mixvit_b_288")
    errors: dict[str, float] = {}
    for run in all_runs():
        for name, error in run.items():
            errors[name] = max(errors.get(name, 0.0), error)
    found |= certified(errors, ALLOWED, "ustam_b_288")
    return found | certified(table_errors() | loss_errors(), ALLOWED, "mixformer_units")


def test_agrees_with_the_authors_and_the_definition():
    assert len(deviations()) == 46
    assert too_far(deviations()) == {}
    assert not_on_page("MixViT and USTAM", deviations()) == []
