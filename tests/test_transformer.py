"""What the trackers with attention share: attention, layers, positions, heads, backbones, losses.
Each against another way.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchvision
from torch import nn

from trackkit import vit
from trackkit.attention import (
    Attention,
    DecoderLayer,
    EncoderLayer,
    LearnedPosition,
    look_by_few,
    sine_position,
)
from trackkit.backbones import MEAN, STD, ConvNorm, MobileOne, ResNet, SmallNet, normalise
from trackkit.heads import MLP, CornerHead, soft_argmax
from trackkit.losses import localisation, place_cross_entropy

WIDTH, HEADS, HIDDEN = 16, 4, 24


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module) -> nn.Module:
    """All parameters and statistics random: biases, norms and all."""
    torch.manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            low = (
                0.5
                if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight"))
                else -0.5
            )
            fan = max(1, math.prod(tensor.shape[1:])) ** 0.5 if tensor.ndim > 1 else 1
            tensor.data.uniform_(low, low + 1).div_(fan / 3 if tensor.ndim > 1 else 1)
    return module.eval()


def twin(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    """torch's module with our parameters."""
    names = {
        name.replace("cross_attn", "multihead_attn"): value
        for name, value in ours.state_dict().items()
    }
    theirs.load_state_dict(names)
    return theirs.eval()


IGNORE = torch.tensor([[False] * 7, [True, True, False, False, False, True, False]])

# ---- attention ----


@pytest.mark.parametrize("ignore", [None, IGNORE], ids=["all", "some"])
@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_look_the_same_way(queries, ignore):
    layer = randomised(Attention(WIDTH, HEADS))
    query, key, value = (
        noise(2, queries, WIDTH),
        noise(2, 7, WIDTH, seed=1),
        noise(2, 7, WIDTH, seed=2),
    )
    torch.testing.assert_close(
        look_by_few(layer, query, key, value, ignore),
        layer(query, key, value, ignore)[0],
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize(("queries", "quicker"), [(1, True), (3, True), (4, False)])
def test_a_decoder_layer_takes_the_quicker_way(queries, quicker, monkeypatch):
    taken = []
    monkeypatch.setattr(
        "trackkit.attention.look_by_few", lambda *given: taken.append(given) or look_by_few(*given)
    )
    layer = randomised(DecoderLayer(WIDTH, HEADS, HIDDEN))
    given = (
        noise(2, queries, WIDTH),
        noise(2, queries, WIDTH, seed=1),
        noise(2, 7, WIDTH, seed=2),
        noise(2, 7, WIDTH, seed=3),
        IGNORE,
    )
    with torch.no_grad():
        found = layer(*given)[0]
    assert bool(taken) == quicker
    torch.testing.assert_close(found, layer(*given)[0], atol=1e-5, rtol=0)  # as in training


@pytest.mark.parametrize("ignore", [None, IGNORE], ids=["all", "some"])
@pytest.mark.parametrize("same", [True, False], ids=["self", "cross"])
def test_attention_is_torchs(same, ignore):
    ours = randomised(Attention(WIDTH, HEADS))
    theirs = twin(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), ours)
    key, value = noise(2, 7, WIDTH), noise(2, 7, WIDTH, seed=1)
    query = key if same else noise(2, 3, WIDTH, seed=2)
    expected, shares = theirs(
        query, key, value, key_padding_mask=ignore, average_attn_weights=False
    )
    loud, share = ours(query, key, value, ignore, weights=True)
    quiet, none = ours(query, key, value, ignore)
    assert none is None
    for found in (loud, quiet):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(share, shares, atol=1e-6, rtol=0)
    assert torch.allclose(share.sum(-1), torch.ones(()), atol=1e-6)
    if ignore is not None:
        assert (share.transpose(1, 3)[ignore] == 0).all()


def test_ignored_tokens_do_not_matter():
    attention, x = randomised(Attention(WIDTH, HEADS)), noise(2, 7, WIDTH)
    changed = torch.where(IGNORE[..., None], 99.0, x)
    seen = ~IGNORE
    assert torch.allclose(
        attention(x, x, x, IGNORE)[0][seen],
        attention(changed, changed, changed, IGNORE)[0][seen],
        atol=1e-5,
    )
    assert not torch.allclose(
        attention(x, x, x)[0][seen], attention(changed, changed, changed)[0][seen], atol=1e-2
    )


