"""An evaluation that may stop and go on: what is recorded is never computed again and never lost."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wdat.attacks import Attack, Context
from wdat.attacks.knapsack import Knapsack, certified_figures
from wdat.attacks.minimum_norm import NearestAdversarial
from wdat.certify import Certificate, Surroundings
from wdat.distributed import gather_to_rank_zero, together
from wdat.errors import SettingError
from wdat.evaluation import stored
from wdat.evaluation.evaluator import ZERO_ONE, Evaluator, settings
from wdat.records import Record, RecordFile
from wdat.threat import ThreatModel


class Session:
    """Records of one network on one set of images, in one folder.

    Where several processes share the set, all make the same calls. The records of the first one decide what is
    missing, and it alone touches the folder.

    Args:
        evaluator: The network and the images.
        results: Where records are and go; on processes other than the first, one without a file.
        folder: Where nearest adversarial points are kept between the attacks that need them.

    Raises:
        SettingError: If the folder has records of other weights under the same name.
    """

    def __init__(self, evaluator: Evaluator, results: RecordFile, folder: Path) -> None:
        self.evaluator, self.results, self.folder = evaluator, results, folder
        self._images = stored.digest(evaluator.images, evaluator.rows, evaluator.processes)[:16]
        self._done = {r.key for r in results.records}
        with together(evaluator.processes):
            if any(self._of_other_weights(r) for r in results.records):
                name = evaluator.facts.checkpoint or evaluator.facts.network
                raise SettingError(
                    f"{folder} holds an evaluation of other weights that {name} had then: name another folder "
                    "(hydra.run.dir)"
                )

    def clean(self, threat: ThreatModel, loss: str) -> None:
        """The clean record of one loss."""
        if self._missing("none", {}, loss, replace(threat, delta=0.0)):
            self._add(self.evaluator.clean(threat, loss))

    def attacked(self, attack: Attack, threat: ThreatModel) -> None:
        """The record of one attack at one budget."""
        started = time.perf_counter()  # the search of the knapsack's nearest counts where it is first needed
        own = attack.threat_of(threat)
        options = settings(attack)
        loss = str(options.pop("loss", ZERO_ONE))
        if not self._missing(attack.name, options, loss, own):
            return
        if isinstance(attack, Knapsack) and attack.nearest is None:
            attack = replace(attack, nearest=self._nearest(attack, own.norm, [own]))  # not kept: norms differ
        record = self.evaluator.attacked(attack, threat)
        self._add(replace(record, seconds=time.perf_counter() - started))

    def certified(self, radii: Tensor, source: str, threat: ThreatModel) -> None:
        """The lower bound from certified radii (N,), 0 where an image is misclassified."""
        if self._missing("certified", {"file": source}, ZERO_ONE, threat):
            self._add(self.evaluator.bounded("certified", {"file": source}, threat, certified_figures(radii, threat)))

    def certify(self, certificate: Certificate, threats: Sequence[ThreatModel], attacks: Sequence[Attack] = ()) -> None:
        """The lower bounds of a certificate at each threat; what a knapsack among the attacks has found helps.

        Args:
            certificate: How to certify.
            threats: All of one norm; they are certified together.
            attacks: Those of the evaluation.

        Raises:
            SettingError: If the threats or the network can't be certified.
        """
        evaluator = self.evaluator
        certificate.check(threats)
        name, options = certificate.network_name(evaluator.facts.network), certificate.options
        missing = [t for t in threats if self._missing("certified", options, ZERO_ONE, t, name)]
        if not missing:
            return
        images, report, norm = evaluator.images, evaluator.progress, threats[0].norm
        search = next((a for a in attacks if isinstance(a, Knapsack)), None) if certificate.by_distance else None
        nearest = None if search is None else search.nearest or self._nearest(search, norm, threats)
        surroundings = Surroundings(
            evaluator.rows, evaluator.processes, None if nearest is None else nearest.distances, self.folder,
            {"facts": str(evaluator.facts), "split": evaluator.split, "n": evaluator.size, "images": self._images},
            None if report is None else lambda k, n: report(f"certified by {certificate.name}", k, n),
        )  # fmt: skip
        started = time.perf_counter()
        found = certificate(evaluator.network, images.x, images.y, threats, surroundings)
        for threat in missing:
            record = evaluator.bounded("certified", options, threat, found.figures(threat))
            self._add(replace(record, network=name, seconds=time.perf_counter() - started))

    def save_distances(self, attacks: Sequence[Attack], norm: str) -> None:
        """Write `distances_NORM.npz`: the nearest-adversarial distance of each image, in the order of the set.

        The search goes on for the images that no budget asked for so far.
        """
        for attack in attacks:
            if isinstance(attack, Knapsack):
                self._save_distances(attack.nearest or self._nearest(attack, norm, []), norm)

    def _save_distances(self, nearest: NearestAdversarial, norm: str) -> None:
        rows, processes = self.evaluator.rows, self.evaluator.processes
        distances = gather_to_rank_zero(nearest.distances.double(), rows, processes)
        labels = gather_to_rank_zero(self.evaluator.images.y, rows, processes)
        with together(processes):
            if distances is not None and labels is not None:
                np.savez(self.folder / f"distances_{norm}.npz", distances=distances.numpy(), labels=labels.numpy())

    def _of_other_weights(self, record: Record) -> bool:
        facts = self.evaluator.facts
        named = (record.network, record.checkpoint) == (facts.network, facts.checkpoint)
        return named and None not in (record.weights, facts.weights) and record.weights != facts.weights

    def _missing(
        self, name: str, options: dict[str, Any], loss: str, threat: ThreatModel, network: str | None = None
    ) -> bool:
        wanted = self.evaluator.record(
            hits=0, attack=name, options=options, loss=loss, p=threat.p, norm=threat.norm, delta=threat.delta,
            loss_mean=None, distance=0.0, seconds=0.0,
        )  # fmt: skip
        wanted = replace(wanted, network=network or wanted.network)
        missing = float(self.evaluator.processes.rank == 0 and self._with_images(wanted).key not in self._done)
        return bool(self.evaluator.processes.max(missing))

    def _with_images(self, record: Record) -> Record:
        return replace(record, images=self._images)

    def _add(self, record: Record) -> None:
        record = self._with_images(record)
        with together(self.evaluator.processes):
            self.results.add([record])
        self._done.add(record.key)

    def _nearest(self, attack: Knapsack, norm: str, threats: Sequence[ThreatModel]) -> NearestAdversarial:
        """Nearest adversarial points that serve these budgets: those left in the folder, else searched and kept.

        Where those in the folder serve smaller budgets only, the search goes on for the images concerned.
        """
        evaluator = self.evaluator
        images, rows, processes, report = evaluator.images, evaluator.rows, evaluator.processes, evaluator.progress
        file = self.folder / f"nearest_{norm}.pt"
        about: dict[str, Any] = {"search": str(attack.search), "facts": str(evaluator.facts)}
        about |= {"split": evaluator.split, "n": evaluator.size, "images": self._images}
        found = stored.load(file, about, images.x, rows, processes)
        if found is not None and (
            all(found.serves(threat, processes) for threat in threats) if threats else math.isinf(found.reach)
        ):
            return found
        progress = None if report is None else lambda k, n: report(f"nearest adversarial points, {norm}", k, n)
        context = Context(processes=processes, index=rows, progress=progress)
        nearest = attack.find(evaluator.network, images.x, images.y, norm, context, threats=threats, previous=found)
        stored.save(file, about, nearest, rows, processes)
        return nearest


def read_radii(path: Path, n: int) -> Tensor:
    """Certified radii in pixel units, one an image in the order of the set; 0 where an image is misclassified.

    Args:
        path: A `.npy` file, or an `.npz` file with an array `radii`.
        n: Number of images.

    Raises:
        SettingError: If the file can't be read, or doesn't hold n numbers that aren't negative.
    """
    try:
        with path.open("rb") as file:  # numpy leaves the file open where it isn't one of its own
            loaded = np.load(file, allow_pickle=False)
            values = loaded if isinstance(loaded, np.ndarray) else loaded["radii"]
        if np.asarray(values).dtype.kind not in "fiu":
            raise TypeError(f"it holds {values.dtype}, not numbers")
        radii = torch.from_numpy(np.asarray(values, dtype=np.float64))
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise SettingError(f"certified={path} can't be read ({error}); give a .npy, or a .npz with `radii`") from error
    if radii.shape != (n,) or bool((radii < 0).any()) or bool(radii.isnan().any()):
        raise SettingError(
            f"certified={path} must hold {n} radii that aren't negative, one an image, in pixel units; "
            f"it holds an array of shape {tuple(radii.shape)}"
        )
    return radii
