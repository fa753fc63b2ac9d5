"""STMTrack and DASTM: what is remembered and what forgotten, what the gate does, what it costs,
what happens to bad input.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from golden import frames
from torch import nn

from trackkit import backbones, official
from trackkit.backbones import ConvNorm, MobileOne, SmallTrunk
from trackkit.costs import DASTM_TABLE_4 as TABLE_4
from trackkit.costs import by_the_paper, frame_macs, macs, part_macs, profile, within
from trackkit.errors import CheckpointError, DataError, TrackkitError
from trackkit.sampling import Samples
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.trackers.base import join, take
from trackkit.trackers.dastm import DASTM, MODULES, DASTMConfig, MemoryAttention
from trackkit.trackers.stmtrack import (
    STMTRACK_SEARCHED,
    PastFrames,
    STMTrack,
    STMTrackConfig,
    cell_centres,
    cells_of,
    foreground_map,
    nearest,
    read_out,
    victim,
    wanted,
)
from trackkit.training import _groups, train
from trackkit.weights import create, load, save


@pytest.fixture(scope="module")
def tracker() -> DASTM:
    """The tiny one with crops of two thirds the size, whose features are 7 x 7."""
    torch.manual_seed(0)
    made = DASTM(DASTMConfig.tiny(size=65, query_size=65)).eval()
    torch.manual_seed(1)
    nn.init.normal_(made.attention.gate.fc2.weight, std=20.0)  # so that it has opinions
    return made


@pytest.fixture(scope="module")
def video():
    return frames("dastm", 9, 200, 260)


def changed(tracker: DASTM, **changes) -> DASTM:
    """The same weights with another config."""
    other = DASTM(replace(tracker.config, **changes)).eval()
    weights = {k: v for k, v in tracker.state_dict().items() if k in other.state_dict()}
    other.load_state_dict(weights)
    return other


def run(tracker, video, **options):
    images, truth = video
    states, predictions = [tracker.start(images[:1], torch.tensor(truth[:1]))], []
    for picture in images[1:]:
        state, prediction = tracker.step(states[-1], [picture], **options)
        states.append(state)
        predictions.append(prediction)
    return states, predictions


# ---- what one tracker is of another ----


def test_without_attention_it_is_stmtrack(tracker, video):
    plain = STMTrack(STMTrackConfig.tiny(size=65)).eval()
    bare = changed(tracker, attention=(), gate="none")
    rest = {k: v for k, v in tracker.state_dict().items() if not k.startswith("attention.")}
    plain.load_state_dict(rest)
    assert bare.state_dict().keys() == rest.keys()
    indifferent = changed(tracker)
    with torch.no_grad():
        indifferent.attention.gate.fc2.bias[0] = 1e9  # never any module
    a, b, c, d = (run(made, video)[1] for made in (plain, bare, tracker, indifferent))
    for same in (b, d):
        assert all(
            torch.equal(x.box, y.box) and torch.equal(x.score, y.score)
            for x, y in zip(a, same, strict=True)
        ), "bit for bit"
    assert not torch.equal(a[-1].score, c[-1].score)


def test_names():
    assert create("dastm-tiny").config == DASTMConfig.tiny()
    assert create("stmtrack-tiny").config == STMTrackConfig.tiny()
    assert DASTMConfig.sastm() == DASTMConfig(gate="none")
    assert STMTrackConfig(**STMTRACK_SEARCHED["vot"]).confidence == 0.0


# ---- memory ----


def test_what_the_authors_look_at():
    assert [wanted(n, 4) for n in (1, 3, 4, 5, 8, 9, 12, 20)] == [
        [1], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 4, 6, 8],
        [1, 2, 4, 6, 8], [1, 2, 5, 8, 11], [1, 3, 8, 13, 18],
    ]  # fmt: skip
    for n in range(5, 300):
        length = n // 4
        assert wanted(n, 4) == sorted({1} | {i * length + length // 2 + 1 for i in range(4)})
        assert set(wanted(n, 4)) - {1} <= set(range(n // 8, n + 1)), (
            "what victim() relies on: nothing before"
        )


@pytest.mark.parametrize("capacity", [6, 16, 64])
def test_bounded_memory_looks_where_the_authors_look_for_long_and_close_to_it_later(capacity):
    held, off = [1], []
    for n in range(2, 1001):
        if len(held) == capacity:
            held.remove(victim([*held, n], 4))
        held.append(n)
        assert held[0] == 1 and len(held) <= capacity
        off.append(max(abs(nearest(held, f) - f) for f in wanted(n, 4)))
    first = next(i for i, o in enumerate(off) if o) + 2
    assert first == pytest.approx(1.25 * capacity, abs=1), (
        "the frame from which on it is not the authors' memory"
    )
    assert max(o / n for n, o in enumerate(off, 2)) <= 1.0 / capacity or capacity < 16
    assert max(o / n for n, o in enumerate(off, 2)) <= 1 / 6


def test_bounded_and_unbounded_track_alike_while_nothing_is_missed(tracker, video):
    states, predictions = run(changed(tracker, memory="unbounded"), video, maps=True)
    small_states, small_predictions = run(changed(tracker, capacity=8), video, maps=True)
    for n, (a, b) in enumerate(zip(predictions, small_predictions, strict=True), 1):
        assert torch.equal(a.box, b.box) and torch.equal(a.maps["memory"], b.maps["memory"]), n
    assert states[-1].memory.held.tolist() == [list(range(1, 10))]
    assert len(small_states[-1].memory.slots) == 8 and {1, 9} <= set(
        small_states[-1].memory.held[0].tolist()
    )


def test_confident_frames_are_looked_at(tracker, video):
    _, never = run(changed(tracker, confidence=1.0), video, maps=True)
    _, always = run(changed(tracker, confidence=0.0), video, maps=True)
    assert [p.maps["memory"][0].tolist() for p in never[4:6]] == [[1, 2, 3, 4]] * 2
    assert [p.maps["memory"][0].tolist() for p in always[4:6]] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]
    assert never[0].maps["memory"].tolist() == always[0].maps["memory"].tolist() == [[1]]


def test_time_and_memory_stay_flat(tracker, video):
    """The short form of benchmarks/dastm_speed.py; time is looked at there. Here: what a step
    touches.
    """
    small, images = changed(tracker, capacity=8), video[0]
    state = small.start(images[:1], torch.tensor(video[1][:1]))
    sizes, work = [], []
    for n in range(24):
        before = state
        held = {tensor.data_ptr() for tensor in before.memory.slots}
        state, prediction = small.step(state, [images[n % 9]], maps=True)
        sizes.append(sum(t.nbytes for t in state.memory.slots))
        work.append(prediction.maps["read_out"].numel())
        assert sum(tensor.data_ptr() not in held for tensor in state.memory.slots) == 1, (
            "one slot is new, the others are shared"
        )
    assert len(set(sizes[8:])) == 1 and max(work) <= 6 * 7**4
    endless = changed(tracker, memory="unbounded")
    state = endless.start(images[:1], torch.tensor(video[1][:1]))
    for n in range(9):
        state, _ = endless.step(state, [images[n % 9]])
    assert len(state.memory.slots) == 10


def test_states_are_left_as_they_are(tracker, video):
    small = changed(tracker, capacity=6)
    states, predictions = run(small, video)
    _, again = small.step(states[5], [video[0][6]])
    assert torch.equal(again.box, predictions[5].box)
    assert [s.count.item() for s in states] == list(range(1, 10))


def test_what_a_memory_gives_back_is_what_it_was_given():
    memory = PastFrames(torch.zeros(2, 0, dtype=torch.long))
    for number in range(1, 8):
        latest = torch.tensor([number, number + 3])  # the second sequence is three frames ahead
        memory = memory.stored(latest[:, None].double(), latest, segments=2, capacity=4)
        assert (memory.held == latest[:, None]).any(1).all()
    assert memory.held.shape == (2, 4) and 1 in memory.held[0] and 4 in memory.held[1], (
        "the first frames stay"
    )
    numbers = memory.held.sort(1).values
    features, real = memory.recalled(numbers)
    assert real is None and torch.equal(features[..., 0], numbers.double())
    features, real = memory.recalled(torch.cat([numbers, torch.zeros(2, 1, dtype=torch.long)], 1))
    assert torch.equal(real, torch.tensor([[True] * 4 + [False]] * 2)) and torch.equal(
        features[:, :4, 0], numbers.double()
    )


# ---- batches ----


@pytest.mark.parametrize(
    "changes", [{}, {"capacity": 6}, {"granularity": "memory"}, {"gate": "random"}]
)
def test_a_batch_is_its_sequences_at_different_ages(tracker, video, changes):
    """Memories of different lengths side by side: the second sequence joins when the first has seen
    five frames.
    """
    one = changed(tracker, confidence=0.21, **changes)
    other, other_boxes = frames("dastm other", 9, 190, 250)
    images, boxes = video
    old = one.start(images[:1], torch.tensor(boxes[:1]))
    for picture in images[1:5]:
        old, _ = one.step(old, [picture])
    young = one.start(other[:1], torch.tensor(other_boxes[:1]))
    batch = join(old, young)
    assert batch.memory.held.tolist() == [[1, 2, 3, 4, 5], [1, 0, 0, 0, 0]]
    alone = [old, young]
    for index in range(1, 4):
        pictures = [images[4 + index], other[index]]
        batch, together = one.step(batch, pictures, maps=True)
        for i in range(2):
            alone[i], single = one.step(alone[i], pictures[i : i + 1], maps=True)
            assert torch.allclose(together.box[i], single.box[0], atol=1e-3)
            assert [f for f in together.maps["memory"][i].tolist() if f] == single.maps["memory"][
                0
            ].tolist()
            assert torch.equal(batch.chosen[i], alone[i].chosen[0])
    swapped = join(take(batch, [1]), take(batch, [0]))
    _, a = one.step(batch, [images[8], other[4]])
    _, b = one.step(swapped, [other[4], images[8]])
    assert torch.allclose(a.box, b.box.flip(0), atol=1e-3)
    assert torch.allclose(one.step(take(batch, [1]), [other[4]])[1].box[0], a.box[1], atol=1e-3)


def test_unknown_memory_changes_nothing():
    query, memory = torch.randn(2, 9, 16), torch.randn(2, 20, 16)
    known = torch.ones(2, 30, dtype=torch.bool)
    known[:, 20:] = False
    padded = torch.cat([memory, torch.randn(2, 10, 16)], 1)
    for maps in (False, True):
        found, weights = read_out(query, padded, known, maps)
        assert torch.allclose(found, read_out(query, memory)[0], atol=1e-6)
    assert (
        weights.shape == (2, 9, 30)
        and torch.allclose(weights.sum(2), torch.ones(2, 9))
        and (weights[:, :, 20:] == 0).all()
    )


# ---- sizes ----


def test_cells():
    """As the specification has them: 25 x 25 around the middle of 289 pixels, 20 x 20 from 0 on for
    160.
    """
    for config in (STMTrackConfig(), DASTMConfig(query_size=160, query_trim=0)):
        cells = cell_centres(config, 289)
        assert (
            cells.shape == (625, 2)
            and cells[0].tolist() == [48, 48]
            and cells[1].tolist() == [56, 48]
            and cells[-1].tolist() == [240, 240]
        )
    cells = cell_centres(config, 160)
    assert cells.shape == (400, 2) and cells[[0, -1]].tolist() == [[0, 0], [152, 152]]
    for size in (97, 160, 161, 288, 289):
        assert (
            cells_of("tiny", size) == SmallTrunk().eval()(torch.zeros(1, 3, size, size)).shape[-1]
        )


def test_queries_smaller_than_the_memory(tracker, video):
    """The target is as large in both, so a smaller query shows less around it."""
    small = changed(tracker, query_size=41, query_trim=0)
    _, predictions = run(small, video, maps=True)
    _, equal = run(tracker, video, maps=True)
    assert predictions[0].maps["score"].shape == (1, 6, 6) and predictions[0].maps[
        "read_out"
    ].shape == (1, 36, 1, 7, 7)
    sides = [p[0].maps["window"][0, 2].item() for p in (predictions, equal)]
    assert sides[0] / sides[1] == pytest.approx(41 / 65, rel=0.02)


def test_maps(tracker, video):
    _, predictions = run(tracker, video, maps=True)
    shown = predictions[-1].maps
    assert shown["read_out"].shape == (1, 49, shown["memory"].shape[1], 7, 7)
    assert torch.allclose(shown["read_out"].sum((2, 3, 4)), torch.ones(1, 49), atol=1e-5)
    assert shown["response"].amax() == pytest.approx(predictions[-1].score.item(), abs=1e-6)
    assert shown["chosen"].sum() == 9
    _, silent = run(tracker, video)
    assert silent[-1].maps is None and torch.allclose(
        silent[-1].box, predictions[-1].box, atol=1e-3
    )


# ---- the gate ----


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(3, 2, 64, 5, 6, generator=torch.Generator().manual_seed(1))


def test_only_chosen_modules_run(tracker, features):
    block, ran = copy.deepcopy(tracker.attention), []
    for name, branch in block.branches.items():
        branch.register_forward_hook(
            lambda module, given, made, name=name: ran.append((name, len(given[0])))
        )
    for wish, expected in ((0, []), (1, [("se", 6)]), (2, [("ca", 6)]), (3, [("cbam", 6)])):
        with torch.no_grad():
            block.gate.fc2.weight.zero_()
            block.gate.fc2.bias.copy_(torch.eye(4)[wish])
            made, choices = block(features)
        assert ran == expected and choices.weights.argmax(2).unique().tolist() == [wish]
        assert torch.equal(made, features) == (wish == 0)
        ran.clear()
    weights = torch.eye(4)[[0, 3, 1, 3, 2, 0]]
    with torch.no_grad():
        routed = block.routed(features.flatten(0, 1), weights)
    assert ran == [("se", 1), ("ca", 1), ("cbam", 2)]
    assert torch.allclose(routed, block.mixed(features.flatten(0, 1), weights), atol=1e-6)


def test_a_tracked_frame_does_not_pay_for_modules_that_it_did_not_choose(tracker, video):
    images, truth = video
    state, costs = tracker.start(images[:1], torch.tensor(truth[:1])), []
    for wish in (0, 3):
        block = copy.deepcopy(tracker)
        with torch.no_grad():
            block.attention.gate.fc2.weight.zero_()
            block.attention.gate.fc2.bias.copy_(torch.eye(4)[wish])
        costs.append(macs(lambda block=block: block.step(state, images[1:2])))
    assert costs[1] - costs[0] == part_macs(tracker.config)["cbam"]


def test_training_chooses_one_module_and_teaches_the_gate(tracker, features):
    block = copy.deepcopy(tracker.attention).train()
    made, choices = block(features)
    one_hot = choices.weights.detach()
    assert torch.allclose(one_hot.amax(2), torch.ones(3, 2)) and torch.allclose(
        one_hot.sum(2), torch.ones(3, 2)
    )
    made.square().mean().backward()
    assert block.gate.fc1.weight.grad.abs().sum() > 0, "straight through"
    torch.manual_seed(0)
    drawn = torch.stack([block(features)[1].weights.detach() for _ in range(300)]).mean(0)
    assert (drawn - choices.probability).abs().max() < 0.12, "drawn with the gate's probabilities"


def test_temperature(tracker, features):
    block = copy.copy(tracker.attention)
    probability = {}
    for tau in (0.1, 1.0, 100.0):
        block.config = replace(tracker.config, tau=tau)
        probability[tau] = block(features)[1].probability
    assert (
        probability[0.1].amax(2).mean()
        > probability[1.0].amax(2).mean()
        > probability[100.0].amax(2).mean()
    )
    # of the last stage: the temperature of the first one stays
    batch = {"progress": torch.tensor(0.5)}
    cooled = changed(tracker, tau=4.0, tau_end=0.25)
    seen = []
    cooled.forward = lambda *given: (
        seen.append(given[-1]) or (_ for _ in ()).throw(KeyboardInterrupt)
    )
    batch |= {"searches": torch.zeros(1, 1, 3, 65, 65), "search_boxes": torch.full((1, 1, 4), 0.5)}
    batch |= {"templates": None, "template_boxes": torch.full((1, 1, 4), 0.5)}
    for stage in DASTM(DASTMConfig.tiny()).recipe("tiny")[0], None:
        with pytest.raises(KeyboardInterrupt):
            cooled.loss(batch, stage.loss if stage else "")
    assert seen == [pytest.approx(1.0), 4.0]


def test_random_gate(tracker, video):
    """The same decisions in every run of a seed, others with another, about equally often."""
    chosen = [
        run(changed(tracker, test_gate="random", seed=seed), video)[0][-1].chosen
        for seed in (0, 0, 1)
    ]
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    draws = changed(tracker, gate="random")._draws(torch.arange(400))
    assert (torch.bincount(draws[:, 0], minlength=4) > 60).all()
    block = MemoryAttention(replace(tracker.config, gate="random")).train()
    assert block(torch.randn(4, 5, 64, 3, 3))[1].weights.sum((0, 1)).min() > 0


def test_one_decision_for_all_memory_frames(tracker, features, video):
    block = copy.copy(tracker.attention)
    block.config = replace(tracker.config, granularity="memory")
    choices = block(features)[1]
    assert torch.equal(choices.weights[:, 0], choices.weights[:, 1])
    known = torch.tensor([[True, False]] * 3)
    own = tracker.attention(features)[1].probability[:, 0]
    assert torch.allclose(block(features, known)[1].probability[:, 0], own, atol=1e-5), (
        "a frame that is not there has no say"
    )
    drawn = copy.deepcopy(block).train()(features)[1].weights
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    states, _ = run(changed(tracker, granularity="memory"), video)
    plain, _ = run(changed(tracker, attention=(), gate="none"), video)
    assert torch.equal(states[0].memory.slots[0], plain[0].memory.slots[0]), (
        "kept as it is, strengthened when looked at"
    )


@pytest.mark.parametrize("names", [("se",), ("ca",), ("cbam",), ("se", "ca"), ("se", "ca", "cbam")])
def test_rows_of_table_1(names, features):
    block = MemoryAttention(DASTMConfig.tiny(attention=names, gate="none")).eval()
    total = MemoryAttention(replace(block.config, static="sum")).eval()
    total.load_state_dict(block.state_dict())
    x = features.flatten(0, 1)
    outputs = [branch(x) for branch in block.branches.values()]
    assert list(block.branches) == list(names)
    assert torch.allclose(block(features)[0].flatten(0, 1), sum(outputs) / len(names), atol=1e-6)
    assert torch.allclose(total(features)[0], block(features)[0] * len(names), atol=1e-5)


# ---- MobileOne and Inception without their norms ----


def stirred(module: nn.Module) -> nn.Module:
    """Norms and weights as after training, kept small enough for twenty blocks of three
    branches.
    """
    torch.manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.normal_(part.running_mean, 0, 0.1)
            nn.init.uniform_(part.weight, 0.3, 0.6)
            nn.init.normal_(part.bias, 0, 0.1)
    return module


@pytest.mark.parametrize(
    ("name", "stage", "channels"), [("mobileone_s0", 3, 256), ("mobileone_s1", 2, 192)]
)
def test_fused_mobileone_is_the_same(name, stage, channels):
    trunk = stirred(MobileOne(name, stage).eval())
    crops = torch.randint(0, 256, (2, 3, 65, 65), dtype=torch.uint8)
    plain = trunk(crops).detach()  # with gradients: all branches
    with torch.no_grad():
        fused, calls = trunk(crops), macs(lambda: trunk(crops))
        assert trunk.channels == channels and fused.shape == (2, channels, 9, 9)
        assert (fused - plain).abs().max() <= 2e-6 * plain.abs().max(), "but for rounding"
        trunk.stages[0][0].conv_kxk[0].bn.weight.mul_(1.1)
        assert not torch.equal(trunk(crops), fused), "a change of a weight is noticed"
    once = sum(p.numel() for memo in trunk._memos for p in memo._value)
    assert {("mobileone_s0", 3): 0.79, ("mobileone_s1", 2): 0.31}[name, stage] == round(
        once / 1e6, 2
    ), "spec, B4"
    assert calls < macs(lambda: MobileOne(name, stage).train()(crops))


def test_fused_convolution_keeps_up_with_its_norm():
    layer = stirred(ConvNorm(5, 7, kernel_size=3, padding=1)).eval()
    x = torch.randn(1, 5, 8, 8)
    for _ in range(2):
        plain = layer(x).detach()
        with torch.no_grad():
            assert torch.allclose(layer(x), plain, atol=1e-6)
            layer.bn.running_mean.add_(0.3)
    with torch.inference_mode():
        assert layer(x).shape == (1, 7, 8, 8)
    assert layer.state_dict().keys() == {
        "conv.weight",
        *(
            f"bn.{n}"
            for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ),
    }


def test_start_from_imagenet(monkeypatch):
    """Both trunks take over what torchvision and timm have, by name."""
    from timm import create_model
    from torchvision.models import inception_v3

    small = {"width": 16, "head_width": 8, "attention": ("ca",)}
    for trunk, whole in (
        ("mobileone_s0", create_model("mobileone_s0")),
        ("inception", inception_v3(init_weights=False)),
    ):
        weights = whole.state_dict()
        published = SimpleNamespace(get_state_dict=lambda progress, weights=weights: weights)
        monkeypatch.setattr(torchvision.models, "get_weight", lambda name, p=published: p)
        monkeypatch.setattr(
            timm,
            "create_model",
            lambda name, pretrained=False, whole=whole, **rest: (
                whole if pretrained else create_model(name, **rest)
            ),
        )
        made = DASTM(DASTMConfig(trunk=trunk, **small))
        assert made.load_pretrained()
        for path in (made.memory, made.query):
            assert all(
                torch.equal(value, weights[key.replace("begin.", "stem.")])
                for key, value in path.trunk.state_dict().items()
            )
    crops = torch.randint(0, 256, (1, 3, 129, 129), dtype=torch.uint8)
    whole.eval()
    with torch.no_grad():
        stem = whole.Conv2d_1a_3x3((crops.float() / 255 - 0.5) / 0.5)
        assert torch.allclose(made.eval().query.trunk.stem(crops), stem, atol=1e-5)


def test_weights_that_cannot_be_fetched(monkeypatch):
    import timm

    def fetch(name, **options):
        raise OSError("no route to host\nmore of it")

    made = backbones.MobileOne("mobileone_s0")
    monkeypatch.setattr(timm, "create_model", fetch)
    with pytest.raises(
        TrackkitError,
        match=r"mobileone_s0 are not in timm's cache .*\(no route to host\).*--no-pretrained",
    ):
        made.load_pretrained()


# ---- costs ----


def test_costs_are_the_specifications():
    """Table B4: GMAC of a frame, three and six memory frames; modules; the gate."""

    def giga(**changes) -> list[float]:
        config = DASTMConfig(**changes)
        return [round(frame_macs(replace(config, segments=n)) / 1e9, 1) for n in (1, 4)]

    assert giga(trunk="mobileone_s1", trunk_stage=2) == [10.7, 11.9]
    assert giga(trunk="mobileone_s1", trunk_stage=2, query_size=160, query_trim=0) == [7.1, 7.9]
    parts = part_macs(DASTMConfig())
    assert {name: parts[name] for name in ("se", "ca", "cbam", "gate")} == {
        "se": 32_768,
        "ca": 819_200,
        "cbam": 126_786,
        "gate": 66_048,
    }
    assert round(parts["head"] / 1e9, 3) == 7.374 and round(parts["read_out"] / 1e9, 3) == 0.4
    blocks = MemoryAttention(DASTMConfig())
    assert {
        name: sum(p.numel() for p in branch.parameters())
        for name, branch in blocks.branches.items()
    } == {"se": 32_768, "ca": 25_648, "cbam": 33_412}
    assert sum(p.numel() for p in blocks.gate.parameters()) == 66_180


@pytest.mark.parametrize("config", [DASTMConfig(), DASTMConfig.tiny()], ids=["full", "tiny"])
def test_what_the_cost_loss_weighs_is_what_is_counted(config):
    """The closed forms `branch.macs` against the counter."""
    with torch.device("meta"):
        branches = MemoryAttention(config).branches
    cells, parts = config.cells(config.size), part_macs(config)
    assert {name: branch.macs(cells, cells) for name, branch in branches.items()} == {
        name: parts[name] for name in MODULES
    }


def test_stmtrack_costs_what_dastm_costs_without_attention():
    bare = DASTMConfig.tiny(attention=(), gate="none")
    assert part_macs(STMTrackConfig.tiny()) == part_macs(bare)
    assert frame_macs(STMTrackConfig.tiny()) == frame_macs(bare)
    assert within(STMTrackConfig.tiny(), frame_macs(bare) - 1).segments == 3


def test_profile():
    with torch.device("meta"):
        found = by_the_paper(STMTrack())
    assert found["parameters"] == 36_812_532 and found["macs"] == pytest.approx(42.2e9, abs=0.2e9)
    assert found["paper"]["peak_memory_bytes"] == 1_240_000_000
    tiny = profile("dastm-tiny")
    assert tiny["paper"] == {} and tiny["macs"] < 150e6 and tiny["parameters"] < 600_000
    assert TABLE_4[DASTMConfig()]["high_computation_share"] == 0.335


def test_budgets_of_table_4():
    config = DASTMConfig(trunk="mobileone_s2", trunk_stage=2, query_size=160, query_trim=0)
    eight = within(config, 8_000_000_000)
    assert eight.segments < config.segments == 4 and frame_macs(eight) <= 8e9
    assert eight == replace(config, segments=eight.segments)
    least = frame_macs(replace(config, segments=1))
    assert within(config, least - 1).attention == ("se", "cbam"), "then the dearest module goes"
    with pytest.raises(
        TrackkitError, match=r"7,000,000,000 multiply-accumulates a frame: the least is 7,\d+,"
    ):
        within(config, 7_000_000_000)


# ---- training ----


@pytest.fixture(scope="module")
def batch():
    spec = replace(DASTM(DASTMConfig.tiny(size=65, query_size=65)).samples(), negatives=0.5)
    samples = Samples(
        SynthDataset(SynthConfig(frames=8, width=160, height=120), seed=3, length=4), spec, 0, 6
    )
    items = [samples[i] for i in range(6)]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def test_everything_learns(tracker, batch):
    torch.manual_seed(0)
    fresh = DASTM(replace(tracker.config, cost_weight=0.5, cost_share=0.1)).train()
    assert batch["templates"].shape == (6, 3, 3, 65, 65) and 0 < batch["labels"].sum() < 6
    losses = fresh.loss(batch)
    parts = losses["score"] + losses["centre"] + losses["sides"] + 0.5 * losses["cost"]
    assert losses["loss"].item() == pytest.approx(parts.item())
    losses["loss"].backward()
    still = [
        name for name, p in fresh.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    unchosen = [name for name in still if "branches" not in name]
    assert unchosen == [], "each part of the network takes part"


def test_boxes_keep_their_precision_in_mixed_precision(tracker, batch):
    """A distance of ten cells in bfloat16 would be off by a quarter of a pixel."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        foreground = foreground_map(torch.full((6, 3, 4), 20.0), 65)
        answer = tracker(batch["templates"], foreground, batch["searches"][:, 0])
        assert (
            answer.score.dtype == torch.bfloat16
            and answer.boxes.dtype == answer.choices.probability.dtype == torch.float32
        )
        assert tracker.loss(batch)["loss"].isfinite()


