"""Weights from files into a network: which of the tensors in a file are the network's, and whether they fit."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wdat.errors import SettingError
from wdat.models.normalisation import compare, constants
from wdat.models.reading import read

State = dict[str, Tensor]

WRAPPERS = (
    "module", "model", "network", "net", "ema", "model_ema", "ema_model", "averaged_model", "teacher", "student",
)  # fmt: skip
"""What keys begin with where a network lies inside data parallelism, an average, a Lightning module or the like."""

_COMPILED = "_orig_mod."  # put into keys by torch.compile
_TRACKED = "num_batches_tracked"
_DEEPEST = 4  # dicts inside dicts


@dataclass(frozen=True)
class Found:
    """A state dict in a file.

    Attributes:
        state: Its tensors, under the network's own names.
        beside: Constants of normalisation that the network doesn't keep in its state.
    """

    state: State
    beside: State


def load_checkpoint(network: nn.Module, path: str | Path, key: str | None = None, new_head: bool = False) -> nn.Module:
    """Load weights into `network`, strictly.

    The network's state dict is found wherever it lies in the file: at the top, or in dicts such as
    `{"state_dict": ...}`, `{"net": ...}` or `{"model": ..., "ema": ...}`, under prefixes such as `module.` or `model.`
    that wrappers put before the network's own keys. What Lightning keeps beside the network is left out. Constants of
    normalisation that the network doesn't keep in its state must equal its own.

    Args:
        network: Changed in place.
        path: A file of `torch.save` or of safetensors.
        key: Which state dict is meant where the file holds several that fit, such as `"ema"` (`model.checkpoint_key`).
        new_head: Whether the last linear layer is drawn anew afterwards (`finetune.init=reset_head`): where it alone
            doesn't fit, as with another number of classes, it keeps the values that it has.

    Returns:
        The same network.

    Raises:
        SettingError: The file is missing, damaged, needs unpickling, holds several networks, has weights that aren't
            finite or another normalisation, or belongs to another architecture. The network is then unchanged.
    """
    path = Path(os.path.expanduser(path))
    content = read(path, "model.checkpoint")
    wanted = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    candidates = dict(_candidates(content))
    if not candidates:
        keys = f"a dict of {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else ""
        raise SettingError(
            f"{path} holds no state dict (model.checkpoint) but {keys or type(content).__name__}: "
            "save torch.save(network.state_dict(), FILE)"
        )
    spare = _head(network, wanted) if new_head else ()
    found = _chosen(_named(_variants(candidates, wanted, spare), key, candidates, path), wanted, path)
    fault = _first_mismatch(found.state, wanted)
    if fault:
        raise SettingError(
            f"{path} doesn't fit {type(network).__name__} (model.checkpoint): {fault}; "
            "choose the model and the number of classes that the file was saved with"
        )
    broken = _nonfinite(found.state, {name for name, _ in network.named_parameters()})
    if broken:
        raise SettingError(
            f"{path} has weights that are not finite ('{broken}'; model.checkpoint): the training that wrote it has "
            "diverged; take an earlier checkpoint"
        )
    compared = compare(network, found.beside, path)
    if compared:
        warnings.warn(compared, stacklevel=2)
    network.load_state_dict(
        {name: found.state.get(name, value) for name, value in network.state_dict().items()}, strict=True
    )
    return network


def check_finite(network: nn.Module, what: str) -> None:
    """Refuse a network whose weights aren't finite.

    Args:
        network: With its weights.
        what: What messages call it.

    Raises:
        SettingError: A parameter isn't finite, or a buffer has a NaN.
    """
    state = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    broken = _nonfinite(state, {name for name, _ in network.named_parameters()})
    if broken:
        raise SettingError(f"{what} has weights that are not finite ('{broken}'; model.name): use others")


def digest(network: nn.Module) -> str:
    """What tells a network's weights and buffers from others: 16 hexadecimal digits of a SHA-256 sum.

    Buffers outside the state dict, such as the constants of a normalisation, count too.
    """
    found = hashlib.sha256()
    state = network.state_dict()
    for name, value in {**state, **{k: v for k, v in network.named_buffers() if k not in state}}.items():
        tensor = value.detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _nonfinite(state: Mapping[str, Tensor], parameters: set[str]) -> str:
    """The first parameter that isn't finite or buffer with a NaN (masks may be infinite); empty for none."""
    for name, value in state.items():
        if value.is_floating_point() and value.device.type != "meta":
            fine = value.isfinite() if name in parameters else ~value.isnan()
            if not bool(fine.all()):
                return name
    return ""


