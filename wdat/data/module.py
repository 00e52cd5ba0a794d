"""The data of a run, as Lightning wants them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch import Tensor

from wdat import seeding
from wdat.batch import Batch
from wdat.data.augment import Augment
from wdat.data.images import ImageSet
from wdat.data.loading import PlannedLoader, ResumableLoader
from wdat.data.pool import Synthetic, SyntheticPool
from wdat.data.sampling import BatchPlan, ShardPlan, TrainPlan, synthetic_places
from wdat.data.sources import SOURCES, fetch
from wdat.data.splits import check_labels, hold_out
from wdat.errors import SettingError, unknown


class ImageDataModule(LightningDataModule):
    """Training, validation and test images, all in memory, and perhaps synthetic images to train on besides.

    Validation images are set aside from the training set, by class; the test set is never touched. Only training
    images are augmented. What is drawn depends on the seed, the step and the place in the global batch, never on the
    number of processes.

    Args:
        source: A name in `SOURCES`.
        num_classes: Number of classes.
        root: The folder for downloaded sources.
        path: The file for `source="npz"`.
        download: Whether missing files may be downloaded.
        batch_size: Images in a training step, over all processes.
        eval_batch_size: The most images one process evaluates at once.
        val_size: Number of validation images, or, below 1, their fraction of the training set.
        on_device: Whether the images are kept, as uint8, on the device that trains; on a GPU a step then waits for
            no copy. False where they don't fit beside the network.
        crop: Pixels by which training images are moved at random; 0 for none.
        flip: Whether training images are flipped left to right at random.
        limit_train: Keeps the first N training images, after validation images are set aside; None for all.
        limit_val: The same for validation.
        limit_test: The same for the test set, in the order of the source.
        synthetic: A pool of further training images: the fields of `Synthetic`; None, or without a path, for none.
        seed: The seed of the run: the split, the order and the augmentation.

    Attributes:
        pool: The pool, from `setup` on; None without one.

    Raises:
        SettingError: A setting is out of range.
    """

    def __init__(
        self,
        source: str,
        num_classes: int,
        root: str | Path = "data",
        path: str | Path | None = None,
        download: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        val_size: int | float = 1024,
        on_device: bool = True,
        crop: int = 4,
        flip: bool = True,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
        synthetic: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if source not in SOURCES:
            raise unknown("data source", source, SOURCES, "data.source")
        self.source = source
        self.root = root
        self.path = path
        self.download = download
        self.num_classes = _count("num_classes", num_classes, 2)
        self.batch_size = _count("batch_size", batch_size)
        self.eval_batch_size = _count("eval_batch_size", eval_batch_size)
        self.val_size = val_size if 0 < val_size < 1 else _val_count(val_size)
        self.on_device = on_device
        self.augment = Augment(_count("crop", crop, 0), flip)
        limits = {"train": limit_train, "val": limit_val, "test": limit_test}
        self.limits = {k: None if n is None else _count(f"limit_{k}", n, 1, "null") for k, n in limits.items()}
        self.seed = _count("seed", seed, 0)
        self.synthetic = Synthetic(**synthetic or {})
        self.pool: SyntheticPool | None = None
        self._sets: dict[str, ImageSet] = {}
        self._share = (0, 1)

    def share(self, rank: int, world: int) -> None:
        """Divide evaluation over processes that no trainer manages.

        Args:
            rank: This process's number, from 0.
            world: Number of processes.
        """
        self._share = (rank, world)

    def prepare_data(self) -> None:
        """Downloads what is missing; Lightning calls this on one process of each machine."""
        fetch(self.source, self.root, self.download)

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and splits the images, once for all stages.

        Raises:
            SettingError: The source or the pool can't be read, their labels aren't classes, validation leaves nothing
                to train on, or a batch has no room for both originals and synthetic images.
        """
        if self._sets:
            return
        data = SOURCES[self.source](self.root, self.path, False)
        check_labels(data, self.num_classes)
        count = self._val_images(len(data.y_train))
        kept, held = hold_out(data.y_train, count, seeding.generator(self.seed, "split"))
        kept, held = kept[: self.limits["train"]], held[: self.limits["val"]]
        first = slice(self.limits["test"])
        if self.synthetic.path is not None:
            synthetic_places(min(self.batch_size, len(kept)), self.synthetic.fraction)
            channels, height, width = data.x_train.shape[1:]
            self.pool = SyntheticPool(self.synthetic.path, (channels, height, width), self.num_classes)
        self._sets = {
            "train": ImageSet(data.x_train[kept], data.y_train[kept], self.augment, self.seed, self.pool),
            "val": ImageSet(data.x_train[held], data.y_train[held]),
            "test": ImageSet(data.x_test[first], data.y_test[first]),
        }

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, augmented batches of `batch_size` over all processes."""
        images, drawn = self._placed("train"), len(self.pool) if self.pool else 0
        plan = TrainPlan(len(images), self.batch_size, self.seed, *self._process(), drawn, self.synthetic.fraction)
        return ResumableLoader(images, plan)

    def val_dataloader(self) -> PlannedLoader:
        """Every validation image once, as it is."""
        return self._evaluation("val")

    def test_dataloader(self) -> PlannedLoader:
        """Every test image once, as it is."""
        return self._evaluation("test")

    def train_batches(self, index: Tensor, step: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Training images outside the course of training, augmented as in training.

        The augmentation is a function of the seed, `step` and the position in `index`, so that processes which share
        a pass see together what one process would. In a batch, `place` is that position and `size` the length of
        `index`.

        Args:
            index: (M,), int64: rows of the training split; row r of the pool is `n_train` + r.
            step: The number that fixes the draws.
            rank: This process's number; it takes positions rank, rank + world, ….
            world: Number of processes that share the pass.

        Yields:
            Batches of at most `eval_batch_size` images.
        """
        images, index = self._placed("train"), index.cpu()
        draws = self.augment.draw(len(index), seeding.generator(self.seed, "pass", step))
        for shard in ShardPlan(len(index), self.eval_batch_size, rank, world):
            place = shard.index
            yield images.read(BatchPlan(index[place], place, len(index), step, 0), draws)

    def images(self, split: str) -> ImageSet:
        """The images of `train`, `val` or `test`.

        Raises:
            RuntimeError: Before `setup`.
        """
        if not self._sets:
            raise RuntimeError("no images yet: call prepare_data() and setup() first")
        return self._sets[split]

    @property
    def pool_share(self) -> float:
        """The pool's share of a batch, f but for rounding; 0 without one."""
        if self.pool is None:
            return 0.0
        return float(synthetic_places(min(self.batch_size, self.n_train), self.synthetic.fraction).float().mean())

    @property
    def n_train(self) -> int:
        """Number of training images, without the pool's."""
        return len(self.images("train"))

    @property
    def splits(self) -> dict[str, int]:
        """Number of images in each split."""
        return {split: len(self.images(split)) for split in ("train", "val", "test")}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.images("train").images.shape[1:]
        return channels, height, width

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the data in records: the source, with the file's for `npz`, and the share of a pool."""
        name = self.source if self.path is None or self.source != "npz" else f"npz:{Path(self.path).stem}"
        pool = self.synthetic
        return name if pool.path is None else f"{name} with {pool.fraction:g} of {Path(pool.path).stem}"

    def _val_images(self, n: int) -> int:
        count = round(self.val_size * n) if self.val_size < 1 else int(self.val_size)
        if not 0 < count < n:
            fault = "leaves no validation image" if count < 1 else "leaves no image to train on"
            raise SettingError(f"data.val_size={self.val_size} of {n} training images {fault}: set 1 to {n - 1}")
        return count

    def _evaluation(self, split: str) -> PlannedLoader:
        images = self._placed(split)
        return PlannedLoader(images, ShardPlan(len(images), self.eval_batch_size, *self._process()))

    def _placed(self, split: str) -> ImageSet:
        """The images of a split, moved once to the device of the run."""
        images = self.images(split)
        if self.on_device and self.trainer:
            self._sets[split] = images = images.to(self.trainer.strategy.root_device)
        return images

    def _process(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else self._share


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
