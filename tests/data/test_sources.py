"""Reading images: round trips, and errors that name the setting and the remedy."""

import hashlib
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets import utils as torchvision_utils

from wdat.data import SOURCES, ImageDataModule, Where, cifar10, cifar100, digits, npz
from wdat.errors import SettingError


def arrays(n_train=6, n_test=4, size=5, channels=3):
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (n_train, size, size, channels), dtype=np.uint8),
        "y_train": np.arange(n_train) % 3,
        "x_test": rng.integers(0, 256, (n_test, size, size, channels), dtype=np.uint8),
        "y_test": np.arange(n_test) % 3,
    }


def save(folder: Path, **changes) -> Path:
    path = folder / "mine.npz"
    content = {name: value for name, value in {**arrays(), **changes}.items() if value is not None}
    np.savez_compressed(path, **content)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_round_trip(tmp_path, channels):
    written = arrays(channels=channels)
    read = npz(save(tmp_path, **written))
    for name in ("x_train", "x_test"):
        images = getattr(read, name)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), written[name])
    for name in ("y_train", "y_test"):
        assert getattr(read, name).dtype == torch.int64
        assert np.array_equal(getattr(read, name).numpy(), written[name])


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_with_test_arrays_alone_serves_for_evaluation(tmp_path, write):
    written = arrays()
    write(tmp_path / "test.npz", x_test=written["x_test"], y_test=written["y_test"])
    data = ImageDataModule("npz", 3, path=tmp_path / "test.npz")
    data.setup()
    (batch,) = data.test_dataloader()
    assert np.array_equal((batch.x * 255).round().byte().permute(0, 2, 3, 1).numpy(), written["x_test"])
    for use in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(
            SettingError, match=r"data\.path=.* has no training images \(x_train, y_train\).*split=test"
        ):
            use()


def test_npz_with_validation_arrays_sets_nothing_aside(tmp_path):
    written = arrays()
    path = save(tmp_path, x_val=written["x_test"][:2], y_val=written["y_test"][:2])
    data = ImageDataModule("npz", 3, path=path, val_size=1024, limit_val=1)
    data.setup()
    assert data.splits == {"train": 6, "val": 1, "test": 4}
    assert data.selection["val"] == "1 of 2, drawn by class (seed 0)"


def test_npz_without_compression_stays_on_the_disk(tmp_path):
    written = arrays()
    np.savez(tmp_path / "plain.npz", **written)
    read = npz(tmp_path / "plain.npz")
    assert np.array_equal(read.x_train.permute(0, 2, 3, 1).numpy(), written["x_train"])
    place = (tmp_path / "plain.npz").read_bytes().index(written["x_train"].tobytes())
    with (tmp_path / "plain.npz").open("r+b") as file:
        file.seek(place)
        file.write(bytes([7, 8, 9]))
    assert read.x_train[0, :, 0, 0].tolist() == [7, 8, 9], "the tensor is the file"


def test_npz_of_both_kinds_gives_the_same_batches(tmp_path):
    np.savez(tmp_path / "plain.npz", **arrays())
    plain, packed = (ImageDataModule("npz", 3, path=p, val_size=2) for p in (tmp_path / "plain.npz", save(tmp_path)))
    for data in (plain, packed):
        data.setup()
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        (a,), (b,) = getattr(plain, loader)(), getattr(packed, loader)()
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
        assert a.x.is_contiguous()


