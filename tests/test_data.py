"""Data sets: every reader on files made here, whole and broken; mini-batches; the digits."""

import gzip
import struct
import sys

import numpy as np
import pytest
import scipy.io
import torch

from blaq.train import data as datasets
from blaq.train.readers import read_cifar, read_idx, read_idx_pair, read_svhn

RANDOM = np.random.default_rng(0)


def idx(array, magic=None, shape=None):
    shape = array.shape if shape is None else shape
    magic = 0x0800 | len(shape) if magic is None else magic
    return struct.pack(f">I{len(shape)}I", magic, *shape) + array.tobytes()


def write_mnist(folder, count=12, packed=True):
    """Eight files' worth of an MNIST-like set; the arrays that were written."""
    folder.mkdir(exist_ok=True)
    arrays = {}
    for part in ("train", "t10k"):
        images = RANDOM.integers(0, 256, (count, 6, 5), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        arrays[part] = images, labels
        for name, content in ((f"{part}-images-idx3-ubyte", idx(images)),
                              (f"{part}-labels-idx1-ubyte", idx(labels))):
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return arrays


def cifar(count, classes=10, coarse=None):
    """Bytes of a CIFAR file; its images and labels."""
    images = RANDOM.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = (np.arange(count) % classes).astype(np.uint8)
    columns = [labels[:, None], images]
    if coarse is not None:
        columns.insert(0, np.full((count, 1), coarse, np.uint8))
    return np.concatenate(columns, 1).tobytes(), images.reshape(-1, 3, 32, 32), labels


# idx


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_like(tmp_path, packed):
    arrays = write_mnist(tmp_path / "mnist", packed=packed)
    data = datasets.load("mnist", tmp_path / "mnist")
    for split, (images, labels) in zip(data, arrays.values(), strict=True):
        assert torch.equal(split.images[:, 0], torch.from_numpy(images))
        assert split.labels.tolist() == labels.tolist()
        assert (split.num_classes, split.in_shape) == (10, (1, 6, 5))


def test_default_folder_is_in_blaq_data(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist")
    monkeypatch.setenv("BLAQ_DATA", str(tmp_path))
    assert len(datasets.load("mnist").train) == 12
    monkeypatch.delenv("BLAQ_DATA")
    with pytest.raises(ValueError, match="a folder must be given for mnist, got none; try"):
        datasets.load("mnist")


ONES = np.ones((2, 3, 4), np.uint8)
BROKEN_IDX = {
    "truncated": (idx(ONES)[:-1], "file must have 40 bytes for dimensions .2, 3, 4., got 39"),
    "too long": (idx(ONES) + b"\0", "file must have 40 bytes for dimensions .2, 3, 4., got 41"),
    "no header": (idx(ONES)[:11], "header must have 16 bytes, got 11"),
    "empty": (b"", "header must have 16 bytes, got 0"),
    "labels for images": (idx(np.ones(30, np.uint8)),
                          "magic number must be 0x00000803, got 0x00000801"),
    "floats": (idx(ONES, magic=0x0D03), "magic number must be 0x00000803, got 0x00000d03"),
    "enormous": (idx(ONES, shape=(2**31, 2**31, 4)), "file must have 18446744073709551632 bytes"),
}


@pytest.mark.parametrize("case", BROKEN_IDX)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_broken_idx(tmp_path, case, suffix):
    content, message = BROKEN_IDX[case]
    path = tmp_path / f"images{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ValueError, match=f"blaq.data: {path}: {message}"):
        read_idx(path, 3)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:15], lambda b: b"not gzip",
                                    lambda b: b[:20] + b"\xff\xff\xff" + b[23:]])
def test_broken_gzip(tmp_path, damage):
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(idx(RANDOM.integers(0, 255, (9, 9, 9), dtype=np.uint8)))))
    with pytest.raises(ValueError, match=f"blaq.data: {path}: file must be whole gzip, got: "):
        read_idx(path, 3)


