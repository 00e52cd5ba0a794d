"""What is trained, and from where: the whole network or its last layer, from its weights, re-drawn or perturbed."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from wdat import errors, seeding
from wdat.errors import SettingError, check_real
from wdat.gradients import undisturbed
from wdat.models.local import seeded
from wdat.models.speed import accelerate, precise

TRAINABLE = ("all", "head")
INIT = ("none", "reset_head", "perturb")

_HEAD_KEY, _NOISE_KEY = 1, 2  # keep the draws of this file apart from those that build a network


def prepare(
    network: nn.Module,
    trainable: str = "all",
    init: str = "none",
    scale: float = 0.01,
    seed: int = 0,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    channels_last: bool = False,
    compile: bool = False,  # noqa: A002  # the key on the command line
) -> list[str]:
    """Choose the parameters to train and where they start, and how the network is run.

    Training the last layer or the whole network, from a re-drawn last layer or slightly perturbed weights, is the
    setting of Wasserstein distributional adversarial training, arXiv 2502.09352; the details are ours.

    Args:
        network: Changed in place. Parameters that are frozen already, such as the normalisation constants of some
            architectures, stay frozen.
        trainable: `"all"`, or `"head"` for the last linear layer alone.
        init: `"none"`, `"reset_head"` to draw the last layer anew, or `"perturb"` to add Gaussian noise to what is
            trained.
        scale: For `"perturb"`: standard deviation of the noise, as a share of the standard deviation of each
            parameter tensor (ours). A constant tensor, such as a fresh BatchNorm's, stays as it is.
        seed: Seed of the run; the draws don't depend on the device.
        image_shape: (C, H, W) of the images, to find the last layer.
        channels_last: As `accelerate` has it.
        compile: Likewise.

    Returns:
        Names of the parameters that are trained. From now on a network that writes into its images gets copies, and
        its last linear layer computes in the precision of its weights also under autocast.

    Raises:
        SettingError: An unknown choice, a negative scale, no last linear layer, or nothing to train.
    """
    if trainable not in TRAINABLE:
        raise errors.unknown("choice", trainable, TRAINABLE, "finetune.trainable")
    if init not in INIT:
        raise errors.unknown("choice", init, INIT, "finetune.init")
    check_real("finetune.scale", scale, "[0, inf)", "relative to each tensor's standard deviation")
    if trainable == "head" or init == "reset_head":
        head = find_head(network, image_shape)[1]
        if trainable == "head":
            keep = {id(parameter) for parameter in head.parameters()}
            for parameter in network.parameters():
                parameter.requires_grad_(parameter.requires_grad and id(parameter) in keep)
        if init == "reset_head":
            _redraw(head, seed)
    if init == "perturb":
        _perturb(network, scale, seed)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    if not names:
        raise SettingError("no parameter is left to train (finetune.trainable): every parameter is frozen")
    if _writes_into_its_input(network, image_shape):
        network.register_forward_pre_hook(_copies)
    with contextlib.suppress(SettingError):  # not every network ends with a linear layer
        precise(network, find_head(network, image_shape)[0])
    accelerate(network, channels_last, compile)
    return names


def _writes_into_its_input(network: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether the network changes the images that it is given, as `x.sub_(mean)` and a first ReLU in place do."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(0))
    with undisturbed(network), torch.no_grad():
        image = torch.rand((1, *image_shape), generator=torch.Generator().manual_seed(0)).to(like)
        before = image._version
        with contextlib.suppress(RuntimeError, ValueError, TypeError, AssertionError):  # said where it is trained
            network(image)
    return image._version != before


def _copies(network: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook: copies of the images for a network that writes into them, so that the step's other passes see them."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in given)


def find_head(network: nn.Module, image_shape: tuple[int, int, int] = (3, 32, 32)) -> tuple[str, nn.Linear]:
    """The last linear layer, found by watching one image pass through the network.

    It is the layer whose output is the logits; failing that, the last one executed with as many outputs as there are
    logits. The network is left exactly as found.

    Args:
        network: Takes images in [0, 1] and gives logits.
        image_shape: (C, H, W) of the images.

    Returns:
        Its name in the network, and the layer.

    Raises:
        SettingError: The network has no such layer or can't take such an image.
    """
    seen: list[tuple[str, nn.Linear, Tensor]] = []
    with contextlib.ExitStack() as stack:
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear):
                hook = module.register_forward_hook(lambda m, _, out, name=name: seen.append((name, m, out)))
                stack.callback(hook.remove)
        stack.enter_context(undisturbed(network))
        logits = _logits_of_one_image(network, image_shape)
    same = [layer for layer in seen if layer[2].shape == logits.shape and torch.equal(layer[2], logits)]
    wide = [layer for layer in seen if layer[1].out_features == logits.shape[-1]]
    if not same and not wide:
        raise SettingError(
            f"{type(network).__name__} has no last linear layer (finetune.trainable): use finetune.trainable=all and "
            "finetune.init=none or perturb"
        )
    name, head, _ = (same or wide)[-1]
    return name, head


def keep_frozen_in_eval(network: nn.Module) -> None:
    """Put frozen parts in eval mode; call it after each `network.train()`.

    `requires_grad=False` leaves the running statistics of BatchNorm and the noise of dropout alive, so a frozen
    backbone would drift. A part is frozen if it has parameters and none is trained; it goes to eval mode with all
    that is in it. So do parts that have no parameters but statistics and stand beside a frozen part.

    Args:
        network: Only its train flags change.
    """
    for module in list(network.modules()):
        children = list(module.children())
        if _frozen(module):
            module.eval()
        elif any(_frozen(child) for child in children):
            for child in children:
                if not any(True for _ in child.parameters()) and any(True for _ in child.buffers()):
                    child.eval()


def _frozen(module: nn.Module) -> bool:
    """Whether the module has parameters and none of them is trained."""
    flags = [parameter.requires_grad for parameter in module.parameters()]
    return bool(flags) and not any(flags)


def _logits_of_one_image(network: nn.Module, image_shape: tuple[int, int, int]) -> Tensor:
    """Logits (1, classes) of one image of noise, on the network's device and in its precision."""
    image = torch.rand((1, *image_shape), generator=torch.Generator().manual_seed(0))
    like = next((p for p in network.parameters() if p.is_floating_point()), image)
    try:
        with torch.no_grad():
            logits = network(image.to(like))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise SettingError(
            f"{type(network).__name__} can't take an image of shape {image_shape}, so its last layer can't be found "
            f"(finetune.trainable): choose data that fit the network ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(logits, Tensor):
        raise SettingError(
            f"{type(network).__name__} gives a {type(logits).__name__}, not logits (finetune.trainable): wrap it so "
            "that it returns one tensor (N, classes)"
        )
    return logits


def _redraw(head: nn.Linear, seed: int) -> None:
    """Draw a linear layer anew, as `nn.Linear` does, the same on every device."""
    with seeded(seed, _HEAD_KEY):
        fresh = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
    with torch.no_grad():
        for old, new in zip(head.parameters(), fresh.parameters(), strict=True):
            old.copy_(new)


def _perturb(network: nn.Module, scale: float, seed: int) -> None:
    """Add Gaussian noise to each trained tensor, relative to the tensor's own standard deviation."""
    with torch.no_grad():
        for place, parameter in enumerate(network.parameters()):
            if parameter.requires_grad:
                generator = seeding.generator(seed, "init", _NOISE_KEY, place)
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise * (scale * parameter.std(correction=0)))
