"""Photographs in class folders: labels and order, what evaluation and training see, on any number of workers."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from witness import fit

from wdat.data import FileSet, ImageDataModule
from wdat.errors import SettingError

CONF = Path(__file__).parents[2] / "conf"
CLASSES = ("n01440764", "n01443537", "n02102040", "n03000684")
source = importlib.import_module("wdat.data.imagenet")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photographs of many sizes, one grey, 6 a class for training and 3 for the test, and files that are none."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 3)):
        for name in CLASSES:
            position = folder / split / name
            position.mkdir(parents=True)
            (position / "notes.txt").write_text("no image")
            for k in range(each):
                height, width = rng.integers(30, 60, 2)
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                ending = ("JPEG", "jpg", "png")[k % 3]
                Image.fromarray(pixels[..., 0] if (name, k) == (CLASSES[1], 2) else pixels).save(
                    position / f"{k}.{ending}"
                )
    (folder / "train" / CLASSES[0] / "more").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "train" / CLASSES[0] / "more" / "0.PNG")
    return folder


def make(root, **settings):
    given = {"preprocessing": "Res36Crop32", "crop": 0, "batch_size": 8, "eval_batch_size": 4, "val_size": 4}
    data = ImageDataModule("imagenet", 4, root, **{**given, **settings})
    data.prepare_data()
    data.setup()
    return data


def whole(loader):
    batches = list(loader)
    return torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])


def test_files_and_labels_are_torchvisions(root):
    data = source.imagenet(root)
    for files, labels, split in ((data.x_train, data.y_train, "train"), (data.x_test, data.y_test, "val")):
        theirs = ImageFolder(str(root / split))
        assert data.classes == tuple(theirs.classes)
        assert [(str(files.folder / n.decode()), y) for n, y in zip(files.names, labels.tolist(), strict=True)] == (
            theirs.samples
        )


def test_evaluation_sees_what_torchvision_shows(root):
    shape = transforms.Compose([transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()])
    theirs = ImageFolder(str(root / "val"), shape)
    data = make(root)
    x, y = whole(data.test_dataloader())
    assert torch.equal(x, torch.stack([image for image, _ in theirs]))
    assert y.tolist() == theirs.targets
    assert data.image_shape == (3, 32, 32)
    assert data.splits == {"train": 21, "val": 4, "test": 12}
    assert data.name == "imagenet:Res36Crop32"


def test_validation_is_taken_from_the_training_folder_by_class(root):
    data = make(root)
    names = {split: data.images(split).files.names.tolist() for split in ("train", "val")}
    assert sorted(names["train"] + names["val"]) == sorted(source.imagenet(root).x_train.names.tolist())
    assert data.images("val").labels.sort().values.tolist() == [0, 1, 2, 3]
    again, other = make(root), make(root, seed=1)
    assert again.images("val").files.names.tolist() == names["val"] != other.images("val").files.names.tolist()
    assert data.images("val").files.folder == root / "train"


def test_the_leaderboards_images_come_first_in_its_order(root, monkeypatch):
    first = [f"{CLASSES[2]}/1.jpg", f"{CLASSES[0]}/2.png", f"{CLASSES[2]}/0.JPEG"]
    plain = source.imagenet(root)
    monkeypatch.setattr(source, "_leaderboard", lambda: first)
    data = source.imagenet(root)
    names = [name.decode() for name in data.x_test.names]
    assert names[:3] == first
    assert names[3:] == [n.decode() for n in plain.x_test.names if n.decode() not in first]
    assert data.y_test.tolist() == [CLASSES.index(name.split("/")[0]) for name in names]
    monkeypatch.setattr(source, "_leaderboard", lambda: [*first, "n09999999/0.JPEG"])
    assert source.imagenet(root).x_test.names.tolist() == plain.x_test.names.tolist(), "not all of them are there"


def test_the_leaderboards_list_is_robustbenchs():
    names = source._leaderboard()
    assert len(set(names)) == len(names) == 5000
    assert all(re.fullmatch(r"n\d{8}/ILSVRC2012_val_\d{8}\.JPEG", name) for name in names)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(root, workers):
    one, many = make(root), make(root, workers=workers)
    index = torch.tensor([5, 0, 3, 3, 11, 7])
    for a, b in (
        (one.train_dataloader(), many.train_dataloader()),
        (one.test_dataloader(), many.test_dataloader()),
        (one.train_batches(index, 2), many.train_batches(index, 2)),
    ):
        pairs = list(zip(a, b, strict=True))
        assert len(pairs) >= 2
        for left, right in pairs:
            assert left.synthetic is right.synthetic is None
            given = zip(left[:-1], right[:-1], strict=True)
            assert all(u is v is None or torch.equal(torch.as_tensor(u), torch.as_tensor(v)) for u, v in given)
    assert many.train_dataloader().num_workers == workers


def test_workers_send_bytes_and_the_division_is_the_loaders(root):
    """A quarter of the bytes pass from process to process, and to the device."""
    loader = make(root).test_dataloader()
    raw = loader.dataset[next(iter(loader.sampler))]
    assert raw.x.dtype == torch.uint8
    batch = next(iter(loader))
    assert torch.equal(batch.x, raw.x.float() / 255)
    assert batch.x.dtype == torch.float32


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False), (None, False)])
def test_batches_for_a_gpu_come_from_pinned_memory(root, device, pinned):
    data = make(root, workers=1)
    if device:
        data.trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device(device)), global_rank=0, world_size=1, num_devices=1
        )
    assert data.train_dataloader().pin_memory is pinned
    assert data.test_dataloader().pin_memory is pinned
    assert data.train_dataloader().persistent_workers
    assert data.val_dataloader().persistent_workers
    assert not data.test_dataloader().persistent_workers, "one pass"


@pytest.mark.parametrize(("cpus", "devices", "workers"), [(8, 1, 8), (8, 4, 2), (2, 4, 1), (96, 1, 16)])
def test_workers_share_the_cpus_of_the_machine(root, monkeypatch, cpus, devices, workers):
    monkeypatch.setattr("wdat.data.module.cpus", lambda: cpus)
    data = make(root, workers=None)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=devices, num_devices=devices)
    assert data.train_dataloader().num_workers == workers
    assert make(root, workers=3).train_dataloader().num_workers == 3


def test_processes_see_what_one_sees(root):
    one, parts = make(root), [make(root), make(root)]
    for rank, data in enumerate(parts):
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )
    for left, *shares in zip(*(data.train_dataloader() for data in (one, *parts)), strict=True):
        assert torch.equal(torch.cat([share.x for share in shares]), left.x)
    index = torch.arange(9)
    alone, seen = torch.cat([b.x for b in one.train_batches(index, 1)]), torch.zeros(9, 3, 32, 32)
    for rank in (0, 1):
        for batch in one.train_batches(index, 1, rank, 2):
            seen[batch.position] = batch.x
    assert torch.equal(seen, alone)


def test_training_cuts_at_random_and_evaluation_does_not(root):
    data, plain = make(root), make(root, min_area=1, flip=False)
    index = torch.arange(21)
    crop, moved = (torch.cat([b.x for b in d.train_batches(index, 0)]) for d in (plain, data))
    assert (crop != moved).flatten(1).any(1).sum() >= 20
    assert not torch.equal(moved, torch.cat([b.x for b in data.train_batches(index, 1)]))
    files = data.images("train").files
    slow = transforms.Compose([transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()])
    assert torch.equal(crop, torch.stack([slow(files.open(row)) for row in range(21)]))


def test_a_fit_with_workers_resumes_where_it_stopped(root, tmp_path):
    """Workers draw batches ahead of training; the saved position is that of training."""
    saver = ModelCheckpoint(
        tmp_path / "kept", "{step}", save_top_k=-1, every_n_train_steps=1, auto_insert_metric_name=False
    )
    settings = {"workers": 2, "batch_size": 4}
    seen = fit(make(root, **settings), tmp_path, callbacks=[saver]).seen
    assert [step for step, *_ in seen] == list(range(10))
    for taken in (1, 4, 6):
        checkpoint = tmp_path / "kept" / f"{taken}.ckpt"
        rest = fit(make(root, **settings), tmp_path, 2, checkpoint, enable_checkpointing=False).seen
        assert [s[:2] for s in rest] == [s[:2] for s in seen[taken:]], taken
        assert all(torch.equal(a[2], b[2]) for a, b in zip(rest, seen[taken:], strict=True))


def test_a_limit_draws_by_class(root):
    data = make(root, limit_train=9, limit_val=4, limit_test=8)
    assert sorted(data.images("train").labels.bincount().tolist()) == [2, 2, 2, 3]
    assert data.images("val").labels.bincount().tolist() == [1, 1, 1, 1]
    assert data.images("test").labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_limit_of_the_lists_length_is_the_list_and_a_smaller_one_is_of_it(root, monkeypatch):
    first = [f"{CLASSES[2]}/1.jpg", f"{CLASSES[0]}/2.png", f"{CLASSES[2]}/0.JPEG"]
    monkeypatch.setattr(source, "_leaderboard", lambda: first)
    for limit in (3, 2):
        data = make(root, limit_test=limit)
        names = [name.decode() for name in data.images("test").files.names]
        assert len(names) == limit
        assert names == [name for name in first if name in names], "in its order"
    assert data.selection["test"] == "2 of 12, on RobustBench's list, drawn by class (seed 0)"
    assert make(root, limit_test=3).selection["test"] == "the 3 of 12 on RobustBench's list"
    assert make(root, limit_test=8).images("test").labels.unique().tolist() == [0, 1, 2, 3]


# --- what can't be used ---------------------------------------------------------------------------------------------


def test_a_root_without_training_images_serves_for_evaluation(root, tmp_path):
    (tmp_path / "val").symlink_to(root / "val")
    (tmp_path / "train").mkdir()  # not yet unpacked
    data = make(tmp_path)
    x, _ = whole(data.test_dataloader())
    assert torch.equal(x, whole(make(root).test_dataloader())[0])
    for use in (data.train_dataloader, data.val_dataloader, lambda: data.n_train, lambda: data.splits):
        with pytest.raises(SettingError, match=r"data\.root=.* has no training images \(train/\).*split=test"):
            use()


def folders(tmp_path, **content):
    for split, names in content.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            if split == "val" or name != "empty":
                Image.new("RGB", (40, 40)).save(tmp_path / split / name / "0.png")
    return tmp_path


@pytest.mark.parametrize(
    ("content", "fault", "remedy"),
    [
        ({}, "there is no folder", "set data.root to the folder that holds val/"),
        ({"train": "abcd"}, "there is no folder", "set data.root to the folder that holds val/"),
        ({"val": "."}, "val/ has no class folders", "sort its images into val/CLASS/"),
        (
            {"val": "abcd", "train": ["empty"]},
            "train/ has no images of the class empty",
            "put images into train/empty/ or remove it",
        ),
        (
            {"val": "abcd", "train": "abce"},
            "train/ and val/ have different classes (d only in val/, e only in train/)",
            "give both the same",
        ),
        ({"val": "abc"}, "the data have 3 classes (a, b, c), but data.num_classes=4", "set data.num_classes=3"),
    ],
)
def test_folders_that_are_no_imagenet(tmp_path, content, fault, remedy):
    with pytest.raises(SettingError) as caught:
        make(folders(tmp_path, **content))
    assert fault in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preprocessing": None}, r"doesn't say how it wants them cropped: set data\.preprocessing=Res256Crop224"),
        ({"preprocessing": "Big"}, r"data\.preprocessing=Big is unknown"),
        ({"crop": 4}, r"data\.crop=4 is for images of one size: set data\.min_area"),
        ({"min_area": 0}, r"data\.min_area=0: set data\.min_area to a share above 0"),
        ({"min_area": 1.5}, r"data\.min_area=1\.5"),
        ({"workers": -1}, r"data\.workers=-1: set data\.workers to a whole number from 0"),
    ],
)
def test_settings_that_do_not_fit(root, settings, message):
    with pytest.raises(SettingError, match=message):
        make(root, **settings)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff\xd8\xff\xe0 crop short"])
def test_a_damaged_image_is_named(tmp_path, workers, content):
    data = make(folders(tmp_path, val="abcd"), workers=workers)
    (tmp_path / "val" / "c" / "0.png").write_bytes(content)
    with pytest.raises(SettingError) as caught:
        whole(data.test_dataloader())
    assert str(caught.value).startswith(f"{tmp_path}/val/c/0.png can't be decoded (")
    assert str(caught.value).endswith("): replace or remove it (data.root)")


def test_images_are_cut_as_the_network_wants_them(root):
    data = make(root, preprocessing="Res40Crop24")
    assert data.image_shape == (3, 24, 24)
    assert isinstance(data.images("train"), FileSet)


def test_the_configuration_takes_the_leaderboards_images():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=["+data=imagenet", "+seed=0"]).data
    assert (config.num_classes, config.limit_test, config.preprocessing, config.crop) == (1000, 5000, None, 0)