@torch.no_grad()
def test_batches_without_the_target(tracker, batch):
    """Nothing to locate: the loss is finite, and teaches to say no."""
    negative = {key: value[:2] for key, value in batch.items()} | {"labels": torch.zeros(2, 1)}
    losses = tracker.loss(negative)
    assert math.isfinite(losses["loss"]) and losses["sides"] == 0 and losses["score"] > 0
    assert math.isfinite(tracker.loss({k: v for k, v in batch.items() if k != "labels"})["loss"])


def test_expected_cost(tracker, batch):
    for share in (0.0, 1.0):
        measured = changed(tracker, cost_weight=1.0, cost_share=share)
        with torch.no_grad():
            measured.attention.gate.fc2.bias[0] = 1e9
            assert measured.loss(batch)["cost"] == pytest.approx(share), "no module costs nothing"


def test_a_short_training_runs_and_goes_on(tmp_path):
    torch.manual_seed(0)
    small = DASTM(DASTMConfig.tiny(size=65, query_size=65))
    stages = [replace(stage.resized(2), batch=2) for stage in small.recipe("tiny")]
    data = SynthDataset(SynthConfig(frames=8, width=160, height=120), seed=3, length=4)
    log = train(small, stages, data, tmp_path, device="cpu", progress=False)
    assert (
        math.isfinite(log[-1]["loss"])
        and load(tmp_path / "tracker.safetensors").config == small.config
    )


