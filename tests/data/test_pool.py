"""A pool of synthetic images: read by rows, refused where it can't be, drawn alike on one process and on many."""

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sparse import sparse_pool
from wdat.data import ImageDataModule, SyntheticPool, TrainPlan
from wdat.data.sampling import synthetic_positions
from wdat.errors import RunError, SettingError
from wdat.seeding import generator


def arrays(n: int = 300, classes: int = 4, height: int = 6, width: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    label = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    return {"image": rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8), "label": label}


def write(folder: Path, **changed) -> Path:
    path = folder / "pool.npz"
    np.savez(path, **{**arrays(), **changed})
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path)


def opened(path) -> SyntheticPool:
    return SyntheticPool(path, (3, 6, 6), 4)


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.uint64, ">i4"])
def test_rows_are_those_of_the_file(tmp_path, kind):
    held = arrays()
    pool = opened(write(tmp_path, label=held["label"].astype(kind)))
    rows = torch.tensor([299, 0, 17, 17, 250, 3])
    images, labels = pool.read(rows)
    assert images.is_contiguous()
    assert torch.equal(images, torch.from_numpy(held["image"][rows]).permute(0, 3, 1, 2))
    assert labels.dtype == torch.int64
    assert labels.tolist() == pool.labels(rows).tolist() == held["label"][rows].tolist()
    assert len(pool) == 300
    assert pool.class_sizes.tolist() == np.bincount(held["label"]).tolist()
    none, nothing = pool.read(rows[:0])
    assert (none.shape, nothing.shape) == ((0, 3, 6, 6), (0,))


def test_labels_are_counted_piece_by_piece(path, monkeypatch):
    monkeypatch.setattr("wdat.data.pool.CHUNK", 7)
    assert opened(path).class_sizes.tolist() == np.bincount(arrays()["label"]).tolist()


def test_a_pool_of_100_million_images_costs_no_memory(tmp_path):
    """As large as a file gets; its images are a hole."""
    path = tmp_path / "large.npz"
    sparse_pool(path, 100_000_000)
    assert path.stat().st_size > 300e9
    assert path.stat().st_blocks * 512 < 200e6
    tracemalloc.start()
    pool = SyntheticPool(path, (3, 32, 32), 10)
    last = 99_999_999
    images, labels = pool.read(torch.tensor([last, 5, 80_000_000]))
    rows = pool.stratified(1000, generator(0, "strata", 0))
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    path.unlink()
    assert used < 40e6, "a hundred million labels alone are more"
    assert int(pool.class_sizes.sum()) == last + 1
    assert not images.any()
    assert len(labels) == 3
    assert rows.max() > 2**26


def test_a_sparse_pool_is_what_numpy_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile.ZipExtFile, "_update_crc", lambda self, data: None)  # sums are left out
    path = tmp_path / "small.npz"
    sparse_pool(path, 50, 6)
    with np.load(path) as archive:
        image, label = archive["image"], archive["label"]
    assert image.shape == (50, 6, 6, 3)
    assert label.shape == (50,)
    pool = SyntheticPool(path, (3, 6, 6), 10)
    assert pool.labels(torch.arange(50)).tolist() == label.tolist()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image": np.zeros((300, 6, 6, 3), np.float32)}, r"image is 300×6×6×3 of float32, not N×H×W×C of uint8"),
        ({"image": np.zeros((300, 108), np.uint8)}, r"image is 300×108 of uint8"),
        ({"image": np.asfortranarray(arrays()["image"])}, r"image is .*numpy\.savez"),
        ({"image": np.zeros((300, 8, 6, 3), np.uint8)}, r"its images are 8×6×3, those of the data 6×6×3"),
        ({"image": np.zeros((0, 6, 6, 3), np.uint8)}, "image is compressed or empty"),
        ({"label": np.zeros(300)}, "label is 300 of float64 for 300 images"),
        ({"label": np.zeros(299, int)}, "label is 299 of int64 for 300 images"),
        ({"label": np.arange(300)}, r"label has 299, but data\.num_classes=4 allows 0 to 3"),
        ({"label": np.full(300, -1)}, "label has -1"),
    ],
)
def test_what_is_no_pool_is_named(tmp_path, changed, words):
    with pytest.raises(SettingError, match=words) as caught:
        opened(write(tmp_path, **changed))
    assert str(caught.value).startswith(f"data.synthetic.path={tmp_path / 'pool.npz'}: ")


def test_a_compressed_pool_is_told_how_to_be_packed(tmp_path):
    packed = tmp_path / "packed.npz"
    np.savez_compressed(packed, **arrays())
    with pytest.raises(SettingError, match=r"image is compressed .* zip -0 NEW\.npz image\.npy label\.npy"):
        opened(packed)
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(tmp_path / "plain.npz", "w", zipfile.ZIP_STORED) as new:
        for name in ("image.npy", "label.npy"):
            new.writestr(name, old.read(name))
    assert torch.equal(
        opened(tmp_path / "plain.npz").read(torch.arange(9))[0], opened(write(tmp_path)).read(torch.arange(9))[0]
    )


