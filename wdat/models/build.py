"""Networks of RobustBench's zoo, built: with fresh weights, with published ones, or as an outline without memory."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wdat.errors import SettingError
from wdat.models.weights import obtain, one_line
from wdat.models.zoo import CLASSES, ZooEntry, resolve, robustbench, weight_files

_LARGE = 2**17  # elements, half a megabyte


def architecture(entry: ZooEntry) -> nn.Module:
    """The network of an entry with fresh weights. Nothing is downloaded.

    Raises:
        SettingError: It can't be built by the versions of timm and torch that are installed.
    """
    try:
        with _tamed(), _fresh_torchvision():
            if entry.timm_name:
                create = importlib.import_module("timm").create_model
                network = create(entry.timm_name, num_classes=CLASSES[entry.dataset])
            else:
                network = entry.settings["model"]()
    except Exception as error:  # third-party constructors
        raise _unusable(entry, "can't be built", error) from error
    return _modern(network)


def outline(entry: ZooEntry) -> nn.Module:
    """The network of an entry with the shapes of its weights and no memory for most of them, in hundredths of a second.

    The few whose constructors compute with their weights are built in full.

    Raises:
        SettingError: It can't be built by the versions of timm and torch that are installed.
    """
    try:
        with _Outline():
            return architecture(entry)
    except SettingError:
        return architecture(entry)


def load_zoo(name: str, dataset: str = "cifar10", threat_model: str = "Linf", root: str | Path = "models") -> nn.Module:
    """A network of the zoo with its weights, in eval mode, on the CPU.

    The weights are looked for where RobustBench looks, `{root}/{dataset}/{threat_model}/{full name}.pt` (the cache of
    torch.hub for the few networks that timm or torchvision provide), and downloaded there if absent. What was
    downloaded stays only if RobustBench itself has loaded it into the network.

    Args:
        name: A key of `ALIASES` or a full name of the zoo.
        dataset: A key of `CLASSES`.
        threat_model: One of `THREAT_MODELS`.
        root: Folder of the weights.

    Raises:
        SettingError: An unknown name; weights that can't be had, with the place to put them by hand; weights that are
            damaged, need unpickling or belong to another network.
    """
    entry = resolve(name, dataset, threat_model)
    root = Path(os.path.expanduser(root))
    files = list(weight_files(entry, root))

    def load(scratch: Path | None) -> nn.Module:
        with _tamed(), _hub(scratch):
            network: nn.Module = robustbench().load_model(
                entry.name, str(scratch or root), entry.dataset, entry.threat_model
            )
        return network

    if files:
        return _modern(obtain(files, str(entry), load)).eval()
    try:
        return _modern(load(None)).eval()
    except Exception as error:  # third-party code
        raise _unusable(entry, "can't be loaded", error) from error


def deepmind(kind: str, **settings: Any) -> nn.Module:
    """A CIFAR network of RobustBench's port of DeepMind's code, with CIFAR-10's normalisation inside.

    Args:
        kind: `"DMWideResNet"` or `"DMPreActResNet"`.
        settings: Arguments of the class, such as `num_classes` and `depth`.
    """
    robustbench()
    classes = importlib.import_module("robustbench.model_zoo.architectures.dm_wide_resnet")
    network: nn.Module = getattr(classes, kind)(**settings)
    return network


class _Outline(TorchFunctionMode):
    """Inside, the large tensors that PyTorch's layers make for their weights have a shape and no memory.

    They alone are made by `torch.empty`. What constructors compute with, such as rates of dropped paths, stays on the
    CPU; under `torch.device("meta")` these constructors fail.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, on the meta device if it is `torch.empty` for much."""
        kwargs = kwargs or {}
        if func is torch.empty:
            shape = func(*args, **{**kwargs, "device": "meta"})
            if shape.numel() >= _LARGE:
                return shape
        return func(*args, **kwargs)


class _OnTheCPU(TorchFunctionMode):
    """Inside, `tensor.cuda()` gives the tensor as it is: some constructors ask for a GPU for their constants."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, unless it is `Tensor.cuda`."""
        return args[0] if func is Tensor.cuda else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _tamed() -> Iterator[None]:
    """Inside, third-party code unpickles nothing, needs no GPU, and neither prints nor warns.

    torchvision and timm ask for unpickling, whatever the environment says, and check a file's sum only when they
    download it; some constructors of RobustBench tell their settings, or call others in ways that are deprecated.
    """
    force, spare = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, spare)}
    os.environ[force] = "1"
    try:
        with _OnTheCPU(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def _fresh_torchvision() -> Iterator[None]:
    """Inside, torchvision's ResNet-50, whose weights RobustBench's `Standard_R50` asks for, comes with fresh ones."""
    models: Any = importlib.import_module("torchvision.models")
    original = models.resnet50
    models.resnet50 = lambda pretrained=False, **settings: original(**settings)
    try:
        yield
    finally:
        models.resnet50 = original


@contextlib.contextmanager
def _hub(folder: Path | None) -> Iterator[None]:
    """Inside, torch.hub looks for files in `folder`; None leaves its own."""
    before = torch.hub._hub_dir
    if folder is not None:
        torch.hub.set_dir(str(folder))
    try:
        yield
    finally:
        torch.hub._hub_dir = before


def _modern(network: nn.Module) -> nn.Module:
    """The network without two habits of RobustBench's architectures.

    Its hand-written Swish becomes the same function of PyTorch, `nn.SiLU`: the former's backward pass uses
    `ctx.saved_variables`, which warns at every call and is about to go. Constant tensors that are plain attributes
    become buffers outside the state dict, which follow the network to its device.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Swish" and type(child).__module__.startswith("robustbench."):
                setattr(module, name, nn.SiLU())
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                delattr(module, name)
                module.register_buffer(name, value, persistent=False)
    return network


def _unusable(entry: ZooEntry, what: str, error: Exception) -> SettingError:
    """The error for a network of the zoo that its own package can't handle."""
    return SettingError(f"{entry} {what} (model.name): {one_line(error)}")