def test_idx_files_that_contradict_each_other(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.write_bytes(idx(ONES))
    labels.write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(ValueError, match=f"{labels}: labels must be 2, as many as images.*got 3"):
        read_idx_pair(images, labels, 10)
    labels.write_bytes(idx(np.array([3, 10], np.uint8)))
    with pytest.raises(ValueError, match=f"{labels}: labels must be 0 to 9, got .10."):
        read_idx_pair(images, labels, 10)
    images.write_bytes(idx(np.zeros((0, 3, 4), np.uint8)))
    with pytest.raises(ValueError, match=f"{images}: dimensions must be positive, got .0, 3, 4."):
        read_idx_pair(images, labels, 10)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/none: folder of mnist must exist"):
        datasets.load("mnist", tmp_path / "none")
    for name, first in (("mnist", "train-images-idx3-ubyte.gz"), ("cifar10", "data_batch_1.bin"),
                        ("cifar100", "train.bin"), ("svhn", "train_32x32.mat"),
                        ("svhn-extra", "train_32x32.mat")):
        with pytest.raises(ValueError, match=f"{tmp_path}/{first}: file must exist, got no"):
            datasets.load(name, tmp_path)
    with pytest.raises(ValueError, match="data must be one of digits, mnist, .*got 'mnst'"):
        datasets.load("mnst", tmp_path)


def test_parts_of_different_shape(tmp_path):
    write_mnist(tmp_path)
    images = np.ones((12, 6, 6), np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    with pytest.raises(ValueError, match="test images must have the shape of training images"):
        datasets.load("mnist", tmp_path)


# CIFAR


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, inner):
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    parts = [cifar(n) for n in (3, 4, 5, 6, 7, 11)]
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, (content, _, _) in zip(names, parts, strict=True):
        (folder / name).write_bytes(content)
    data = datasets.load("cifar10", tmp_path)
    assert (len(data.train), len(data.test), data.train.in_shape) == (25, 11, (3, 32, 32))
    assert np.array_equal(data.train.images.numpy(), np.concatenate([p[1] for p in parts[:5]]))
    assert np.array_equal(data.train.labels.numpy(), np.concatenate([p[2] for p in parts[:5]]))
    assert np.array_equal(data.test.images.numpy(), parts[5][1])


def test_cifar100_takes_the_fine_label(tmp_path):
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(cifar(100, classes=100, coarse=7)[0])
    data = datasets.load("cifar100", tmp_path)
    assert data.train.labels.tolist() == list(range(100)) and data.train.num_classes == 100


@pytest.mark.parametrize(("content", "ranges", "message"), [
    (cifar(3)[0][:-1], (10,), "size must be a positive multiple of 3073 bytes, got 9218"),
    (b"", (10,), "size must be a positive multiple of 3073 bytes, got 0"),
    (cifar(3)[0], (20, 100), "size must be a positive multiple of 3074 bytes, got 9219"),
    (cifar(20, classes=11)[0], (10,), "labels must be 0 to 9, got .10."),
    (cifar(3, coarse=20)[0], (20, 100), "labels must be 0 to 19, got .20."),
    (cifar(101, classes=101, coarse=1)[0], (20, 100), "labels must be 0 to 99, got .100."),
])
def test_broken_cifar(tmp_path, content, ranges, message):
    path = tmp_path / "batch.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"blaq.data: {path}: {message}"):
        read_cifar(path, ranges)


# SVHN


def write_svhn(path, count=11):
    images = RANDOM.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    labels = (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None]
    scipy.io.savemat(path, {"X": images, "y": labels})
    return images, labels


def test_svhn(tmp_path):
    images, labels = write_svhn(tmp_path / "train_32x32.mat")
    write_svhn(tmp_path / "test_32x32.mat")
    write_svhn(tmp_path / "extra_32x32.mat", count=4)
    data = datasets.load("svhn", tmp_path)
    assert data.train.images.shape == (11, 3, 32, 32)
    assert data.train.images[5, 2, 7, 9] == images[7, 9, 2, 5]
    assert labels[9] == 10 and data.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert len(datasets.load("svhn-extra", tmp_path).train) == 15


IMAGES = np.zeros((32, 32, 3, 2), np.uint8)


@pytest.mark.parametrize(("content", "message"), [
    ({"labels": np.zeros((2, 1), np.uint8)}, "file must have the variable X, got none"),
    ({"X": IMAGES}, "file must have the variable y, got none"),
    ({"X": IMAGES * 1.0, "y": np.ones((2, 1), np.uint8)}, "X must be uint8, got float64"),
    ({"X": IMAGES[:31], "y": np.ones((2, 1), np.uint8)}, "X must have shape 32×32×3×n"),
    ({"X": IMAGES[..., 0], "y": np.ones((2, 1), np.uint8)}, "X must have shape 32×32×3×n"),
    ({"X": IMAGES, "y": np.ones((3, 1), np.uint8)}, "y must be 2×1 integers, one for each image"),
    ({"X": IMAGES, "y": np.ones((2, 1))}, "y must be 2×1 integers.*got float64"),
    ({"X": IMAGES, "y": np.array([[0], [1]], np.uint8)}, "labels must be 1 to 10, got .0."),
    ({"X": IMAGES, "y": np.array([[11], [1]], np.uint8)}, "labels must be 1 to 10, got .11."),
])
def test_contradictory_svhn(tmp_path, content, message):
    path = tmp_path / "train_32x32.mat"
    scipy.io.savemat(path, content)
    with pytest.raises(ValueError, match=f"blaq.data: {path}: {message}"):
        read_svhn(path)


@pytest.mark.parametrize("keep", [0, 1, 60, 127, 128, 129, 140, 160, 1000, -1])
@pytest.mark.parametrize("compressed", [True, False])
def test_truncated_svhn(tmp_path, keep, compressed):
    path = tmp_path / "train_32x32.mat"
    images = RANDOM.integers(0, 256, IMAGES.shape, dtype=np.uint8)
    scipy.io.savemat(path, {"y": np.ones((2, 1), np.uint8), "X": images}, do_compression=compressed)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"blaq.data: {path}: file must"):
        read_svhn(path)