def test_files_that_can_not_be_read(tmp_path, path):
    with pytest.raises(SettingError, match=r"no\.npz: no such file"):
        opened(tmp_path / "no.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(SettingError, match=r"has no array image \(found x\)"):
        opened(tmp_path / "other.npz")
    whole = path.read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[:-500])
    with pytest.raises(SettingError, match="damaged"):
        opened(tmp_path / "short.npz")
    pool = opened(path)
    with path.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(RunError, match=r"data\.synthetic\.path=.*cut short"):
        pool.read(torch.tensor([299]))


@pytest.mark.parametrize(
    ("setting", "value"), [("fraction", 0), ("fraction", 1.0), ("fraction", -1), ("sample", 0), ("every", 0)]
)
def test_settings_out_of_range(setting, value):
    with pytest.raises(SettingError, match=rf"data\.synthetic\.{setting}={value}"):
        ImageDataModule("digits", 10, synthetic={setting: value})


# --- what is drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8, 100, 299])
def test_a_stratified_sample_has_each_class_in_proportion(path, size):
    pool, held = opened(path), arrays()["label"]
    rows = pool.stratified(size, generator(0, "strata", 3))
    assert len(rows.unique()) == size
    assert torch.equal(rows, pool.stratified(size, generator(0, "strata", 3)))
    assert size > 290 or not torch.equal(rows, pool.stratified(size, generator(0, "strata", 4)))
    wanted = size * np.bincount(held) / 300
    assert np.abs(np.bincount(held[rows.numpy()], minlength=4) - wanted).max() <= 1 + 0.05 * size


def test_a_sample_as_large_as_the_pool_is_the_pool(path):
    for size in (300, 1024):
        assert opened(path).stratified(size, generator(0, "strata", 0)).tolist() == list(range(300))


