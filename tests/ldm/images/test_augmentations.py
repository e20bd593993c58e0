"""Transforms with torchvision's names: sizes, places and chances, of PIL images and of tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images import augmentations as ours
from ldm.images.augmentations import (
    CenterCrop,
    Compose,
    Pad,
    RandomApply,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomVerticalFlip,
    Resize,
    build_transform,
)
from ldm.images.tensors import PILToTensor
from ldm.util import UserError, get_obj_from_str
from tests.ldm.image_files import gradient


def image(height, width):
    return Image.fromarray(gradient(height, width))


def both(height, width):
    """Return the same image as Pillow's and as a tensor."""
    pil = image(height, width)
    return pil, PILToTensor()(pil)


def size(x):
    return tuple(x.shape[-2:]) if isinstance(x, torch.Tensor) else (x.height, x.width)


@pytest.mark.parametrize(
    ("given", "of", "expected"),
    [
        ({"size": 20}, (40, 61), (20, 30)),  # the smaller side, and the proportions rounded down
        ({"size": 20}, (61, 40), (30, 20)),
        ({"size": [20]}, (40, 61), (20, 30)),
        ({"size": [10, 30]}, (40, 61), (10, 30)),
        ({"size": 80}, (40, 61), (80, 122)),
        ({"size": 20, "max_size": 25}, (40, 61), (16, 25)),
        ({"size": 20, "max_size": 50}, (40, 61), (20, 30)),
    ],
)
def test_resize_sizes(given, of, expected):
    for x in both(*of):
        assert size(Resize(**given)(x)) == expected


