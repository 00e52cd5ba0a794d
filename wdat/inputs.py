"""What callers hand over as network, images and labels, brought into one form or refused with a remedy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wdat.errors import SettingError
from wdat.gradients import device_of, undisturbed
from wdat.precision import float32

_WRAPPER = "class Logits(torch.nn.Sequential): forward = lambda self, x: {} (and give Logits(network))"


class Function(nn.Module):
    """A plain function in the place of a network; it has no modes and no parameters that could be guarded.

    Args:
        function: Takes images (N, C, H, W) in [0, 1], gives logits (N, K).
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W)."""
        return self.function(x)


def as_network(given: Any) -> nn.Module:
    """A network as a module: modules as they are, a module's own `forward` as that module, other functions wrapped.

    Raises:
        SettingError: If it is a class, or can't be called.
    """
    if isinstance(given, nn.Module):
        return given
    owner = getattr(given, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(given, "__name__", "") in ("forward", "__call__"):
        return owner
    if isinstance(given, type):
        raise SettingError(f"the network is the class {given.__name__}: give an instance, {given.__name__}(...)")
    if not callable(given):
        raise SettingError(f"the network is a {type(given).__name__}: give a module that maps images to logits (N, K)")
    return Function(given)


def as_images(given: Any, network: nn.Module) -> Tensor:
    """Images as a tensor: tensors as they are, floats of NumPy in the precision of the network's weights.

    Raises:
        SettingError: If they are neither.
    """
    if isinstance(given, Tensor):
        return given
    if not isinstance(given, np.ndarray) or given.dtype.kind not in "fiub":
        what = f"an array of {given.dtype}" if isinstance(given, np.ndarray) else f"a {type(given).__name__}"
        raise SettingError(f"images must be a float tensor (N, C, H, W) in [0, 1], not {what}: torch.stack them")
    images = torch.from_numpy(np.ascontiguousarray(given))
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(0))
    return images.to(like.device, like.dtype) if images.is_floating_point() else images.to(like.device)


def as_labels(given: Any) -> Tensor:
    """Labels as int64: whole numbers of any type, in a tensor, an array or a list.

    Raises:
        SettingError: If they aren't whole numbers.
    """
    try:
        labels = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError) as error:
        raise SettingError(f"labels must be whole numbers of shape (N,), not a {type(given).__name__}") from error
    if labels.dim() == 0:
        raise SettingError("labels must have shape (N,), not be one number: of one image, give x[None] and y[None]")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        remedy = "y.argmax(1) of one-hot rows" if labels.dim() == 2 else "y.long()"
        raise SettingError(f"labels must be whole numbers of shape (N,), not {labels.dtype}: give {remedy}")
    return labels.long()


def classes_of(network: nn.Module, x: Tensor) -> int:
    """Number of classes K that a network tells apart, from one image given to it; the network is left as it was found.

    Args:
        network: Takes images in [0, 1], gives logits (N, K).
        x: Images (N, C, H, W), N ≥ 1, of which the first is used.

    Raises:
        SettingError: If it can't take the image, gives something else than logits with a gradient to the images, or
            has no weights yet.
    """
    name = network.name if isinstance(network, Function) else type(network).__name__
    shape = (1, *x.shape[1:])
    if any(is_lazy(tensor) for tensor in chain(network.parameters(), network.buffers())):
        raise SettingError(f"{name} has lazy layers without weights: call network(torch.zeros{shape}) once before")
    image = x[:1].detach().to(device_of(network, x), copy=True).requires_grad_(True)
    with undisturbed(network), float32(network, image):
        try:
            out = network(image.clone())
        except (torch.OutOfMemoryError, SettingError):
            raise
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            hint = ""
            if x.dim() == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
                hint = "; channels come first: x.permute(0, 3, 1, 2)"
            raise SettingError(
                f"{name} can't take images {shape} of {str(x.dtype).removeprefix('torch.')} on {image.device} "
                f"({reason}): choose data and model that fit each other{hint}"
            ) from error
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != 1 or not out.is_floating_point():
        raise SettingError(f"{name} gives {_described(out)}")
    if out.shape[1] < 2:
        raise SettingError(
            f"{name} gives one logit, not (N, K) of two classes or more: wrap it, "
            + _WRAPPER.format("torch.nn.functional.pad(self[0](x), (1, 0))")
        )
    if not out.requires_grad:
        raise SettingError(
            f"the logits of {name} carry no gradient to the images, which attacks follow: take torch.no_grad, "
            ".detach() and NumPy out of its forward"
        )
    return out.shape[1]


def check_figures(network: nn.Module, x: Tensor) -> None:
    """Warn of a network whose figures can't be trusted; it is left as it was found.

    Attacks follow the gradient of one pass, and a verdict is that of one pass: both mean little where another pass
    gives other logits, or where an image's logits depend on its batch. Of probabilities in the place of logits, losses
    have gradients that vanish.

    Args:
        network: Takes images in [0, 1], gives logits (N, K).
        x: Images (N, C, H, W), of which up to four are used.
    """
    images = x[:4].detach().to(device_of(network, x))
    with undisturbed(network), float32(network, images), torch.no_grad():
        first, again = (network(images.clone()) for _ in range(2))
        single = torch.cat([network(image[None].clone()) for image in images])
    name = network.name if isinstance(network, Function) else type(network).__name__
    near = {"rtol": 1e-3, "atol": 1e-3 * float(first.nan_to_num(0, 0, 0).abs().max()), "equal_nan": True}
    if not torch.allclose(first, again, **near):  # type: ignore[arg-type]  # of several types
        warnings.warn(
            f"{name} gives other logits for the same images at each pass: accuracy depends on chance, and attacks that "
            "follow one pass overestimate it",
            stacklevel=3,
        )
    elif not torch.allclose(first, single, **near):  # type: ignore[arg-type]
        warnings.warn(
            f"{name} gives logits that depend on the other images of the batch, as with BatchNorm without running "
            "statistics: figures depend on the order of the images and on batch_size",
            stacklevel=3,
        )
    if bool((first >= 0).all()) and bool(((first.sum(1) - 1).abs() < 1e-4).all()):
        warnings.warn(
            f"{name} gives probabilities, not logits: gradients of losses vanish, and attacks overestimate accuracy; "
            "return what goes into the softmax",
            stacklevel=3,
        )


def _described(out: Any) -> str:
    """What a network gives instead of logits, and the wrapper to write."""
    if isinstance(out, Tensor):
        return (
            f"a tensor {tuple(out.shape)} of {str(out.dtype).removeprefix('torch.')} for one image, not float logits "
            "(1, K): return what goes into the softmax"
        )
    if isinstance(out, Mapping):
        names = [str(key) for key in out]
        key = "logits" if "logits" in names else (names or ["logits"])[0]
        return f"a dict of {', '.join(names)}, not logits (N, K): wrap it, " + _WRAPPER.format(f"self[0](x)['{key}']")
    if isinstance(out, (tuple, list)):
        fields = getattr(out, "_fields", ())
        what = f"a {type(out).__name__} of {', '.join(fields) or len(out)}"
        member = ".logits" if "logits" in fields else "[0]"
        return f"{what}, not logits (N, K): wrap it, " + _WRAPPER.format(f"self[0](x){member}")
    member = ".logits" if hasattr(out, "logits") else "[0]"
    return f"a {type(out).__name__}, not logits (N, K): wrap it, " + _WRAPPER.format(f"self[0](x){member}")