def _candidates(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """The dicts of tensors in a file's content, by the keys that lead to them, as in `ema.module`."""
    if not isinstance(content, Mapping) or not content or depth > _DEEPEST:
        return
    if all(isinstance(value, Tensor) for value in content.values()):
        yield name, {str(key).replace(_COMPILED, ""): value for key, value in content.items()}
        return
    if depth == 0 and "pytorch-lightning_version" in content and "state_dict" in content:
        content = {"state_dict": content["state_dict"]}  # beside it are the optimiser's and other states
    for key, value in content.items():
        yield from _candidates(value, f"{name}.{key}".lstrip("."), depth + 1)


def _prefixes(state: State) -> list[str]:
    """The prefixes of wrappers' names that keys begin with, the empty one first."""
    found = {"": None}  # in the order of the file
    for key in state:
        prefix = ""
        for part in key.split(".")[:-1]:
            if part not in WRAPPERS:
                break
            prefix += f"{part}."
            found[prefix] = None
    if all(key.startswith("1.") or _is_constant(key, state) for key in state):
        found["1."] = None  # nn.Sequential(normalisation, network)
    return sorted(found, key=len)


def _is_constant(key: str, state: State) -> bool:
    return bool(constants({key: state[key]}))


def _variants(candidates: Mapping[str, State], wanted: State, spare: tuple[str, ...]) -> dict[str, Found]:
    """What each candidate holds under each prefix, by its name and the prefix."""
    variants = {}
    for name, whole in candidates.items():
        for prefix in _prefixes(whole):
            own = {key for key in whole if key in wanted or key.removeprefix(prefix) in wanted}
            beside = constants({key: value for key, value in whole.items() if key not in own})
            inner = {key: value for key, value in whole.items() if key.startswith(prefix) and key not in beside}
            state = {key[len(prefix) :]: value for key, value in inner.items()}
            variants[f"{name}.{prefix}".strip(".")] = Found(_completed(state, wanted, beside, spare), beside)
    return variants


def _named(
    variants: dict[str, Found], key: str | None, candidates: Mapping[str, State], path: Path
) -> dict[str, Found]:
    """Those that a key means; all without one."""
    if key is None:
        return variants
    found = {n: v for n, v in variants.items() if n == key or n.startswith(f"{key}.") or n.endswith(f".{key}")}
    if not found:
        held = ", ".join(name for name in candidates if name) or "one network, without a key"
        raise SettingError(f"{path} has nothing called {key} (model.checkpoint_key): it holds {held}")
    return found


def _chosen(variants: dict[str, Found], wanted: State, path: Path) -> Found:
    """The one that fits; where none does, the one that is nearest to it."""
    fitting = {name: found for name, found in variants.items() if not _first_mismatch(found.state, wanted)}
    if not fitting:
        return max(variants.values(), key=lambda found: len(found.state.keys() & wanted.keys()))
    first, *others = fitting.values()
    if any(not _equal(first.state, other.state) for other in others):
        raise SettingError(
            f"{path} holds {len(fitting)} networks that fit (model.checkpoint): {', '.join(fitting)}; choose one, "
            f"model.checkpoint_key={list(fitting)[-1]}"
        )
    return first


def _completed(state: State, wanted: State, beside: State, spare: tuple[str, ...]) -> State:
    """The state with what a file may lack: counters of batches, as in PyTorch, and what is spare.

    Constants of normalisation may go by another name in the file; they are compared.
    """
    own = constants(wanted) if beside else {}
    missing = {
        name: value for name, value in wanted.items()
        if name not in state and (name.rpartition(".")[2] == _TRACKED or name in own)
    }  # fmt: skip
    odd = {name for name, value in wanted.items() if name not in state or state[name].shape != value.shape}
    if spare and odd - set(missing) and odd - set(missing) <= set(spare):
        state = {name: value for name, value in state.items() if name not in spare}
        missing |= {name: wanted[name] for name in spare}
    return {**state, **missing}


def _head(network: nn.Module, wanted: State) -> tuple[str, ...]:
    """Names of the parameters of the last linear layer in the order of the modules; none where there is none."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return tuple(name for name in wanted if linear and name.rpartition(".")[0] == linear[-1])


def _equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def _first_mismatch(state: State, wanted: State) -> str:
    """The first key, in the network's order, where the two differ; empty where they agree."""
    for key, value in wanted.items():
        if key not in state:
            return f"the key '{key}' is missing in the file"
        if state[key].shape != value.shape:
            return f"'{key}' has shape {tuple(state[key].shape)} in the file and {tuple(value.shape)} in the network"
    unexpected = [key for key in state if key not in wanted]
    return f"the network has no key '{unexpected[0]}'" if unexpected else ""
