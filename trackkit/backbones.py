"""Backbones: crops to feature maps."""
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.errors import TrackkitError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the papers' backbones learned from


def normalise(crops: Tensor) -> Tensor:
    """uint8 crops (..., 3, S, S), RGB -> float32 with ImageNet's mean 0 and deviation 1."""
    mean = torch.tensor(MEAN, device=crops.device).view(3, 1, 1) * 255
    std = torch.tensor(STD, device=crops.device).view(3, 1, 1) * 255
    return (crops.float() - mean) / std


class ResNet(nn.Module):
    """torchvision's ResNet up to the third stage, norms frozen: (B, 3, S, S) -> (B, 1024, S / 16, S / 16).

    Frozen norms are constants, so in inference each one is multiplied into the convolution before it: the same
    function, a third fewer passes over memory.
    """

    stride, channels = 16, 1024

    def __init__(self, name: str):
        super().__init__()
        import torchvision

        self.name = name
        whole = getattr(torchvision.models, name)(norm_layer=torchvision.ops.FrozenBatchNorm2d)
        for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            self.add_module(part, getattr(whole, part))
        self._folded: tuple[tuple, list[tuple[Tensor, Tensor]], list[Tensor]] = ((), [], [])

    def load_pretrained(self) -> None:
        """Take over ImageNet's weights (torchvision's V1), from torch's cache or the network."""
        import torchvision

        weights = torchvision.models.get_weight(f"{self.name.replace('resnet', 'ResNet')}_Weights.IMAGENET1K_V1")
        try:
            state = weights.get_state_dict(progress=True)
        except OSError as error:
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            raise TrackkitError(
                f"the ImageNet weights of {self.name} are not in {folder} and could not be fetched ({error}); put {Path(weights.url).name} "
                "there, or start from random weights: --no-pretrained"
            ) from error
        self.load_state_dict({key: state[key] for key in self.state_dict()})

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not torch.is_grad_enabled():
            return self._infer(x)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer3(self.layer2(self.layer1(x)))

    def _infer(self, x: Tensor) -> Tensor:
        weights = iter(self._fold())

        def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
            weight, bias = next(weights)
            return F.conv2d(x, weight, bias, layer.stride, layer.padding)

        x = self.maxpool(conv(self.conv1, x.to(memory_format=torch.channels_last)).relu_())
        for block in (*self.layer1, *self.layer2, *self.layer3):
            y = conv(block.conv1, x).relu_()
            y = conv(block.conv2, y).relu_()
            y = conv(block.conv3, y)
            x = y.add_(conv(block.downsample[0], x) if block.downsample is not None else x).relu_()
        return x

    def _fold(self) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of each convolution with its norm in it, made anew when a weight has changed.

        A change through `.data` leaves no trace in a tensor and goes unnoticed; under `torch.no_grad()` it does not.
        """
        pairs = [(self.conv1, self.bn1)]
        for block in (*self.layer1, *self.layer2, *self.layer3):
            pairs += [(block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)]
            pairs += [tuple(block.downsample)] if block.downsample is not None else []
        sources = [t for conv, norm in pairs for t in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)]
        tracked = not any(t.is_inference() for t in sources)  # tensors made in inference mode do not count their changes
        version = tuple((t.data_ptr(), t._version) for t in sources) if tracked else ()
        if self._folded[0] != version or not tracked:
            folded = []
            for conv, norm in pairs:
                scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
                weight = (conv.weight * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
                folded.append((weight, norm.bias - norm.running_mean * scale))
            self._folded = version, folded, [t.detach() for t in sources]  # kept, so that no other tensor gets their addresses
        return self._folded[1]


class SmallNet(nn.Module):
    """A backbone that trains on a laptop: stride 8, residual blocks, (B, 3, S, S) -> (B, channels, S / 8, S / 8)."""

    stride = 8

    def __init__(self, channels: tuple[int, int, int] = (16, 32, 64)):
        super().__init__()
        a, b, c = channels
        self.channels = c
        self.layers = nn.Sequential(
            _conv(3, a, 2), nn.ReLU(inplace=True),
            _conv(a, b, 2), nn.ReLU(inplace=True),
            _Residual(b),
            _conv(b, c, 2), nn.ReLU(inplace=True),
            _Residual(c),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = _conv(channels, channels), _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs))
