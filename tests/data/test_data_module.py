"""The data module: splits, settings, and what a real fit sees."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from witness import fit

from wdat.data import ImageDataModule, ImageSet
from wdat.errors import SettingError

CONF = Path(__file__).parents[2] / "conf" / "data"


def numbered(folder: Path, n: int = 40, n_test: int = 11, classes: int = 4) -> Path:
    """An archive whose images carry their own number in every pixel; test images are numbered from 200."""
    path = folder / "numbered.npz"
    x_train, x_test = np.arange(n, dtype=np.uint8), 200 + np.arange(n_test, dtype=np.uint8)
    np.savez(
        path,
        x_train=np.broadcast_to(x_train[:, None, None, None], (n, 6, 6, 3)),
        y_train=np.arange(n) % classes,
        x_test=np.broadcast_to(x_test[:, None, None, None], (n_test, 6, 6, 3)),
        y_test=np.arange(n_test) % classes,
    )
    return path


def make(folder: Path, **settings) -> ImageDataModule:
    given = {"num_classes": 4, "batch_size": 8, "eval_batch_size": 4, "val_size": 8, "crop": 0, "flip": False}
    data = ImageDataModule("npz", path=numbered(folder), **{**given, **settings})
    data.prepare_data()
    data.setup()
    return data


def pixels(images: ImageSet) -> torch.Tensor:
    """The images of a split, in its order."""
    return images.images if images.rows is None else images.images[images.rows]


def numbers(loader) -> list[int]:
    return [int(v) for batch in loader for v in (batch.x[:, 0, 0, 0] * 255).round()]


def test_validation_comes_from_training_and_the_test_set_is_untouched(tmp_path):
    data = make(tmp_path)
    train, val, test = (numbers(make_loader()) for make_loader in loaders(data))
    assert sorted(train + val) == list(range(40))
    assert len(val) == 8
    assert np.bincount([v % 4 for v in val]).tolist() == [2, 2, 2, 2]
    assert test == list(range(200, 211))
    assert data.splits == {"train": 32, "val": 8, "test": 11}
    assert data.n_train == 32
    assert data.image_shape == (3, 6, 6)
    assert data.name == "npz:numbered"
    assert numbers(make(tmp_path, seed=1).val_dataloader()) != val
    assert numbers(make(tmp_path, seed=0).val_dataloader()) == val


def loaders(data):
    return data.train_dataloader, data.val_dataloader, data.test_dataloader


def test_limits_draw_by_class_from_the_seed_and_never_move_the_split(tmp_path):
    whole, part = make(tmp_path), make(tmp_path, limit_train=16, limit_val=4, limit_test=8)
    assert part.splits == {"train": 16, "val": 4, "test": 8}
    for split, each in (("train", 4), ("val", 1)):
        kept, all_of_it = (pixels(d.images(split)).flatten(1)[:, 0].tolist() for d in (part, whole))
        assert kept == [number for number in all_of_it if number in kept], "in its order"
        assert part.images(split).labels.bincount(minlength=4).tolist() == [each] * 4
    assert part.images("test").labels.bincount(minlength=4).tolist() in ([2, 2, 2, 2], [3, 2, 2, 1])
    assert numbers(part.test_dataloader()) == numbers(make(tmp_path, limit_test=8).test_dataloader())
    assert len({tuple(numbers(make(tmp_path, limit_test=3, seed=s).test_dataloader())) for s in range(6)}) > 1
    assert make(tmp_path, limit_train=10_000, limit_test=10_000).splits == whole.splits


def test_it_says_what_a_limit_has_taken(tmp_path):
    assert make(tmp_path, limit_test=3, limit_train=100, seed=2).selection == {
        "test": "3 of 11, drawn by class (seed 2)", "val": "all 8", "train": "all 32",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=r"setup\(\)"):
        _ = ImageDataModule("digits", 10).selection


def test_a_fraction_for_validation(tmp_path):
    assert make(tmp_path, val_size=0.25).splits["val"] == 10


def test_only_training_images_are_augmented(tmp_path):
    data = make(tmp_path, crop=2)
    train, val, test = (torch.cat([batch.x for batch in make_loader()]) for make_loader in loaders(data))
    assert (train == 0).flatten(1).any(1).float().mean() > 0.5, "padding shows"
    for x in (val, test):
        assert torch.equal(x, x[:, :1, :1, :1].expand_as(x))


def test_batches_hold_the_rows_they_name(tmp_path):
    data = make(tmp_path)
    for split, loader in zip(("train", "val", "test"), loaders(data), strict=True):
        for batch in loader():
            assert torch.equal(batch.x, pixels(data.images(split))[batch.index].float() / 255)
            assert torch.equal(batch.y, data.images(split).labels[batch.index])


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("batch_size", 0, "from 1"),
        ("batch_size", -8, "from 1"),
        ("batch_size", 2.5, "whole number"),
        ("eval_batch_size", 0, "from 1"),
        ("num_classes", 1, "from 2"),
        ("crop", -1, "from 0"),
        ("seed", -1, "from 0"),
        ("limit_train", 0, "null for all"),
        ("limit_val", -3, "null for all"),
        ("limit_test", True, "null for all"),
        ("val_size", 0, "leaves no validation split"),
        ("val_size", -5, "fraction between 0 and 1"),
        ("val_size", 1.0, "fraction between 0 and 1"),
        ("val_size", 0.001, "leaves no validation image: set 1 to 39"),
        ("val_size", 40, "leaves no image to train on: set 1 to 39"),
    ],
)
def test_settings_out_of_range(tmp_path, setting, value, remedy):
    with pytest.raises(SettingError) as caught:
        make(tmp_path, **{setting: value})
    assert f"data.{setting}={value}" in str(caught.value)
    assert remedy in str(caught.value)


def test_labels_that_are_no_classes(tmp_path):
    with pytest.raises(
        SettingError, match=r"y_train has labels from 0 to 3, but data\.num_classes=3 .* data\.num_classes=4"
    ):
        make(tmp_path, num_classes=3)
    path = tmp_path / "negative.npz"
    x = np.zeros((4, 6, 6, 3), np.uint8)
    np.savez(path, x_train=x, y_train=np.arange(4), x_test=x, y_test=np.arange(4) - 1)
    with pytest.raises(SettingError, match=r"y_test has labels from -1 to 2.*data\.num_classes.*from 0"):
        ImageDataModule("npz", 4, path=path, val_size=1).setup()


def test_unknown_source_and_use_before_setup():
    with pytest.raises(SettingError, match=r"data\.source.*did you mean cifar10"):
        ImageDataModule("cifar", 10)
    with pytest.raises(RuntimeError, match=r"setup\(\)"):
        ImageDataModule("digits", 10).train_dataloader()


def test_passes_over_training_rows(tmp_path):
    data = make(tmp_path, crop=2)
    index = torch.tensor([5, 0, 31, 7, 7, 12, 1, 2, 3])
    whole = list(data.train_batches(index, step=6))
    assert [len(batch.y) for batch in whole] == [4, 4, 1]
    assert torch.equal(torch.cat([batch.index for batch in whole]), index)
    assert torch.equal(torch.cat([batch.y for batch in whole]), data.images("train").labels[index])
    assert {(batch.size, batch.step) for batch in whole} == {(9, 6)}
    x = torch.cat([batch.x for batch in whole])
    assert torch.equal(x, torch.cat([batch.x for batch in data.train_batches(index, 6)]))
    assert not torch.equal(x, torch.cat([batch.x for batch in data.train_batches(index, 7)]))
    shared = torch.empty_like(x)
    for rank in (0, 1):
        for batch in data.train_batches(index, 6, rank, 2):
            shared[batch.position] = batch.x
    assert torch.equal(shared, x)
    assert list(data.train_batches(index[:0], 0)) == []


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_a_fit_sees_a_new_order_in_each_epoch(tmp_path, use_distributed_sampler):
    data = make(tmp_path)
    options = {"enable_checkpointing": False, "use_distributed_sampler": use_distributed_sampler}
    witness = fit(data, tmp_path, **options)
    assert [step for step, *_ in witness.seen] == list(range(8))
    first, second = ([row for _, rows, _ in witness.seen[k : k + 4] for row in rows] for k in (0, 4))
    assert sorted(first) == sorted(second) == list(range(32))
    assert first != second
    assert witness.validated == 2 * list(range(8))
    again = fit(make(tmp_path), tmp_path, **options)
    assert [seen[:2] for seen in again.seen] == [seen[:2] for seen in witness.seen]
    assert [seen[1] for seen in fit(make(tmp_path, seed=1), tmp_path, **options).seen] != [s[1] for s in witness.seen]


def test_a_resumed_fit_goes_on_where_it_stopped(tmp_path):
    saver = ModelCheckpoint(
        tmp_path / "kept", "{step}", save_top_k=-1, every_n_train_steps=1, auto_insert_metric_name=False
    )
    data = make(tmp_path, crop=2)
    whole = fit(data, tmp_path, epochs=3, callbacks=[saver])
    for taken in range(1, 12):
        checkpoint = tmp_path / "kept" / f"{taken}.ckpt"
        rest = fit(make(tmp_path, crop=2), tmp_path, 3, checkpoint, enable_checkpointing=False).seen
        assert [seen[:2] for seen in rest] == [seen[:2] for seen in whole.seen[taken:]], taken
        assert all(torch.equal(a[2], b[2]) for a, b in zip(rest, whole.seen[taken:], strict=True))


def test_a_fit_resumed_between_epochs(tmp_path):
    saver = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = fit(make(tmp_path), tmp_path, epochs=3, callbacks=[saver])
    rest = fit(make(tmp_path), tmp_path, 3, tmp_path / "kept" / "epoch=0.ckpt", enable_checkpointing=False)
    assert [seen[:2] for seen in rest.seen] == [seen[:2] for seen in whole.seen[4:]]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "npz", "digits", "folder"])
def test_configurations_are_the_constructor(name, tmp_path):
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        config = compose(
            overrides=[
                f"+data={name}",
                "+seed=7",
                "data.limit_test=3",
                "++data.path=f.npz",
                *(["data.root=pets"] * (name == "folder")),
            ]
        )
    data = instantiate(config.data)
    assert isinstance(data, ImageDataModule)
    assert data.source == name
    assert data.seed == 7
    assert data.num_classes == (100 if name == "cifar100" else 10)
    assert data.limits["test"] == 3
    assert data.augment.flip == (name != "digits")
    assert data.name == {"npz": "npz:f", "folder": "folder:pets"}.get(name, name)


def test_digits_end_to_end():
    data = ImageDataModule("digits", 10, val_size=0.15, flip=False, limit_test=20)
    data.prepare_data()
    data.setup("fit")
    assert data.splits == {"train": 1221, "val": 216, "test": 20}
    assert data.image_shape == (3, 32, 32)
    (batch,) = data.test_dataloader()
    assert batch.y.bincount(minlength=10).tolist() == [2] * 10
    assert torch.equal(batch.x, data.images("test").images[data.images("test").rows].float() / 255)
    assert batch.index.tolist() == batch.position.tolist() == list(range(20))
    assert batch.size == 20


class _Elsewhere:
    """A trainer whose device holds shapes only, as far as data are concerned."""

    global_rank, world_size = 0, 1

    class strategy:  # noqa: N801 (an attribute of Lightning's trainer)
        root_device = torch.device("meta")


def test_images_are_kept_as_bytes_on_the_device_that_trains(tmp_path):
    data = make(tmp_path, crop=1, flip=True)
    data.trainer = _Elsewhere()
    for loader, split in ((data.train_dataloader(), "train"), (data.val_dataloader(), "val")):
        batch = next(iter(loader))
        assert data.images(split).images.device.type == data.images(split).labels.device.type == "meta"
        assert data.images(split).images.dtype == torch.uint8
        assert batch.x.device.type == batch.y.device.type == batch.index.device.type == "meta"
        assert batch.x.dtype == torch.float32
    kept = data.images("train")
    data.train_dataloader()
    assert data.images("train") is kept, "moved once"
    assert next(data.train_batches(torch.arange(4), 0)).x.device.type == "meta"


def test_images_may_stay_where_they_are(tmp_path):
    data = make(tmp_path, on_device=False)
    data.trainer = _Elsewhere()
    assert next(iter(data.train_dataloader())).x.device.type == "meta", "each batch goes there"
    next(iter(data.val_dataloader()))
    train, val = (data.images(split).images for split in ("train", "val"))
    assert train.device.type == "cpu"
    assert train.data_ptr() == val.data_ptr(), "of an archive nothing is copied, not even to set images aside"
    assert train.stride(1) == 1, "as it lies in the file"


def test_a_plain_data_module_keeps_its_images(tmp_path):
    data = make(tmp_path)
    data.train_dataloader()
    assert data.images("train").images.device.type == "cpu"


def test_the_test_stage_needs_no_validation_split(tmp_path):
    path = tmp_path / "few.npz"
    x = np.zeros((4, 6, 6, 3), np.uint8)
    np.savez(path, x_train=x, y_train=np.arange(4), x_test=x, y_test=np.arange(4))
    data = ImageDataModule("npz", 4, path=path, val_size=1024)
    data.setup("test")
    data.setup("test")
    assert len(data.images("test")) == 4
    with pytest.raises(SettingError, match=r"data\.val_size=1024 of 4 training images"):
        data.setup("fit")