# folder of images


def test_images_without_torchvision_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.datasets", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'blaq-kernels\[vision\]'"):
        datasets.load("images", tmp_path)


def test_images(tmp_path):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from PIL import Image

    for part in ("train", "val"):
        for label, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
            (tmp_path / part / label).mkdir(parents=True)
            for i, size in enumerate([(300, 200), (224, 224)]):
                Image.new("RGB", size, colour).save(tmp_path / part / label / f"{i}.png")
    data = datasets.load("images", tmp_path)
    assert data.train.images.shape == (4, 3, 224, 224)
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.train.images[:, :, 100, 7].tolist() == [[255, 0, 0]] * 2 + [[0, 0, 255]] * 2
    whole = (tmp_path / "val/dog/0.png").read_bytes()
    (tmp_path / "val/dog/0.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="dog/0.png: file must be a whole image"):
        datasets.load("images", tmp_path)
    (tmp_path / "val/dog/0.png").write_bytes(whole)
    (tmp_path / "val/dog").rename(tmp_path / "val/fox")
    with pytest.raises(ValueError, match="train and val must have the same classes, got 'dog'"):
        datasets.load("images", tmp_path)
    with pytest.raises(ValueError, match="train: folder must exist"):
        datasets.load("images", tmp_path / "train")


# digits, and the real MNIST where it is


def test_digits_are_the_same_for_everyone():
    data = datasets.load("digits")
    assert (len(data.train), len(data.test), data.train.in_shape) == (1437, 360, (1, 28, 28))
    assert data.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    every = torch.cat([data.train.images, data.test.images])
    assert int(every.min()) == 0 and int(every.max()) == 255
    again = datasets.load("digits")
    assert torch.equal(data.train.images, again.train.images)
    assert data.test.labels[:8].tolist() == again.test.labels[:8].tolist()


def test_real_mnist():
    folder = datasets.default_folder("mnist")
    if folder is None or not folder.is_dir():
        pytest.skip("MNIST is not in $BLAQ_DATA/mnist")
    data = datasets.load("mnist")
    assert data.train.images.shape == (60000, 1, 28, 28) and data.test.images.shape[0] == 10000
    assert data.train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265,
                                                     5851, 5949]
    assert data.train.mean.item() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert data.train.std.item() / 255 == pytest.approx(0.3081, abs=5e-5)


# normalisation and mini-batches


def synthetic(count=23, shape=(2, 16, 8), classes=3):
    images = torch.from_numpy(RANDOM.integers(0, 256, (count, *shape), dtype=np.uint8))
    labels = torch.arange(count) % classes
    images[:, 0, 0, 0] = torch.arange(count).byte()  # says which image it is
    mean, std = datasets._statistics(images)
    return datasets.Split(images, labels, classes, mean, std)


def test_normalised_training_set_has_zero_mean_and_unit_variance(monkeypatch):
    monkeypatch.setattr(datasets, "CHUNK", 5)
    split = synthetic()
    flat = split.normalise(split.images).transpose(0, 1).flatten(1).double()
    assert flat.mean(1).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert flat.std(1, correction=0).tolist() == pytest.approx([1, 1], abs=1e-6)
    blank = torch.full((2, 1, 3, 3), 7, dtype=torch.uint8)
    assert datasets._statistics(blank)[1].item() == 1.0


def test_batches_are_a_permutation_and_follow_the_generator():
    split = synthetic()

    def epoch(generator):
        return list(datasets.batches(split, 5, generator))

    generator = torch.Generator().manual_seed(4)
    first = epoch(generator)
    state = generator.get_state()
    second = epoch(generator)
    assert [len(y) for _, y in first] == [5, 5, 5, 5]
    seen = [x * split.std + split.mean for x, _ in first]
    which = torch.cat(seen)[:, 0, 0, 0].round().long()
    assert len(set(which.tolist())) == 20
    assert torch.equal(torch.cat([y for _, y in first]), split.labels[which])
    assert not torch.equal(first[0][0], second[0][0])
    again = epoch(torch.Generator().set_state(state))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(second, again, strict=True))
    assert [len(y) for _, y in datasets.batches(split, 99, generator)] == [23]


def test_augmentation_mirrors_and_shifts():
    split = synthetic(count=200)
    images = split.images
    got = datasets.augmented(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 2, 2))
    kinds = set()
    for image, before in zip(got, padded, strict=True):
        found = [(flip, dy, dx) for flip in (False, True) for dy in range(5) for dx in range(3)
                 if torch.equal(image, (before[:, dy:dy + 16, dx:dx + 8].flip(2) if flip else
                                        before[:, dy:dy + 16, dx:dx + 8]))]
        assert len(found) == 1
        kinds.add(found[0])
    assert len(kinds) == 30  # 2 × 5 × 3, of 200 draws