@pytest.mark.parametrize("name", ["stmtrack", "dastm", "dastm-tiny", "stmtrack-tiny"])
def test_recipes(name):
    with torch.device("meta"):
        made = create(name)
    for scale in ("tiny", "laptop", "gpu", "paper"):
        assert all(_groups(made, stage) for stage in made.recipe(scale))
    assert {stage.loss for stage in made.recipe("tiny")} == {
        "cooling" if name.startswith("dastm") else ""
    }
    if name.endswith("-tiny"):
        return
    (whole,) = made.recipe("paper")
    assert whole.trainable == ("*",), "a frozen random trunk would be useless"
    made.pretrained = True
    assert all(_groups(made, stage) for scale in ("gpu", "paper") for stage in made.recipe(scale))
    first, second = made.recipe("paper")
    assert [whole.rate(i) for i in (0, whole.steps - 1)] == pytest.approx(
        [
            first.rate(0) if first.warmup else first.lr * 1 / whole.warmup,
            second.rate(second.steps - 1),
        ],
        rel=1e-3,
    )
    assert whole.steps == first.steps + second.steps
    learning = {n for group in (first.trainable,) for n in group}
    assert (
        first.rate(first.steps) == pytest.approx(second.rate(0))
        and first.momentum == 0.9
        and first.weight_decay == 1e-4
    )
    assert {"stmtrack": (10 * 4687, 10 * 4687)}.get(name, (150_000, 450_000)) == (
        first.steps,
        second.steps,
    )
    assert ("*.trunk.*.bn.*" in learning) == (name == "stmtrack")
    learns = {id(p) for group in _groups(made, second) for p in group["params"]}
    trained = {n for n, p in made.named_parameters() if id(p) in learns}
    stem = [
        n for n in dict(made.named_parameters()) if "Conv2d_" in n and n.endswith("conv.weight")
    ]
    assert not trained & set(stem) and len(stem) == (10 if name == "stmtrack" else 0)
    assert len(trained) == len(dict(made.named_parameters())) - len(stem)


