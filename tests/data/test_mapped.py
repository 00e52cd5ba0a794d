"""Arrays mapped inside an archive, against what NumPy loads from it."""

import warnings
import zipfile

import numpy as np
import pytest
import torch

from wdat.data.mapped import mapped, view


def arrays():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (7, 5, 4, 3), dtype=np.uint8),
        "label": np.arange(7),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4))),
        "one": np.array(5.0, np.float32),
        "big_endian": np.arange(4, dtype=">i4"),
    }


@pytest.mark.parametrize("name", ["pool.npz", "a name with ü.npz"])
def test_maps_what_numpy_loads(tmp_path, name):
    written = arrays()
    np.savez(tmp_path / name, **written)
    read = mapped(tmp_path / name, written)
    assert list(read) == list(written)
    for key, value in written.items():
        assert isinstance(read[key], np.memmap)
        assert read[key].dtype == value.dtype
        assert np.array_equal(read[key], value)
        assert not read[key].flags.writeable


def test_a_map_reads_the_file_and_nothing_else(tmp_path):
    path = tmp_path / "pool.npz"
    np.savez(path, image=np.zeros((4, 2, 2, 3), np.uint8))
    read = mapped(path, ["image"])["image"]
    with path.open("r+b") as file:
        file.seek(read.offset)
        file.write(bytes([9] * 12))
    assert read[0].tolist() == np.full((2, 2, 3), 9).tolist()
    assert not read[1:].any()


def test_only_the_names_asked_for(tmp_path):
    np.savez(tmp_path / "pool.npz", **arrays())
    assert list(mapped(tmp_path / "pool.npz", ["label", "none"])) == ["label"]


def test_members_behind_others_of_any_kind(tmp_path):
    with zipfile.ZipFile(tmp_path / "mixed.npz", "w") as archive:
        archive.writestr("notes.txt", "x" * 1001)
        for name, kind in (("packed", zipfile.ZIP_DEFLATED), ("plain", zipfile.ZIP_STORED)):
            np.save(tmp_path / f"{name}.npy", np.arange(50))
            archive.write(tmp_path / f"{name}.npy", f"{name}.npy", kind)
    read = mapped(tmp_path / "mixed.npz", ["packed", "plain"])
    assert list(read) == ["plain"]
    assert np.array_equal(read["plain"], np.arange(50))


def test_what_cannot_be_mapped_is_left_out(tmp_path):
    np.savez_compressed(tmp_path / "compressed.npz", **arrays())
    assert mapped(tmp_path / "compressed.npz", arrays()) == {}
    objects = np.array([{}], dtype=object)
    np.savez(tmp_path / "odd.npz", empty=np.zeros((0, 3)), objects=objects)
    assert mapped(tmp_path / "odd.npz", ["empty", "objects"]) == {}


def test_records_of_several_fields_and_long_headers(tmp_path):
    fields = np.zeros(3, [("a", "u1"), ("b", "f4")])
    version_2 = tmp_path / "plain.npy"
    with version_2.open("wb") as file:
        np.lib.format.write_array(file, np.arange(6).reshape(2, 3), version=(2, 0))
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.write(version_2, "plain.npy")
    np.savez(tmp_path / "fields.npz", fields=fields)
    assert mapped(tmp_path / "fields.npz", ["fields"]) == {}
    assert mapped(tmp_path / "odd.npz", ["plain"])["plain"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_damage_is_an_error(tmp_path):
    path = tmp_path / "pool.npz"
    np.savez(path, image=np.zeros((4, 8, 8, 3), np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[:300])
    with pytest.raises(zipfile.BadZipFile):
        mapped(path, ["image"])
    path.write_bytes(content.replace(b"(4, 8, 8, 3)", b"(9, 8, 8, 3)"))
    with pytest.raises(ValueError, match=r"image\.npy has 768 bytes for an array of 1728"):
        mapped(path, ["image"])
    for old, new, fault in (
        (b"\x93NUMPY", b"\x93NUMPX", "no array: the magic"),
        (b"'shape'", b"'shpae'", "damaged header"),
        (b"{'descr'", b"['descr'", "damaged header"),
        (b"(4, 8, 8, 3)", b"(-4, 8, 8,3)", "damaged header"),
        (b"'|u1'", b"'|q9'", "damaged header"),
        (b"\x93NUMPY\x01\x00\x76\x00", b"\x93NUMPY\x01\x00\xff\xff", "damaged header .65535 bytes long"),
    ):
        assert old in content
        path.write_bytes(content.replace(old, new))
        with pytest.raises(ValueError, match=f"image\\.npy (is|has a) {fault}"):
            mapped(path, ["image"])
    with pytest.raises(FileNotFoundError):
        mapped(tmp_path / "none.npz", ["image"])


def test_a_tensor_of_a_map_shares_it_in_silence(tmp_path):
    np.savez(tmp_path / "pool.npz", **arrays())
    read = mapped(tmp_path / "pool.npz", ["image"])["image"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = view(read)
    assert tensor.data_ptr() == read.ctypes.data
    assert torch.equal(tensor, torch.from_numpy(arrays()["image"]))
