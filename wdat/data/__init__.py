"""Data: where images come from, how they are split, and which make up which batch."""

from wdat.data.augment import Augment, Draws, crop_and_flip
from wdat.data.crops import CenterCrop, RandomCrop
from wdat.data.files import Files, FileSet
from wdat.data.images import ImageSet, LabelledImages
from wdat.data.loading import PlannedLoader, ResumableLoader
from wdat.data.module import ImageDataModule
from wdat.data.pool import Synthetic, SyntheticPool
from wdat.data.sampling import BatchPlan, ShardPlan, TrainPlan
from wdat.data.sources import SOURCES, Where, cifar10, cifar100, digits, folder, imagenet, npz
from wdat.data.splits import Splits, hold_out

__all__ = [
    "SOURCES",
    "Augment",
    "BatchPlan",
    "CenterCrop",
    "Draws",
    "FileSet",
    "Files",
    "ImageDataModule",
    "ImageSet",
    "LabelledImages",
    "PlannedLoader",
    "RandomCrop",
    "ResumableLoader",
    "ShardPlan",
    "Splits",
    "Synthetic",
    "SyntheticPool",
    "TrainPlan",
    "Where",
    "cifar10",
    "cifar100",
    "crop_and_flip",
    "digits",
    "folder",
    "hold_out",
    "imagenet",
    "npz",
]
