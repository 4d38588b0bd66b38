import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from blockdrop_fast.data import image_files
from blockdrop_fast.data.batches import batches_of, crop_and_flip, load_dataset
from blockdrop_fast.data.image_files import CIFAR10_CLASSES, image_folder_loader
from blockdrop_fast.data.image_sets import (
    IMAGENET_NORMALIZATION,
    NO_NORMALIZATION,
    R32_C10_NORMALIZATION,
    ImageFolder,
    ImageSet,
    Normalization,
    epoch_generator,
)
from tests.data.cifar_archives import (
    cifar_rows,
    py2_pickle,
    write_as_python2,
    write_cifar10,
    write_cifar100,
    writer_with_protocol,
)


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch):
    monkeypatch.delenv("BLOCKDROP_DATA", raising=False)


def random_pixels(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_image(path, size=(32, 32), seed=0):
    """Write random pixels of a size (width, height) and return them as (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random_pixels(size[1], size[0], seed)
    Image.fromarray(pixels).save(path)
    return pixels


def write_tree(root, classes=("cat", "dog"), splits=("train", "test"), count=3, **options):
    suffix = options.pop("suffix", ".png")
    pixels = {}
    for split in splits:
        for label in classes:
            for index in range(count):
                path = root / split / label / f"{index:03d}{suffix}"
                pixels[split, label, index] = write_image(path, seed=len(pixels), **options)
    return pixels


def image_set(count=20, classes=4, size=8, **options) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    names = tuple(str(label) for label in range(classes))
    return ImageSet(images, torch.arange(count) % classes, names, "random", **options)


# --- normalisation


def test_normalization_is_mean_and_std_per_channel():
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    result = IMAGENET_NORMALIZATION.apply(images)
    assert torch.allclose(result[:, 1], (images[:, 1] - 0.456) / 0.224)
    assert torch.equal(NO_NORMALIZATION.apply(images), images)
    assert result.dtype == torch.float64
    before = images.clone()
    R32_C10_NORMALIZATION.apply(images)
    assert torch.equal(images, before)


def test_normalization_survives_its_dict():
    stored = R32_C10_NORMALIZATION.to_dict()
    assert Normalization.from_dict(stored) == R32_C10_NORMALIZATION
    assert stored["mean"][0] == 125.3 / 255


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalization((0, 0), (1, 1, 1)), "mean: expected three numbers"),
        (lambda: Normalization((0, 0, 0), (1, 0, 1)), "std: expected numbers above 0"),
        (lambda: Normalization((0, float("nan"), 0), (1, 1, 1)), "mean: expected finite"),
        (lambda: Normalization.from_dict({"mean": [0, 0, 0]}), "'mean' and 'std'"),
        (lambda: NO_NORMALIZATION.apply(torch.rand(2, 1, 4, 4)), "images: expected shape"),
    ],
)
def test_bad_normalization_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_normalization_of_integers_is_refused():
    with pytest.raises(TypeError, match="images: expected floating point"):
        NO_NORMALIZATION.apply(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


# --- digits


def test_digits_are_the_default():
    dataset = load_dataset()
    assert dataset.name == "digits"
    assert dataset.classes == tuple("0123456789")
    assert len(dataset.train) + len(dataset.test) == 1797
    assert dataset.train.images.shape[1:] == (3, 32, 32)
    assert dataset.train.images.max() == 255
    assert not dataset.train.flip
    train_counts, test_counts = (
        split.labels.bincount(minlength=10) for split in (dataset.train, dataset.test)
    )
    assert torch.equal(test_counts, (train_counts + test_counts) // 5)
    again = load_dataset()
    assert torch.equal(again.test.images, dataset.test.images)
    assert torch.equal(again.test.labels, dataset.test.labels)
    train, test = (
        {bytes(image) for image in split.images.numpy()} for split in (dataset.train, dataset.test)
    )
    assert not train & test


# --- CIFAR files


def test_hand_made_python2_pickle_is_valid():
    rows = cifar_rows(2, 0)
    content = pickle.loads(py2_pickle(b"data", rows, [3, 4], b"labels"), encoding="bytes")
    assert np.array_equal(content[b"data"], rows)
    assert content[b"labels"] == [3, 4]


@pytest.mark.parametrize("from_parent", [False, True])
@pytest.mark.parametrize(
    "write",
    [write_as_python2, *(writer_with_protocol(protocol) for protocol in (2, 4, 5))],
    ids=["python2", "protocol2", "protocol4", "protocol5"],
)
def test_cifar10_files(tmp_path, write, from_parent):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, write)
    dataset = load_dataset(tmp_path if from_parent else folder)
    assert dataset.name == dataset.train.name == "CIFAR-10"
    assert dataset.classes == CIFAR10_CLASSES
    assert dataset.train.labels.tolist()[:8] == [0, 9, 1, 2, 0, 9, 2, 2]
    expected = np.concatenate([cifar_rows(4, index) for index in range(1, 6)])
    assert np.array_equal(dataset.train.images.numpy().reshape(20, -1), expected)
    assert np.array_equal(dataset.test.images.numpy().reshape(3, -1), cifar_rows(3, 6))


def test_cifar_arrays_in_column_order(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    rows = np.asfortranarray(cifar_rows(3, 6))
    write_cifar10(folder, writer_with_protocol(4))
    writer_with_protocol(4)(folder / "test_batch", rows, [1, 2, 3], "labels")
    test = load_dataset(folder).test
    assert np.array_equal(test.images.numpy().reshape(3, -1), rows)


def test_cifar100_files(tmp_path):
    folder = tmp_path / "cifar-100-python"
    write_cifar100(folder, write_as_python2)
    for source in (folder, tmp_path):
        dataset = load_dataset(source)
        assert dataset.name == "CIFAR-100"
        assert dataset.classes[99] == "class 99"
        assert dataset.train.labels.tolist() == [99, 0, 5]
        assert np.array_equal(dataset.test.images.numpy().reshape(2, -1), cifar_rows(2, 1))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_code_in_cifar_files_is_refused(tmp_path, protocol):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, write_as_python2)
    content = {"data": Malicious(tmp_path / "owned"), "labels": []}
    (folder / "data_batch_3").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError, match=r"data_batch_3.*refused.*mkdir"):
        load_dataset(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["builtins\neval", "numpy\nload", "numpy.core.multiarray\nfoo"])
def test_other_functions_in_cifar_files_are_refused(tmp_path, name):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, write_as_python2)
    (folder / "test_batch").write_bytes(b"\x80\x02c" + name.encode() + b"\n.")
    with pytest.raises(ValueError, match="refused"):
        load_dataset(folder)


def test_object_arrays_in_cifar_files_are_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, write_as_python2)
    content = {"data": np.array([[1, None]], dtype=object), "labels": [0]}
    (folder / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="expected uint8"):
        load_dataset(folder)


def test_truncated_and_missing_cifar_files_are_named(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, write_as_python2)
    whole = (folder / "data_batch_2").read_bytes()
    (folder / "data_batch_2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="data_batch_2: damaged"):
        load_dataset(folder)
    (folder / "data_batch_2").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_2"):
        load_dataset(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": cifar_rows(2, 0), "labels": [1]}, "expected 2 integers under 'labels'"),
        ({"data": cifar_rows(2, 0), "labels": [1, 10]}, "expected 0 to 9, got 1 to 10"),
        ({"data": cifar_rows(2, 0)[:, :5], "labels": [1, 1]}, r"expected shape \(N, 3072\)"),
        ({"labels": [1]}, "expected an array under 'data', got NoneType"),
    ],
)
def test_wrong_content_of_cifar_files_is_named(tmp_path, content, message):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, write_as_python2)
    (folder / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"test_batch: .*{message}"):
        load_dataset(folder)


# --- image folders


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_small_image_tree_is_read_exactly(tmp_path, test_name):
    splits = ("train", test_name)
    pixels = write_tree(tmp_path, classes=("dog", "ant", "bee"), splits=splits, size=(20, 12))
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    files_before = sorted(tmp_path.rglob("*"))
    dataset = load_dataset(str(tmp_path))
    assert dataset.classes == ("ant", "bee", "dog")
    assert dataset.name == tmp_path.name
    assert dataset.train.image_size == (12, 20)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for split, images in (("train", dataset.train.images), (test_name, dataset.test.images)):
        for row, image in enumerate(images.numpy()):
            expected = pixels[split, dataset.classes[row // 3], row % 3]
            assert np.array_equal(image.transpose(1, 2, 0), expected)
    assert sorted(tmp_path.rglob("*")) == files_before


def test_grey_images_and_nested_folders_are_read(tmp_path):
    write_tree(tmp_path, classes=("a",), count=1)
    nested = tmp_path / "train" / "a" / "images" / "x.PNG"
    nested.parent.mkdir()
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(nested)
    dataset = load_dataset(tmp_path)
    assert len(dataset.train) == 2
    assert (dataset.train.images[1] == 7).all()


@pytest.mark.parametrize(
    ("suffix", "size", "name"),
    [
        (".jpg", (32, 32), "CIFAR-10 (JPEG)"),
        (".png", (32, 32), "CIFAR-10 (PNG)"),
        (".jpg", (16, 16), "mine"),
    ],
)
def test_display_name_of_cifar10_trees(tmp_path, suffix, size, name):
    root = tmp_path / "mine"
    write_tree(root, classes=CIFAR10_CLASSES, count=1, suffix=suffix, size=size)
    dataset = load_dataset(root)
    assert dataset.name == dataset.train.name == dataset.test.name == name


def test_environment_names_the_data(tmp_path, monkeypatch):
    write_tree(tmp_path / "photos")
    monkeypatch.setenv("BLOCKDROP_DATA", str(tmp_path / "photos"))
    assert load_dataset().name == "photos"
    monkeypatch.setenv("BLOCKDROP_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"BLOCKDROP_DATA: the folder .*gone"):
        load_dataset()


def test_val_serves_when_test_has_no_classes(tmp_path):
    write_tree(tmp_path, splits=("train", "val"))
    write_image(tmp_path / "test" / "unlabelled.png")
    assert len(load_dataset(tmp_path).test) == 6


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: the folder .*nowhere"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        load_dataset(tmp_path / "file")
    with pytest.raises(ValueError, match="no data set recognised"):
        load_dataset(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="neither test/ nor val/"):
        load_dataset(tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"train' has no class folders"):
        load_dataset(tmp_path)


def test_several_data_sets_in_one_folder_are_ambiguous(tmp_path):
    write_tree(tmp_path)
    write_cifar10(tmp_path / "cifar-10-batches-py", write_as_python2)
    with pytest.raises(ValueError, match="several data sets found"):
        load_dataset(tmp_path)


def test_classes_that_differ_between_splits_are_named(tmp_path):
    write_tree(tmp_path, classes=("cat", "dog"), splits=("train",))
    write_tree(tmp_path, classes=("cat", "emu"), splits=("test",))
    with pytest.raises(ValueError, match=r"only in train/ dog, only in test/ emu"):
        load_dataset(tmp_path)


def test_class_without_images_is_named(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "test" / "owl").mkdir()
    (tmp_path / "train" / "owl").mkdir()
    with pytest.raises(ValueError, match=r"train/owl' holds no images"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("index", [0, 2], ids=["header", "decoding"])
@pytest.mark.parametrize("damage", ["text", "truncated"])
def test_unreadable_image_is_named(tmp_path, index, damage):
    write_tree(tmp_path, size=(48, 48))
    path = tmp_path / "train" / "dog" / f"{index:03d}.png"
    content = path.read_bytes()
    path.write_bytes(b"not an image" if damage == "text" else content[: len(content) // 2])
    with pytest.raises(OSError, match=rf"cannot read the image '.*dog/{index:03d}\.png'"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_of_mixed_sizes_are_named(tmp_path, split):
    write_tree(tmp_path)
    write_image(tmp_path / split / "dog" / "001.png", size=(32, 31))
    with pytest.raises(ValueError, match=r"mixed sizes: '.*001\.png' is 32×31, .* is 32×32"):
        load_dataset(tmp_path)


# --- image sets


def test_subset_is_reproducible_and_keeps_the_order():
    whole = image_set(20)
    part = whole.subset(7, seed=5)
    assert len(part) == 7
    where = [int((whole.images == image).flatten(1).all(1).nonzero()) for image in part.images]
    assert where == sorted(set(where))
    assert torch.equal(part.labels, whole.labels[where])
    assert torch.equal(part.images, whole.subset(7, seed=5).images)
    assert not torch.equal(part.images, whole.subset(7, seed=6).images)
    assert len(whole.subset(0)) == 0
    with pytest.raises(ValueError, match="n: expected 0 to 20, got 21"):
        whole.subset(21)


def test_to_moves_images_and_labels():
    moved = image_set(4).to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 3, 8, 8)}, "images: expected uint8"),
        ({"images": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, "images: expected uint8"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels: expected int64"),
        ({"labels": torch.zeros(4)}, "labels: expected int64"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, "labels: expected 0 to 1, got 0 to 3"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "labels: expected 0 to 1, got -1 to 1"),
    ],
)
def test_bad_image_set_is_refused(change, message):
    fields = {
        "images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 1, 0]),
    }
    with pytest.raises(ValueError, match=message):
        ImageSet(**{**fields, **change}, classes=("a", "b"), name="bad")


# --- batches of images in memory


def test_plain_batches_are_the_normalised_images_in_order():
    split = image_set(10)
    result = list(batches_of(split, 4, normalization=IMAGENET_NORMALIZATION))
    assert [len(labels) for _, labels in result] == [4, 4, 2]
    expected = IMAGENET_NORMALIZATION.apply(split.images.float() / 255)
    assert torch.equal(torch.cat([images for images, _ in result]), expected)
    assert torch.equal(torch.cat([labels for _, labels in result]), split.labels)


@pytest.mark.parametrize(
    ("count", "drop_last", "lengths"),
    [(10, True, [4, 4]), (8, False, [4, 4]), (3, True, []), (0, False, []), (3, False, [3])],
)
def test_number_of_batches(count, drop_last, lengths):
    loader = batches_of(image_set(count), 4, drop_last=drop_last, shuffle=True, augment=True)
    assert len(loader) == len(lengths)
    assert [len(labels) for _, labels in loader] == lengths


def test_shuffling_permutes_images_with_their_labels():
    split = image_set(50)
    images, labels = next(batches_of(split, 50, shuffle=True, seed=1))
    assert not torch.equal(labels, split.labels)
    originals = {
        bytes(image.numpy()): int(label)
        for image, label in zip(split.images, split.labels, strict=True)
    }
    restored = (images * 255).round().to(torch.uint8)
    assert len({bytes(image.numpy()) for image in restored}) == 50
    for image, label in zip(restored, labels, strict=True):
        assert originals[bytes(image.numpy())] == label


def test_epochs_are_functions_of_seed_and_number():
    split = image_set(40)

    def epoch(seed, number):
        torch.rand(3)  # other random draws must not matter
        return next(batches_of(split, 40, shuffle=True, augment=True, seed=seed, epoch=number))[0]

    first = epoch(1, 2)
    assert torch.equal(first, epoch(1, 2))
    for other in ((1, 3), (2, 2), (2, 1)):
        assert not torch.equal(first, epoch(*other))
    state = torch.random.get_rng_state()
    list(batches_of(split, 8, shuffle=True, augment=True))
    assert torch.equal(state, torch.random.get_rng_state())


def test_augmentation_does_not_depend_on_the_batch_size():
    split = image_set(13)
    whole = next(batches_of(split, 13, shuffle=True, augment=True, seed=3))[0]
    parts = torch.cat(
        [images for images, _ in batches_of(split, 4, shuffle=True, augment=True, seed=3)]
    )
    assert torch.equal(whole, parts)


def test_epoch_generator_is_fixed_over_versions():
    # Resuming a training under a newer numpy or torch must not change its random draws.
    assert epoch_generator(0, 0).initial_seed() == 7896617691693857887
    assert epoch_generator(3, 1).initial_seed() == 5712964121383671236


def expected_crop(image: np.ndarray, row: int, column: int, flip: bool) -> np.ndarray:
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 8, width + 8), image.dtype)
    padded[:, 4:-4, 4:-4] = image
    crop = padded[:, row : row + height, column : column + width]
    return crop[:, :, ::-1] if flip else crop


def test_crop_and_flip_of_every_offset():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (162, 3, 6, 10), generator=generator, dtype=torch.uint8)
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9)).repeat(2, 1)
    flips = torch.arange(162) >= 81
    result = crop_and_flip(images, offsets, flips)
    assert result.is_contiguous()
    for index in range(162):
        row, column = offsets[index].tolist()
        expected = expected_crop(images[index].numpy(), row, column, bool(flips[index]))
        assert np.array_equal(result[index].numpy(), expected)
    assert torch.equal(result[40], images[40])  # offset (4, 4): the image itself
    assert crop_and_flip(images[:0], offsets[:0], flips[:0]).shape == (0, 3, 6, 10)


def find_augmentation(original: np.ndarray, augmented: np.ndarray) -> tuple[int, int, bool]:
    for row in range(9):
        for column in range(9):
            for flip in (False, True):
                if np.array_equal(expected_crop(original, row, column, flip), augmented):
                    return row, column, flip
    raise AssertionError("no crop of the padded image")


@pytest.mark.parametrize(
    ("set_flip", "flip", "flipped"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_augmentation_draws_a_crop_and_a_flip_for_each_image(set_flip, flip, flipped):
    split = image_set(120, flip=set_flip)
    images, labels = next(batches_of(split, 120, augment=True, flip=flip, seed=4))
    pixels = (images * 255).round().to(torch.uint8).numpy()
    drawn = [find_augmentation(*pair) for pair in zip(split.images.numpy(), pixels, strict=True)]
    assert torch.equal(labels, split.labels)
    assert {row for row, _, _ in drawn} == set(range(9))
    assert {column for _, column, _ in drawn} == set(range(9))
    assert len({(row, column) for row, column, _ in drawn}) > 40
    share = sum(flip for _, _, flip in drawn) / len(drawn)
    assert 0.3 < share < 0.7 if flipped else share == 0


@pytest.mark.parametrize("augment", [False, True])
def test_memory_format_changes_only_the_layout(augment):
    split = image_set(6)
    options = {"augment": augment, "normalization": R32_C10_NORMALIZATION, "seed": 2}
    plain = next(batches_of(split, 6, **options))[0]
    last = next(batches_of(split, 6, memory_format=torch.channels_last, **options))[0]
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


def test_iterating_leaves_the_images_alone():
    split = image_set(6)
    before = split.images.clone()
    for images, _ in batches_of(split, 6, augment=True):
        images.zero_()
    for images, _ in batches_of(split, 6):
        images.zero_()
    assert torch.equal(split.images, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed: expected a number from 0 on, got -1"),
        ({"epoch": -1}, ValueError, "epoch: expected a number from 0 on, got -1"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format: expected"),
        ({"image_set": torch.zeros(3)}, TypeError, "image_set: expected an ImageSet"),
    ],
)
def test_bad_batch_arguments_are_named_at_the_call(options, error, message):
    with pytest.raises(error, match=message):
        batches_of(**{"image_set": image_set(4), "batch_size": 2, **options})


# --- batches of image files


@pytest.fixture
def large_tree(tmp_path):
    root = tmp_path / "photos"
    write_tree(root, classes=("a", "b"), splits=("train", "val"), count=3, size=(90, 70))
    return root


def test_large_images_stay_in_their_files(large_tree):
    dataset = load_dataset(large_tree)
    assert isinstance(dataset.train, ImageFolder)
    assert dataset.train.image_size == (224, 224)
    assert dataset.train.num_classes == 2
    loader = batches_of(dataset.test, 4, normalization=IMAGENET_NORMALIZATION, workers=0)
    assert len(loader) == 2
    result = list(loader)
    assert [tuple(images.shape) for images, _ in result] == [(4, 3, 224, 224), (2, 3, 224, 224)]
    assert torch.cat([labels for _, labels in result]).tolist() == [0, 0, 0, 1, 1, 1]
    assert len(dataset.train.subset(2)) == 2


def test_one_large_class_is_enough_for_files(tmp_path):
    write_tree(tmp_path)
    write_image(tmp_path / "train" / "dog" / "000.png", size=(65, 65))
    assert isinstance(load_dataset(tmp_path).train, ImageFolder)


def test_evaluation_resizes_the_shorter_side_and_crops_the_center(tmp_path):
    path = tmp_path / "val" / "a" / "x.png"
    pixels = write_image(path, size=(400, 320))
    images, labels = next(iter(image_folder_loader(tmp_path, "val", 1, workers=0)))
    resized = np.asarray(Image.fromarray(pixels).resize((320, 256), Image.Resampling.BILINEAR))
    assert images.dtype == torch.uint8
    assert np.array_equal(images[0].numpy().transpose(1, 2, 0), resized[16:240, 48:272])
    assert labels.tolist() == [0]


def test_loader_and_batches_agree(large_tree):
    split = load_dataset(large_tree).train
    raw, _ = next(iter(image_folder_loader(large_tree, "train", 6, workers=0)))
    normalised, _ = next(
        iter(
            image_folder_loader(
                large_tree, "train", 6, workers=0, normalization=IMAGENET_NORMALIZATION
            )
        )
    )
    batch, _ = next(batches_of(split, 6, normalization=IMAGENET_NORMALIZATION, workers=0))
    assert torch.equal(batch, normalised)
    assert torch.equal(batch, IMAGENET_NORMALIZATION.apply(raw.float() / 255))


def test_training_crops_do_not_depend_on_workers(large_tree):
    def epoch(workers, number=0):
        options = {"train": True, "seed": 1, "epoch": number, "workers": workers}
        return list(image_folder_loader(large_tree, "train", 2, **options))

    here, elsewhere, later = epoch(0), epoch(2), epoch(0, number=1)
    assert len(here) == 3
    for (images, labels), (other_images, other_labels) in zip(here, elsewhere, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
    assert not torch.equal(here[0][0], later[0][0])


def test_training_crops_differ_between_images_epochs_and_seeds(large_tree):
    split = load_dataset(large_tree).train.subset(1)
    twice = ImageFolder(split.paths * 2, split.labels.repeat(2), split.classes, split.name)

    def crops(seed, number):  # unshuffled, so that only the crops can differ
        return next(batches_of(twice, 2, augment=True, seed=seed, epoch=number, workers=0))[0]

    first = crops(0, 0)
    assert torch.equal(first, crops(0, 0))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], crops(0, 1)[0])
    assert not torch.equal(first[0], crops(1, 0)[0])


@pytest.mark.parametrize("size", [(90, 70), (400, 20), (20, 400), (1, 1)])
def test_random_crops_lie_within_the_stated_ranges(size, monkeypatch):
    boxes = []
    crop = Image.Image.crop
    monkeypatch.setattr(
        Image.Image, "crop", lambda self, box=None: boxes.append(box) or crop(self, box)
    )
    image = Image.new("RGB", size)
    random = np.random.default_rng(0)
    for _ in range(100):
        assert image_files._random_resized_crop(image, random).size == (224, 224)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        # Half a pixel of rounding on each side.
        assert (right - left + 0.5) / (bottom - top - 0.5) >= 3 / 4
        assert (right - left - 0.5) / (bottom - top + 0.5) <= 4 / 3
    if size == (90, 70):
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
        assert 0.07 * 6300 < min(areas) < 0.2 * 6300
        assert 0.7 * 6300 < max(areas) <= 6300


def test_unreadable_image_file_is_named_while_loading(large_tree):
    (large_tree / "train" / "b" / "001.png").write_bytes(b"broken")
    for workers in (0, 1):
        with pytest.raises(OSError, match=r"cannot read the image '.*b/001\.png'"):
            list(batches_of(load_dataset(large_tree).train, 2, workers=workers))


def test_bad_loader_arguments(large_tree):
    with pytest.raises(FileNotFoundError, match="nosuch"):
        image_folder_loader(large_tree, "nosuch", 2)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        image_folder_loader(large_tree, "train", 0)
    with pytest.raises(ValueError, match="workers: expected at least 0, got -1"):
        image_folder_loader(large_tree, "train", 2, workers=-1)
