"""Backbones: crops to feature maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit import checkpoints
from trackkit.devices import constant
from trackkit.errors import TrackkitError
from trackkit.paths import SAMPLES

# of ImageNet, which the papers' backbones learned from
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(crops: Tensor) -> Tensor:
    """uint8 crops (..., 3, S, S), RGB -> float32 with ImageNet's mean 0 and deviation 1."""
    mean, std = constant(_statistics, MEAN, STD, device=crops.device)
    return (crops.float() - mean) / std


def _statistics(*given: tuple[float, ...]) -> Tensor:
    """A mean and a deviation of colours from 0 to 1 in grey levels: float32 (2, 3, 1, 1)."""
    return torch.tensor(given, dtype=torch.float32)[..., None, None] * 255


class ResNet(nn.Module):
    """torchvision's ResNet up to the third stage, norms frozen: (B, 3, S, S) -> (B, 1024, S / 16, S
    / 16).

    Frozen norms are constants, so in inference each one is multiplied into the convolution before
    it: the same function, a third fewer passes over memory.
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
        weights = _torchvision_weights(self.name.replace("resnet", "ResNet"))
        self.load_state_dict({key: weights[key] for key in self.state_dict()})

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
        """(weight, bias) of each convolution with its norm in it, made anew when a weight has
        changed.

        A change through `.data` leaves no trace in a tensor and goes unnoticed; under
        `torch.no_grad()` it does not.
        """
        pairs = [(self.conv1, self.bn1)]
        for block in (*self.layer1, *self.layer2, *self.layer3):
            pairs += [(block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)]
            pairs += [tuple(block.downsample)] if block.downsample is not None else []
        sources = [
            t
            for conv, norm in pairs
            for t in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        ]
        # tensors made in inference mode do not count their changes
        tracked = not any(t.is_inference() for t in sources)
        version = tuple((t.data_ptr(), t._version) for t in sources) if tracked else ()
        if self._folded[0] != version or not tracked:
            folded = []
            for conv, norm in pairs:
                scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
                weight = (conv.weight * scale[:, None, None, None]).contiguous(
                    memory_format=torch.channels_last
                )
                folded.append((weight, norm.bias - norm.running_mean * scale))
            # kept, so that no other tensor gets their addresses
            self._folded = version, folded, [t.detach() for t in sources]
        return self._folded[1]


class SmallNet(nn.Module):
    """A backbone that trains on a laptop: stride 8, residual blocks, (B, 3, S, S) -> (B, channels,
    S / 8, S / 8).
    """

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

    def load_pretrained(self, project: nn.Conv2d) -> None:
        """Take the weights of matching-tiny, which come with trackkit, and for `project`, a 1x1
        convolution behind this network, those with which its channels have mean 0 and variance 1.

        Raises CheckpointError if `project` is not as wide.
        """
        path = SAMPLES / "weights" / "matching-tiny.safetensors"
        weights, _ = checkpoints.read(path)
        own = {key: weights[f"net.{key}"] for key in self.state_dict()}
        checkpoints.load_strictly(self, own, str(path))
        # the norm behind it, multiplied into it
        std = (weights["norm.running_var"].float() + 1e-5).sqrt()
        weight = weights["project.weight"].float() / std[:, None, None, None]
        bias = (weights["project.bias"].float() - weights["norm.running_mean"].float()) / std
        checkpoints.load_strictly(project, {"weight": weight, "bias": bias}, str(path))


class SmallTrunk(SmallNet):
    """`SmallNet` in two parts, between which STMTrack adds its foreground map."""

    stem_channels, stem_padding = 16, 1

    def stem(self, crops: Tensor) -> Tensor:
        """RGB, 0..255 -> (B, 16, S / 2, S / 2)."""
        return self.layers[:2](normalise(crops).contiguous(memory_format=torch.channels_last))

    def rest(self, x: Tensor) -> Tensor:
        return self.layers[2:](x)


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = _conv(channels, channels), _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


def _conv(inputs: int, outputs: int, stride: int = 1) -> ConvStack:
    return ConvStack(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
    )


class Memo:
    """A value made of tensors, kept until one of them changes (in place, or by another in its
    stead). Training changes the statistics of a norm without a trace, but counts its batches: that
    count belongs among the tensors.
    """

    def __init__(self):
        self._version, self._value, self._sources = None, None, []

    def __call__(self, sources: list[Tensor], make: Callable[[], Any], also: Any = None) -> Any:
        """`make()`, or what it gave last time if `sources` and `also` are the same."""
        if any(t.is_inference() for t in sources):  # such tensors do not count their changes
            return make()
        version = also, [(t.data_ptr(), t._version) for t in sources]
        if self._version != version:
            self._version, self._value = version, make()
            # kept, so that no other tensor gets their addresses
            self._sources = [t.detach() for t in sources]
        return self._value


def fused(
    branches: list[tuple[nn.Conv2d | None, nn.BatchNorm2d]], like: nn.Conv2d
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals the sum of branches, each a convolution
    and its norm in evaluation.

    A smaller kernel is padded to the size of `like`'s; a branch without a convolution passes its
    input on. Summed in float64.
    """
    weight, bias = torch.zeros_like(like.weight, dtype=torch.float64), 0.0
    for conv, norm in branches:
        if conv is None:
            kernel, row = torch.zeros_like(weight), torch.arange(len(weight), device=weight.device)
            # all at once: nn.init.dirac_ writes one channel after the other
            kernel[row, row % weight.shape[1], *(size // 2 for size in like.kernel_size)] = 1
        else:
            margin = (like.kernel_size[0] - conv.kernel_size[0]) // 2
            kernel = F.pad(conv.weight.double(), [margin] * 4)
        scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        weight = weight + kernel * scale[:, None, None, None]
        shift = 0.0 if conv is None or conv.bias is None else conv.bias.double()
        bias = bias + norm.bias.double() + (shift - norm.running_mean.double()) * scale
    return weight.to(like.weight).contiguous(memory_format=torch.channels_last), bias.to(
        like.weight
    )


class ConvStack(nn.Sequential):
    """Convolutions and what follows them, in a row: (B, C, H, W) -> (B, D, h, w). In inference a
    norm behind a convolution is multiplied into it, and maps lie with channels last.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        self._memo = Memo()
        self.shortcut = True  # norms may be multiplied into convolutions

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled() or not self.shortcut:
            return super().forward(x)
        steps: list[tuple[nn.Module, nn.BatchNorm2d | None]] = []
        for layer in self:
            if steps and isinstance(layer, nn.BatchNorm2d) and isinstance(steps[-1][0], nn.Conv2d):
                steps[-1] = steps[-1][0], layer
            else:
                steps.append((layer, None))
        convs = [step for step in steps if isinstance(step[0], nn.Conv2d)]
        sources = [t for conv, norm in convs for t in _numbers(conv, norm)]
        eps = [norm.eps for _, norm in convs if norm is not None]
        kernels = iter(self._memo(sources, lambda: [_kernel(*step) for step in convs], eps))
        x = x.contiguous(memory_format=torch.channels_last)
        for layer, _ in steps:
            x = layer._conv_forward(x, *next(kernels)) if isinstance(layer, nn.Conv2d) else layer(x)
        return x


def _numbers(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> list[Tensor]:
    """All that a convolution and its norm in evaluation are made of.

    A norm's count of batches is among it: in training, torch changes running means without a trace.
    """
    return [*conv.parameters(), *([*norm.parameters(), *norm.buffers()] if norm else [])]


def _kernel(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """Weight, with channels last, and bias of a convolution and its norm, if it has one."""
    if norm is not None:
        return fused([(conv, norm)], conv)
    return conv.weight.contiguous(memory_format=torch.channels_last), conv.bias


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU, by torchvision's names. In inference the norm is multiplied
    into the convolution.
    """

    def __init__(self, inputs: int, outputs: int, **layout):
        super().__init__()
        self.conv, self.bn = (
            nn.Conv2d(inputs, outputs, bias=False, **layout),
            nn.BatchNorm2d(outputs, eps=1e-3),
        )
        self._memo = Memo()

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return F.relu(self.bn(self.conv(x)))
        parts = self.conv, self.bn
        return self.conv._conv_forward(
            x, *self._memo(_numbers(*parts), lambda: _kernel(*parts))
        ).relu_()


class Inception(nn.Module):
    """torchvision's Inception v3 up to Mixed_6e without its second max-pool, as STMTrack has it:
    stride 8, (B, 3, S, S) -> (B, 768, s, s).

    Hardly anything is padded before Mixed_5b, so s = 33 for S = 289. STMTrack's foreground
    map enters behind the `stem`.
    """

    stride, channels, stem_channels, stem_padding = 8, 768, 32, 0

    def __init__(self):
        super().__init__()
        from torchvision.models import inception

        self.Conv2d_1a_3x3 = ConvNorm(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, kernel_size=3)
        for name, inputs, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", inception.InceptionA(inputs, pooled, ConvNorm))
        self.Mixed_6a = inception.InceptionB(288, ConvNorm)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", inception.InceptionC(768, width, ConvNorm))

    def load_pretrained(self) -> None:
        """Take over ImageNet's weights (torchvision's), from torch's cache or the network."""
        weights = _torchvision_weights("Inception_V3")
        self.load_state_dict({name: weights[name] for name in self.state_dict()})

    def stem(self, crops: Tensor) -> Tensor:
        """RGB, 0..255 -> (B, 32, s, s)."""
        x = (crops.to(self.Conv2d_1a_3x3.conv.weight.dtype) - 127.5) / 127.5
        return self.Conv2d_1a_3x3(x.contiguous(memory_format=torch.channels_last))

    def rest(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x)), 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e"):
            x = getattr(self, f"Mixed_{name}")(x)
        return x

    def forward(self, crops: Tensor) -> Tensor:
        return self.rest(self.stem(crops))


class MobileOne(nn.Module):
    """timm's MobileOne (Vasu et al., CVPR 2023) up to a stage, the third one undiminished: stride
    8, (B, 3, S, S) -> (B, C, s, s).

    In training each block is a sum of branches, in inference one convolution that equals the sum.
    Everything is padded, so cell k is centred at pixel 8 k.
    """

    stride, stem_padding = 8, 1

    def __init__(self, name: str, stage: int = 3):
        super().__init__()
        import timm

        self.name = name
        whole = timm.create_model(name, num_classes=0, output_stride=8)
        self.begin, self.stages = whole.stem, whole.stages[:stage]
        self.stem_channels, self.channels = (whole.feature_info[i]["num_chs"] for i in (0, stage))
        self._memos = [Memo() for _ in self._blocks()]

    def load_pretrained(self) -> None:
        """Take over ImageNet's weights (timm's), from its cache or the network."""
        weights = timm_weights(self.name)
        self.load_state_dict(
            {name: weights[name.replace("begin.", "stem.")] for name in self.state_dict()}
        )

    def _blocks(self) -> list[nn.Module]:
        return [self.begin, *(block for stage in self.stages for block in stage)]

    def stem(self, crops: Tensor) -> Tensor:
        """RGB, 0..255 -> (B, C, S / 2, S / 2)."""
        return self._run(0, normalise(crops).contiguous(memory_format=torch.channels_last))

    def rest(self, x: Tensor) -> Tensor:
        for index in range(1, len(self._memos)):
            x = self._run(index, x)
        return x

    def forward(self, crops: Tensor) -> Tensor:
        return self.rest(self.stem(crops))

    def _run(self, index: int, x: Tensor) -> Tensor:
        block = self._blocks()[index]
        if self.training or torch.is_grad_enabled():
            return block(x)
        conv = block.conv_kxk[0].conv
        sources = [*block.parameters(), *block.buffers()]
        weight, bias = self._memos[index](sources, lambda: fused(_branches(block), conv))
        return block.act(
            block.attn(F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups))
        )


