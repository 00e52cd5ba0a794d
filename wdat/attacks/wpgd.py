"""W-PGD [B]: all images share one budget, divided anew at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from wdat.attacks.allocation import granted_share, sensitivity_radii
from wdat.attacks.base import Context, Moved
from wdat.attacks.gradient import GradientAttack
from wdat.threat import ThreatModel, direction, dual_norm, image_norm, per_image, power_mean, shrink

CHUNK = 128  # images of which steps stay in a processor's cache


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
        size = CHUNK if x.device.type == "cpu" else self.batch_size

        def move(z: Tensor, gradient: Tensor) -> Tensor:
            chunks = [slice(i, i + size) for i in range(0, max(len(z), 1), size)]
            n = torch.cat([dual_norm(gradient[rows], threat.norm) for rows in chunks])
            lengths = self.step_size * sensitivity_radii(n, power_mean(n, threat.q, processes), threat.q, share)
            moved, d = torch.empty_like(z), torch.zeros_like(n)
            for rows in chunks:
                step = per_image(lengths[rows], z) * direction(gradient[rows], threat.norm)
                offset = torch.sub(step.add_(z[rows]), x[rows], out=moved[rows])
                d[rows] = image_norm(offset, threat.norm)
            total = threat.length(d, processes)
            radii = d.clamp_max(share) if threat.is_pointwise else d * min(share / max(total, 1e-300), 1.0)
            for rows in chunks:
                if total > share:
                    shrink(moved[rows], radii[rows], d[rows], threat.norm)
                moved[rows].add_(x[rows]).clamp_(0, 1)
            return moved

        first, dropped = [move(x, clean.gradient)], (~clean.finite).sum()
        del clean  # it is as large as the set; so is the first iterate, which is handed over
        z, loss_mean = self._ascend(network, first.pop(), y, target, move, context)
        return Moved(z, None, share, loss_mean, norms, dropped)