@pytest.mark.parametrize(
    ("changes", "fault", "remedy"),
    [
        ({"x_test": None, "y_test": None}, "no array x_test, y_test", "numpy.savez_compressed"),
        ({"x_train": None}, "no array x_train (found", "numpy.savez_compressed"),
        ({"y_val": np.arange(2)}, "no array x_val", "numpy.savez_compressed"),
        ({"x_val": np.zeros((2, 6, 6, 3), np.uint8), "y_val": np.arange(2)}, "x_val is 2×6×6×3", "use one size"),
        ({"x_train": np.full((6, 5, 5, 3), 0.5, np.float32)}, "x_train is float32", "(x_train * 255).round()"),
        ({"x_test": np.full((4, 5, 5, 3), 200.0)}, "x_test is float64", "(x_test).round()"),
        ({"x_test": np.full((4, 5, 5, 3), np.nan)}, "x_test is float64", "not finite"),
        ({"x_test": np.linspace(-1, 1, 300).reshape(4, 5, 5, 3)}, "look like [-1, 1]", "((x_test + 1) * 127.5)"),
        ({"x_test": np.linspace(-2, 2, 300).reshape(4, 5, 5, 3)}, "look normalised", "that they were made from"),
        ({"x_test": np.full((4, 5, 5, 3), 65535, np.uint16)}, "x_test is uint16", "(x_test // 257).astype('uint8')"),
        ({"x_test": np.full((4, 5, 5, 3), -1, np.int16)}, "x_test is int16", "store pixels"),
        ({"x_train": np.zeros((6, 5, 5, 3), np.int32)}, "x_train is int32", "x_train.astype('uint8')"),
        ({"x_train": np.zeros((6, 3, 5, 5), np.uint8)}, "not N×H×W×C", "x_train.transpose(0, 2, 3, 1)"),
        ({"x_train": np.zeros((6, 5, 5), np.uint8)}, "not N×H×W×C", "x_train[..., None]"),
        ({"x_train": np.zeros((6, 75), np.uint8)}, "x_train is 6×75", "store N×H×W×C"),
        ({"x_train": np.zeros((6, 7, 7, 3), np.uint8)}, "x_train is 6×7×7×3 and x_test 4×5×5×3", "use one size"),
        ({"x_test": np.zeros((0, 5, 5, 3), np.uint8), "y_test": np.zeros(0, int)}, "an empty split", "at least one"),
        ({"y_train": np.arange(5)}, "y_train has 5 labels for 6 images in x_train", "one label for each"),
        ({"y_test": np.arange(7)}, "y_test has 7 labels for 4 images in x_test", "one label for each"),
        ({"y_train": np.zeros(6)}, "y_train is float64", "y_train.astype('int64')"),
        ({"y_train": np.zeros((6, 10), int)}, "y_train is 6×10", "argmax"),
        ({"y_test": np.array(3)}, "y_test is a single number", "reshape"),
        ({"y_train": np.array([{}] * 6, dtype=object)}, "Python objects", "nothing is unpickled"),
    ],
)
def test_npz_says_what_is_wrong_and_what_to_do(tmp_path, changes, fault, remedy):
    path = save(tmp_path, **changes)
    with pytest.raises(SettingError) as caught:
        npz(path)
    assert f"data.path={path}" in str(caught.value)
    assert fault in str(caught.value)
    assert remedy in str(caught.value)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:400])


def garbled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[120:160] = bytes(40)
    path.write_bytes(bytes(content))


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"x_train": 1}))


def lone_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize("damage", [truncated, garbled, pickled, lone_array, lambda path: path.write_bytes(b"")])
def test_npz_damaged(tmp_path, damage):
    path = save(tmp_path)
    damage(path)
    with pytest.raises(SettingError, match=r"data\.path=.*; write it with numpy\.savez"):
        npz(path)


@pytest.mark.parametrize(
    ("old", "new"), [(b"(6, 5, 5, 3)", b"(9, 5, 5, 3)"), (b"\x93NUMPY", b"\x93NUMPX"), (b"'|u1'", b"'<f8'")]
)
def test_npz_whose_headers_are_damaged(tmp_path, old, new):
    path = tmp_path / "plain.npz"
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(SettingError, match=r"data\.path=.* is damaged \(.*; write it with numpy\.savez"):
        npz(path)


def test_npz_without_a_file(tmp_path):
    with pytest.raises(SettingError, match=r"set data\.path=FILE\.npz"):
        npz(None)
    with pytest.raises(SettingError, match=r"data\.path=.*no such file.*set data\.path"):
        npz(tmp_path / "none.npz")
    with pytest.raises(SettingError, match=r"is a folder: class folders of images are data=folder data\.root="):
        npz(tmp_path)


def test_digits_are_fixed_and_balanced():
    data = digits()
    assert data.x_train.shape == (1437, 3, 32, 32)
    assert data.x_test.shape == (360, 3, 32, 32)
    assert data.x_train.dtype == torch.uint8
    assert int(data.x_train.max()) == 255
    assert int(data.x_train.min()) == 0
    assert torch.equal(data.x_test[:, 0], data.x_test[:, 2])
    assert data.y_test.bincount(minlength=10).min() >= 33
    assert torch.equal(data.x_test, digits().x_test)