def test_both_ways_of_attention_have_the_same_gradients():
    x, found = noise(2, 7, WIDTH), []
    for weights in (False, True):
        attention = randomised(Attention(WIDTH, HEADS)).train()
        attention(x, x, x, IGNORE, weights)[0].square().sum().backward()
        found.append([p.grad for p in attention.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_attention_drops_only_in_training():
    attention, x = randomised(Attention(WIDTH, HEADS, dropout=0.5)), noise(2, 7, WIDTH)
    assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    attention.train()
    for weights in (False, True):
        assert not torch.allclose(
            attention(x, x, x, None, weights)[0], attention(x, x, x, None, weights)[0]
        )
    assert torch.allclose(attention(x, x, x, None, True)[1].sum(-1), torch.ones(())), (
        "what is shown is what was there before"
    )


def test_heads_must_share_the_width():
    with pytest.raises(ValueError, match="16 cannot be shared by 3"):
        Attention(16, 3)


# ---- layers ----


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
def test_layers_without_positions_are_torchs(pre_norm):
    rest = {"batch_first": True, "norm_first": pre_norm}
    x, memory = noise(2, 3, WIDTH), noise(2, 7, WIDTH, seed=1)
    encoder = randomised(EncoderLayer(WIDTH, HEADS, HIDDEN, pre_norm=pre_norm))
    theirs = twin(nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **rest), encoder)
    expected = theirs(memory, src_key_padding_mask=IGNORE)
    found = encoder(memory, torch.zeros_like(memory), IGNORE)[0]
    # torch's fast path blanks the others
    torch.testing.assert_close(found[~IGNORE], expected[~IGNORE], atol=1e-5, rtol=0)
    decoder = randomised(DecoderLayer(WIDTH, HEADS, HIDDEN, pre_norm=pre_norm))
    theirs = twin(nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, **rest), decoder)
    expected = theirs(x, memory, memory_key_padding_mask=IGNORE)
    found, share = decoder(
        x, torch.zeros_like(x), memory, torch.zeros_like(memory), IGNORE, weights=True
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert share.shape == (2, HEADS, 3, 7)


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
def test_positions_steer_queries_and_keys_and_are_no_values(pre_norm):
    """The layers written out, with torch's attention."""

    def attend(attention: Attention, query, key, value):
        return twin(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), attention)(
            query, key, value, key_padding_mask=None
        )[0]

    def think(layer, y):
        return layer.linear2(layer.linear1(y).relu())

    x, question, memory, position = (noise(2, n, WIDTH, seed=n) for n in (3, 3, 7, 7))
    layer = randomised(EncoderLayer(WIDTH, HEADS, HIDDEN, pre_norm=pre_norm))
    if pre_norm:
        y = layer.norm1(memory)
        y = memory + attend(layer.self_attn, y + position, y + position, y)
        expected = y + think(layer, layer.norm2(y))
    else:
        y = layer.norm1(
            memory + attend(layer.self_attn, memory + position, memory + position, memory)
        )
        expected = layer.norm2(y + think(layer, y))
    torch.testing.assert_close(layer(memory, position)[0], expected, atol=1e-5, rtol=0)

    layer = randomised(DecoderLayer(WIDTH, HEADS, HIDDEN, pre_norm=pre_norm))
    if pre_norm:
        y = layer.norm1(x)
        y = x + attend(layer.self_attn, y + question, y + question, y)
        y = y + attend(layer.cross_attn, layer.norm2(y) + question, memory + position, memory)
        expected = y + think(layer, layer.norm3(y))
    else:
        y = layer.norm1(x + attend(layer.self_attn, x + question, x + question, x))
        y = layer.norm2(y + attend(layer.cross_attn, y + question, memory + position, memory))
        expected = layer.norm3(y + think(layer, y))
    torch.testing.assert_close(layer(x, question, memory, position)[0], expected, atol=1e-5, rtol=0)


def test_layers_drop_in_training_at_each_place():
    """With everything dropped only the residual path is left."""
    x, position = noise(2, 7, WIDTH), noise(2, 7, WIDTH, seed=1)
    encoder = randomised(EncoderLayer(WIDTH, HEADS, HIDDEN, dropout=1.0)).train()
    torch.testing.assert_close(encoder(x, position)[0], encoder.norm2(encoder.norm1(x)))
    decoder = randomised(DecoderLayer(WIDTH, HEADS, HIDDEN, dropout=1.0)).train()
    torch.testing.assert_close(
        decoder(x, position, x, position)[0], decoder.norm3(decoder.norm2(decoder.norm1(x)))
    )


