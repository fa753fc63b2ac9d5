"""In inference norms are multiplied into convolutions: nobody can tell, whatever came before."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from trackkit.backbones import ConvStack
from trackkit.costs import without_shortcuts
from trackkit.weights import TRACKERS, create

TINY = sorted(name for name in TRACKERS if name.endswith("-tiny"))


def stirred(network: nn.Module) -> nn.Module:
    """Norms that do something."""
    with torch.no_grad():
        for norm in (part for part in network.modules() if isinstance(part, nn.BatchNorm2d)):
            for tensor, low, high in (
                (norm.running_mean, -0.2, 0.2), (norm.running_var, 0.5, 2.0),
                (norm.weight, 0.5, 1.5), (norm.bias, -0.2, 0.2),
            ):  # fmt: skip
                tensor.uniform_(low, high)
    return network.eval()


def stack() -> ConvStack:
    return stirred(
        ConvStack(
            nn.Conv2d(3, 8, 5, 2, groups=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2), nn.Conv2d(8, 6, 3, dilation=2, groups=2, bias=False),
            nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1),
        )
    )  # fmt: skip


@torch.no_grad()
def differ(net: ConvStack, x: torch.Tensor) -> float:
    """Largest difference between the quick way and the plain one."""
    with without_shortcuts(net):
        plain = net(x)
    return float((net(x) - plain).abs().max())


CHANGES = {
    "nothing": lambda net: net,
    "a step of an optimiser": lambda net: _learned(net),
    "new weights": lambda net: _loaded(net),
    "a weight in place": lambda net: (nn.init.normal_(net[0].weight), net)[1],
    "a mean in place": lambda net: (net[1].running_mean.add_(0.5), net)[1],
    "a bias in place": lambda net: (nn.init.normal_(net[0].bias), net)[1],
    "statistics of a training batch": lambda net: (
        net.train()(torch.randn(4, 3, 40, 40)),
        net.eval(),
    )[1],
    "an epsilon": lambda net: (setattr(net[1], "eps", 0.1), net)[1],
    "a copy": lambda net: _copied(net),
    "there and back": lambda net: net.double().float(),
    "a layer more": lambda net: (net.append(nn.ReLU()), net)[1],
    "another layer": lambda net: (net.__setitem__(6, nn.Conv2d(6, 5, 1)), net)[1],
}


def _learned(net: ConvStack) -> ConvStack:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net.train()(torch.randn(4, 3, 40, 40)).square().mean().backward()
    optimizer.step()
    return net.eval()


def _loaded(net: ConvStack) -> ConvStack:
    net.load_state_dict(stack().state_dict())
    return net


def _copied(net: ConvStack) -> ConvStack:
    copied = copy.deepcopy(net)
    nn.init.normal_(copied[0].weight)
    return copied


@pytest.mark.parametrize("change", CHANGES)
def test_folded_norms_follow_the_weights(change):
    net, x = stack(), torch.randn(2, 3, 40, 40)
    assert differ(net, x) <= 1e-5
    assert differ(CHANGES[change](net), x) <= 1e-5


def test_training_has_its_norms():
    """The same bits as a plain sequence, gradients included, also in evaluation."""
    net, x = stack(), torch.randn(2, 3, 40, 40)
    plain = nn.Sequential(*copy.deepcopy(net))
    assert net.state_dict().keys() == plain.state_dict().keys()
    for mode in (True, False):
        results = []
        for either in (net.train(mode), plain.train(mode)):
            either.zero_grad()
            made = either(x)
            made.square().sum().backward()
            results.append([made, *(p.grad for p in either.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", TINY)
def test_boxes_are_those_of_separate_norms(name):
    tracker = stirred(create(name))
    frames = [torch.randint(0, 256, (3, 120, 160), dtype=torch.uint8) for _ in range(3)]
    state = tracker.start(frames[:1], torch.tensor([[60.0, 40.0, 40.0, 30.0]]))
    for _, frame in pairwise(frames):
        with without_shortcuts(tracker):
            _, plain = tracker.step(state, [frame])
        state, quick = tracker.step(state, [frame])
        assert (quick.box - plain.box).abs().max() <= 1e-4, "px"
        assert (quick.score - plain.score).abs().max() <= 1e-5