def imitate(kind, root: Path, monkeypatch, n: int = 3):
    """Writes files like the published ones, but small, and gives `kind` their checksums."""
    rng = np.random.default_rng(1)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    label = "labels" if kind is CIFAR10 else "fine_labels"
    written = {}

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()]

    def part(name: str) -> list[str]:
        written[name] = (rng.integers(0, 256, (n, 3072), dtype=np.uint8), [int(v) for v in rng.integers(0, 10, n)])
        return write(name, {"data": written[name][0], label: written[name][1]})

    monkeypatch.setattr(kind, "train_list", [part(name) for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [part(name) for name, _ in kind.test_list])
    name, md5 = write(kind.meta["filename"], {kind.meta["key"]: [str(k) for k in range(10)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": name, "md5": md5})
    return written


@pytest.fixture
def no_network(monkeypatch):
    asked = []

    def refuse(url, *args, **kwargs):
        asked.append(url)
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision_utils, "_urlretrieve", refuse)
    monkeypatch.setattr(torchvision_utils, "_get_redirect_url", lambda url, max_hops=3: url)
    return asked


@pytest.mark.parametrize(("kind", "source"), [(CIFAR10, cifar10), (CIFAR100, cifar100)])
@pytest.mark.parametrize("download", [True, False])
def test_cifar_that_is_there_needs_no_network(tmp_path, monkeypatch, no_network, kind, source, download):
    written = imitate(kind, tmp_path, monkeypatch)
    data = source(tmp_path, download=download)
    names = [name for name, _ in kind.train_list]
    assert np.array_equal(data.x_train.numpy().reshape(-1, 3072), np.concatenate([written[k][0] for k in names]))
    assert data.y_train.tolist() == [label for k in names for label in written[k][1]]
    test = written[kind.test_list[0][0]]
    assert data.x_test.shape == (3, 3, 32, 32)
    assert np.array_equal(data.x_test.numpy().reshape(-1, 3072), test[0])
    assert data.y_test.tolist() == test[1]
    assert data.y_test.dtype == torch.int64
    assert not no_network


@pytest.mark.parametrize(("kind", "source"), [(CIFAR10, cifar10), (CIFAR100, cifar100)])
def test_cifar_without_network_says_how_to_go_on(tmp_path, no_network, kind, source):
    with pytest.raises(SettingError) as caught:
        source(tmp_path, download=True)
    text = str(caught.value)
    assert no_network
    assert kind.url in text
    assert "no route to host" in text
    assert str(tmp_path / kind.base_folder) in text
    assert "data.root=" in text
    assert "data=npz data.path=FILE.npz" in text


def test_cifar_without_permission_to_download(tmp_path, no_network):
    with pytest.raises(SettingError, match=r"data\.root=.*isn't there.*data\.download=true.*data=npz data\.path="):
        cifar10(tmp_path, download=False)
    assert not no_network


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("download", [True, False])
def test_cifar_damaged(tmp_path, monkeypatch, no_network, name, download):
    imitate(CIFAR10, tmp_path, monkeypatch)
    (tmp_path / CIFAR10.base_folder / name).write_bytes(b"<html>quota exceeded</html>")
    with pytest.raises(SettingError, match=rf"is damaged \({name}: wrong checksum\)"):
        cifar10(tmp_path, download=download)
    assert bool(no_network) == download


def test_cifar_incomplete(tmp_path, monkeypatch, no_network):
    imitate(CIFAR10, tmp_path, monkeypatch)
    (tmp_path / CIFAR10.base_folder / "test_batch").unlink()
    with pytest.raises(SettingError, match=r"is incomplete \(no test_batch\): set data\.download=true"):
        cifar10(tmp_path, download=False)


def test_cifar_unpacks_an_archive_that_was_placed_by_hand(tmp_path, monkeypatch, no_network):
    import tarfile

    imitate(CIFAR10, tmp_path / "elsewhere", monkeypatch)
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "elsewhere" / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest())
    assert len(cifar10(tmp_path, download=True).y_train) == 15
    assert not no_network


def test_registry_gives_each_source_its_settings(tmp_path, monkeypatch):
    imitate(CIFAR10, tmp_path, monkeypatch)
    imitate(CIFAR100, tmp_path, monkeypatch)
    path = save(tmp_path)
    (tmp_path / "val" / "class").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "class" / "0.png")
    where = Where(tmp_path, path)
    sizes = {name: len(source(where).y_test) for name, source in SOURCES.items()}
    assert sizes == {"cifar10": 3, "cifar100": 3, "imagenet": 1, "folder": 1, "npz": 4, "digits": 360}


@pytest.mark.parametrize("there", [False, True])
def test_a_download_that_fails_leaves_no_empty_folders(tmp_path, no_network, there):
    root = tmp_path / "deep" / "data"
    if there:
        root.mkdir(parents=True)
    with pytest.raises(SettingError, match="downloading"):
        cifar10(root, download=True)
    assert no_network
    assert root.exists() == there
    assert list(tmp_path.rglob("*")) == ([tmp_path / "deep", root] if there else [])