def test_weights_start_as_the_authors_do():
    torch.manual_seed(0)
    layer = DecoderLayer(64, 4, 128)
    for name, weight in layer.named_parameters():
        if weight.ndim > 1:
            bound = math.sqrt(6 / sum(weight.shape))  # xavier-uniform over the stacked matrix
            assert 0.95 * bound < weight.abs().max() <= bound, name
    assert (layer.cross_attn.in_proj_bias == 0).all() and (layer.self_attn.out_proj.bias == 0).all()


# ---- positions ----


def test_sine_position_by_its_formula():
    grid = sine_position(torch.zeros(1, 3, 5, dtype=torch.bool), 16).view(3, 5, 16)
    for y, x in ((0, 0), (1, 3), (2, 4)):
        for channel in range(16):
            count, last = (y + 1, 3) if channel < 8 else (x + 1, 5)
            angle = 2 * math.pi * count / last / 10_000 ** (2 * (channel % 8 // 2) / 8)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert grid[y, x, channel].item() == pytest.approx(expected, abs=1e-5), (y, x, channel)


def test_sine_position_has_one_scale_for_all_grids():
    small, large = (
        sine_position(torch.zeros(1, n, n, dtype=torch.bool), 64).view(n, n, 64) for n in (8, 20)
    )
    assert torch.allclose(small[-1, -1], large[-1, -1], atol=1e-5)
    assert torch.allclose(small[1, 3], large[4, 9], atol=1e-5), "2 of 8 is 5 of 20"
    assert torch.allclose(large[:, :1, :32].expand(-1, 20, -1), large[:, :, :32]), (
        "the first half tells y alone"
    )
    assert torch.allclose(large[:1, :, 32:].expand(20, -1, -1), large[:, :, 32:]), (
        "the second half tells x alone"
    )
    assert torch.allclose(large.unflatten(-1, (-1, 2)).square().sum(-1), torch.ones(()), atol=1e-5)
    flat = large.flatten(0, 1)
    assert (torch.cdist(flat, flat) + 9 * torch.eye(400)).min() > 0.1, "no two cells look alike"


def test_sine_position_counts_what_is_inside():
    outside = torch.zeros(2, 8, 8, dtype=torch.bool)
    outside[1, :3], outside[1, :, 6:] = True, True
    whole, padded = sine_position(outside, 32).view(2, 8, 8, 32)
    inside = sine_position(torch.zeros(1, 5, 6, dtype=torch.bool), 32).view(5, 6, 32)
    assert torch.allclose(padded[3:, :6], inside, atol=1e-5)
    assert torch.equal(whole, sine_position(outside[:1], 32).view(8, 8, 32))
    nothing = sine_position(torch.ones(1, 4, 4, dtype=torch.bool), 32)
    assert torch.isfinite(nothing).all()


def test_learned_position_is_column_then_row():
    position = randomised(LearnedPosition(8))
    grid = position(torch.zeros(3, 4, 5, dtype=torch.bool))
    assert grid.shape == (3, 20, 8) and torch.equal(grid[0], grid[2])
    row, column = 2, 3
    assert torch.equal(
        grid[0, row * 5 + column],
        torch.cat([position.column.weight[column], position.row.weight[row]]),
    )


# ---- heads ----


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 5), (7, 7)])
def test_soft_argmax_of_a_peak(row, column):
    logits = torch.zeros(1, 8, 8)
    logits[0, row, column] = 100
    assert soft_argmax(logits)[0].tolist() == pytest.approx([column / 8, row / 8])


def test_soft_argmax_of_symmetric_maps():
    middle = 7 / 2 / 8
    assert soft_argmax(torch.zeros(2, 8, 8)).flatten().tolist() == pytest.approx([middle] * 4)
    logits = noise(1, 8, 8)
    even = logits + logits.flip(1) + logits.flip(2) + logits.flip(1, 2)
    assert soft_argmax(even)[0].tolist() == pytest.approx([middle] * 2)
    assert torch.allclose(
        soft_argmax(logits.transpose(1, 2)), soft_argmax(logits).flip(1), atol=1e-6
    )
    assert torch.allclose(soft_argmax(logits + 5), soft_argmax(logits), atol=1e-6)