def _branches(block: nn.Module) -> list[tuple[nn.Conv2d | None, nn.BatchNorm2d]]:
    """Convolutions and norms whose sum a block of MobileOne is."""
    branches = [(unit.conv, unit.bn) for unit in block.conv_kxk]
    branches += (
        [(block.conv_scale.conv, block.conv_scale.bn)] if block.conv_scale is not None else []
    )
    return branches + ([(None, block.identity)] if block.identity is not None else [])


def timm_weights(name: str) -> dict[str, Tensor]:
    """A pretrained network's entries by timm's names, from timm's cache or the network;
    TrackkitError if neither has them.
    """
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise TrackkitError(
            f"the weights {name} are not in timm's cache and could not be fetched ({reason}); "
            "connect once, or start from random weights: --no-pretrained"
        ) from error


def _torchvision_weights(name: str) -> dict[str, Tensor]:
    """The same of torchvision's networks, trained on ImageNet (V1); `name` as torchvision writes it
    before "_Weights".
    """
    import torchvision

    weights = torchvision.models.get_weight(f"{name}_Weights.IMAGENET1K_V1")
    try:
        return weights.get_state_dict(progress=True)
    # RuntimeError: what was fetched is not what it should be
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise TrackkitError(
            f"the ImageNet weights of {name} are not in {folder} and could not be fetched "
            f"({error}); put {Path(weights.url).name} "
            "there, or start from random weights: --no-pretrained"
        ) from error
