"""Reading weights from files, safely: nothing is ever unpickled that could run code."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import textwrap
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wdat.errors import SettingError

_OURS = "network."  # where our Lightning module keeps the network
_COMPILED = "_orig_mod."  # put into keys by torch.compile
_PARALLEL = "module."  # put before keys by DataParallel and its kin


def broken_part(path: Path) -> str | None:
    """The part of a file of `torch.save` whose bytes aren't those of its checksum; None if all are.

    `torch.load` doesn't look at the checksums.

    Raises:
        zipfile.BadZipFile: The file is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def load_checkpoint(network: nn.Module, path: str | Path) -> nn.Module:
    """Load weights into `network`, strictly.

    Args:
        network: Changed in place.
        path: A file written by `torch.save`: a state dict, or a dict that holds one as `state_dict`, such as a
            Lightning checkpoint of ours. The prefixes of `torch.compile`, of data parallelism and of our Lightning
            module are removed.

    Returns:
        The same network.

    Raises:
        SettingError: The file is missing, damaged, needs unpickling, or belongs to another architecture. The network
            is then unchanged.
    """
    path = Path(os.path.expanduser(path))
    content = read(path, "model.checkpoint")
    wanted = network.state_dict()
    state = _unwrapped(_state_dict(content, path), wanted)
    fault = _first_mismatch(state, wanted)
    if fault:
        raise SettingError(
            f"{path} doesn't fit {type(network).__name__} (model.checkpoint): {fault}; "
            "choose the model and the number of classes that the file was saved with"
        )
    network.load_state_dict(state, strict=True)
    return network


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


def read(path: Path, setting: str) -> Any:
    """The content of a file written by `torch.save`, on the CPU, without unpickling objects.

    Args:
        path: The file.
        setting: The key on the command line that named the file, for messages.

    Raises:
        SettingError: There is no such file, it is no PyTorch file, it is damaged, or it needs unpickling.
    """
    if not os.path.isfile(path):  # which no name, however odd, makes fail
        raise SettingError(f"there is no file {path} ({setting}): check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a foreign pickle it warns before it refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise SettingError(f"{path} {_why(path, error)} ({setting})") from error


def _why(path: Path, error: Exception) -> str:
    """What is wrong with a file that `torch.load` refused."""
    if isinstance(error, PermissionError):
        return "may not be read: change its permissions"
    if path.stat().st_size == 0:
        return "is empty: fetch it again"
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(b"<"):
        return f"is a web page{_title(path)}, not weights: fetch it again, in a browser if need be"
    if _cut_short(head, path, error):
        return "is cut short: fetch or save it again"
    if isinstance(error, pickle.UnpicklingError) and head.startswith((b"PK", b"\x80")):
        return (
            "holds pickled Python objects, and nothing is unpickled here because that can run code: where you trust "
            "it, load it once elsewhere and save torch.save(network.state_dict(), FILE)"
        )
    return "is damaged or no PyTorch file: fetch or save it again"


def _title(path: Path) -> str:
    """A web page's title, which may tell of a quota or a login; empty if it has none."""
    with path.open("rb") as file:
        found = re.search(r"<title>(.*?)</title>", file.read(4096).decode(errors="replace"), re.I | re.S)
    return f" ('{textwrap.shorten(found[1], 60, placeholder='...')}')" if found else ""


def _cut_short(head: bytes, path: Path, error: Exception) -> bool:
    """Whether a file of PyTorch's lacks its end, which in the present format is a zip archive's list of contents."""
    if head.startswith(b"PK"):
        return not zipfile.is_zipfile(path)
    return head.startswith(b"\x80") and any(sign in str(error) for sign in ("truncated", "Ran out", "unexpected EOF"))


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a file's content."""
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        found = f"a dict of {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise SettingError(
            f"{path} holds no state dict (model.checkpoint) but {found or 'nothing'}: "
            "save torch.save(network.state_dict(), FILE)"
        )
    return {str(key): value for key, value in state.items()}


def _unwrapped(state: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """The state with the prefixes removed that wrappers put before the network's own keys.

    A prefix stays where the network's own keys have it. What a Lightning module of ours keeps beside the network is
    left out.
    """
    state = {key.replace(_COMPILED, ""): value for key, value in state.items()}
    for prefix, every in ((_PARALLEL, True), (_OURS, False), (_PARALLEL, True)):
        has = [key.startswith(prefix) for key in state]
        if (all(has) if every else any(has)) and not any(key.startswith(prefix) for key in wanted):
            state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    return state


def _first_mismatch(state: dict[str, Tensor], wanted: dict[str, Any]) -> str:
    """The first key, in the network's order, where the two differ; empty where they agree."""
    for key, value in wanted.items():
        if not isinstance(value, Tensor):
            continue
        if key not in state:
            return f"the key '{key}' is missing in the file"
        if state[key].shape != value.shape:
            return f"'{key}' has shape {tuple(state[key].shape)} in the file and {tuple(value.shape)} in the network"
    unexpected = [key for key in state if key not in wanted]
    return f"the network has no key '{unexpected[0]}'" if unexpected else ""
