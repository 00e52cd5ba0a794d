"""Class folders: of small images, and what both kinds leave out or refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wdat.data import ImageDataModule, folder
from wdat.data.imagenet import imagenet
from wdat.errors import SettingError


def fill(base: Path, splits: tuple[str, ...] = ("train", "test"), classes: str = "ab", each: int = 5, side: int = 6):
    """Images whose pixels are all the number of the image; "" as a split puts the classes into the folder itself."""
    number = 0
    for split in splits:
        for name in classes:
            (base / split / name).mkdir(parents=True)
            for k in range(each):
                Image.fromarray(np.full((side, side, 3), number, np.uint8)).save(base / split / name / f"{k}.png")
                number += 1
    return base


def first_pixels(images) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_folders_of_the_splits(tmp_path):
    data = folder(fill(tmp_path))
    assert (data.x_train.dtype, data.x_train.shape, data.classes) == (torch.uint8, (10, 3, 6, 6), ("a", "b"))
    assert first_pixels(data.x_train) == list(range(10))
    assert first_pixels(data.x_test) == list(range(10, 20))
    assert data.y_train.tolist() == data.y_test.tolist() == [0] * 5 + [1] * 5
    assert data.x_val is None


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_images_of_its_own(tmp_path, name):
    fill(tmp_path, ("train", name, "test"))
    data = folder(tmp_path)
    assert first_pixels(data.x_val) == list(range(10, 20))
    assert first_pixels(data.x_test) == list(range(20, 30))
    module = ImageDataModule("folder", 2, tmp_path, val_size=1024)
    module.setup()
    assert module.splits == {"train": 10, "val": 10, "test": 10}
    assert module.name == f"folder:{tmp_path.name}"


def test_without_a_test_folder_val_is_the_test_set(tmp_path):
    fill(tmp_path, ("train", "val"))
    module = ImageDataModule("folder", 2, tmp_path, val_size=4, batch_size=4)
    module.setup()
    assert module.splits == {"train": 6, "val": 4, "test": 10}
    assert first_pixels(folder(tmp_path).x_test) == list(range(10, 20))
    assert len(list(module.train_dataloader())) == 1


def test_a_test_folder_alone_serves_for_evaluation(tmp_path):
    module = ImageDataModule("folder", 2, fill(tmp_path, ("test",)))
    module.setup()
    assert len(module.images("test")) == 10
    with pytest.raises(SettingError, match=r"data\.root=.* has no training images \(train/\)"):
        module.train_dataloader()


def test_without_folders_of_splits_a_share_is_set_aside_the_same_for_every_seed(tmp_path):
    fill(tmp_path, ("",), each=10)
    data = folder(tmp_path)
    assert data.y_test.bincount().tolist() == [2, 2]
    assert sorted(first_pixels(data.x_train) + first_pixels(data.x_test)) == list(range(20))
    tests = []
    for seed in (0, 5):
        module = ImageDataModule("folder", 2, tmp_path, val_size=4, seed=seed)
        module.setup()
        tests.append(first_pixels(module.images("test").images))
    assert tests[0] == tests[1] == first_pixels(data.x_test)
    assert folder(tmp_path, test_size=0.5).y_test.bincount().tolist() == [5, 5]


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, ("",), classes="")
    for name in ("car", "train"):
        (tmp_path / name).mkdir()
        for k in range(5):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{k}.png")
    assert folder(tmp_path).classes == ("car", "train")


def test_images_of_any_size_are_brought_to_one(tmp_path):
    fill(tmp_path)
    rng = np.random.default_rng(0)
    kept = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(kept).save(tmp_path / "train" / "a" / "0.png")
    Image.fromarray(rng.integers(0, 256, (9, 14, 3), dtype=np.uint8)).save(tmp_path / "test" / "b" / "0.png")
    with pytest.raises(SettingError, match=r"1\.png is 6×6 and others are 8×8: set data\.size=8"):
        folder(tmp_path)
    data = folder(tmp_path, size=8)
    assert data.x_train.shape == data.x_test.shape == (10, 3, 8, 8)
    assert np.array_equal(data.x_train[0].permute(1, 2, 0).numpy(), kept), "what has the size keeps its pixels"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "LA"])
def test_all_modes_become_colours(tmp_path, mode):
    fill(tmp_path)
    Image.new("RGB", (6, 6), (255, 255, 255)).convert(mode).save(tmp_path / "test" / "a" / "0.tiff")
    (tmp_path / "test" / "a" / "0.png").unlink()
    assert int(folder(tmp_path).x_test[0].min()) > 250


def test_sixteen_bits_are_not_cut(tmp_path):
    fill(tmp_path)
    values = np.linspace(0, 65535, 36).round().astype(np.uint16).reshape(6, 6)
    Image.fromarray(values).save(tmp_path / "test" / "a" / "0.png")
    read = folder(tmp_path).x_test[0]
    assert torch.equal(read[0], read[2])
    assert np.array_equal(read[0].numpy(), np.round(values / 65535 * 255).astype(np.uint8))
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "test" / "a" / "0.tiff")
    with pytest.raises(SettingError, match=r"0\.tiff has 32-bit pixels"):
        folder(tmp_path)


# --- what is left out or refused, by both kinds of class folders


def read_as_imagenet(root):
    return imagenet(root)


def hidden_in(base: Path, *splits: str) -> None:
    for split in splits:
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
            (base / split / name).mkdir()
            Image.new("RGB", (6, 6)).save(base / split / name / "0.png")
            (base / split / "a" / name).mkdir()
            Image.new("RGB", (6, 6)).save(base / split / "a" / name / "0.png")
        (base / split / "a" / "._0.png").write_bytes(b"no image")
        (base / split / "a" / ".DS_Store").write_bytes(b"")


@pytest.mark.parametrize("read", [folder, read_as_imagenet])
def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path, read):
    fill(tmp_path, ("train", "val"))
    before = read(tmp_path)
    hidden_in(tmp_path, "train", "val")
    (tmp_path / ".git").mkdir()
    after = read(tmp_path)
    assert after.classes == ("a", "b")
    assert torch.equal(before.y_train, after.y_train)
    assert torch.equal(before.y_test, after.y_test)


def test_hidden_folders_without_splits(tmp_path):
    fill(tmp_path, ("",))
    hidden_in(tmp_path, "")
    assert folder(tmp_path).classes == ("a", "b")
    assert len(folder(tmp_path).y_train) + len(folder(tmp_path).y_test) == 10


@pytest.mark.parametrize("read", [folder, read_as_imagenet])
@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_classes_are_named(tmp_path, read, split):
    fill(tmp_path, ("train", "val"))
    for name in ("train", "val"):
        (tmp_path / name / "cat").mkdir()
    other = "val" if split == "train" else "train"
    Image.new("RGB", (6, 6)).save(tmp_path / other / "cat" / "0.png")
    with pytest.raises(SettingError, match=rf"{split}/ has no images of the class cat; put images into {split}/cat/"):
        read(tmp_path)


@pytest.mark.parametrize("read", [folder, read_as_imagenet])
def test_classes_must_be_the_same_in_all_splits(tmp_path, read):
    fill(tmp_path, ("train",), "abc")
    fill(tmp_path, ("val",), "abd")
    with pytest.raises(SettingError, match=r"different classes \(c only in train/, d only in val/\)"):
        read(tmp_path)


def test_classes_must_be_the_same_in_validation_too(tmp_path):
    fill(tmp_path, ("train", "test"))
    fill(tmp_path, ("val",), "a")
    with pytest.raises(SettingError, match=r"train/ and val/ have different classes \(b only in train/\)"):
        folder(tmp_path)


@pytest.mark.parametrize(
    ("made", "root", "words"),
    [
        ([], None, r"set data\.root=FOLDER"),
        (["pets/train", "notes.txt/"], "pest", r"has no class folders \(.* holds notes\.txt/, pets/\): set data\.root"),
        ([], "", r"holds nothing"),
        (["x/deep"], "x/deep", "has no class folders"),
        (["train/a"], "", r"has train/ and neither test/ nor val/: add one, or set data\.root=.*train, of which"),
    ],
)
def test_a_folder_that_holds_no_classes_lists_what_is_there(tmp_path, made, root, words):
    for name in made:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(SettingError, match=words):
        folder(None if root is None else tmp_path / root)


def test_a_missing_folder_of_photographs_lists_what_is_there(tmp_path):
    fill(tmp_path, ("train", "test"))
    with pytest.raises(SettingError, match=r"there is no folder .*/val \(.* holds test/, train/\); set data\.root"):
        imagenet(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 0}, r"data\.size=0"),
        ({"size": 2.5}, r"data\.size=2\.5"),
        ({"test_size": 0}, r"data\.test_size=0"),
        ({"test_size": 3}, r"data\.test_size=3"),
        ({"test_size": 0.01}, r"data\.test_size=0\.01 of 10 images leaves none"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, words):
    with pytest.raises(SettingError, match=words):
        folder(fill(tmp_path, ("",)), **settings)


def test_the_number_of_classes_is_told(tmp_path):
    with pytest.raises(SettingError, match=r"the data have 2 classes \(a, b.* set data\.num_classes=2"):
        ImageDataModule("folder", 10, fill(tmp_path)).setup()


def test_one_class_is_told_to_be_none(tmp_path):
    with pytest.raises(SettingError, match=r"the data have one class, a: set data\.root to the folder that holds all"):
        ImageDataModule("folder", 10, fill(tmp_path, ("",), "a")).setup()
