"""What every certificate shares: what it is given, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from wdat.distributed import ALONE, Processes
from wdat.threat import ThreatModel


@dataclass(frozen=True)
class Surroundings:
    """What surrounds one call of a certificate. The defaults are those of a set that one process holds.

    Attributes:
        rows: (N,), where this process's images stand in the whole set; None for 0 to N − 1.
        processes: The processes that share the set; all make the same calls.
        distances: (N,), distances of points found by an attack, at which the search for a radius ends: 0 where an
            image is misclassified, inf where no point was found. None where no attack was run.
        folder: Where results are kept as they come, so that an interrupted call goes on; None keeps nothing.
        about: What the results are of, in plain values: those kept of anything else are not used.
        progress: Called with images done and images in all.
    """

    rows: Tensor | None = None
    processes: Processes = ALONE
    distances: Tensor | None = None
    folder: Path | None = None
    about: dict[str, Any] = field(default_factory=dict)
    progress: Callable[[int, int], None] | None = None


class Certified(Protocol):
    """Lower bounds of the accuracy of a whole set, at any threat of the norm that they were made for."""

    def figures(self, threat: ThreatModel) -> dict[str, Any]:
        """`accuracy`, its interval and `distance`, and what records say in their details, at one threat."""


@dataclass(frozen=True)
class Certificate(ABC):
    """A way to bound the accuracy of a set from below."""

    name: ClassVar[str]
    by_distance: ClassVar[bool] = False  # whether distances found by an attack help

    @property
    def options(self) -> dict[str, Any]:
        """The settings, as records state them."""
        return {"method": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def network_name(self, name: str) -> str:
        """What records call the network that the bound is of."""
        return name

    def check(self, threats: Sequence[ThreatModel]) -> None:
        """Refuse threats that the certificate can't bound, before any work.

        Raises:
            SettingError: If there are any.
        """
        del threats

    def check_network(self, network: nn.Module, x: Tensor) -> None:
        """Refuse a network, by a pass of one of its images x (N, C, H, W), before any work.

        Raises:
            SettingError: If it can't be certified.
        """
        del network, x

    @abstractmethod
    def __call__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        threats: Sequence[ThreatModel],
        surroundings: Surroundings | None = None,
    ) -> Certified:
        """Bound the accuracy of the set whose part this process holds.

        Args:
            network: Takes images in [0, 1], gives logits (N, K); left as it was found.
            x: Images (N, C, H, W) in [0, 1], this process's part.
            y: Labels (N,).
            threats: The threats that are asked for, all of one norm.
            surroundings: The other parts of the set, and what else is known.

        Raises:
            SettingError: If the network can't be bounded.
        """
