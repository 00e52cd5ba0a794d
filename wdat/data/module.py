"""The data of a run, as Lightning wants them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, arange

from wdat import seeding
from wdat.data.augment import Augment
from wdat.data.batch import Batch
from wdat.data.crops import CenterCrop, RandomCrop
from wdat.data.files import Files, FileSet
from wdat.data.images import ImageSet, LabelledImages
from wdat.data.loading import Pass, PlannedLoader, ResumableLoader
from wdat.data.mixed import MixedSet
from wdat.data.patches import PatchedSet, Patches
from wdat.data.pool import Synthetic, SyntheticPool
from wdat.data.sampling import BatchPlan, ShardPlan, TrainPlan, synthetic_positions
from wdat.data.sources import SOURCES, Source, Where, fetch
from wdat.data.splits import by_class, check_labels, hold_out
from wdat.errors import SettingError, unknown

MOST_WORKERS = 16  # more decode no faster than one device takes


class ImageDataModule(LightningDataModule):
    """Training, validation and test images, in memory or read from files, perhaps with synthetic ones to train on.

    Validation images are set aside from the training set, by class; the test set is never touched. Only training
    images are augmented. What is drawn depends on the seed, the step and the position in the global batch, never on the
    number of processes or workers.

    Args:
        source: A name in `SOURCES`, or a function like them, of a `Where`.
        num_classes: Number of classes.
        root: The folder for downloaded sources, and of `source="imagenet"` and `source="folder"`.
        path: The file for `source="npz"`.
        download: Whether missing files may be downloaded.
        batch_size: Images in a training step, over all processes.
        eval_batch_size: The most images one process evaluates at once.
        val_size: Number of validation images, or, below 1, their fraction of the training set.
        on_device: Whether the images are kept, as uint8, on the device that trains; on a GPU a step then waits for
            no copy. False where they don't fit beside the network; those of an uncompressed archive then stay on the
            disk. Images in files always do.
        crop: Pixels by which training images are moved at random; 0 for none. For images of one size.
        flip: Whether training images are flipped left to right at random.
        preprocessing: How photographs are cropped to one size, such as `Res256Crop224`, or as
            `wdat.models.preprocessing` gives it for a network; other sources don't need it.
        size: Side in pixels to which images of `source="folder"` are resized; None where they are of one size.
        test_size: The share of `source="folder"` that is set aside as the test set where no folder is.
        min_area: The smallest share of an image in a file that a random training crop covers; 1 for no random crop.
        workers: Processes that read images in files, for each training process; 0 reads in that process, None takes
            one for each CPU, divided among the training processes of the machine.
        limit_train: Keeps N training images, drawn by class from the seed, after validation images are set aside; None
            for all.
        limit_val: The same for validation.
        limit_test: The same for the test set. Of a published list (ImageNet's of RobustBench) the whole list where N
            is its length, and images of the list where N is less.
        synthetic: A pool of further training images: the fields of `Synthetic`; None, or without a path, for none.
        seed: The seed of the run: the split, the order and the augmentation.
        augmentation: Of training images beside crops and flips: the fields of `Patches`; None for none.

    Attributes:
        pool: The pool, from `setup` on; None without one.

    Raises:
        SettingError: A setting is out of range.
    """

    def __init__(
        self,
        source: str | Source,
        num_classes: int,
        root: str | Path | None = "data",
        path: str | Path | None = None,
        download: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        val_size: int | float = 1024,
        on_device: bool = True,
        crop: int = 4,
        flip: bool = True,
        preprocessing: str | None = None,
        size: int | None = None,
        test_size: float = 0.2,
        min_area: float = 0.08,
        workers: int | None = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
        synthetic: Mapping[str, Any] | None = None,
        seed: int = 0,
        augmentation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(source, str) and source not in SOURCES:
            raise unknown("data source", source, SOURCES, "data.source")
        self._read: Source = SOURCES[source] if isinstance(source, str) else source
        self.source = source if isinstance(source, str) else getattr(source, "func", source).__name__
        self.root = root
        self.path = path
        self.where = Where(root, path, size, test_size)
        self.download = download
        self.num_classes = _count("num_classes", num_classes, 2)
        self.batch_size = _count("batch_size", batch_size)
        self.eval_batch_size = _count("eval_batch_size", eval_batch_size)
        self.val_size = val_size if 0 < val_size < 1 else _val_count(val_size)
        self.on_device = on_device
        self.augment = Augment(_count("crop", crop, 0), flip)
        self.preprocessing = preprocessing
        self.min_area = min_area
        if not 0 < min_area <= 1:
            raise SettingError(
                f"data.min_area={min_area}: set data.min_area to a share above 0, or 1 for no random crop"
            )
        self.workers = None if workers is None else _count("workers", workers, 0, "null")
        limits = {"train": limit_train, "val": limit_val, "test": limit_test}
        self.limits = {k: None if n is None else _count(f"limit_{k}", n, 1, "null") for k, n in limits.items()}
        self.seed = _count("seed", seed, 0)
        self.synthetic = Synthetic(**synthetic or {})
        self.patches = Patches(**augmentation or {})
        self.pool: SyntheticPool | None = None
        self._sets: dict[str, LabelledImages] = {}
        self._split = False
        self._selection: dict[str, str] = {}

    def prepare_data(self) -> None:
        """Downloads what is missing; Lightning calls this on one process of each machine."""
        fetch(self.source, self.root, self.download)

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and splits the images, once for all stages.

        A source without training images has a test set alone, and so has the stage "test", which no `val_size` suits
        better or worse.

        Raises:
            SettingError: The source or the pool can't be read, their labels aren't classes, validation leaves nothing
                to train on, or a batch has no room for both originals and synthetic images.
        """
        alone = stage == "test"
        if self._sets and (alone or self._split):
            return
        data = self._read(self.where)
        check_labels(data, self.num_classes)
        sets = {"test": self._set(data.x_test, data.y_test, arange(len(data.y_test)), "test", data.listed)}
        if not alone and data.x_val is not None and data.y_val is not None:
            sets["val"] = self._set(data.x_val, data.y_val, arange(len(data.y_val)), "val")
        if len(data.y_train) and not alone:
            kept = arange(len(data.y_train))
            if "val" not in sets:
                count = self._val_images(len(data.y_train))
                kept, held = hold_out(data.y_train, count, seeding.generator(self.seed, "split"))
                sets["val"] = self._set(data.x_train, data.y_train, held, "val")
            sets["train"] = self._set(data.x_train, data.y_train, kept, "train")
            if self.synthetic.path is not None:
                sets["train"] = self._mixed(sets["train"], self.synthetic.path)
            if self.patches.cutmix or self.patches.erasing:
                sets["train"] = PatchedSet(sets["train"], self.patches)
        self._sets, self._split = sets, not alone

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, augmented batches of `batch_size` over all processes."""
        images, drawn = self._on_device("train"), len(self.pool) if self.pool else 0
        plan = TrainPlan(len(images), self.batch_size, self.seed, *self._process(), drawn, self.synthetic.fraction)
        return ResumableLoader(images, plan, self._workers(images), self._device)

    def val_dataloader(self) -> PlannedLoader:
        """Every validation image once, as it is."""
        return self.evaluation_loader("val", *self._process(), again=True)

    def test_dataloader(self) -> PlannedLoader:
        """Every test image once, as it is."""
        return self.evaluation_loader("test", *self._process())

    def evaluation_loader(self, split: str, rank: int = 0, world_size: int = 1, again: bool = False) -> PlannedLoader:
        """Every image of a split once, as it is, divided over processes.

        Args:
            split: `train`, `val` or `test`.
            rank: This process's number, from 0.
            world_size: Number of processes.
            again: Whether there are several passes.
        """
        images = self._on_device(split)
        plan = ShardPlan(len(images), self.eval_batch_size, rank, world_size)
        return PlannedLoader(images, plan, self._workers(images), self._device, again)

    def train_batches(self, index: Tensor, step: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Training images outside the course of training, augmented as in training.

        The augmentation is a function of the seed, `step` and the position in `index`, so that processes which share
        a pass see together what one process would. In a batch, `position` is that position and `size` the length of
        `index`.

        Args:
            index: (M,), int64: rows of the training split; row r of the pool is `n_train` + r.
            step: The number that fixes the draws.
            rank: This process's number; it takes positions rank, rank + world_size, ….
            world_size: Number of processes that share the pass.

        Yields:
            Batches of at most `eval_batch_size` images.
        """
        images, index = self._on_device("train"), index.cpu()
        shards = [shard.index for shard in ShardPlan(len(index), self.eval_batch_size, rank, world_size)]
        plans = [BatchPlan(index[position], position, len(index), step, 0) for position in shards]
        workers = min(self._workers(images), len(plans))
        drawn = Pass(images, images.draw(len(index), "pass", step))
        yield from PlannedLoader(drawn, plans, workers, self._device)

    def images(self, split: str) -> LabelledImages:
        """The images of `train`, `val` or `test`.

        Raises:
            RuntimeError: Before `setup`.
            SettingError: The source has no training images, from which `train` and `val` are taken.
        """
        if not self._sets:
            raise RuntimeError("no images yet: call prepare_data() and setup() first")
        if split not in self._sets:
            where = f"data.path={self.path}" if self.source == "npz" else f"data.root={self.root}"
            kept = "x_train, y_train" if self.source == "npz" else "train/"
            raise SettingError(
                f"{where} has no training images ({kept}), from which those of split={split} are taken: add them, or "
                "evaluate with split=test"
            )
        return self._sets[split]

    @property
    def pool_share(self) -> float:
        """The pool's share of a batch, f but for rounding; 0 without one."""
        if self.pool is None:
            return 0.0
        return float(synthetic_positions(min(self.batch_size, self.n_train), self.synthetic.fraction).float().mean())

    @property
    def n_train(self) -> int:
        """Number of training images, without the pool's."""
        return len(self.images("train"))

    @property
    def splits(self) -> dict[str, int]:
        """Number of images in each split."""
        return {split: len(self.images(split)) for split in ("train", "val", "test")}

    @property
    def selection(self) -> dict[str, str]:
        """What each split is of, in words: `all 360`, or `32 of 360, drawn by class (seed 0)`."""
        self.images("test")
        return dict(self._selection)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.images("test").shape

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the data in records: the source, with the file of `npz`, the folder or the crop of `imagenet`.

        A pool isn't measured on and has no part in it.
        """
        about = {
            "npz": self.path and Path(self.path).stem,
            "folder": self.root and Path(self.root).resolve().name,
            "imagenet": self.preprocessing,
        }.get(self.source)
        return f"{self.source}:{about}" if about else self.source

    def _mixed(self, images: LabelledImages, path: str | Path) -> MixedSet:
        """Training images beside the pool."""
        if not isinstance(images, ImageSet):
            raise SettingError(
                f"data.synthetic.path={path}: a pool mixes with images of one size that fit in memory or lie in an npz "
                f"file, not with data={self.source}; set data.synthetic.path=null"
            )
        synthetic_positions(min(self.batch_size, len(images)), self.synthetic.fraction)
        self.pool = SyntheticPool(path, images.shape, self.num_classes)
        return MixedSet(images, self.pool)

    def _limited(self, labels: Tensor, rows: Tensor, split: str, listed: int) -> Tensor:
        """The rows that the limit of a split keeps, in their order; the first `listed` are a published list."""
        limit, n = self.limits[split], len(rows)
        if limit is None or limit >= n:
            self._selection[split] = f"all {n:,}"
            return rows
        if limit == listed:
            self._selection[split] = f"the {limit:,} of {n:,} on RobustBench's list"
            return rows[:limit]
        among = rows[:listed] if limit < listed else rows
        whole = f"{n:,}, on RobustBench's list" if limit < listed else f"{n:,}"
        self._selection[split] = f"{limit:,} of {whole}, drawn by class (seed {self.seed})"
        key = ("train", "val", "test").index(split)
        return among[by_class(labels[among], limit, seeding.generator(self.seed, "limit", key))]

    def _set(self, images: Tensor | Files, labels: Tensor, rows: Tensor, split: str, listed: int = 0) -> LabelledImages:
        """The split that keeps these rows, as far as its limit allows."""
        rows, train = self._limited(labels, rows, split, listed), split == "train"
        if not isinstance(images, Files):
            return ImageSet(images, labels[rows], self.augment if train else None, self.seed, rows)
        if self.augment.padding:
            raise SettingError(f"data.crop={self.augment.padding} is for images of one size: set data.min_area instead")
        if self.preprocessing is None:
            raise SettingError(
                f"data={self.source} has images of many sizes, and this network doesn't say how it wants them "
                "cropped: set data.preprocessing=Res256Crop224 (shorter side to 256, central 224×224) or the like"
            )
        crop = CenterCrop.named(self.preprocessing)
        augment = RandomCrop(crop, self.min_area, self.augment.flip) if train else None
        return FileSet(images[rows], labels[rows], crop, augment, self.seed)

    def _val_images(self, n: int) -> int:
        count = round(self.val_size * n) if self.val_size < 1 else int(self.val_size)
        if not 0 < count < n:
            fault = "leaves no validation image" if count < 1 else "leaves no image to train on"
            raise SettingError(f"data.val_size={self.val_size} of {n} training images {fault}: set 1 to {n - 1}")
        return count

    def _workers(self, images: LabelledImages) -> int:
        """Reading from memory needs no processes."""
        if not images.in_files or self.workers is not None:
            return (self.workers or 0) if images.in_files else 0
        return min(max(cpus() // (self.trainer.num_devices if self.trainer else 1), 1), MOST_WORKERS)

    @property
    def _device(self) -> torch.device | None:
        return self.trainer.strategy.root_device if self.trainer else None

    def _on_device(self, split: str) -> LabelledImages:
        """The images of a split, moved once to the device of the run."""
        images = self.images(split)
        if self.on_device and self._device is not None:
            self._sets[split] = images = images.to(self._device)
        return images

    def _process(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(name: str, value: object, least: int = 1, none: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        remedy = f"a whole number from {least}" + (f", or {none} for all" if none else "")
        raise SettingError(f"data.{name}={value}: set data.{name} to {remedy}")
    return value


def _val_count(value: float) -> int:
    try:
        return _count("val_size", value)
    except SettingError:
        remedy = "a whole number of images from 1, or a fraction between 0 and 1"
        raise SettingError(f"data.val_size={value} leaves no validation split: set data.val_size to {remedy}") from None
