"""Image files of all kinds, also broken ones, and what ``cnnmpi.predict`` says of them."""

import base64
import csv
import errno
import html.parser
import io
import json
import os
import re
import struct
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnmpi import SimpleCNN, checkpoint
from cnnmpi.common.text import printable
from cnnmpi.data import DataError, normalize
from cnnmpi.data.images import fit, read_fitted, read_image
from cnnmpi.functional import softmax
from cnnmpi.gallery import evenly
from cnnmpi.machine import usable_cores
from cnnmpi.predict import main, predictions
from cnnmpi.train.state import model_attributes, pack

CLASSES = ["a[/b]", ":smile:", "a\nb", "猫"]
MEAN, STD = 0.4, 0.3


def picture(height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.fixture(params=[3, 1])
def model(request, tmp_path: Path) -> tuple[Path, SimpleCNN]:
    options = {"in_channels": request.param, "num_classes": 4, "image_size": [28, 20]}
    net = SimpleCNN(**options)
    net.eval()
    path = tmp_path / "model.h5"
    stated = {"classes": CLASSES, "mean": [MEAN] * request.param, "std": [STD] * request.param}
    checkpoint.save(path, pack(net), model_attributes("simplecnn", options, net) | stated)
    return path, net


# -- pixels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_a_picture_is_turned_as_its_orientation_says(tmp_path, orientation, kind):
    upright = picture()
    stored = {  # what a camera stores so that the viewer's turn gives the upright picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "webp" else {}
    path = saved(tmp_path / f"p.{kind}", Image.fromarray(np.ascontiguousarray(stored)), exif=exif, **lossless)
    assert np.array_equal(read_image(path), upright)


def test_an_orientation_that_cannot_be_read_is_none(tmp_path):
    path = saved(tmp_path / "p.png", Image.fromarray(picture()), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09broken")
    assert np.array_equal(read_image(path), picture())


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
def test_gray_of_16_bits_is_scaled(tmp_path, kind):
    gray = picture(channels=1)
    path = saved(tmp_path / f"p.{kind}", Image.fromarray(gray[:, :, 0].astype(np.uint16) * 257))
    assert np.array_equal(read_image(path, 1), gray)
    assert np.array_equal(read_image(path, 3), gray.repeat(3, axis=2))


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    for kind in ("png", "tiff", "pgm"):
        path = saved(tmp_path / f"p.{kind}", Image.fromarray(np.full((4, 4), 200, np.uint16)))
        assert (read_image(path, 1) == 1).all()


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int32, [0, 1, 255], [0, 1, 255]),  # as 8 bits
        (np.int32, [0, 257, 65535], [0, 1, 255]),  # as 16 bits
        (np.int32, [0, 1 << 20, 1 << 30], [0, 0, 255]),  # as what there is
        (np.int32, [-100, 0, 100], [0, 128, 255]),
        (np.float32, [0, 0.5, 1], [0, 128, 255]),
        (np.float32, [0, 100, 255], [0, 100, 255]),
        (np.float32, [0, 25700, 65535], [0, 100, 255]),
        (np.float32, [-1, 0, 1], [0, 128, 255]),
        (np.float32, [0, 0, 0], [0, 0, 0]),
        (np.float32, [-5, -5, -5], [0, 0, 0]),
        (np.float32, [-3e38, 0, 3e38], [0, 0, 0]),  # no range of float32: nothing to see, and no warning
    ],
)
def test_numbers_without_a_range_are_scaled_by_what_they_are(tmp_path, dtype, values, expected):
    path = saved(tmp_path / "p.tiff", Image.fromarray(np.array([values], dtype)))
    assert read_image(path, 1)[0, :, 0].tolist() == expected


def test_numbers_that_are_none_are_refused(tmp_path):
    path = saved(tmp_path / "p.tiff", Image.fromarray(np.array([[0, np.nan, np.inf]], np.float32)))
    with pytest.raises(DataError, match="pixels that are no numbers"):
        read_image(path)


def transparent(mode: str) -> tuple[Image.Image, dict]:
    """Two pixels that show, two hidden ones of another colour."""
    alpha = Image.fromarray(np.array([[255, 255, 0, 0]], np.uint8))
    gray = Image.fromarray(np.array([[10, 200, 30, 0]], np.uint8))
    if mode in ("LA", "RGBA"):
        image = gray.convert(mode)
        image.putalpha(alpha)
        return image, {}
    if mode == "P":
        image = Image.fromarray(np.array([[1, 2, 3, 3]], np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 10, 10, 10, 200, 200, 200, 30, 30, 30])
        return image, {"transparency": 3}
    image = Image.fromarray(np.array([[10, 200, 30, 30]], np.uint8)).convert(mode)
    return image, {"transparency": 30 if mode == "L" else (30, 30, 30)}


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "RGB"])
def test_what_is_transparent_shows_white(tmp_path, mode):
    image, options = transparent(mode)
    path = saved(tmp_path / "p.png", image, **options)
    for channels in (1, 3):
        assert read_image(path, channels)[0].tolist() == [[value] * channels for value in (10, 200, 255, 255)]


def test_a_palette_with_alpha_shows_white(tmp_path, monkeypatch):
    image = Image.new("PA", (2, 1))
    image.putpalette([10, 10, 10])
    image.putpixel((0, 0), (0, 255))
    image.putpixel((1, 0), (0, 0))
    path = saved(tmp_path / "p.png", Image.new("L", (1, 1)))
    monkeypatch.setattr(Image, "open", lambda path: image)  # no format that Pillow writes holds this mode
    assert read_image(path, 1)[0, :, 0].tolist() == [10, 255]


