"""An accelerator that isn't there: tensors that live on the CPU and say that they are on `cuda:0`.

Autograd and the kernels see CPU tensors; Python sees a device. So a CPU finds what only a GPU would show: an operation
that mixes devices raises, and each moment at which the host would wait for the device is counted by source line, as are
kernels and collective operations. `torch.distributed` is, where asked for, that of two processes of which the other has
no images, and refuses what NCCL refuses.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
HOST_INDEX = ("index.Tensor", "index_put_.default", "index_put.default", "_index_put_impl_.default")
MEETS_HOST = (*HOST_INDEX, "copy_.default", "_to_copy.default")  # where a CPU tensor may meet one on a device
SEARCHES = ("nonzero", "equal", "masked_select", "unique", "_unique")  # the size of the result isn't known before
READS = ("tolist", "__bool__", "__int__", "__float__", "item", "__index__", "__format__")
NO_KERNEL = ("_local_scalar_dense.default", "detach.default", "lift_fresh.default")


@dataclass
class Counts:
    """What happened, by source line.

    Attributes:
        waits: Moments at which the host waits for the device, by line and kind.
        kernels: Operations on the device, by line.
        collectives: Collective operations, by line.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Begin anew."""
        for counter in (self.waits, self.kernels, self.collectives):
            counter.clear()

    def waited(self, kind: str) -> None:
        """Note a wait."""
        self.waits[_line(), kind] += 1

    def totals(self) -> tuple[int, int, int]:
        """Waits, kernels and collectives in all."""
        return self.waits.total(), self.kernels.total(), self.collectives.total()


COUNTS = Counts()  # of the accelerator that is pretended; `accelerator` clears it


def _line() -> str:
    """The innermost line of the project that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "/wdat/" in frame.f_code.co_filename:
            return f"{os.path.relpath(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class Pretended(Tensor):
    """A tensor of the CPU that says it is on `cuda:0`.

    Args:
        raw: The CPU tensor.
    """

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Pretended:
        made: Pretended = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=raw.device,
        )  # fmt: skip
        made.raw = raw
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = dict(kwargs or {})
        name = str(func).removeprefix("aten.")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        host = [t for t in tensors if not isinstance(t, Pretended) and t.dim() > 0]
        if host and (name not in MEETS_HOST or (name in HOST_INDEX and not isinstance(args[0], Pretended))):
            raise RuntimeError(f"expected all tensors on the same device, in {name} at {_line()}")
        _count_waits(name, args, kwargs, bool(host))
        to_host = _device(kwargs) == "cpu" and name == "_to_copy.default"
        if kwargs.get("device") is not None:
            del kwargs["device"]
        known = {id(t.raw): t for t in tensors if isinstance(t, Pretended)}
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in NO_KERNEL:
            COUNTS.kernels[_line()] += 1
        out = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
        if to_host or name == "_local_scalar_dense.default":
            return out
        return tree_map(lambda o: _wrapped(o, known) if isinstance(o, Tensor) else o, out)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Pretended) else value


def _wrapped(out: Tensor, known: dict[int, Any]) -> Tensor:
    """What an operation in place gives back is the tensor it was given."""
    return known[id(out)] if id(out) in known else Pretended(out)


def _device(kwargs: dict[str, Any]) -> str | None:
    try:
        return None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    except (RuntimeError, TypeError):
        return None


def _count_waits(name: str, args: Any, kwargs: dict[str, Any], host: bool) -> None:
    if host and name == "copy_.default" and not (len(args) > 2 and args[2]):
        COUNTS.waited("copy between host and device")
    elif host and name in HOST_INDEX:
        COUNTS.waited("index on the host")
    elif name == "_local_scalar_dense.default":
        COUNTS.waited("item")
    elif name.startswith(SEARCHES):
        COUNTS.waited(name.partition(".")[0])
    elif name in HOST_INDEX and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
        COUNTS.waited("boolean mask")
    elif name == "_to_copy.default" and _device(kwargs) == "cpu":
        COUNTS.waited("device to host")