# ---- bad input ----


def test_impossible_configs():
    for changes, message in (
        ({"trunk": "resnet50"}, "trunk must be one of inception"),
        ({"attention": ("se", "se")}, "at most once"),
        ({"attention": ()}, "a gate needs attention modules"),
        ({"gate": "none", "test_gate": "random"}, "there is none"),
        ({"gate": "none", "cost_weight": 1.0}, "there is no gate"),
        ({"capacity": 5}, "a capacity of at least segments"),
        ({"trim": 19, "query_trim": 19}, "leaves no cells when 19 are cut off"),
        ({"query_trim": 0}, "must be equal; got 6, 0"),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"tau": math.inf}, "tau must be above 0"),
        ({"cost_share": 1.5}, "cost_share must be at least 0 and at most 1"),
        ({"attention": ("se", "eca")}, "attention must be one of se, ca, cbam"),
        ({"width": 8}, "width must be at least 16"),
    ):
        with pytest.raises(ValueError, match=message):
            DASTMConfig(**changes)


@pytest.mark.parametrize("exact", [True, False])
def test_small_frames_and_boxes_at_the_border(tracker, exact):
    made = changed(tracker, exact=exact)
    frame = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    state = made.start(
        [frame] * 3, torch.tensor([[0.0, 0, 12, 9], [-5, -4, 20, 20], [40, 30, 30, 40]])
    )
    for _ in range(3):
        state, prediction = made.step(state, [frame] * 3)
        assert (
            torch.isfinite(prediction.box).all()
            and (state.size >= 4).all()
            and (state.centre >= 0).all()
        )
    with pytest.raises(DataError, match="needs finite numbers"):
        made.step(replace(state, size=state.size * torch.nan), [frame] * 3)
    with pytest.raises(DataError, match="lies outside its 50x40 frame"):
        made.start([frame], torch.tensor([[60.0, 0, 12, 9]]))