def test_half_transparent_is_half_white(tmp_path):
    path = saved(tmp_path / "p.png", Image.new("RGBA", (1, 1), (0, 0, 200, 127)))
    assert read_image(path)[0, 0].tolist() == [128, 128, 228]


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "jpeg"), ("CMYK", "tiff"), ("1", "png"), ("YCbCr", "jpeg")])
def test_other_modes_give_the_colour_that_pillow_sees(tmp_path, mode, kind):
    image = Image.fromarray(picture(16, 16)).convert(mode)
    path = saved(tmp_path / f"p.{kind}", image)
    with Image.open(path) as read:
        expected = np.asarray(read.convert("RGB"))
    assert np.array_equal(read_image(path), expected)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_of_several_frames_the_first_is_seen(tmp_path, kind):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "webp" else {}
    path = saved(tmp_path / f"p.{kind}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert (read_image(path) == [255, 0, 0]).all()


@pytest.mark.parametrize("size", [(29, 29), (1, 1), (1, 500), (500, 1), (28, 28), (57, 41), (97, 203), (30, 31)])
@pytest.mark.parametrize("to", [(28, 28), (32, 32), (7, 20)])
def test_any_size_fits(size, to):
    for channels in (1, 3):
        assert fit(picture(*size, channels), *to).shape == (*to, channels)
    assert (fit(np.full((*size, 3), 77, np.uint8), *to) == 77).all()


def test_sizes_that_rounding_makes_larger_than_the_image_fit():
    for side in range(1, 200):
        for model in (16, 28, 32, 96, 224):
            assert fit(np.zeros((side, side + 3, 1), np.uint8), model, model).shape == (model, model, 1)


# -- what cannot be read -----------------------------------------------------------------------------------------------


def png(*chunks: tuple[bytes, bytes], broken: bool = False) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data) ^ (broken and kind == b"IHDR")
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


HEAD = (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
BODY, END = (b"IDAT", zlib.compress(bytes(20))), (b"IEND", b"")
BROKEN = {
    "nothing": b"",
    "text": b"no image",
    "half a signature": b"\x89PNG",
    "a chunk with a wrong checksum": png(HEAD, BODY, END, broken=True),
    "no pixels": png(HEAD, END),
    "pixels that are not compressed": png(HEAD, (b"IDAT", bytes(20)), END),
    "a short header": png((b"IHDR", b"\0\0"), END),
    "an enormous header": png((b"IHDR", struct.pack(">IIBBBBB", 1 << 30, 1 << 30, 8, 2, 0, 0, 0)), BODY, END),
    "no width": png((b"IHDR", struct.pack(">IIBBBBB", 0, 4, 8, 0, 0, 0, 0)), BODY, END),
    "a large text": png(HEAD, (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 24))), BODY, END),
    "PPM without numbers": b"P6\n",
    "PPM of letters": b"P6 a b 255\n",
    "PPM of few pixels": b"P6 100 100 255\nabc",
    "PPM of a wrong maximum": b"P6 2 2 99999999\n" + bytes(12),
    "plain PPM of letters": b"P3 2 2 255\n1 2 x 4",
    "TIFF of nothing": b"II*\0\x08\0\0\0",
    "TIFF of tags only": b"II*\0\x08\0\0\0\x01\0\0\x01\x03\0\x01\0\0\0\x04\0\0\0\0\0\0\0",
    "GIF of nothing": b"GIF89a",
    "JPEG of nothing": b"\xff\xd8\xff\xe0",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n%%EOF\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_image_is_refused_in_one_line(tmp_path, name, capfd):
    path = tmp_path / "p.png"
    path.write_bytes(BROKEN[name])
    with pytest.raises(DataError) as refusal:
        read_image(path)
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < len(str(path)) + 250
    assert capfd.readouterr() == ("", "")  # nor do the libraries below say anything


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "gif", "webp", "ppm", "bmp"])
@pytest.mark.filterwarnings("error")
def test_damage_anywhere_gives_an_image_or_one_line(tmp_path, kind, capfd):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(16, 16)).save(buffer, kind, **({} if kind in ("ppm", "bmp", "gif") else {"exif": exif}))
    whole, draw = buffer.getvalue(), np.random.default_rng(1)
    path = tmp_path / "p"
    for attempt in range(150):
        damaged = bytearray(whole)
        if attempt % 3 == 0:
            damaged = damaged[: draw.integers(len(whole))]
        for _ in range(draw.integers(1, 6)):
            if damaged:
                damaged[draw.integers(min(len(damaged), 400))] = draw.integers(256)
        path.write_bytes(damaged)
        try:
            image = read_image(path)
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
    assert capfd.readouterr().err == ""


def test_places_that_are_no_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (
        ("pipe", "not a file"),
        (".", "not a file"),
        ("gone.png", "No such file or directory"),
        ("x" * 300, "File name too long"),
        ("loop", "Too many levels of symbolic links"),
        ("nul\0", "not a readable image"),
    ):
        with pytest.raises(DataError, match=reason):
            read_image(tmp_path / name)


@pytest.mark.filterwarnings("error")
def test_more_pixels_than_anyone_wants_are_refused_before_they_take_memory(tmp_path, monkeypatch):
    path = saved(tmp_path / "p.png", Image.new("L", (100, 100)))
    for limit, fine in ((10_000, True), (6_000, True), (4_999, False)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        if fine:
            assert read_image(path).shape == (100, 100, 3)
        else:
            with pytest.raises(DataError, match="exceeds limit of 9998 pixels"):
                read_image(path)


# -- the command -------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_model(model, tmp_path, capsys):
    path, net = model
    pixels = picture(28, 20)
    gray = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
    image = saved(tmp_path / "p.png", Image.fromarray(pixels))
    assert main([str(path), str(image), "--top", "4"]) == 0
    out = capsys.readouterr().out
    channels = net.features.layers[0].in_c
    x = (pixels if channels == 3 else gray).transpose(2, 0, 1)[None]
    row = softmax(net.forward(normalize(x, [MEAN] * channels, [STD] * channels)))[0]
    shown = ["a[/b]", ":smile:", "a\\nb", "猫"]
    expected = "  ".join(f"{shown[k]} {row[k]:.1%}" for k in np.argsort(-row, kind="stable"))
    assert out == f"{image}: {expected}\n"


def test_a_picture_and_its_mirror_image_are_seen_alike_with_tta(model, tmp_path, capsys):
    path, _ = model
    pixels, said = picture(28, 20), {}
    for name, seen in (("a.png", pixels), ("b.png", pixels[:, ::-1])):
        image = saved(tmp_path / name, Image.fromarray(seen))
        for tta in ("none", "flip"):
            assert main([str(path), str(image), "--top", "4", "--tta", tta]) == 0
            said[name, tta] = capsys.readouterr().out.split(": ", 1)[1]
    assert said["a.png", "flip"] == said["b.png", "flip"]
    assert said["a.png", "none"] != said["b.png", "none"]


def test_probabilities_are_those_of_the_engine_that_is_asked_for(model, tmp_path, capsys):
    pytest.importorskip("torch")
    path, net = model
    image, channels = saved(tmp_path / "p.png", Image.fromarray(picture(28, 20))), net.features.layers[0].in_c
    x = normalize(read_image(image, channels).transpose(2, 0, 1)[None], [MEAN] * channels, [STD] * channels)
    logits = net.to_torch(precision="bfloat16").forward(net.as_array(x))
    expected = sorted((f"{p:.1%}" for p in softmax(net.F.to_numpy(logits))[0]), key=lambda text: -float(text[:-1]))
    engine = ["--backend", "torch", "--precision", "bfloat16"]
    assert main([str(path), str(image), "--top", "4", *engine]) == 0
    assert re.findall(r"\S+%", capsys.readouterr().out) == expected
    assert main([str(path), str(image), *engine[:3], "tf32"]) == 2
    assert "precision tf32 is a GPU's" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["crop", "pad", "stretch", "", "something else"])