@pytest.mark.parametrize(
    ("interpolation", "number"),
    [("nearest", 0), ("lanczos", 1), ("bilinear", 2), ("bicubic", 3), ("box", 4), ("hamming", 5)],
)
def test_resize_filters_are_pillows_by_name_and_number(interpolation, number):
    x = image(40, 60)
    expected = np.asarray(x.resize((30, 20), Image.Resampling(number)))
    for given in (interpolation, number, Image.Resampling(number)):
        assert np.array_equal(np.asarray(Resize(20, given)(x)), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_of_tensors_is_near_pillows_and_without_antialias_is_not(interpolation):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    pil, tensor = Image.fromarray(noise), torch.from_numpy(noise).permute(2, 0, 1)
    expected = torch.from_numpy(np.array(Resize(16, interpolation)(pil))).permute(2, 0, 1).float()
    smooth = Resize(16, interpolation)(tensor)
    assert smooth.dtype == torch.uint8
    assert (smooth.float() - expected).abs().max() <= 1.0
    assert (Resize(16, interpolation, antialias=False)(tensor).float() - expected).abs().mean() > 10
    assert (Resize(16, interpolation)(tensor.float() / 255) * 255 - expected).abs().max() <= 1.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Resize("20"), "size '20'"),
        (lambda: Resize(0), "size 0"),
        (lambda: Resize([1, 2, 3]), r"size \[1, 2, 3\]"),
        (lambda: Resize(20, "cubic"), "interpolation 'cubic'"),
        (lambda: Resize(20, max_size=20), "max_size 20"),
        (lambda: Resize(20, "lanczos")(torch.zeros(3, 40, 40)), "lanczos: tensors"),
        (lambda: RandomCrop(50)(image(40, 60)), "RandomCrop of 50x50 from an image of 40x60"),
        (lambda: Pad([1, 2, 3]), "padding"),
        (lambda: Pad(1, padding_mode="wrap")(image(4, 4)), "padding_mode 'wrap'"),
        (lambda: RandomResizedCrop(8, scale=(0.5, 0.2)), "scale"),
        (lambda: RandomResizedCrop(8, scale=[0.5]), r"scale \[0.5\]: give the minimum and the maximum"),
        (lambda: RandomCrop(8, padding_mode="wrap"), "padding_mode 'wrap' is unknown"),
        (lambda: RandomHorizontalFlip(50), "p 50: give a number from 0 to 1"),
        (lambda: RandomVerticalFlip(-1), "p -1: give a number from 0 to 1"),
        (lambda: RandomApply([], p=2), "p 2: give a number from 0 to 1"),
        (lambda: ours.RandomGrayscale(2), "p 2: give a number from 0 to 1"),
        (lambda: ours.Normalize([0.5, 0.5], [0.5]), r"mean \[0.5, 0.5\] and std \[0.5\]: give one number per channel"),
        (lambda: ours.ColorJitter(saturation="x"), "saturation 'x': give a number"),
        (lambda: build_transform("Resize"), "image_transforms 'Resize'"),
    ],
)
def test_bad_arguments_are_one_line(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize("of", [(40, 61), (61, 40), (20, 20)])
def test_center_crop_takes_the_middle(of):
    height, width = of
    pil, tensor = both(*of)
    top, left = round((height - 20) / 2), round((width - 15) / 2)
    expected = gradient(*of)[top : top + 20, left : left + 15]
    assert np.array_equal(np.asarray(CenterCrop([20, 15])(pil)), expected)
    assert np.array_equal(CenterCrop([20, 15])(tensor).permute(1, 2, 0).numpy(), expected)


def test_center_crop_of_a_smaller_image_has_a_black_edge():
    for x in both(10, 13):
        cropped = CenterCrop(20)(x)
        assert size(cropped) == (20, 20)
        values = np.asarray(cropped) if not isinstance(cropped, torch.Tensor) else cropped.permute(1, 2, 0).numpy()
        assert np.array_equal(values[5:15, 3:16], gradient(10, 13))
        assert not values[:5].any() and not values[:, 16:].any()


def test_random_crop_reaches_every_place_and_follows_the_seed():
    pil, tensor = both(12, 14)
    torch.manual_seed(0)
    first = [np.asarray(RandomCrop(10)(pil)) for _ in range(200)]
    torch.manual_seed(0)
    second = [RandomCrop(10)(tensor).permute(1, 2, 0).numpy() for _ in range(200)]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({a.tobytes() for a in first}) == 3 * 5


def test_random_crop_pads():
    for x in both(8, 30):
        assert size(RandomCrop(20, pad_if_needed=True)(x)) == (20, 20)
        assert size(RandomCrop([12, 34], padding=2)(x)) == (12, 34)


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
def test_pad_is_numpys(mode):
    expected = np.pad(gradient(6, 8), ((2, 4), (1, 3), (0, 0)), mode=mode)
    pil, tensor = both(6, 8)
    padding = Pad([1, 2, 3, 4], padding_mode=mode)
    assert np.array_equal(np.asarray(padding(pil)), expected)
    assert np.array_equal(padding(tensor).permute(1, 2, 0).numpy(), expected)
    assert size(Pad([1, 2])(pil)) == (10, 10)


def test_random_resized_crop_stays_within_its_ranges():
    crop = RandomResizedCrop(8, scale=(0.2, 0.5), ratio=(0.5, 2.0))
    torch.manual_seed(0)
    shapes = []
    for _ in range(300):
        top, left, height, width = crop.place(100, 120)
        assert 0 <= top <= 100 - height and 0 <= left <= 120 - width
        assert 0.19 < height * width / 12000 < 0.51 and 0.48 < width / height < 2.1
        shapes.append((height, width))
    assert len(set(shapes)) > 100
    for x in both(100, 120):
        assert size(crop(x)) == (8, 8)
    assert RandomResizedCrop(8).place(10, 1000) == (0, 493, 10, 13)  # where none fits: the middle


@pytest.mark.parametrize(("flip", "axis"), [(RandomHorizontalFlip, 1), (RandomVerticalFlip, 0)])
def test_flips(flip, axis):
    pil, tensor = both(4, 6)
    turned = np.flip(gradient(4, 6), axis)
    assert np.array_equal(np.asarray(flip(1.0)(pil)), turned)
    assert np.array_equal(flip(1.0)(tensor).permute(1, 2, 0).numpy(), turned)
    assert flip(0.0)(pil) is pil
    torch.manual_seed(0)
    assert 60 < sum(flip()(pil) is pil for _ in range(200)) < 140


def test_compose_takes_configs_and_random_apply_applies_all_or_none():
    described = [
        {"target": "torchvision.transforms.Resize", "params": {"size": 20, "interpolation": 3}},
        {"target": "torchvision.transforms.RandomCrop", "params": {"size": 20}},
        {"target": "torchvision.transforms.RandomHorizontalFlip"},
        {"target": "torchvision.transforms.ToTensor"},
        {"target": "torchvision.transforms.Normalize", "params": {"mean": [0.5] * 3, "std": [0.5] * 3}},
    ]
    for transform in (build_transform(described), Compose(described)):
        x = transform(image(40, 60))
        assert x.shape == (3, 20, 20) and -1 <= x.min() < -0.5 < 0.5 < x.max() <= 1
    assert size(RandomApply(described[:1], p=1.0)(image(40, 60))) == (20, 30)
    assert size(RandomApply(described[:1], p=0.0)(image(40, 60))) == (40, 60)


@pytest.mark.parametrize("name", ours.__all__)
def test_torchvisions_names_lead_here(name):
    assert get_obj_from_str(f"torchvision.transforms.{name}") is getattr(ours, name)
