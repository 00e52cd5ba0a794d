"""W-PGD [B]: all images share one budget, divided anew at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from wdat.attacks.allocation import granted_share, sensitivity_radii
from wdat.attacks.base import Context, Moved
from wdat.attacks.gradient import GradientAttack
from wdat.threat import ThreatModel, contract, direction, dual_norm, per_image, power_mean


@dataclass
class WPGD(GradientAttack):
    """The published distributional attack.

    Each step moves image i by α h(g_i)(n_i/Υ)^(q−1), Υ over the set at the current point. Then, with D the set's W_p
    distance: if D > δ, image i is contracted to radius d_i δ/D; at p = inf each image to min(d_i, δ) and nothing else
    (the official code moves interior points out to the sphere there). Then [0, 1].

    Its accuracy is only an *upper* bound of adversarial accuracy, and a loose one.
    """

    name: ClassVar[str] = "wpgd"

    def _run(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context) -> Moved:
        processes = context.processes
        clean, norms, sensitivity = self._clean(network, x, y, threat, context)
        share = threat.delta if context.sensitivity is None else granted_share(norms, sensitivity, threat)
        target = self._target(network, x, y, context, clean)

        def move(z: Tensor, gradient: Tensor) -> Tensor:
            n = dual_norm(gradient, threat.norm)
            lengths = self.step_size * sensitivity_radii(n, power_mean(n, threat.q, processes), threat.q, share)
            z = z + per_image(lengths, z) * direction(gradient, threat.norm)
            d = threat.distances(x, z)
            if threat.is_pointwise:
                radii = d.clamp_max(share)
            else:
                total = threat.length(d, processes)
                radii = d * (share / total if total > share else 1.0)
            return contract(x, z, radii, threat.norm).clamp_(0, 1)

        z, loss_mean = self._ascend(network, move(x, clean.gradient), y, target, move, context)
        return Moved(z, None, share, loss_mean, norms, int((~clean.finite).sum()))