def test_a_model_sees_in_prediction_what_it_saw_in_training(tmp_path, capsys, monkeypatch, how):
    options = {"in_channels": 3, "num_classes": 4, "image_size": [28, 20]}
    net, path, seen = SimpleCNN(**options), tmp_path / "model.h5", []
    stated = {"classes": CLASSES, "mean": [MEAN] * 3, "std": [STD] * 3, "data_fit": how}
    checkpoint.save(path, pack(net), model_attributes("simplecnn", options, net) | stated)
    image = saved(tmp_path / "p.png", Image.fromarray(picture(90, 40)))
    monkeypatch.setattr(
        "cnnmpi.predict.predictions", lambda model, images, *rest: seen.extend(images) or np.ones((1, 4))
    )
    assert main([str(path), str(image)]) == 0
    expected = fit(picture(90, 40), 28, 20, how if how in ("pad", "stretch") else "crop")
    assert np.array_equal(seen[0], expected)


def test_bad_files_are_named_and_the_good_ones_predicted(model, tmp_path, capsys):
    path, _ = model
    good = [saved(tmp_path / f"{k}.png", Image.fromarray(picture(29 + k, 29))) for k in range(3)]
    (tmp_path / "bad.png").write_bytes(b"no image")
    os.mkfifo(tmp_path / "pipe")
    names = [good[0], tmp_path / "bad.png", good[1], tmp_path / "pipe", tmp_path / "gone.png", good[2]]
    assert main([str(path), *map(str, names)]) == 0
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(name) for name in good]
    *errors, last = err.splitlines()
    assert all(line.startswith("cnnmpi.predict: error: ") for line in errors) and len(errors) == 3
    assert last == "cnnmpi.predict: 3 of 6 files could not be read"
    assert main([str(path), *map(str, names), "--strict"]) == 2
    assert capsys.readouterr() == (out, err)  # what a script asks for by that is the code alone
    assert main([str(path), *map(str, names[3:5])]) == 2, "nothing could be read"
    capsys.readouterr()
    assert main([str(path), *map(str, good)]) == 0
    assert capsys.readouterr() == (out, "")  # the bad ones changed nothing