def test_soft_argmax_between_two_cells_and_its_slope():
    logits = torch.full((1, 4, 4), -50.0, dtype=torch.float64)
    logits[0, 1, 0], logits[0, 1, 2] = math.log(3), 0.0
    assert soft_argmax(logits)[0].tolist() == pytest.approx([0.25 * 2 / 4, 1 / 4])
    assert torch.autograd.gradcheck(soft_argmax, (noise(2, 3, 3).double().requires_grad_(),))


def test_soft_argmax_keeps_its_precision_in_mixed_precision():
    """Coordinates in bfloat16 would be steps of a pixel."""
    logits = 3 * noise(4, 20, 20).bfloat16()
    exact = soft_argmax(logits.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_argmax(logits)
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-5


def test_corner_head_has_two_towers_of_halving_widths():
    head = randomised(CornerHead(WIDTH, 32))
    features = noise(3, WIDTH, 6, 6)
    top_left, bottom_right = head(features)
    assert top_left.shape == bottom_right.shape == (3, 6, 6) and not torch.allclose(
        top_left, bottom_right, atol=1e-3
    )
    convolutions = [m for m in head.top_left.modules() if isinstance(m, nn.Conv2d)]
    shapes = [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions]
    assert shapes == [(WIDTH, 32, 3), (32, 16, 3), (16, 8, 3), (8, 4, 3), (4, 1, 1)]
    assert all(c.bias is not None for c in convolutions)
    x = features
    for block in head.top_left[:-1]:
        x = block[1](block[0](x)).relu()
    torch.testing.assert_close(head.top_left[-1](x)[:, 0], top_left)


def test_mlp_by_hand():
    mlp, x = randomised(MLP(WIDTH, 8, 3)), noise(2, 5, WIDTH)
    a, b, c = mlp.layers
    torch.testing.assert_close(mlp(x), c(b(a(x).relu()).relu()))
    assert len(MLP(4, 5, 6, depth=2).layers) == 2


# ---- losses ----


def test_localisation_by_hand():
    """Two boxes that half overlap, and two that lie apart."""
    boxes = torch.tensor([[0.0, 0, 0.2, 0.2], [0, 0, 0.1, 0.1]])
    truth = torch.tensor([[0.1, 0, 0.3, 0.2], [0.3, 0, 0.4, 0.1]])
    giou, l1 = localisation(boxes, truth)
    assert l1.item() == pytest.approx((0.2 + 0.6) / 8)
    # 1 - (IoU - empty share of the hull): 1 - (1/3 - 0) and 1 - (0 - 2/4)
    assert giou.item() == pytest.approx((2 / 3 + 3 / 2) / 2, abs=1e-6)
    assert [t.item() for t in localisation(truth, truth)] == pytest.approx([0, 0], abs=1e-6)


def test_localisation_pulls_boxes_that_do_not_touch():
    boxes = torch.tensor([[0.0, 0, 0.1, 0.1]], requires_grad=True)
    localisation(boxes, torch.tensor([[0.5, 0.0, 0.6, 0.1]]))[0].backward()
    assert boxes.grad[0, 2] < 0, "the right edge is drawn to the right"


def test_a_box_inside_out_blanks_a_batch_only_if_asked_to():
    boxes = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.6, 0.2, 0.5, 0.4]], requires_grad=True)
    truth = torch.tensor([[0.1, 0.1, 0.4, 0.3], [0.4, 0.2, 0.7, 0.4]])
    kept, l1 = localisation(boxes, truth)
    dropped, same = localisation(boxes, truth, keep_degenerate=False)
    assert l1 == same and dropped == 0 and kept > 0.5
    slope = torch.autograd.grad(dropped, boxes, retain_graph=True)[0]
    assert (slope == 0).all()
    slope = torch.autograd.grad(kept, boxes)[0]
    assert torch.isfinite(slope).all() and (slope[0] != 0).any()
    good = localisation(boxes[:1], truth[:1])[0]
    assert localisation(boxes[:1], truth[:1], keep_degenerate=False)[0] == good


