"""Running attacks over a whole set of images: one set, one budget, one record an attack."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from wdat.attacks import ATTACKS, Attack, Context, build
from wdat.attacks.base import NONFINITE, check_images
from wdat.distributed import ALONE, Processes, together
from wdat.errors import SettingError, unknown
from wdat.evaluation.bars import Bars
from wdat.evaluation.batches import batches_of, members
from wdat.evaluation.details import examples, histogram
from wdat.evaluation.results import Results
from wdat.evaluation.statistics import bootstrap_interval, masking_warning
from wdat.gradients import device_of, gradient_parts, ordinary, undisturbed
from wdat.inputs import as_network, check_figures, classes_of
from wdat.losses import check_classes, correct, get_label_loss, nonfinite
from wdat.precision import describe, float32
from wdat.records import Facts, Record
from wdat.threat import ThreatModel, dual_norm, parse_budget, power_mean

Progress = Callable[[str, int, int], None]

ZERO_ONE = "0-1"  # the loss of attacks that count errors


@dataclass(frozen=True)
class ImageTensors:
    """A whole evaluation set, or this process's part of it, in memory.

    Attributes:
        x: Images (N, C, H, W) in [0, 1], on the network's device, or on the host: then they go to it pass by pass.
        y: Labels (N,).
        index: (N,), their rows in the split, which give the order of a set that processes share; None puts the images
            of the first process first.
    """

    x: Tensor
    y: Tensor
    index: Tensor | None = None

    @classmethod
    def collect(cls, batches: Iterable[Any], device: torch.device) -> ImageTensors:
        """Gather images and labels of every batch, and the rows where it knows them.

        Raises:
            SettingError: If there is no batch at all, as a process without images has an empty one, or a batch isn't
                images and labels.
        """
        return cls.join((members(batch) for batch in batches), device)

    @classmethod
    def join(cls, parts: Iterable[tuple[Tensor, ...]], device: torch.device) -> ImageTensors:
        """One set of several parts: images, labels and, where all have them, the rows; raises as `collect`."""
        kept = [ordinary(*part) for part in parts]
        if not kept:
            raise SettingError("the set of images to attack is empty; check data.limit_test and data.val_size")
        shapes = {tuple(x.shape[1:]) for x, *_ in kept if len(x)}
        if len(shapes) > 1:
            sizes = ", ".join("×".join(map(str, shape)) for shape in sorted(shapes))
            raise SettingError(f"the batches have images of several sizes ({sizes}): bring them to one")
        columns = [list(column) for column in zip(*kept, strict=True)]
        del kept
        home = place(sum(x.numel() * x.element_size() for x in columns[0]), device)
        return cls(*(_joined(column, home) for column in columns))


SETS = 5
"""Tensors as large as the set that an attack may hold, with the images, and one as room for a pass of a batch."""


def place(size: int, device: torch.device) -> torch.device:
    """Where a set of so many bytes is to be: on the device, or on the host if the device has no room to attack it.

    Args:
        size: Bytes of the images as they will be attacked.
        device: Where the network is.
    """
    if device.type != "cuda":
        return device
    free, whole = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, not in use
    if SETS * size <= free:
        return device
    warnings.warn(
        f"the images take {size / 1e9:.3g} GB, and attacks up to {SETS} times as much, of which the GPU has "
        f"{free / 1e9:.3g} GB free of {whole / 1e9:.3g}: they stay in the host's memory, which is slower; more devices "
        "(trainer.devices) or fewer images (data.limit_test) keep them on the GPU",
        stacklevel=3,
    )
    return torch.device("cpu")


def _joined(parts: list[Tensor], device: torch.device) -> Tensor:
    """The parts as one tensor on a device; each is let go once it is copied, so that a large set is held once."""
    whole = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]), device=device)
    parts.reverse()
    done = 0
    while parts:
        part = parts.pop()
        whole[done : done + len(part)] = part
        done += len(part)
    return whole


def positions(images: ImageTensors, processes: Processes) -> tuple[Tensor, int]:
    """Where this process's images stand in the whole set, (N,), and how many images that has.

    Raises:
        SettingError: If the set is empty, or an image is in it twice, as with samplers that make shards even.
    """
    n, device = len(images.y), images.y.device
    before = processes.gather(torch.tensor([n], device=device))
    size = int(before.sum())
    if size == 0:
        raise SettingError("the set of images to evaluate is empty; check data.limit_test and data.val_size")
    if processes.max(float(images.index is None)) or images.index is None:
        return int(before[: processes.rank].sum()) + torch.arange(n, device=device), size
    rows = processes.gather(images.index).sort().values
    if bool((rows[1:] == rows[:-1]).any()):
        raise SettingError(
            f"some of the {size} images to evaluate come twice: set trainer.use_distributed_sampler=false, or divide "
            "them with wdat.data.ShardPlan, which repeats none"
        )
    return torch.searchsorted(rows, images.index), size


@dataclass(frozen=True)
class Evaluator:
    """A network and a whole set of images, ready to be attacked; each call gives one record.

    Attributes:
        network: Takes images in [0, 1], gives logits (N, K).
        images: The set, or this process's part of it.
        batch_size: Images per pass.
        stage: What the records say of their stage.
        split: What they say of their split.
        epoch: What they say of the epochs trained.
        facts: What they say of network, data and seed.
        processes: The processes that hold the other parts of the set.
        progress: Called with a label, steps done and steps in all.
        pictures: Whether records carry examples and histograms.
        classes: Names of the classes, by label, for the examples.
        tf32: Whether products may use TF32, where the device has it: faster, and too coarse for exact verdicts.
        size: Images in the whole set, over all processes.
        rows: (N,), where this process's images stand in the whole set.

    Raises:
        SettingError: If an image or a label can't be used.
    """

    network: nn.Module
    images: ImageTensors
    batch_size: int = 512
    stage: str = "evaluate"
    split: str = "test"
    epoch: int | None = None
    facts: Facts = field(default_factory=Facts)
    processes: Processes = ALONE
    progress: Progress | None = None
    pictures: bool = False
    classes: Sequence[str] | None = None
    tf32: bool = False
    size: int = field(init=False)
    rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        x, y = ordinary(self.images.x, self.images.y)
        index = None if self.images.index is None else ordinary(self.images.index)[0]
        images = ImageTensors(x, y, index)
        with together(self.processes):
            check_images(self.network, images.x, images.y)
        rows, size = positions(images, self.processes)
        for name, value in {"images": images, "rows": rows, "size": size}.items():
            object.__setattr__(self, name, value)

    def record(self, hits: int, **values: Any) -> Record:
        """A record on this set, from the number of images classified correctly and what else is known."""
        low, high = bootstrap_interval(hits, self.size)
        device = device_of(self.network, self.images.x)
        about: dict[str, Any] = {
            "stage": self.stage, "split": self.split, "epoch": self.epoch, "device": str(device),
            "n": self.size, "set_size": self.size, **asdict(self.facts),
            "accuracy": hits / self.size, "accuracy_low": low, "accuracy_high": high,
            "compute": describe(device, self.images.x.dtype, self.tf32),
        }  # fmt: skip
        return Record(**{**about, **values})

    def clean(self, threat: ThreatModel, loss: str) -> Record:
        """A, V(0), W(0) and Υ of one loss, from one forward and backward pass [B]."""
        started = time.perf_counter()
        x, y = self.images.x, self.images.y
        with undisturbed(self.network), float32(self.network, x, self.tf32):
            parts = gradient_parts(self.network, x, y, get_label_loss(loss, "losses"), self.batch_size)
            kept = [(dual_norm(part.gradient, threat.norm), part.loss, part.logits, part.finite) for part in parts]
        norms, values, logits, finite = map(torch.cat, zip(*kept, strict=True))
        wrong, values = ~correct(logits, y), values.double()
        totals = [float(wrong.sum()), float(values.sum()), float(values[wrong].sum()), float((~finite).sum())]
        misses, total, total_wrong, dropped, broken = self.processes.sum([*totals, float(nonfinite(logits))])
        if broken:
            warnings.warn(NONFINITE.format("clean", int(broken), self.size), stacklevel=2)
        return self.record(
            hits=self.size - int(misses),
            attack="none",
            options={},
            loss=loss,
            p=threat.p,
            norm=threat.norm,
            delta=0.0,
            loss_mean=total / self.size,
            distance=0.0,
            seconds=time.perf_counter() - started,
            upsilon=power_mean(norms, threat.q, self.processes),
            loss_misclassified=total_wrong / misses if misses else None,
            dropped=int(dropped),
            nonfinite=int(broken),
        )

    def check(self, attacks: Sequence[Attack], threats: Sequence[ThreatModel], losses: Sequence[str] = ()) -> None:
        """Refuse, before any work, what an attack, a budget or a loss can't do with this network and these images.

        Raises:
            SettingError: As `Attack.check`, on all processes.
        """
        with together(self.processes):
            if len(self.images.y):
                shape, classes = self.images.x.shape[1:], classes_of(self.network, self.images.x)
                for loss in losses:
                    check_classes(loss, classes)
                for threat in threats:
                    threat.check(shape)
                    for attack in attacks:
                        attack.check(shape, classes, threat)
                check_figures(self.network, self.images.x)

    def prepared(self, attack: Attack, threats: Sequence[ThreatModel]) -> tuple[Attack, float]:
        """The attack with what it finds once for these budgets, and the seconds that this took."""
        started = time.perf_counter()
        if len(threats) > 1:
            attack = attack.prepared(self.network, self.images.x, self.images.y, threats, self._context(attack))
        return attack, time.perf_counter() - started

    def _context(self, attack: Attack, label: str | None = None) -> Context:
        progress = partial(self.progress, label or attack.name) if self.progress else None
        return Context(processes=self.processes, index=self.rows, progress=progress, tf32=self.tf32)

    def attacked(self, attack: Attack, threat: ThreatModel, spent: float = 0.0, pictures: bool = True) -> Record:
        """Accuracy under one attack, verified.

        Args:
            attack: The attack.
            threat: Its budget.
            spent: Seconds that were needed before, to prepare it.
            pictures: False for none in this record, whatever this evaluator's are.
        """
        started = time.perf_counter() - spent
        options = settings(attack)
        loss = str(options.pop("loss", ZERO_ONE))
        context = self._context(attack, f"{attack.name} {loss}")
        result = attack(self.network, self.images.x, self.images.y, threat, context)
        values: dict[str, Any] = {
            "attack": attack.name, "options": options, "loss": loss, "norm": threat.norm,
            "p": result.threat.p, "delta": result.threat.delta,
            "loss_mean": result.loss_mean, "distance": result.distance or 0.0, "dropped": result.dropped,
            "nonfinite": result.nonfinite,
        }  # fmt: skip
        details = dict(result.details)
        if "accuracy" in details:  # the optimum, whose last image is attacked fractionally
            details["materialised"] = {"accuracy": result.accuracy, "distance": result.distance}
            values |= _taken(details)
        if self.pictures and pictures:
            images, shared = (self.images.x, self.images.y), (self.rows, self.processes)
            details["histogram"] = histogram(result.distances, processes=self.processes)
            with float32(self.network, self.images.x, self.tf32):
                details["examples"] = examples(self.network, *images, result, *shared, self.classes)
        seconds = time.perf_counter() - started
        return self.record(hits=round((result.accuracy or 0.0) * self.size), **values, seconds=seconds, details=details)

    def bounded(self, name: str, options: dict[str, Any], threat: ThreatModel, details: dict[str, Any]) -> Record:
        """A record of figures that were not attacked for, such as a bound from certified radii."""
        about = {"attack": name, "options": options, "loss": ZERO_ONE, "p": threat.p, "norm": threat.norm}
        values = {**about, "delta": threat.delta, "loss_mean": None, "seconds": 0.0, **_taken(details)}
        return self.record(hits=0, **values, details=details)


def _taken(details: dict[str, Any]) -> dict[str, Any]:
    """Take out of the details what has a field of its own in a record."""
    return {k: details.pop(k) for k in ("accuracy", "accuracy_low", "accuracy_high", "distance")}


def warn_of_masking(records: Sequence[Record]) -> None:
    """Say where gradients have misled the search behind the knapsack, as `masking_warning` finds it."""
    said = masking_warning(records)
    if said:
        warnings.warn(said, stacklevel=3)


def settings(attack: Attack) -> dict[str, Any]:
    """The options of an attack, as its record states them."""
    return {f.name: getattr(attack, f.name) for f in fields(attack) if f.repr}


def plan(
    attacks: Sequence[Any] | str | Attack | None,
    losses: Sequence[str] | str,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 512,
) -> list[Attack]:
    """The attacks to run: one for each name and loss, one for each name that ascends no loss, and those made already.

    A single attack or loss is as good as a list of one.

    Raises:
        SettingError: If a name or an option can't be used.
    """
    attacks = [attacks] if isinstance(attacks, (str, Attack, type)) else attacks or ()
    losses = [losses] if isinstance(losses, str) else losses
    for loss in losses:
        get_label_loss(loss, "losses")
    for name in options or {}:
        if name not in ATTACKS:
            raise unknown("attack", name, ATTACKS, f"attack_options.{name}")
    built: list[Attack] = []
    for attack in attacks:
        if isinstance(attack, Attack):
            built.append(attack)
            continue
        if not isinstance(attack, str):
            name = getattr(attack, "__name__", type(attack).__name__)
            raise SettingError(
                f"attacks has {name}, neither a name nor an attack: give {name}(...) or one of its names"
            )
        given = {"batch_size": batch_size, **(options or {}).get(attack, {})}
        kind = ATTACKS.get(attack)
        ascends = kind is None or any(f.name == "loss" for f in fields(kind))
        try:
            if ascends:
                built += [build(attack, **{"loss": loss, **given}) for loss in losses]
            else:
                built.append(build(attack, **given))
        except SettingError as error:
            raise SettingError(re.sub(r"\battack\.", f"attack_options.{attack}.", str(error))) from error
    return built


def evaluate(
    network: nn.Module | Callable[[Tensor], Tensor],
    loader: Iterable[Any] | Dataset[Any] | ImageTensors,
    threat: ThreatModel,
    attacks: Sequence[str | Attack] | str | Attack | None = ("pgd", "wpgd"),
    *,
    losses: Sequence[str] | str = ("ce",),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    deltas: Sequence[float | str] = (),
    batch_size: int = 512,
    stage: str = "evaluate",
    split: str = "test",
    epoch: int | None = None,
    facts: Facts | None = None,
    processes: Processes = ALONE,
    progress: Progress | bool = False,
    pictures: bool = False,
    classes: Sequence[str] | None = None,
    tf32: bool = False,
) -> Results:
    """Clean accuracy and accuracy under attacks that share one budget over the whole set.

    Always in the precision of the images (IEEE float32, not TF32), in eval mode; the network is left as it was found.

    Args:
        network: Any module or function that takes images in [0, 1] and gives logits (N, K).
        loader: Batches of images (N, C, H, W) and labels (N,), as pairs or as dicts, in tensors or NumPy arrays; a data
            set of single images; or the pair of tensors itself.
        threat: Order, norm and budget.
        attacks: Names, or attacks made with `wdat.attacks.build`, or a single one; pointwise ones run at p = inf.
        losses: For each, one clean record (V(0), W(0), Υ) and one run of every attack given by name.
        options: Settings per attack name, such as `{"wpgd": {"steps": 100}}`.
        deltas: Further budgets for every attack; the knapsack searches once for all of them.
        batch_size: Images per pass; it doesn't change which images share the budget.
        stage: What the records say of their stage.
        split: What they say of their split.
        epoch: What they say of the epochs trained.
        facts: What they say of network, data and seed.
        processes: The processes that hold the other parts of the set.
        progress: True for a bar in a notebook or terminal; or what is called with a label, steps done, steps in all.
        pictures: Whether records of the threat's own budget carry examples and histograms.
        classes: Names of the classes, by label, for the examples.
        tf32: Whether products may use TF32, where the device has it; records tell.

    Returns:
        Clean records, one a loss, then one record for each budget, attack and loss: a list that prints as a table and
        has `to_frame()` and `plot()`.

    Raises:
        SettingError: If the set is empty, or a name, option or image can't be used.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> loader = [(torch.rand(8, 3, 2, 2), torch.arange(8) % 3)]
        >>> records = evaluate(network, loader, ThreatModel(2, "linf", "8/255"), ["wpgd"])
        >>> [r.attack for r in records]
        ['none', 'wpgd']
    """
    if not isinstance(threat, ThreatModel):
        raise SettingError(f"threat={threat!r} is no threat: give wdat.ThreatModel(p=2, norm='linf', delta='8/255')")
    network, losses = as_network(network), [losses] if isinstance(losses, str) else losses
    built = plan(attacks, losses, options, batch_size)
    tensors = loader
    if not isinstance(tensors, ImageTensors):
        tensors = ImageTensors.collect(batches_of(loader, batch_size), device_of(network, torch.empty(0)))
    show = (Bars() if progress else None) if isinstance(progress, bool) else progress
    about = (stage, split, epoch, facts or Facts(), processes, show, pictures, classes, tf32)
    evaluator = Evaluator(network, tensors, batch_size, *about)
    threats = [threat, *(replace(threat, delta=parse_budget(delta, "deltas")) for delta in deltas)]
    evaluator.check(built, threats, losses)
    records = [evaluator.clean(threat, loss) for loss in losses]
    ready = [evaluator.prepared(attack, threats) for attack in built]
    for own in threats:
        first = own is threat
        records += [evaluator.attacked(attack, own, spent * first, first) for attack, spent in ready]
    warn_of_masking(records)
    return Results(records)