class _Driver(TorchFunctionMode):
    """Factories on `cuda` and moves to and from it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], Pretended):
            return self._of_device(func, name, args, kwargs)
        if name == "to" and isinstance(args[0], Tensor):
            target, dtype, waits = _target(args, kwargs)
            if target == "cuda":
                if waits:
                    COUNTS.waited("host to device")
                return Pretended(args[0].detach().to(dtype or args[0].dtype))
        elif _device(kwargs) == "cuda":
            del kwargs["device"]
            if name in ("tensor", "as_tensor"):
                COUNTS.waited("host to device")
            return Pretended(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _of_device(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        given: Any = args[0]
        if name in READS:
            COUNTS.waited(name.strip("_"))
            return getattr(given.detach().raw, name)(*args[1:])
        if name == "numpy":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "cpu" or (name == "to" and _target(args, kwargs)[0] == "cpu"):
            COUNTS.waited("device to host")
            dtype = _target(args, kwargs)[1] if name == "to" else None
            return given.detach().raw.clone().to(dtype or given.dtype)
        if name == "to":
            _, dtype, _ = _target(args, kwargs)
            layout = {key: kwargs[key] for key in ("memory_format", "copy") if key in kwargs}
            return func(given, dtype or given.dtype, **layout)
        if name == "new_tensor":
            COUNTS.waited("host to device")
            return Pretended(torch.tensor(args[1], dtype=kwargs.get("dtype") or given.dtype))
        return func(*args, **kwargs)


def _target(args: Any, kwargs: dict[str, Any]) -> tuple[str | None, torch.dtype | None, bool]:
    """Device and dtype that `Tensor.to` is asked for, and whether the host waits for a copy."""
    values = [*args[1:], kwargs.get("device"), kwargs.get("other"), kwargs.get("dtype")]
    device, dtype = None, None
    for value in values:
        if isinstance(value, Tensor):
            device, dtype = value.device.type, value.dtype
        elif isinstance(value, (str, torch.device)):
            device = torch.device(value).type
        elif isinstance(value, torch.dtype):
            dtype = value
    return device, dtype, not (kwargs.get("non_blocking") or any(value is True for value in args[1:]))


class _NCCL:
    """`torch.distributed` as the first of two processes sees it, of which the other has nothing."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return 2

    def get_rank(self) -> int:
        return 0

    def _check(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if not isinstance(tensor, Pretended):
                raise RuntimeError(f"no backend type associated with device type cpu ({_line()})")
            if not tensor.is_contiguous():
                raise RuntimeError("tensors must be contiguous")
        COUNTS.collectives[_line()] += 1

    def all_reduce(self, tensor: Tensor, op: Any = None) -> None:
        self._check(tensor)

    def all_gather(self, parts: list[Tensor], tensor: Tensor) -> None:
        self._check(*parts, tensor)
        for rank, part in enumerate(parts):
            part.raw.copy_(tensor.raw) if rank == 0 else part.raw.zero_()  # type: ignore[attr-defined]

    def broadcast(self, tensor: Tensor, src: int = 0) -> None:
        self._check(tensor)


@contextmanager
def accelerator(processes: int = 1) -> Iterator[Counts]:
    """Pretend inside the block that there is a GPU, as `device_tensor` and `lend` give it tensors.

    Args:
        processes: 1, or 2, of which the second has no images.
    """
    COUNTS.clear()
    with ExitStack() as stack:
        stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
        torch.backends.cudnn.enabled = False
        patches = {
            "get_rng_state": lambda device=0: torch.get_rng_state(),
            "set_rng_state": lambda state, device=0: None,
            "get_device_name": lambda device=0: "Pretended",
            "device": lambda device: nullcontext(),
        }
        for name, function in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        if processes > 1:
            stack.enter_context(mock.patch("wdat.distributed.dist", _NCCL(torch.distributed)))
        stack.enter_context(_Driver())
        yield COUNTS


def device_tensor(tensor: Tensor) -> Tensor:
    """A tensor on the pretended device, without a wait."""
    return Pretended(tensor.detach().clone())


def lend(network: nn.Module) -> nn.Module:
    """The network with its parameters and buffers on the pretended device; changed in place."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(device_tensor(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = device_tensor(buffer)
    return network