def test_place_cross_entropy_of_cells_and_between_them():
    logits = noise(2, 3, 4, 4)
    log = logits.flatten(2).log_softmax(2).view_as(logits)
    place = torch.tensor([0.5, 0.25]).expand(2, 3, 2)  # x, y: the cell in row 1, column 2
    assert place_cross_entropy(logits, place).item() == pytest.approx(
        -log[..., 1, 2].mean().item(), abs=1e-6
    )
    shared = -(0.75 * log[..., 1, 2] + 0.25 * log[..., 1, 3]).mean()
    assert place_cross_entropy(logits, place + torch.tensor([0.0625, 0])).item() == pytest.approx(
        shared.item(), abs=1e-6
    )
    for far, cell in ((1.0, (3, 3)), (0.0, (0, 0))):
        assert place_cross_entropy(logits, torch.full((2, 3, 2), far)).item() == pytest.approx(
            -log[..., *cell].mean().item(), abs=1e-6
        )


def test_place_cross_entropy_and_soft_argmax_agree():
    """The slope is the softmax minus the target; the target's expectation is the place."""
    logits, place = noise(1, 6, 6).requires_grad_(), torch.tensor([[0.37, 0.62]])
    place_cross_entropy(logits, place).backward()
    target = logits.detach().flatten(1).softmax(1).view(1, 6, 6) - logits.grad
    assert (
        torch.allclose(soft_argmax(target.clamp(min=1e-30).log()), place, atol=1e-5)
        and (target > 1e-6).sum() == 4
    )


# ---- backbones ----


def plainly(backbone: ResNet, x: torch.Tensor) -> torch.Tensor:
    """The way of training: norm by norm."""
    with torch.enable_grad():
        return backbone(x).detach()