@given(size=st.integers(2, 400), fraction=st.floats(0.01, 0.99), world_size=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_synthetic_positions_are_spread_evenly(size, fraction, world_size):
    count = size - round((1 - fraction) * size)
    if count in (0, size):
        with pytest.raises(SettingError, match=r"data\.synthetic\.fraction=.*data\.batch_size"):
            synthetic_positions(size, fraction)
        return
    places = synthetic_positions(size, fraction)
    assert int(places.sum()) == count
    for part in places.tensor_split(world_size):
        assert abs(int(part.sum()) - len(part) * count / size) < 1


def plan(rank: int = 0, world_size: int = 1, epoch: int = 0, seed: int = 0) -> TrainPlan:
    made = TrainPlan(40, 8, seed, rank, world_size, pool=1000, fraction=0.7)
    made.set_epoch(epoch)
    return made


def test_an_epoch_takes_originals_once_and_the_rest_from_the_pool():
    seen = [batch.index for epoch in range(60) for batch in plan(epoch=epoch)]
    assert len(seen) == 60 * 5, "an epoch is as long as without a pool"
    assert [int((index < 40).sum()) for index in seen] == [2] * 300, "round(0.3 · 8)"
    for epoch in range(60):
        own = torch.cat(seen[5 * epoch : 5 * epoch + 5])
        own = own[own < 40]
        assert len(own.unique()) == len(own) == 10
    every = torch.cat(seen)
    assert len(every[every < 40].unique()) == 40, "each epoch has an order of its own"
    drawn = every[every >= 40] - 40
    assert 0 <= drawn.min() < 20
    assert 980 < drawn.max() < 1000
    counts = torch.bincount(drawn // 100, minlength=10).double()
    assert float(((counts - 180) ** 2 / 180).sum()) < 27.9, "χ² of 9 degrees of freedom, 0.1 %"


def test_rows_of_the_pool_are_a_function_of_seed_and_step():
    first, again, other = (torch.cat([b.index for b in plan(seed=s)]) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    batches = list(plan())
    assert not torch.equal(batches[0].index[batches[0].index >= 40], batches[1].index[batches[1].index >= 40])


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_originals_and_pool(world_size):
    for whole, *parts in zip(plan(epoch=2), *(plan(rank, world_size, 2) for rank in range(world_size)), strict=True):
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
        counts = [int((part.index >= 40).sum()) for part in parts]
        assert max(counts) - min(counts) <= 1


def test_without_a_pool_nothing_changes():
    plain, none = TrainPlan(40, 8, 0), TrainPlan(40, 8, 0, pool=0, fraction=0.7)
    assert all(torch.equal(a.index, b.index) for a, b in zip(plain, none, strict=True))


# --- the data module ------------------------------------------------------------------------------------------------


def originals(folder: Path, **settings) -> ImageDataModule:
    rng = np.random.default_rng(1)
    x, x_test = (rng.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8) for n in (40, 11))
    np.savez(folder / "own.npz", x_train=x, y_train=np.arange(40) % 4, x_test=x_test, y_test=np.arange(11) % 4)
    given = {"batch_size": 8, "eval_batch_size": 4, "val_size": 8, "crop": 0, "flip": False}
    data = ImageDataModule("npz", 4, path=folder / "own.npz", **{**given, **settings})
    data.setup()
    return data


def mixed(folder, **settings):
    given = {"path": write(folder), "fraction": 0.6, **settings.pop("synthetic", {})}
    return originals(folder, synthetic=given, **settings)


def test_batches_hold_the_rows_they_name(tmp_path):
    data, held = mixed(tmp_path), arrays()
    own = data.images("train").originals
    pixels = own.pixels(torch.arange(32), None)
    for batch in data.train_dataloader():
        assert batch.synthetic.tolist() == (batch.index >= data.n_train).tolist()
        assert int(batch.synthetic.sum()) == 5
        for x, y, row in zip(batch.x, batch.y.tolist(), batch.index.tolist(), strict=True):
            image = pixels[row] if row < 32 else torch.from_numpy(held["image"][row - 32]).permute(2, 0, 1)
            assert torch.equal(x, image.float() / 255)
            assert y == (own.labels[row] if row < 32 else held["label"][row - 32])


def test_both_kinds_are_augmented_alike(tmp_path):
    data = mixed(tmp_path, crop=2, flip=True)
    (plain, moved) = (next(iter(d.train_dataloader())) for d in (mixed(tmp_path), data))
    draws = data.augment.draw(8, generator(0, "augment", 0))
    assert torch.equal(data.augment((plain.x * 255).round().to(torch.uint8), draws).float() / 255, moved.x)
    changed = (plain.x != moved.x).flatten(1).any(1)
    assert bool(changed[plain.synthetic].any())
    assert bool(changed[~plain.synthetic].any())


def test_passes_reach_the_pool(tmp_path):
    data, held = mixed(tmp_path), arrays()
    index = torch.tensor([331, 0, 32, 5, 100])
    batches = list(data.train_batches(index, step=6))
    assert torch.cat([b.index for b in batches]).tolist() == index.tolist()
    x = torch.cat([b.x for b in batches])
    assert torch.equal(x[0], torch.from_numpy(held["image"][299]).permute(2, 0, 1).float() / 255)
    assert torch.equal(x[1], data.images("train").originals.pixels(torch.tensor([0]), None)[0].float() / 255)
    assert torch.cat([b.synthetic for b in batches]).tolist() == [True, False, True, False, True]


def test_without_a_pool_no_image_is_synthetic(tmp_path):
    data = originals(tmp_path, synthetic={"path": None})
    assert data.pool is None
    assert data.pool_share == 0
    assert next(iter(data.train_dataloader())).synthetic is None
    assert data.name == "npz:own"


def test_validation_and_test_images_are_originals(tmp_path):
    data = mixed(tmp_path)
    assert data.splits == {"train": 32, "val": 8, "test": 11}
    assert data.pool_share == 5 / 8
    assert data.name == "npz:own", "what is measured"
    assert all(batch.synthetic is None for batch in (*data.val_dataloader(), *data.test_dataloader()))


def test_a_batch_without_originals_is_refused_before_any_work(tmp_path):
    with pytest.raises(SettingError, match=r"data\.synthetic\.fraction=0\.97 of 8 images leaves no original image"):
        mixed(tmp_path, synthetic={"fraction": 0.97})
    with pytest.raises(SettingError, match="leaves no synthetic image"):
        mixed(tmp_path, synthetic={"fraction": 0.03})
    write(tmp_path, image=np.zeros((300, 8, 8, 3), np.uint8))
    with pytest.raises(SettingError, match=r"its images are 8×8×3, those of the data 6×6×3"):
        originals(tmp_path, synthetic={"path": tmp_path / "pool.npz"})


class _Elsewhere:
    global_rank, world_size = 0, 1

    class strategy:  # noqa: N801 (an attribute of Lightning's trainer)
        root_device = torch.device("meta")


def test_rows_of_the_pool_are_copied_to_the_originals(tmp_path):
    data = mixed(tmp_path, crop=1)
    data.trainer = _Elsewhere()
    images = data._on_device("train")
    assert images.pool is data.pool
    assert images.originals.images.device.type == "meta"


def test_a_stopped_epoch_goes_on_with_the_same_rows():
    batches = list(plan(epoch=2))
    interrupted = plan(epoch=2)
    stream = iter(interrupted)
    next(stream), next(stream)
    resumed = plan()
    resumed.load_state_dict(interrupted.state_dict())
    assert [b.index.tolist() for b in resumed] == [b.index.tolist() for b in batches[2:]]