def test_many_images_take_no_more_memory_than_a_batch(model, tmp_path, capsys, monkeypatch):
    path, _ = model
    monkeypatch.setattr("cnnmpi.train.evaluation.BATCH", 4)
    images = [str(saved(tmp_path / f"{k}.png", Image.fromarray(picture(40, 40)))) for k in range(2)]
    peaks = []
    for count in (8, 8, 80):
        tracemalloc.start()
        assert main([str(path), *(images * (count // 2))]) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(capsys.readouterr().out.splitlines()) == count
    # the paths and lines of 72 more images take some kB, their activations would take 14 MB; 1 MB are those of a batch,
    # and threads may or may not have reached the largest ones at the same time
    assert peaks[2] < peaks[1] + 1e6 * usable_cores()


@pytest.mark.parametrize("top", ["0", "-1", "5", "99"])
def test_a_number_of_classes_that_there_are_not_is_refused(model, tmp_path, capsys, top):
    image = saved(tmp_path / "p.png", Image.fromarray(picture()))
    assert main([str(model[0]), str(image), f"--top={top}"]) == 2
    out, err = capsys.readouterr()
    assert not out and f"--top {top}: the model knows 4 classes; name a number from 1 to 4" in err
    assert err.count("\n") == 1


def test_as_many_classes_as_there_are_suffice_by_default(tmp_path, capsys):
    options = {"in_channels": 1, "num_classes": 2, "image_size": 8}
    net, path = SimpleCNN(**options), tmp_path / "model.h5"
    stated = {"classes": ["yes", "no"], "mean": [0.5], "std": [0.5]}
    checkpoint.save(path, pack(net), model_attributes("simplecnn", options, net) | stated)
    image = saved(tmp_path / "p.png", Image.fromarray(picture()))
    assert main([str(path), str(image)]) == 0
    assert len(re.findall("%", capsys.readouterr().out)) == 2


def test_what_cannot_predict_is_refused_in_one_line(model, tmp_path, capsys):
    image = saved(tmp_path / "p.png", Image.fromarray(picture()))
    options = {"in_channels": 2, "num_classes": 2, "image_size": 8}
    net, two = SimpleCNN(**options), tmp_path / "two.h5"
    stated = {"classes": ["yes", "no"], "mean": [0.5] * 2, "std": [0.5] * 2}
    checkpoint.save(two, pack(net), model_attributes("simplecnn", options, net) | stated)
    for arguments, message in (
        ([model[0]], "name at least one image"),
        ([image, image], "not a cnnmpi checkpoint"),
        ([tmp_path, image], "cannot be read"),
        ([two, image], "takes images of 2 channels: an image file has 1 or 3"),
    ):
        assert main([str(each) for each in arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("loss", "counted"),
    [
        ("cross_entropy", {}),
        ("binary_cross_entropy", {"best_test_acc": 0.5}),
        ("mse", {}),
        (None, {}),
        ("nets.py:mine", {"best_test_loss": 0.5}),  # the targets are no classes: who knows what the outputs are
        ("nets.py:mine", {"best_test_acc": -1}),
        ("nets.py:mine", {"best_val_acc": 0.5}),
    ],
)
def test_what_is_printed_is_what_the_model_was_trained_to_give(tmp_path, capsys, model, loss, counted):
    path, net = model
    arrays, attributes = checkpoint.load(path)
    config = {"config": json.dumps({"loss": loss})} if loss else {}  # written by another program
    checkpoint.save(path, arrays, attributes | {"classes": list("abcd")} | config | counted)
    image = saved(tmp_path / "a.png", Image.fromarray(picture(28, 20)))
    channels = len(attributes["mean"])
    pixels = read_image(image, channels)
    logits = net.forward(normalize(pixels.transpose(2, 0, 1)[None], [MEAN] * channels, [STD] * channels))[0]
    assert main([str(path), str(image), "--top", "4"]) == 0
    printed = dict(re.findall(r"(\w) (\S+?)%?(?=  |$)", capsys.readouterr().out.split(": ")[1].strip()))
    expected = {
        "binary_cross_entropy": 100 / (1 + np.exp(-logits)),
        "mse": logits,
    }.get(loss, logits if "best_test_loss" in counted else 100 * softmax(logits))
    for name, value in zip("abcd", expected, strict=True):
        assert float(printed[name]) == pytest.approx(float(value), abs=0.06, rel=0.006), "as rounded for people"


def test_settings_that_can_be_none_are_refused_as_evaluate_does(tmp_path, capsys, model):
    path, _ = model
    arrays, attributes = checkpoint.load(path)
    checkpoint.save(path, arrays, attributes | {"config": "no JSON"})
    assert main([str(path), str(saved(tmp_path / "a.png", Image.fromarray(picture())))]) == 2
    err = capsys.readouterr().err
    assert f"{path}: its configuration cannot be used: " in err and err.count("\n") == 1


# -- many images, and what is written of them --------------------------------------------------------------------------

AWKWARD = ["a,b", 'say "x"', "a\nb\rc", "=1+1<script>alert(1)</script>"]


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, SimpleCNN]:
    return awkward_model(tmp_path / "model.h5")


def awkward_model(path: Path, loss: str = "cross_entropy") -> tuple[Path, SimpleCNN]:
    options = {"in_channels": 3, "num_classes": 4, "image_size": 8}
    net = SimpleCNN(**options)
    net.eval()
    stated = {"classes": AWKWARD, "mean": [MEAN] * 3, "std": [STD] * 3, "config": json.dumps({"loss": loss})}
    checkpoint.save(path, pack(net), model_attributes("simplecnn", options, net) | stated)
    return path, net


def outputs_of(net: SimpleCNN, path: Path) -> np.ndarray:
    pixels = fit(read_image(path), 8, 8).transpose(2, 0, 1)
    return net.forward(normalize(pixels[None], [MEAN] * 3, [STD] * 3))[0]


def drawn(path: Path, seed: int, side: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return saved(path, Image.fromarray(pixels), format="png")


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def paths_in(text: str) -> list[str]:
    return [line.rpartition(": ")[0] for line in text.splitlines()]


def give(monkeypatch, listed: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed)))


def test_a_folder_gives_all_files_below_it_sorted(trained, tmp_path, capsys):
    names = ["b/2.png", "b/10.png", "a.png", "b/c/d.png", "Z.png", "no.txt"]
    for number, name in enumerate(names):
        drawn(tmp_path / "photos" / name, number)
    for name in (".hidden.png", ".git/x.png", "b/Thumbs.db", "__MACOSX/y.png"):
        drawn(tmp_path / "photos" / name, 0)
    (tmp_path / "photos" / "b" / "circle").symlink_to("..")
    assert main([str(trained[0]), str(tmp_path / "photos")]) == 0
    out, err = capsys.readouterr()
    assert paths_in(out) == [str(tmp_path / "photos" / name) for name in sorted(names)]
    assert err.splitlines() == [
        f"cnnmpi.predict: left out: {tmp_path}/photos/b/circle: a link to a folder, which may lead in circles"
    ]


def test_a_pattern_gives_the_files_that_match_sorted_unless_a_file_has_that_name(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["p/b.png", "p/a.png", "p/q/c.png", "p/q/d.jpg", "a[1].png", "a1.png"]):
        drawn(Path(name), number)
    (tmp_path / "p" / "circle").symlink_to(".")
    (tmp_path / "p" / "folder.png").mkdir()
    for pattern, expected in {
        "p/*.png": ["p/a.png", "p/b.png"],
        "p/**/*.png": ["p/a.png", "p/b.png", "p/q/c.png"],
        "p/q/[cd].*": ["p/q/c.png", "p/q/d.jpg"],
        "a[1].png": ["a[1].png"],  # as a pattern it would be a1.png
        f"{tmp_path}/a[0-9].png": [f"{tmp_path}/a1.png"],
    }.items():
        assert main([str(trained[0]), pattern]) == 0
        out, err = capsys.readouterr()
        assert paths_in(out) == expected, pattern
        circle = "cnnmpi.predict: left out: p/circle: a link to a folder, which may lead in circles\n"
        assert err == (circle if "**" in pattern else ""), pattern


def test_two_stars_stand_for_all_folders_below_and_no_links(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a.png", "p/b.png", "p/q/c.png", "p/q/r/d.png", "p[1]/q/e.png", "p/.hidden/f.png"]
    for number, name in enumerate(names):
        drawn(Path(name), number)
    for number in range(30):  # links in circles: as many paths as there are ways through them
        (tmp_path / "p" / "q" / f"link{number}").symlink_to(tmp_path / "p")
    Path("link").symlink_to("p/q")
    for pattern, expected in {
        "**/*.png": ["a.png", "p/b.png", "p/q/c.png", "p/q/r/d.png", "p[1]/q/e.png"],
        f"{tmp_path}/**/r/*.png": [f"{tmp_path}/p/q/r/d.png"],
        "**/q/**/*.png": ["p/q/c.png", "p/q/r/d.png", "p[1]/q/e.png"],
        "p/**": ["p/b.png", "p/q/c.png", "p/q/r/d.png"],
        "link/**/*.png": ["link/c.png", "link/r/d.png"],  # one that is named
        "p/**.png": ["p/b.png"],
        "[p]/**/**/c.png": ["p/q/c.png"],
    }.items():
        assert main([str(trained[0]), pattern]) == 0
        assert paths_in(capsys.readouterr().out) == expected, pattern


def test_a_pattern_that_nothing_matches_is_a_file_that_is_not_there(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn(Path("a.png"), 0)
    drawn(Path("gone1.png"), 0).unlink()
    assert main([str(trained[0]), "a.png", "gone[1].png", "--csv", "out.csv"]) == 0
    reason = "no file of this name, and none matches it as a pattern"
    assert capsys.readouterr().err.startswith(f"cnnmpi.predict: error: gone[1].png: {reason}\n")
    assert [row[-1] for row in rows_of(Path("out.csv"))] == ["error", "", reason]
    assert main([str(trained[0]), "gone*.png"]) == 2
    assert capsys.readouterr() == ("", f"cnnmpi.predict: error: gone*.png: {reason}\n")


@pytest.mark.parametrize("name", ["empty", "-"])
def test_what_gives_no_files_is_named_in_one_line(trained, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    give(monkeypatch, b"\n\n")
    assert main([str(trained[0]), str(drawn(Path("a.png"), 0)), name, "--csv", "out.csv"]) == 2
    out, err = capsys.readouterr()
    said = "standard input names no files" if name == "-" else f"{name} gives no files"
    assert not out and err == f"cnnmpi.predict: error: {said}\n" and not Path("out.csv").exists()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\0"])
def test_a_list_on_standard_input_stands_where_it_is_named(trained, tmp_path, capsys, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    names = ["b.png", "*.png", "a\udcff.png", *(["two\nlines.png"] if end == b"\0" else [])]
    for number, name in enumerate(["first.png", *names, "last.png"]):
        drawn(Path(name), number)
    give(monkeypatch, end.join(map(os.fsencode, names)) + end)
    assert main([str(trained[0]), "first.png", "-", "last.png", "--json", "out.json"]) == 0
    assert [each["path"] for each in json.loads(Path("out.json").read_text())] == ["first.png", *names, "last.png"]


def test_a_list_may_come_from_windows(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn(Path("é.png"), 0)
    give(monkeypatch, "\ufeffé.png\r\n".encode())
    assert main([str(trained[0]), "-"]) == 0
    assert paths_in(capsys.readouterr().out) == ["é.png"]
    for listed in ("\ufeffé.png\r\n".encode("utf-16-le"), "\ufeffé.png\r\n".encode("utf-16-be")):
        give(monkeypatch, listed)
        assert main([str(trained[0]), "-"]) == 2
        said = "cnnmpi.predict: error: standard input is a list in UTF-16: write it in UTF-8\n"
        assert capsys.readouterr() == ("", said)


def test_standard_input_is_read_once(trained, tmp_path, capsys, monkeypatch):
    give(monkeypatch, os.fsencode(drawn(tmp_path / "a.png", 0)))
    assert main([str(trained[0]), "-", "-"]) == 2
    out, err = capsys.readouterr()
    assert not out and "which is read once: name it once" in err and err.count("\n") == 1


def test_a_table_holds_what_the_model_says_and_texts_as_they_are(trained, tmp_path, capsys, monkeypatch):
    path, net = trained
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.png", 'a "b", c.png', "two\nlines.png", "猫.png", "a\udcff.png", "bad.png"]
    for number, name in enumerate(names):
        drawn(Path(name), number)
    Path("bad.png").write_bytes(b"no image")
    assert main([str(path), *names, "--csv", "out.csv", "--top", "2"]) == 0
    head, *rows = rows_of(tmp_path / "out.csv")
    assert head == ["path", "class", "probability", "class_2", "probability_2", "error"]
    assert [row[0] for row in rows] == [*names[:4], "a\\udcff.png", "bad.png"]  # readable to all programs
    for name, row in zip(names[:-1], rows, strict=False):
        values = softmax(outputs_of(net, Path(name))[None])[0]
        first, second = np.argsort(-values)[:2]
        assert [row[1], row[3], row[5]] == [AWKWARD[first], AWKWARD[second], ""]
        assert [float(row[2]), float(row[4])] == pytest.approx([float(values[first]), float(values[second])], rel=1e-5)
    assert rows[-1][1:] == ["", "", "", "", "not an image, or of a kind that Pillow does not know"]
    out, err = capsys.readouterr()
    assert not out and re.search(r"predict: 5 images, [\d,]+ images/s, 1 unreadable, --tta none\n$", err)


def test_json_holds_what_the_model_says_and_texts_as_they_are(trained, tmp_path, capsys, monkeypatch):
    path, net = trained
    monkeypatch.chdir(tmp_path)
    names = ['a "b".png', "a\udcff.png", "gone.png"]
    for number, name in enumerate(names[:-1]):
        drawn(Path(name), number)
    assert main([str(path), *names, "--json", "-"]) == 0
    *said, gone = json.loads(capsys.readouterr().out)
    assert gone == {"path": "gone.png", "error": "No such file or directory"}
    for name, each in zip(names, said, strict=False):
        values = softmax(outputs_of(net, Path(name))[None])[0]
        best = np.argsort(-values)[:3]
        assert each["path"] == name and [one["class"] for one in each["classes"]] == [AWKWARD[k] for k in best]
        assert [one["probability"] for one in each["classes"]] == pytest.approx(values[best].tolist(), rel=1e-5)
        assert set(each) == {"path", "classes"}


def test_what_is_no_number_is_null_in_json(trained, tmp_path, capsys, monkeypatch):
    images = [str(drawn(tmp_path / f"{k}.png", k)) for k in range(2)]
    values = np.array([[0.2, 0.3, 0.2, 0.1], [np.nan, np.inf, -np.inf, 0.1]], np.float32)
    monkeypatch.setattr("cnnmpi.predict.predictions", lambda model, images, *rest: values)
    arguments = ["--json", str(tmp_path / "a.json"), "--gallery", str(tmp_path / "a.html"), "--top", "4"]
    assert main([str(trained[0]), *images, *arguments]) == 0
    _, said = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert sorted(one["probability"] is None for one in said["classes"]) == [False, True, True, True]
    assert 0.1 in [one["probability"] for one in said["classes"]], "as short as the float32 allows"
    assert [each["alt"] for each in Shown((tmp_path / "a.html").read_text()).pictures] == images[::-1], "the least sure"


@pytest.mark.parametrize(
    ("loss", "head", "names"),
    [
        ("mse", "output", ("outputs", "output", "value")),
        ("binary_cross_entropy", "label", ("labels", "label", "probability")),
    ],
)
def test_numbers_and_several_labels_are_written_in_full(tmp_path, loss, head, names):
    path, net = awkward_model(tmp_path / "model.h5", loss)
    image = drawn(tmp_path / "a.png", 1)
    written = [
        "--csv",
        str(tmp_path / "a.csv"),
        "--json",
        str(tmp_path / "a.json"),
        "--gallery",
        str(tmp_path / "a.html"),
    ]
    assert main([str(path), str(image), *written]) == 0
    logits = outputs_of(net, image)
    many, one, value = names
    (said,) = json.loads((tmp_path / "a.json").read_text())
    if loss == "mse":
        expected = list(zip(AWKWARD, logits.tolist(), strict=True))  # in the model's order
    else:
        expected = [(AWKWARD[k], float(1 / (1 + np.exp(-logits[k])))) for k in np.argsort(-logits)]
    assert [each[one] for each in said[many]] == [name for name, _ in expected]
    assert [each[value] for each in said[many]] == pytest.approx([number for _, number in expected], rel=1e-5)
    columns, row = rows_of(tmp_path / "a.csv")
    assert columns[:3] == ["path", one, value] and columns[-2:] == [f"{value}_4", "error"] and len(row) == 10
    assert row[1::2] == [name for name, _ in expected] + [""]
    shown = Shown((tmp_path / "a.html").read_text()).text
    assert ("by their a,b" if loss == "mse" else "most probable of its labels") in shown
    formatted = "{:.3g}".format if loss == "mse" else "{:.1%}".format
    assert all(f"{printable(name)} {formatted(number)}|" in shown for name, number in expected)


def test_files_appear_whole_or_not_at_all(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cnnmpi.train.evaluation.BATCH", 2)
    images = [str(drawn(Path(f"{k}.png"), k)) for k in range(20)]
    files = {"csv": Path("out.csv"), "json": Path("link.json"), "gallery": Path("new.html")}
    files["csv"].write_text("old")
    Path("real.json").write_text("old")
    files["json"].symlink_to("real.json")
    before, calls = sorted(Path().iterdir()), []

    def predict(model, images, *rest):
        assert files["csv"].read_text() == files["json"].read_text() == "old" and not files["gallery"].exists()
        calls.append(images)
        if len(calls) == limit:
            raise ZeroDivisionError
        return predictions(model, images, *rest)

    monkeypatch.setattr("cnnmpi.predict.predictions", predict)
    arguments = [str(trained[0]), *images, *(word for name, path in files.items() for word in (f"--{name}", str(path)))]
    limit = 7
    with pytest.raises(ZeroDivisionError):
        main(arguments)
    assert sorted(Path().iterdir()) == before and files["csv"].read_text() == "old", (
        "neither half a file nor temporaries"
    )
    limit = 0
    assert main(arguments) == 0
    assert len(rows_of(Path("out.csv"))) == 21 and len(json.loads(Path("real.json").read_text())) == 20
    assert files["json"].is_symlink() and files["gallery"].read_text().endswith("</html>\n")
    assert len(list(Path().iterdir())) == len(before) + 1


def test_a_full_disk_is_told_in_one_line_and_leaves_the_old_file(trained, tmp_path, capsys, monkeypatch):
    image, old = drawn(tmp_path / "a.png", 0), tmp_path / "out.csv"
    old.write_text("old")
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: real(Path("/dev/full"), "w") if "x" in a else real(path, *a, **k)
    )
    assert main([str(trained[0]), str(image), "--csv", str(old)]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == f"cnnmpi.predict: error: --csv {old}: cannot be written: No space left on device"
    assert old.read_text() == "old" and not list(tmp_path.glob(".*"))


def test_a_gallery_that_fails_leaves_the_tables(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn(Path("a.png"), 0)

    def full(path):
        if "html" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cnnmpi.common.files.sync", full)
    arguments = ["--csv", "out.csv", "--json", "out.json", "--gallery", "out.html"]
    assert main([str(trained[0]), "a.png", *arguments]) == 2
    assert "--gallery out.html: cannot be written: No space left on device" in capsys.readouterr().err
    assert len(rows_of(Path("out.csv"))) == 2 and len(json.loads(Path("out.json").read_text())) == 1
    assert sorted(path.name for path in Path().iterdir()) == ["a.png", "model.h5", "out.csv", "out.json"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_who_may_read_a_file_may_read_the_one_in_its_place(trained, tmp_path, monkeypatch, mode):
    image, table = drawn(tmp_path / "a.png", 0), tmp_path / "out.csv"
    table.write_text("old")
    table.chmod(mode)
    assert main([str(trained[0]), str(image), "--csv", str(table)]) == 0
    assert len(rows_of(table)) == 2 and table.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    ("images", "name"),
    [
        ("link/0.png", "photos/0.png"),
        ("photos/0.png", "link/0.png"),
        ("sub/../keep.png", "keep.png"),
        ("l.png", "l.png"),
        ("l.png", "photos/0.png"),
        ("photos", "photos/0.png"),
        ("photos/*", "link/0.png"),
        ("-", "photos/0.png"),
        ("photos", "photos/cut.png"),
        ("photos", "photos/table"),
        ("keep.png", "nets.py"),
        ("keep.png", "other.py"),
        ("keep.png", "copy.h5"),
    ],
)
def test_nothing_is_written_over_what_is_read_whatever_leads_there(
    trained, tmp_path, capsys, monkeypatch, images, name
):
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate(["photos/0.png", "photos/1.png", "keep.png"]):
        drawn(Path(path), number)
    Path("photos/cut.png").write_bytes(Path("keep.png").read_bytes()[:60])
    os.mkfifo("photos/table")
    Path("sub").mkdir()
    Path("link").symlink_to("photos")
    Path("l.png").symlink_to("photos/0.png")
    Path("copy.h5").symlink_to("model.h5")
    Path(f"{tmp_path.name}.py").write_text("from cnnmpi import SimpleCNN\n\n\nclass Net(SimpleCNN):\n    pass\n")
    Path("other.py").symlink_to(f"{tmp_path.name}.py")
    Path("nets.py").write_text(f"from {tmp_path.name} import Net\n")
    give(monkeypatch, b"./photos/1.png\nlink/0.png\n")
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    before = {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}
    monkeypatch.setattr("cnnmpi.predict.predictions", lambda *arguments: pytest.fail("too late"))
    assert main([str(trained[0]), images, "--csv", name, "--model", "nets.py:Net"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.splitlines()[-1].startswith("cnnmpi.predict: error: ")
    assert re.search("is to be read|is the network's source|is the checkpoint|is not a file", err)
    assert {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()} == before


def test_places_that_cannot_be_written_are_known_before_anything_is_computed(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cnnmpi.predict.predictions", lambda *arguments: pytest.fail("too late"))
    monkeypatch.chdir(tmp_path)
    drawn(Path("photos/a.png"), 0)
    drawn(Path("photos/b.png"), 0)
    for arguments, message in (
        (["--csv", "gone/out.csv"], "--csv gone/out.csv: cannot be written: No such file or directory"),
        (["--json", "photos"], "--json photos: cannot be written: it is not a file"),
        (["--csv", "/dev/null"], "--csv /dev/null: cannot be written: it is not a file (standard output is called -)"),
        (["--gallery", "photos/a.png/out.html"], "cannot be written: Not a directory"),
        (["--csv", "x", "--json", "./x"], "--csv x: named twice: each needs a place of its own"),
        (["--csv", "-", "--json", "-"], "--csv -: named twice"),
        (["--csv", "model.h5"], "--csv model.h5: is the checkpoint"),
        (
            ["photos/a.png", "--csv", "photos/a.png"],
            "photos/a.png is to be read: let what is written have another name",
        ),
    ):
        assert main([str(trained[0]), "photos", *arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and message in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "b.png", "model.h5", "photos"]


def test_a_folder_may_take_what_is_written_of_it(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn(Path("photos/a.png"), 0)
    Path("link").symlink_to("photos")
    for _ in range(2):
        assert main([str(trained[0]), "photos", "--csv", "photos/out.csv", "--strict"]) == 0
        assert len(rows_of(Path("photos/out.csv"))) == 2
        assert main([str(trained[0]), "link", "--csv", "link/out.csv", "--strict"]) == 0
        assert len(rows_of(Path("photos/out.csv"))) == 2


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_numbers_depend_neither_on_threads_nor_on_what_cannot_be_read(trained, tmp_path, monkeypatch, backend):
    if backend == "torch":
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cnnmpi.train.evaluation.BATCH", 4)
    for k in range(23):
        drawn(Path(f"photos/{k:02}.png"), k)
    shapes, tables = [], []

    def predict(model, images, *rest):
        shapes[-1].append(len(images))
        return predictions(model, images, *rest)

    monkeypatch.setattr("cnnmpi.predict.predictions", predict)
    arguments = [str(trained[0]), "photos", "--csv", "out.csv", "--backend", backend]
    for threads in (1, 2, 3, 7):
        shapes.append([])
        assert main([*arguments, "--threads", str(threads)]) == 0
        tables.append(rows_of(Path("out.csv")))
    for bad in (3, 9, 22):
        Path(f"photos/{bad:02}.png").write_bytes(b"no image")
    shapes.append([])
    assert main([*arguments, "--threads", "2"]) == 0
    assert all(sorted(each) == [3, 4, 4, 4, 4, 4] for each in shapes)
    assert tables[0] == tables[1] == tables[2] == tables[3] and len(tables[0]) == 24
    different = [
        k for k, (row, its) in enumerate(zip(tables[0][1:], rows_of(Path("out.csv"))[1:], strict=True)) if row != its
    ]
    assert different == [3, 9, 22]


def test_batches_are_computed_and_files_read_at_the_same_time(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("cnnmpi.train.evaluation.BATCH", 4)
    images = [str(drawn(tmp_path / f"{k}.png", k)) for k in range(8)]
    meetings = {"read": threading.Barrier(2), "computed": threading.Barrier(2)}  # each passes when two are there

    def read(path, *arguments):
        meetings["read"].wait(20)
        return read_fitted(path, *arguments)

    def predict(model, images, *rest):
        meetings["computed"].wait(20)
        return predictions(model, images, *rest)

    monkeypatch.setattr("cnnmpi.predict.read_fitted", read)
    monkeypatch.setattr("cnnmpi.predict.predictions", predict)
    assert main([str(trained[0]), *images, "--threads", "2"]) == 0


def test_fewer_than_no_threads_are_refused(trained, tmp_path, capsys):
    assert main([str(trained[0]), str(drawn(tmp_path / "a.png", 0)), "--threads", "-1"]) == 2
    assert "--threads must be a number of at least 0, got -1" in capsys.readouterr().err


# -- what is shown meanwhile -------------------------------------------------------------------------------------------


def test_a_terminal_shows_a_bar_and_standard_output_stays_clean(trained, tmp_path, capsys, monkeypatch):
    image = drawn(tmp_path / "[red]a.png", 0)
    monkeypatch.setattr("cnnmpi.console.is_terminal", lambda stream: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Path("bad[").mkdir()
    Path("bad[/red].png").write_bytes(b"no image")
    assert main([str(trained[0]), str(image), "bad[/red].png", "--csv", "-"]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.reader(io.StringIO(out, newline="")))
    assert [row[0] for row in rows] == ["path", str(image), "bad[/red].png"]
    assert "━" in err and "2/2" in err and "bad[/red].png: not an image" in err


def test_lines_above_the_bar_are_as_long_as_they_are(trained, tmp_path, capsys, monkeypatch):
    name = f"{'a long name ' * 9}.png"
    monkeypatch.setattr("cnnmpi.console.is_terminal", lambda stream: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(tmp_path)
    assert main([str(trained[0]), str(drawn(Path("a.png"), 0)), name, "--csv", "out.csv"]) == 0
    assert f"cnnmpi.predict: error: {name}: No such file or directory\n" in capsys.readouterr().err


def test_a_log_gets_a_line_now_and_then(trained, tmp_path, capsys, monkeypatch):
    images = [str(drawn(tmp_path / f"{k}.png", k)) for k in range(3)]
    monkeypatch.setattr("cnnmpi.console.EVERY_S", 0)
    assert main([str(trained[0]), *images, "--csv", str(tmp_path / "out.csv")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[:-1]] == [f"cnnmpi.predict: {k} of 3 images" for k in (1, 2, 3)]
    monkeypatch.setattr("cnnmpi.console.EVERY_S", 1000)
    assert main([str(trained[0]), *images, "--csv", str(tmp_path / "out.csv")]) == 0
    assert capsys.readouterr().err.count("\n") == 1


# -- the gallery -------------------------------------------------------------------------------------------------------


class Shown(html.parser.HTMLParser):
    """What a browser would make of a page: its tags, the texts of its elements, its pictures by their alt."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.cells, self.pictures, self.text = set(), [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(dict(attributes))

    def handle_data(self, data):
        self.text += data + "|"


def test_a_gallery_escapes_all_texts_and_loads_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ['"><script>alert(2)<', "\u202eevil\udcff.png", "<b>bad"]
    for number, name in enumerate(names):
        drawn(Path(name), number)
    Path("<b>bad").write_bytes(b"no image")
    assert main([str(trained[0]), *names, "--gallery", "out.html", "--tta", "flip"]) == 0
    page = Path("out.html").read_bytes().decode()  # valid UTF-8
    shown = Shown(page)
    assert not shown.tags & {"script", "b>bad"} and "b" in shown.tags  # tiles have it
    assert [each["alt"] for each in shown.pictures] and all(each["src"].startswith("data:") for each in shown.pictures)
    assert {each["alt"] for each in shown.pictures} == {names[0], "\\u202eevil\\udcff.png"}
    assert "=1+1<script>alert(1)</script>" in shown.text and "<b>bad|" in shown.text
    assert "flip|--tta" in shown.text and "2|images" in shown.text and "1|unreadable" in shown.text
    assert not re.search(r"(?:href|src)=\"(?!#|data:)", page)


def test_a_gallery_shows_the_least_sure_of_each_class_and_says_how_many_there_are(trained, tmp_path, monkeypatch):
    said = {
        "a.png": (0, 0.9),
        "b.png": (0, 0.5),
        "c.png": (0, 0.7),
        "d.png": (0, 0.6),
        "e.png": (1, 0.4),
        "f.png": (3, 0.8),
    }
    images = [str(drawn(tmp_path / name, number)) for number, name in enumerate(said)]
    rows = np.zeros((6, 4), np.float32)
    for row, (k, value) in zip(rows, said.values(), strict=True):
        row[:] = (1 - value) / 3
        row[k] = value
    monkeypatch.setattr("cnnmpi.predict.predictions", lambda model, images, *rest: rows)
    for limit, expected in ((100, "bdcaef"), (6, "bdcaef"), (5, "bdcef"), (4, "bdef"), (3, "bef"), (2, "be"), (1, "b")):
        monkeypatch.setattr("cnnmpi.gallery.SHOWN", limit)
        assert main([str(trained[0]), *images, "--gallery", str(tmp_path / "out.html")]) == 0
        shown = Shown((tmp_path / "out.html").read_text())
        assert "".join(Path(each["alt"]).stem for each in shown.pictures) == expected
        of_first = sum(name in "abcd" for name in expected)
        assert (f"{of_first} of 4, the" if of_first < 4 else "all, the") + " least sure first" in shown.text
        assert (f"Shown are {limit} of the 6 images" in shown.text) == (limit < 6)
        assert "a,b|4|66.7%|67.5%|0|" in shown.text.replace("\n|", "")  # counts are of all images
    assert "1 of the classes were guessed for no image" in shown.text


def test_a_gallery_of_numbers_is_spread_over_them(tmp_path, monkeypatch):
    path, _ = awkward_model(tmp_path / "model.h5", "mse")
    images = [str(drawn(tmp_path / f"{k}.png", k)) for k in range(7)]
    rows = np.zeros((7, 4), np.float32)
    rows[:, 0] = [3, 1, 6, 0, 5, 2, 4]
    monkeypatch.setattr("cnnmpi.predict.predictions", lambda model, images, *rest: rows)
    monkeypatch.setattr("cnnmpi.gallery.SHOWN", 3)
    assert main([str(path), *images, "--gallery", str(tmp_path / "out.html")]) == 0
    assert [Path(each["alt"]).stem for each in Shown((tmp_path / "out.html").read_text()).pictures] == ["3", "0", "2"]


def test_a_gallery_of_nothing_but_unreadable_files_lists_them(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cnnmpi.gallery.MOST_LISTED", 2)
    names = [str(tmp_path / f"gone{k}.png") for k in range(3)]
    assert main([str(trained[0]), *names, "--gallery", str(tmp_path / "out.html")]) == 2
    shown = Shown((tmp_path / "out.html").read_text())
    assert not shown.pictures and f"{names[1]}|No such file or directory" in shown.text
    assert names[2] not in shown.text and "and 1 more" in shown.text


def test_pictures_of_a_gallery_are_small(trained, tmp_path):
    small, large = drawn(tmp_path / "small.png", 0, side=32), drawn(tmp_path / "large.png", 1, side=1000)
    assert main([str(trained[0]), str(small), str(large), "--gallery", str(tmp_path / "out.html")]) == 0
    pixels = {}
    for each in Shown((tmp_path / "out.html").read_text()).pictures:
        data = base64.b64decode(each["src"].partition(",")[2])
        assert len(data) < 12_000
        pixels[Path(each["alt"]).stem] = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(pixels["small"], read_image(small)) and pixels["large"].shape == (128, 128, 3)


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [
        ([], 5, []),
        ([3, 2, 1], 6, [3, 2, 1]),
        ([100, 100, 1], 11, [5, 5, 1]),
        ([100, 100, 1], 12, [6, 5, 1]),
        ([9, 9, 9], 2, [1, 1, 0]),
        ([1, 9], 5, [1, 4]),
    ],
)
def test_what_small_classes_leave_goes_to_the_others(counts, most, expected):
    assert evenly(counts, most) == expected