def folded(backbone: ResNet, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return backbone(x)


@pytest.fixture(scope="module")
def resnet() -> ResNet:
    backbone = ResNet("resnet50").eval()
    for module in backbone.modules():
        if hasattr(module, "running_var"):
            randomised(module)
            module.weight.mul_(0.7)
    return backbone


IMAGE = noise(2, 3, 64, 48)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def test_resnet_is_torchvisions_up_to_the_third_stage(resnet):
    whole = torchvision.models.resnet50().eval()  # with ordinary norms
    missing, extra = whole.load_state_dict(resnet.state_dict(), strict=False)
    assert not extra and all(
        name.startswith(("layer4", "fc")) or name.endswith("tracked") for name in missing
    )
    with torch.no_grad():
        x = whole.maxpool(whole.relu(whole.bn1(whole.conv1(IMAGE))))
        expected = whole.layer3(whole.layer2(whole.layer1(x)))
    assert expected.shape == (2, resnet.channels, 64 // resnet.stride, 48 // resnet.stride)
    assert close(plainly(resnet, IMAGE), expected) and close(folded(resnet, IMAGE), expected)


def test_norms_are_constants(resnet):
    assert not any("bn" in name or "downsample.1" in name for name, _ in resnet.named_parameters())
    resnet.train()
    before = copy.deepcopy(resnet.state_dict())
    training = resnet(IMAGE)
    assert training.requires_grad and all(
        torch.equal(v, before[k]) for k, v in resnet.state_dict().items()
    )
    resnet.eval()
    assert torch.equal(training.detach(), plainly(resnet, IMAGE))


def test_folding_is_done_once(resnet):
    folded(resnet, IMAGE)
    before = resnet._fold()
    folded(resnet, IMAGE)
    assert resnet._fold() is before


def other_weight(b):
    b.layer2[0].conv2.weight.mul_(1.5)


def other_norm(b):
    b.layer3[5].bn3.running_mean.add_(1)


def other_file(b):
    b.load_state_dict({k: v * 1.1 for k, v in b.state_dict().items()})


def other_file_assigned(b):
    b.load_state_dict({k: v * 1.1 for k, v in b.state_dict().items()}, assign=True)


def other_tensor(b):
    b.conv1.weight = nn.Parameter(b.conv1.weight * 2)


def other_data_twice(b):
    """The first new tensor makes room for the second where the old one was."""
    for _ in range(2):
        b.conv1.weight.data = b.conv1.weight.data * 1.5


def an_optimiser_step(b):
    for p in b.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(b.parameters(), lr=0.01).step()
    b.zero_grad()


@pytest.mark.parametrize(
    "change",
    [
        other_weight,
        other_norm,
        other_file,
        other_file_assigned,
        other_tensor,
        other_data_twice,
        an_optimiser_step,
    ],
    ids=lambda f: f.__name__,
)
def test_folding_sees_changes(resnet, change):
    changed = copy.deepcopy(resnet)
    before = folded(changed, IMAGE)
    with torch.no_grad():
        change(changed)
    after = folded(changed, IMAGE)
    assert not close(after, before) and close(after, plainly(changed, IMAGE))
    assert close(folded(resnet, IMAGE), plainly(resnet, IMAGE)), "the original is left alone"


def test_folding_follows_the_precision(resnet):
    moved = copy.deepcopy(resnet)
    assert close(folded(moved, IMAGE), folded(resnet, IMAGE))
    exact = folded(moved.double(), IMAGE.double())
    assert exact.dtype == torch.float64 and close(exact, plainly(moved, IMAGE.double()))
    assert close(folded(resnet, IMAGE).double(), exact)
    assert close(folded(moved.bfloat16().float(), IMAGE), plainly(moved, IMAGE))


def test_folding_in_inference_mode(resnet):
    with torch.inference_mode():
        made = copy.deepcopy(resnet)
        assert close(made(IMAGE), folded(resnet, IMAGE))
        made.conv1.weight.mul_(2)
        assert not close(made(IMAGE), folded(resnet, IMAGE))
        assert close(resnet(IMAGE), folded(resnet, IMAGE))
    assert close(folded(resnet, IMAGE), plainly(resnet, IMAGE))


def test_pretrained_weights_are_torchvisions(monkeypatch):
    theirs = randomised(torchvision.models.resnet50()).state_dict()
    monkeypatch.setattr(
        torchvision.models.ResNet50_Weights, "get_state_dict", lambda *_, **__: theirs
    )
    resnet = ResNet("resnet50")
    resnet.load_pretrained()
    loaded = resnet.state_dict()
    assert len(loaded) > 200 and all(
        torch.equal(value, theirs[name]) for name, value in loaded.items()
    )


def test_deeper_resnet():
    names = {
        name.split(".")[1] for name in ResNet("resnet101").state_dict() if name.startswith("layer3")
    }
    assert len(names) == 23


def test_small_net():
    net = randomised(SmallNet((4, 6, 8)))
    assert net(IMAGE).shape == (2, 8, 64 // net.stride, 48 // net.stride)
    before = net.training, folded(net, IMAGE)
    assert torch.allclose(before[1], plainly(net, IMAGE), atol=1e-5) and (net(IMAGE) >= 0).all()


def test_normalise():
    crop = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1).expand(2, 3, 4, 4)
    found = normalise(crop)
    expected = [(v / 255 - m) / s for v, m, s in zip((0, 128, 255), MEAN, STD, strict=True)]
    assert found.dtype == torch.float32 and found.shape == (2, 3, 4, 4)
    assert found[1, :, 2, 3].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_that_starts_as_a_lookup_finds_the_like_in_the_other_crop(heads):
    blocks = vit.blocks(64, 1, heads, 128, 0.0)
    z, x = vit.learned_position(6, 64), vit.learned_position(12, 64)
    vit.start_as_lookup(blocks, z, x)
    content = torch.randn(1, 36, 64)
    where = torch.randperm(144)[:36]
    search = torch.randn(1, 144, 64)
    search[:, where] = content  # each piece of the template is somewhere in the search crop
    q, k, _ = blocks[0].project(torch.cat([content + z, search + x], 1))
    share = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0]
    found = share[36 + where][:, :36].argmax(1)  # where in the template a search token looks
    assert (found == torch.arange(36)).float().mean() > 0.9
    across = share[36 + where][:, :36].sum(1)
    assert across.mean() > 0.5  # of 180 tokens 36 are the template's, and one is itself
    unlike = [i for i in range(144) if i not in set(where.tolist())]
    assert share[36:][unlike][:, :36].max() < share[36 + where][:, :36].max(1).values.median()


@pytest.mark.parametrize("kind", ["convolution", "mobileone"])
def test_folded_norms_follow_statistics_that_training_changes(kind):
    """A training step without an optimiser's changes the statistics of norms and nothing else."""
    crops = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    if kind == "mobileone":
        network = MobileOne("mobileone_s0", stage=1)
    else:
        network, crops = ConvNorm(3, 8, kernel_size=3), normalise(crops)

    def error():
        network.eval()
        plain = network(crops).detach()
        with torch.no_grad():
            return float((network(crops) - plain).abs().max() / plain.abs().max())

    assert error() < 1e-4
    network.train()(crops)
    assert error() < 1e-4
