"""Image files of all kinds, also broken ones, and what ``cnnmpi.predict`` says of them."""

import io
import json
import os
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnmpi import SimpleCNN, checkpoint
from cnnmpi.data import DataError, normalize
from cnnmpi.data.images import fit, read_image
from cnnmpi.functional import softmax
from cnnmpi.predict import main
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
    monkeypatch.setattr("cnnmpi.predict.predictions", lambda model, images, tta: seen.extend(images) or np.ones((1, 4)))
    assert main([str(path), str(image)]) == 0
    expected = fit(picture(90, 40), 28, 20, how if how in ("pad", "stretch") else "crop")
    assert np.array_equal(seen[0], expected)


def test_bad_files_are_named_and_the_good_ones_predicted(model, tmp_path, capsys):
    path, _ = model
    good = [saved(tmp_path / f"{k}.png", Image.fromarray(picture(29 + k, 29))) for k in range(3)]
    (tmp_path / "bad.png").write_bytes(b"no image")
    names = [good[0], tmp_path / "bad.png", good[1], tmp_path, tmp_path / "gone.png", good[2]]
    assert main([str(path), *map(str, names)]) == 2
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(name) for name in good]
    assert all(line.startswith("cnnmpi.predict: error: ") for line in err.splitlines()) and err.count("\n") == 3
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
    # the paths and lines of 72 more images take some kB, their activations would take 14 MB
    assert peaks[2] < peaks[1] + 1e6


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


@pytest.mark.parametrize("loss", ["cross_entropy", "nets.py:mine", "binary_cross_entropy", "mse", 3, None])
def test_what_is_printed_is_what_the_model_was_trained_to_give(tmp_path, capsys, model, loss):
    path, net = model
    arrays, attributes = checkpoint.load(path)
    config = json.dumps({"loss": loss}) if loss else "no JSON"
    checkpoint.save(path, arrays, attributes | {"classes": list("abcd"), "config": config})
    image = saved(tmp_path / "a.png", Image.fromarray(picture(28, 20)))
    channels = len(attributes["mean"])
    pixels = read_image(image, channels)
    logits = net.forward(normalize(pixels.transpose(2, 0, 1)[None], [MEAN] * channels, [STD] * channels))[0]
    assert main([str(path), str(image), "--top", "4"]) == 0
    printed = dict(re.findall(r"(\w) (\S+?)%?(?=  |$)", capsys.readouterr().out.split(": ")[1].strip()))
    expected = {
        "binary_cross_entropy": 100 / (1 + np.exp(-logits)),
        "mse": logits,
    }.get(loss, 100 * softmax(logits))
    for name, value in zip("abcd", expected, strict=True):
        assert float(printed[name]) == pytest.approx(float(value), abs=0.06, rel=0.006), "as rounded for people"
