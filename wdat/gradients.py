"""Input gradients of single images, from one pass each, and the guard that leaves a network as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wdat.losses import Loss
from wdat.threat import per_image


@dataclass(frozen=True)
class Gradients:
    """One pass over images: the gradient of the summed loss, and what the same forward pass tells.

    Attributes:
        gradient: (N, ...), ∇ₓJ(x_i, y_i); zero where it was not finite.
        loss: (N,), J(x_i, y_i).
        logits: (N, K).
        finite: (N,), bool: whether the gradient was finite.
    """

    gradient: Tensor
    loss: Tensor
    logits: Tensor
    finite: Tensor

    def to(self, device: torch.device) -> Gradients:
        """The same on a device."""
        return Gradients(*(part.to(device) for part in (self.gradient, self.loss, self.logits, self.finite)))


def input_gradients(network: nn.Module, x: Tensor, target: Tensor, loss: Loss, batch_size: int = 512) -> Gradients:
    """∇ₓJ of every image, in passes of `batch_size`; call it inside `wdat.gradients.undisturbed`.

    Args:
        network: Takes images in [0, 1], gives logits (N, K).
        x: Images (N, ...), where the results will be; images on the host go to the network's device pass by pass.
        target: The loss's target, one row an image.
        loss: Per-sample loss.
        batch_size: Images per pass.
    """
    if 0 < len(x) <= batch_size:
        return next(gradient_parts(network, x, target, loss, batch_size))
    gradient, rest, done = torch.empty_like(x), [], 0  # the gradients of a large set are held once
    for part in gradient_parts(network, x, target, loss, batch_size):
        gradient[done : done + len(part.loss)] = part.gradient
        rest.append((part.loss, part.logits, part.finite))
        done += len(part.loss)
    return Gradients(gradient, *map(torch.cat, zip(*rest, strict=True)))


def gradient_parts(
    network: nn.Module, x: Tensor, target: Tensor, loss: Loss, batch_size: int = 512
) -> Iterator[Gradients]:
    """What `input_gradients` gives, pass by pass; one without images where there are none."""
    if not len(x):
        logits = forward(network, x)
        yield Gradients(torch.zeros_like(x), loss(logits, target), logits, x.new_zeros(0, dtype=torch.bool))
    device = device_of(network, x)
    for start in range(0, len(x), batch_size):
        rows = slice(start, start + batch_size)
        images = x[rows].detach().to(device).requires_grad_(True)
        # It may write into its input. Of a copy, which is no leaf, torch warns where the network is compiled.
        logits = network(images if is_compiled(network) else images.clone())
        yield gradients_of(images, logits, target[rows].to(device), loss).to(x.device)


def is_compiled(network: nn.Module) -> bool:
    """Whether `network.compile()` was called."""
    return getattr(network, "_compiled_call_impl", None) is not None


def eager(network: nn.Module) -> AbstractContextManager[object]:
    """Inside, a compiled network runs as it is written: evaluations and trials would need graphs of their own."""
    return torch.compiler.set_stance("force_eager") if is_compiled(network) else nullcontext()


def device_of(network: nn.Module, x: Tensor) -> torch.device:
    """Where a network's parameters are; where x is if it has none."""
    return next((parameter.device for parameter in network.parameters()), x.device)


def gradients_of(images: Tensor, logits: Tensor, target: Tensor, loss: Loss, retain_graph: bool = False) -> Gradients:
    """The gradients of a forward pass that was already made.

    Args:
        images: (N, ...), with `requires_grad`.
        logits: (N, K), what the network made of them, with its graph.
        target: The loss's target, one row an image.
        loss: Per-sample loss.
        retain_graph: Whether the graph is needed once more.
    """
    values = loss(logits, target)
    (gradient,) = torch.autograd.grad(values.sum(), images, retain_graph=retain_graph)
    if gradient.device.type != "cpu":  # without asking the device
        finite = gradient.flatten(1).isfinite().all(1)
        gradient = torch.where(per_image(finite, gradient).bool(), gradient, 0.0)
        return Gradients(gradient, values.detach(), logits.detach(), finite)
    finite = gradient.flatten(1).sum(1).isfinite()  # one pass; a finite gradient's sum overflows at most rarely
    if not bool(finite.all()):
        finite = gradient.flatten(1).isfinite().all(1)
        gradient[~finite] = 0.0
    return Gradients(gradient, values.detach(), logits.detach(), finite)


def forward(network: nn.Module, x: Tensor, batch_size: int = 512) -> Tensor:
    """Logits (N, K) of all images, without gradients, in passes of `batch_size`.

    Not every network accepts an empty batch, so the width K for no images is that of a blank one. The network is given
    copies, because some write into their input, and on its device; the logits are where the images are.
    """
    device = device_of(network, x)
    with torch.no_grad():
        if not len(x):
            blank: Tensor = network(x.new_zeros((1, *x.shape[1:]), device=device))
            return blank[:0].to(x.device)
        starts = range(0, len(x), batch_size)
        return torch.cat([network(x[i : i + batch_size].to(device, copy=True)).to(x.device) for i in starts])


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Eval mode, frozen parameters and enabled input gradients; everything as before on exit, also after an error.

    Each submodule's training flag, each parameter's `requires_grad` and each buffer's values are restored; `.grad` is
    never touched, because only gradients with respect to inputs are ever taken. Works inside `torch.no_grad` and
    `torch.inference_mode`.
    """
    flags = [(module, module.training) for module in network.modules()]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    buffers = [
        (module, name, buffer, buffer.clone(), _version(buffer))
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        network.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for module, name, buffer, *_ in buffers:
                setattr(module, name, buffer)
            # Only what has changed is written, because a graph may hold the others.
            written = {module for module, _, buffer, _, version in buffers if version != _version(buffer)}
            for module, _, buffer, saved, version in buffers:
                if (version is None or module in written) and bool((buffer != saved).any()):
                    buffer.copy_(saved)


def _version(buffer: Tensor) -> int | None:
    """How often a tensor on a device was written to, which needs no look at its values.

    BatchNorm's statistics aren't counted when it renews them, only its number of batches is: where one buffer of a
    module was written to, all of them are looked at. None for tensors that don't count, and on the CPU, where a look
    costs little and also finds what `.data` hides.
    """
    return None if buffer.device.type == "cpu" or buffer.is_inference() else buffer._version


def ordinary(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Detached tensors that autograd accepts, also where the given ones were made in inference mode."""
    with torch.inference_mode(False):
        return tuple(t.clone() if t.is_inference() else t.detach() for t in tensors)
