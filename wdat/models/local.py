"""Networks built here, without a download. All take images in [0, 1] and normalise inside.

Budgets keep their unit, pixels of [0, 1], because no network is ever given normalised images. The normalisation
constants are buffers outside the state dict, so published weights of these architectures load strictly; weights that
were trained with other constants than CIFAR-10's need these (`model.mean`, `model.std`), because convolutions that pad
with zeros leave no way to fold them into the first layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from wdat import seeding
from wdat.errors import SettingError

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)
Constants = Sequence[float] | None


@contextlib.contextmanager
def seeded(seed: int, *keys: int) -> Iterator[None]:
    """Draw initial weights on the CPU from (seed, keys) and leave the global generator as it was.

    Args:
        seed: The seed of the run, 0 included.
        keys: Further non-negative numbers that separate one use from another.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(seeding.generator(seed, "init", *keys).get_state())
        yield


def constants(mean: Constants, std: Constants) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The constants of the normalisation, one a colour; CIFAR-10's where None.

    Raises:
        SettingError: If they aren't three finite numbers, or a standard deviation isn't positive.
    """
    found = []
    for name, given, usual in (("mean", mean, CIFAR10_MEAN), ("std", std, CIFAR10_STD)):
        values = usual if given is None else given
        numbers = not isinstance(values, (int, float, str)) and all(isinstance(v, (int, float)) for v in values)
        if not numbers or len(values) != 3 or not all(math.isfinite(v) for v in values):
            raise SettingError(f"model.{name}={given} must be three numbers, one a colour: model.{name}=[0.5,0.5,0.5]")
        found.append(tuple(float(v) for v in values))
    if min(found[1]) <= 0:
        raise SettingError(f"model.std={std} must be positive: model.std=[0.25,0.25,0.25]")
    return found[0], found[1]


class _Normalised(nn.Module):
    """A network of 32x32 colour images that holds their mean and standard deviation, outside the state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Constants = None, std: Constants = None) -> None:
        super().__init__()
        for name, values in zip(("mean", "std"), constants(mean, std), strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def normalise(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] less the mean, over the standard deviation."""
        return (x - self.mean) / self.std


class NormalisedSequential(_Normalised):
    """Layers in a row after the normalisation; the keys are the layers' places, as in `nn.Sequential`."""

    def __init__(self, *layers: nn.Module, mean: Constants = None, std: Constants = None) -> None:
        super().__init__(mean, std)
        for place, layer in enumerate(layers):
            self.add_module(str(place), layer)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, 32, 32) in [0, 1]."""
        x = self.normalise(x)
        for layer in self.children():
            x = layer(x)
        return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions without BatchNorm, and a shortcut: a 1x1 convolution where the stride is not 1."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential() if plain else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, outputs, H / stride, W / stride) of features (N, inputs, H, W)."""
        return relu(self.conv2(relu(self.conv1(x))) + self.shortcut(x))


class SmallResNet(_Normalised):
    """A small residual network without BatchNorm, from the model collection of the verifier alpha-beta-CROWN.

    Args:
        num_classes: Number of logits.
        stem: Channels of the first convolution, which has stride 2.
        widths: Channels of each layer of two blocks; the first block of a layer has stride 2.
        mean, std: Constants of the normalisation, one a colour; CIFAR-10's where None.
    """

    def __init__(
        self, num_classes: int, stem: int, widths: tuple[int, ...], mean: Constants = None, std: Constants = None
    ) -> None:
        super().__init__(mean, std)
        self.conv1 = nn.Conv2d(3, stem, 3, stride=2, padding=1)
        inputs = stem
        self.layers = [f"layer{i}" for i, _ in enumerate(widths, start=1)]
        for name, width in zip(self.layers, widths, strict=True):
            self.add_module(name, nn.Sequential(BasicBlock(inputs, width, 2), BasicBlock(width, width, 1)))
            inputs = width
        self.linear1 = nn.Linear(inputs * (16 // 2 ** len(widths)) ** 2, 100)
        self.linear2 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, 32, 32) in [0, 1]."""
        x = relu(self.conv1(self.normalise(x)))
        for name in self.layers:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.linear2(relu(self.linear1(x.flatten(1))))
        return logits


def resnet2b(num_classes: int, mean: Constants = None, std: Constants = None) -> nn.Module:
    """Two residual blocks; 112,006 parameters at ten classes."""
    return SmallResNet(num_classes, stem=8, widths=(16,), mean=mean, std=std)


def resnet4b(num_classes: int, mean: Constants = None, std: Constants = None) -> nn.Module:
    """Four residual blocks; 123,734 parameters at ten classes."""
    return SmallResNet(num_classes, stem=16, widths=(32, 32), mean=mean, std=std)


def cnn_a(num_classes: int, mean: Constants = None, std: Constants = None) -> nn.Module:
    """Two strided 4x4 convolutions and two linear layers; 214,918 parameters at ten classes."""
    return NormalisedSequential(
        nn.Conv2d(3, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 100),
        nn.ReLU(),
        nn.Linear(100, num_classes),
        mean=mean,
        std=std,
    )


def small_cnn(num_classes: int, mean: Constants = None, std: Constants = None) -> nn.Module:
    """Three strided 3x3 convolutions and two linear layers (ours); 47,818 parameters at ten classes."""
    return NormalisedSequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
        mean=mean,
        std=std,
    )


def preact_resnet18(num_classes: int, mean: Constants = None, std: Constants = None) -> nn.Module:
    """RobustBench's pre-activation ResNet-18 with the normalisation inside."""
    from wdat.models import build

    mean, std = constants(mean, std)
    return build.deepmind("DMPreActResNet", num_classes=num_classes, depth=18, mean=mean, std=std)


def wrn_28_10(num_classes: int, mean: Constants = None, std: Constants = None) -> nn.Module:
    """RobustBench's WideResNet-28-10 with the normalisation inside."""
    from wdat.models import build

    mean, std = constants(mean, std)
    return build.deepmind("DMWideResNet", num_classes=num_classes, depth=28, width=10, mean=mean, std=std)


LOCAL: dict[str, Callable[..., nn.Module]] = {
    build.__name__: build for build in (preact_resnet18, wrn_28_10, resnet2b, resnet4b, cnn_a, small_cnn)
}