def test_labels_of_boxes_larger_than_the_crop_do_not_wrap():
    """A box three times as wide as the crop; the authors' slices turn around at negative
    numbers.
    """
    label = foreground_map(torch.tensor([[-100.0, 40, 400, 50.9], [10, 10, 12, 10]]), 97)
    assert label[0].sum() == 97 * 11 and label[0, 40:51].all()
    assert label[1].nonzero().tolist() == [[10, 10], [10, 11], [10, 12]]


def test_wrong_checkpoints(tracker, tmp_path):
    save(tracker, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert again.config == tracker.config and all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), tracker.state_dict().values(), strict=True)
    )
    theirs = {f"basemodel_m.{k}": torch.empty(3) for k in ("Conv2d_1a_3x3.conv.weight", "fc")} | {
        "r_x.conv.weight": torch.empty(2)
    }
    with pytest.raises(
        CheckpointError,
        match=r"for stmtrack does not fit.*missing: memory.*not expected: memory.trunk.fc.*; of "
        r"another size: memory.trunk.Conv2d_1a",
    ):
        official.load("stmtrack", theirs)


@pytest.mark.parametrize(("exact", "off"), [(True, 0.75), (False, 2.0)])
def test_boxes_come_back_from_where_the_pixels_are(tracker, exact, off):
    """A frame whose colours are coordinates. The authors' way back misses the place by up to two
    pixels, the exact one by what rounding of colours leaves.
    """
    made = changed(tracker, exact=exact)
    frame = torch.stack(
        [
            torch.arange(256).expand(200, 256),
            torch.arange(200)[:, None].expand(200, 256),
            torch.zeros(200, 256),
        ]
    ).to(torch.uint8)
    state = made.start([frame], torch.tensor([[113.3, 80.9, 26.4, 31.7]]))
    crops, scale, origin = made._look([frame], state, made.search_crop)
    # x and y of the crop's columns and rows
    place = origin[0][:, None] + torch.arange(65) / scale - (0.5 if exact else 0.0)
    found = torch.stack([crops[0, 0, 40], crops[0, 1, :, 40]]).double()
    assert (found - place).abs().max() < off
