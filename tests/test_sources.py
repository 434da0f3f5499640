"""What ``python -m cnnmpi.data`` makes data files of, folders of images, .npz files and MNIST; and what it shows."""

import gzip
import hashlib
import io
import json
import os
import struct
import sys
import threading
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from cnnmpi.data import DataError, Dataset, find_data, read_hdf5, statistics, write_hdf5
from cnnmpi.data import __main__ as command
from cnnmpi.data.dataset import BLOCK, index_digest
from cnnmpi.data.images import FITS, fit, read_fitted
from cnnmpi.data.sources import folder as folder_module
from cnnmpi.data.sources import streams
from cnnmpi.data.sources.folder import find_pictures
from cnnmpi.data.sources.split import drawn_for_test
from cnnmpi.data.writer import CHUNK, Source, write
from cnnmpi.train.code import Code
from cnnmpi.train.setup import Data, data_attributes
from tests.jobs import run

pytestmark = pytest.mark.mpi_skip  # the same on each rank

SIZE = 8
DRAWN = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)  # what most files below show
GRAY = DRAWN[:, :, :1]


def twice(pixels: np.ndarray) -> np.ndarray:
    """Each pixel as a square of four, so that scaling to half of the size gives ``pixels`` exactly."""
    return pixels.repeat(2, axis=0).repeat(2, axis=1)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.squeeze(pixels))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(*colour: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (SIZE, SIZE, 3))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def made(folder: Path, *arguments: str, code: int = 0) -> Dataset:
    """The data set that ``images FOLDER`` makes."""
    out = folder.with_suffix(".h5")
    assert command.main(["images", str(folder), "--out", str(out), *arguments]) == code
    return read_hdf5(out)


def stored(dataset: Dataset, index: int, part: str = "train") -> np.ndarray:
    return getattr(dataset, f"{part}_images")[index].transpose(1, 2, 0)


def complaint(arguments: list[str | Path], capsys, code: int = 2) -> str:
    """The one line with which a call is refused."""
    capsys.readouterr()
    assert command.main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("cnnmpi.data: error: ") and error.count("\n") == 1, error
    return error


# -- image files of all kinds ------------------------------------------------------------------------------------------


def odd_files() -> dict[str, tuple[bytes, np.ndarray, int]]:
    """{name: content, what it shows, by how much a level may differ}: all that cameras and the web produce."""
    big, gray = twice(DRAWN), twice(GRAY)
    alpha = np.full((*big.shape[:2], 1), 255, np.uint8)
    alpha[:2, :2] = 0
    on_white = DRAWN.copy()
    on_white[0, 0] = 255
    gray_on_white = GRAY.repeat(3, axis=2)
    gray_on_white[0, 0] = 255
    half = np.dstack(
        [np.broadcast_to(np.array([0, 100, 200], np.uint8), (16, 16, 3)), np.full((16, 16), 127, np.uint8)]
    )
    half_white = [round((c * 127 + 255 * 128) / 255) for c in (0, 100, 200)]
    few = twice(np.arange(64, dtype=np.uint8).reshape(SIZE, SIZE))  # numbers of a palette
    palette = Image.fromarray(few).convert("P")
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
    palette.putpalette(colours.tobytes())
    coloured = colours[few[::2, ::2]]
    without_first = coloured.copy()
    without_first[0, 0] = 255
    ink = np.zeros((16, 16, 4), np.uint8) + np.array([40, 80, 120, 60], np.uint8)  # cyan, magenta, yellow, black
    dry = [round((255 - c) * (255 - 60) / 255) for c in (40, 80, 120)]
    frames = [Image.fromarray(big), Image.new("RGB", (16, 16))]
    more = {"save_all": True, "append_images": frames[1:]}
    dots = twice(GRAY > 127)
    shown_gray, levels = GRAY.repeat(3, axis=2), np.uint16(gray[:, :, 0]) * 257
    wide = np.hstack([np.zeros((16, 8, 3), np.uint8), big, np.zeros((16, 8, 3), np.uint8)])
    jpeg = 6  # levels: quality 95 rounds the coefficients of one colour by at most 1 or 2, and YCbCr rounds once more
    warm = np.broadcast_to(np.array([200, 120, 40], np.uint8), (64, 64, 3))
    quarters = warm.copy()
    quarters[:, :32] = [20, 60, 220]  # what a camera held upright stores: the left half comes up
    upright = np.concatenate([flat(20, 60, 220)[:4], flat(200, 120, 40)[:4]])
    return {
        "plain.png": (encoded(big, "PNG"), DRAWN, 0),
        "plain.bmp": (encoded(big, "BMP"), DRAWN, 0),
        "plain.tga": (encoded(big, "TGA"), DRAWN, 0),
        "plain.ppm": (encoded(big, "PPM"), DRAWN, 0),
        "lossless.webp": (encoded(big, "WEBP", lossless=True), DRAWN, 0),
        "lzw.tif": (encoded(big, "TIFF", compression="tiff_lzw"), DRAWN, 0),
        "deflate.TIFF": (encoded(big, "TIFF", compression="tiff_adobe_deflate"), DRAWN, 0),
        "interlaced name": (encoded(big, "PNG", optimize=True), DRAWN, 0),  # no suffix at all
        "a png.jpg": (encoded(big, "PNG"), DRAWN, 0),
        "ünï cödé 猫.png": (encoded(big, "PNG"), DRAWN, 0),
        "[red]:smile:.png": (encoded(big, "PNG"), DRAWN, 0),
        "two\nlines.png": (encoded(big, "PNG"), DRAWN, 0),
        "-dash.png": (encoded(big, "PNG"), DRAWN, 0),
        "2021/may/deep.png": (encoded(big, "PNG"), DRAWN, 0),
        "gray.png": (encoded(gray, "PNG"), shown_gray, 0),
        "gray alpha.png": (encoded(np.dstack([gray, alpha]), "PNG"), gray_on_white, 0),
        "gray16.png": (encoded(levels, "PNG"), shown_gray, 0),
        "gray16.tif": (encoded(levels, "TIFF"), shown_gray, 0),
        "gray16.pgm": (encoded(levels, "PPM"), shown_gray, 0),
        "float.tif": (encoded(gray[:, :, 0] / np.float32(255), "TIFF"), shown_gray, 0),
        "bits.png": (encoded(Image.fromarray(dots[:, :, 0]), "PNG"), np.uint8(GRAY > 127).repeat(3, 2) * 255, 0),
        "fax.tif": (
            encoded(Image.fromarray(dots[:, :, 0]), "TIFF", compression="group4"),
            np.uint8(GRAY > 127).repeat(3, 2) * 255,
            0,
        ),
        "alpha.png": (encoded(np.dstack([big, alpha]), "PNG"), on_white, 0),
        "alpha.webp": (encoded(np.dstack([big, alpha]), "WEBP", lossless=True), on_white, 0),
        "half.png": (encoded(half, "PNG"), flat(*half_white), 1),  # two roundings
        "palette.png": (encoded(palette, "PNG"), coloured, 0),
        "palette.gif": (encoded(palette, "GIF"), coloured, 0),
        "palette hole.png": (encoded(palette, "PNG", transparency=0), without_first, 0),
        "animated.png": (encoded(frames[0], "PNG", **more), DRAWN, 0),
        "animated.webp": (encoded(frames[0], "WEBP", lossless=True, **more), DRAWN, 0),
        "pages.tif": (encoded(frames[0], "TIFF", **more), DRAWN, 0),
        "animated.gif": (
            encoded(
                Image.new("RGB", (16, 16), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (16, 16))]
            ),
            flat(255, 0, 0),
            0,
        ),
        "ink.jpg": (encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=95), flat(*dry), jpeg),
        "ink.tif": (encoded(Image.fromarray(ink, "CMYK"), "TIFF"), flat(*dry), 1),  # two roundings
        "flat.jpg": (encoded(warm, "JPEG", quality=95), flat(200, 120, 40), jpeg),
        "progressive.jpeg": (encoded(warm, "JPEG", quality=95, progressive=True), flat(200, 120, 40), jpeg),
        "gray.jpg": (encoded(warm[:, :, 0], "JPEG", quality=95), flat(200, 200, 200), jpeg),
        "two pictures.mpo": (encoded(Image.fromarray(warm), "MPO", save_all=True), flat(200, 120, 40), jpeg),
        "held upright.jpg": (encoded(quarters, "JPEG", quality=95, exif=turned(6)), upright, jpeg),
        "held upright.png": (encoded(np.rot90(big), "PNG", exif=turned(6)), DRAWN, 0),
        "wide.png": (encoded(wide, "PNG"), DRAWN, 0),  # the middle is cut out
        "photograph.jpg": (encoded(warm.repeat(10, 0).repeat(10, 1), "JPEG", quality=95), flat(200, 120, 40), jpeg),
    }


def bad_files() -> dict[str, tuple[bytes, str]]:
    """{name: content, why it is left out}."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    enormous = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )
    jpeg = encoded(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8), "JPEG")
    return {
        "z half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "z half.png": (encoded(twice(DRAWN), "PNG")[:200], "truncated"),
        "z empty.png": (b"", "not an image"),
        "z notes.txt": (b"no image", "not an image"),
        "z program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n%%EOF\n", "EPS is refused"),
        "z enormous.png": (enormous, "exceeds limit of"),
    }  # fmt: skip


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


PNG = encoded(twice(DRAWN), "PNG")


def test_each_odd_file_is_read_rightly_or_named(tmp_path, capsys):
    odd, bad, top = odd_files(), bad_files(), tmp_path / "photos"
    put(top / "train" / "odd", {name: content for name, (content, *_) in odd.items()})
    put(top / "train" / "odd", {name: content for name, (content, _) in bad.items()})
    put(top / "train" / "odd", {".DS_Store": b"x", "Thumbs.db": b"x", "__MACOSX/a.png": b"x", ".hidden/a.png": b"x"})
    for name in ("train/plain", "test/odd", "test/plain"):
        put(top / name, {"a.png": PNG})
    (top / "train" / "odd" / "z linked.png").symlink_to(top / "test" / "odd" / "a.png")
    (top / "train" / "odd" / "z broken link.png").symlink_to("gone.png")
    (top / "train" / "odd" / "z circle").symlink_to(top / "train")
    os.mkfifo(top / "train" / "odd" / "z pipe")

    dataset = made(top, "--size", str(SIZE))
    assert dataset.classes == ("odd", "plain") and dataset.fit == "crop"
    assert dataset.train_labels.tolist() == [0] * (len(odd) + 1) + [1] and dataset.test_labels.tolist() == [0, 1]
    for index, name in enumerate(sorted(odd)):
        _, expected, tolerance = odd[name]
        assert np.abs(stored(dataset, index).astype(int) - expected).max() <= tolerance, name
    assert np.array_equal(stored(dataset, len(odd)), DRAWN)  # by way of the link

    left_out = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
    bad |= {
        "z broken link.png": (b"", "No such file"),
        "z circle": (b"", "a link to a folder"),
        "z pipe": (b"", "not a file"),
    }
    assert left_out.pop() == f"left out: {len(bad)} in all"
    for name, (_, reason) in bad.items():
        assert sum(f"/{name}: " in line and reason in line for line in left_out) == 1, name
    assert len(left_out) == len(bad)

    before = top.with_suffix(".h5").read_bytes()
    made(top, "--size", str(SIZE), "--strict", code=2)
    assert f"{len(bad)} files cannot be used, and --strict allows for none" in capsys.readouterr().err
    assert top.with_suffix(".h5").read_bytes() == before


def test_gray_images_have_one_channel(tmp_path):
    put(tmp_path / "d" / "a", {f"{k}.png": encoded(twice(GRAY), "PNG") for k in range(3)})
    put(tmp_path / "d" / "b", {"0.png": encoded(flat(255, 0, 0), "PNG"), "1.png": PNG})
    dataset = made(tmp_path / "d", "--size", str(SIZE), "--channels", "1")
    assert dataset.train_images.shape[1:] == (1, SIZE, SIZE) and np.array_equal(stored(dataset, 0), GRAY)


# -- other proportions -------------------------------------------------------------------------------------------------


def test_what_becomes_of_other_proportions():
    tall = np.concatenate([np.full((4, 8, 3), 10, np.uint8), twice(DRAWN[:4, :4]), np.full((4, 8, 3), 90, np.uint8)])
    assert np.array_equal(fit(tall, 4, 4, "crop"), DRAWN[:4, :4])
    padded = fit(tall, 8, 8, "pad")  # of 16x8: to 8x4, between two columns of black on either side
    assert not padded[:, :2].any() and not padded[:, 6:].any()
    assert np.array_equal(padded[2:6, 2:6], DRAWN[:4, :4]) and (padded[:2, 2:6] == 10).all()
    lying = np.ascontiguousarray(tall.transpose(1, 0, 2))
    assert np.array_equal(fit(lying, 8, 8, "pad"), padded.transpose(1, 0, 2))
    stretched = fit(tall, 4, 8, "stretch")
    assert (stretched[0] == 10).all() and (stretched[3] == 90).all()
    middle = DRAWN[:4, :4].astype(float).reshape(2, 2, 4, 3).mean(axis=1).repeat(2, axis=1)
    assert np.abs(stretched[1:3] - middle).max() <= 0.5  # rounded once
    for how in FITS:
        assert np.array_equal(fit(DRAWN, SIZE, SIZE, how), DRAWN)
        assert fit(DRAWN, 3, 20, how).shape == (3, 20, 3) and fit(np.zeros((1, 500, 1), np.uint8), 7, 9, how).any() == 0


def test_the_fit_travels_with_the_data_file(tmp_path):
    put(tmp_path / "d" / "a", {f"{k}.png": PNG for k in range(2)})
    put(tmp_path / "d" / "b", {f"{k}.png": encoded(DRAWN[:3], "PNG") for k in range(2)})
    for how in FITS:
        dataset = made(tmp_path / "d", "--size", "6x5", "--fit", how)
        assert dataset.fit == how and dataset.train_images.shape[1:] == (3, 6, 5)
        assert np.array_equal(stored(dataset, 1), read_fitted(tmp_path / "d" / "b" / "0.png", 3, 6, 5, how))
        assert data_attributes(Data(dataset, "", (), ()), Code())["data_fit"] == how  # of every checkpoint


def test_large_photographs_are_decoded_smaller_to_nearly_the_same_pixels(tmp_path):
    scene = Image.fromarray(np.random.default_rng(3).integers(0, 256, (6, 8, 3), np.uint8)).resize((1600, 1200), 3)
    path = tmp_path / "p.jpg"
    path.write_bytes(encoded(scene, "JPEG", quality=95))
    exact = np.asarray(scene)[:, 200:1400].reshape(20, 60, 20, 60, 3).mean(axis=(1, 3))
    for _ in range(2):
        pixels = read_fitted(path, 3, 20, 20)
        # libjpeg averages 8x8 pixels in its own way, whose window's edges are not those of the 60x60 averaged here
        assert np.abs(pixels - exact).mean() < 1.5
        assert np.array_equal(pixels, read_fitted(path, 3, 20, 20))


# -- which images test -------------------------------------------------------------------------------------------------


def test_the_draw_depends_on_seed_and_names_alone():
    names = [f"cat/{k}.png" for k in range(50)]
    drawn = {name for name, test in zip(names, drawn_for_test(names, 0.1, 3), strict=True) if test}
    assert len(drawn) == 5
    backwards = names[::-1]
    assert {name for name, test in zip(backwards, drawn_for_test(backwards, 0.1, 3), strict=True) if test} == drawn
    more = [*names, "cat/another.png"]
    assert len(drawn - {name for name, test in zip(more, drawn_for_test(more, 0.1, 3), strict=True) if test}) <= 1
    assert drawn_for_test(names, 0.1, 4) != drawn_for_test(names, 0.1, 3)
    assert [sum(drawn_for_test(names[:n], 0.1, 3)) for n in (0, 1, 2, 14, 16)] == [0, 0, 1, 1, 2]
    expected = sorted(names, key=lambda name: hashlib.sha256(f"3/{name}".encode()).digest())[:5]
    assert drawn == set(expected)  # on every machine, in every version


def test_a_folder_is_the_same_data_in_whatever_order_it_lies(tmp_path, monkeypatch):
    random = np.random.default_rng(4)
    names = [f"{c}/{k}.png" for c in "ab" for k in range(9)]
    put(tmp_path / "d", {name: encoded(random.integers(0, 256, (8, 8, 3), np.uint8), "PNG") for name in names})
    walk, listed, made_of = os.walk, Path.iterdir, {}
    for order in (1, -1):
        monkeypatch.setattr(Path, "iterdir", lambda path, order=order: iter(sorted(listed(path))[::order]))
        monkeypatch.setattr(
            os, "walk", lambda *a, order=order, **k: ((w, f, sorted(names)[::order]) for w, f, names in walk(*a, **k))
        )
        made_of[order] = made(tmp_path / "d", "--size", "8", "--test", "0.3")
    one = made_of[1]
    assert one.digest() == made_of[-1].digest() and np.bincount(one.test_labels).tolist() == [3, 3]
    other = made(tmp_path / "d", "--size", "8", "--test", "0.3", "--seed", "1")
    assert other.digest() != one.digest() and np.bincount(other.test_labels).tolist() == [3, 3]


@pytest.mark.parametrize("cores", [1, 5])
def test_threads_change_nothing_and_read_only_a_little_ahead(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(folder_module, "usable_cores", lambda: cores)
    put(tmp_path / "d" / "a", {f"{k:03}.png": encoded(np.full((4, 4, 3), k, np.uint8), "PNG") for k in range(200)})
    put(tmp_path / "d" / "b", {f"{k:03}.png": PNG for k in range(2)})
    pictures = find_pictures(tmp_path / "d")
    started, lock = [], threading.Lock()
    real = folder_module.read_fitted

    def counted(path, *rest):
        with lock:
            started.append(path)
        return real(path, *rest)

    monkeypatch.setattr(folder_module, "read_fitted", counted)
    taken = 0
    for _, images, _ in pictures.source(512, 512).pieces:  # each fills most of a chunk, so one makes a piece
        taken += len(images)
        assert len(started) <= taken + folder_module.AHEAD * cores + 1
    expected = [int(path.stem) for path, label in pictures.train if label == 0]
    assert taken == 202
    small = np.concatenate([images[:, 0, 0, 0] for part, images, _ in pictures.source(4, 4).pieces if part == "train"])
    assert small[: len(expected)].tolist() == expected


# -- where the classes are said ----------------------------------------------------------------------------------------


def test_a_validation_folder_serves_as_test_folder(tmp_path):
    for part, value in (("train", 10), ("val", 20)):
        for name in ("b", "a"):
            put(tmp_path / "d" / part / name, {"x.png": encoded(flat(value, ord(name), 0), "PNG")})
    dataset = made(tmp_path / "d", "--size", "8")
    assert dataset.classes == ("a", "b")
    assert dataset.train_images[:, :2, 0, 0].tolist() == [[10, 97], [10, 98]]
    assert dataset.test_images[:, :2, 0, 0].tolist() == [[20, 97], [20, 98]]


def test_a_table_says_what_the_files_show(tmp_path):
    top = tmp_path / "d"
    put(
        top,
        {f"{k}.png": encoded(flat(k, k, k), "PNG") for k in range(8)} | {"sub/ä b.png": encoded(flat(8, 8, 8), "PNG")},
    )
    lines = [
        "note,label,path",
        *(f"x,{'odd' if k % 2 else 'even'},{k}.png" for k in range(8)),
        'x,even,"./sub/ä b.png"',
    ]
    (tmp_path / "l.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    dataset = made(top, "--size", "4", "--labels", str(tmp_path / "l.csv"))
    assert dataset.classes == ("even", "odd")
    seen = {}
    for part in ("train", "test"):
        for image, label in zip(getattr(dataset, f"{part}_images"), getattr(dataset, f"{part}_labels"), strict=True):
            seen[int(image[0, 0, 0])] = dataset.classes[label]
    assert seen == {k: "odd" if k % 2 else "even" for k in range(9)}
    assert np.bincount(dataset.test_labels).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("path,class\na.png,x\n", "must name the columns path and label"),
        ("", "must name the columns path and label"),
        ("path,label\na.png\n", "line 2: a path and a label are needed"),
        ("path,label\na.png,x\n,y\n", "line 3: a path and a label are needed"),
        ("path,label\n../a.png,x\n", "line 2: ../a.png leads outside of"),
        ("path,label\n/etc/passwd,x\n", "line 2: /etc/passwd leads outside of"),
        ("path,label\na.png,x\n./a.png,y\n", "line 3: ./a.png is named a second time"),
        ("path,label\na.png,x\nb.png,x\n", "expected at least two classes"),
        ("path,label\n", "expected at least two classes"),
        (f"path,label\na.png,{'x' * 200_000}\n", "field larger than field limit"),
        (b"path,label\na.png,\xff\n", "is not text in UTF-8"),
        ("path,label\na.png,x\ngone.png,y\nalso gone.png,y\n", "no training image of the class y can be read"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_is_refused(tmp_path, capsys, table, match):
    put(tmp_path / "d", {"a.png": PNG, "b.png": PNG})
    (tmp_path / "l.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    out = tmp_path / "o.h5"
    capsys.readouterr()
    assert command.main(["images", str(tmp_path / "d"), "--labels", str(tmp_path / "l.csv"), "--out", str(out)]) == 2
    assert match in capsys.readouterr().err.splitlines()[-1] and not out.exists()


@pytest.mark.fault
def test_folders_that_make_no_data_set_are_refused_with_the_remedy(tmp_path, capsys):
    def refused(files: dict[str, bytes], *arguments: str, folders: tuple[str, ...] = ()) -> str:
        refused.count += 1
        top = tmp_path / str(refused.count)
        top.mkdir()
        put(top, files)
        for name in folders:
            (top / name).mkdir(parents=True)
        return complaint(["images", top, "--out", tmp_path / "o.h5", *arguments], capsys)

    refused.count = 0
    two = {"a/1.png": PNG, "b/1.png": PNG}
    assert "b: the folder of a class holds no files: put images into it, or remove it" in refused(
        {"a/1.png": PNG}, folders=("b",)
    )
    assert "found only a" in refused({"a/1.png": PNG}) and "found none" in refused({})
    both = {"train/a/1.png": PNG, "train/b/1.png": PNG, "test/a/1.png": PNG, "test/c/1.png": PNG}
    assert "test has no folder b, as train has: both need the same classes" in refused(both)
    assert "has a folder test already: leave --test away" in refused(both, "--test", "0.2")
    for share in ("0", "1", "-1", "nan"):
        assert f"--test {float(share)}: expected a share" in refused(two, f"--test={share}")
    for size in ("0", "x", "8x", "8x8x8", "-3", "4097", "1e3"):
        assert f"--size {size}: expected 64, or height x width" in refused(two, f"--size={size}")
    assert "there are no test images" in refused(two)  # of a single image nothing is drawn
    assert r"the class \udcff has a name that is not valid UTF-8" in refused({"a/1.png": PNG, "\udcff/1.png": PNG})
    assert "No such file" in complaint(["images", tmp_path / "gone"], capsys)
    assert "Not a directory" in complaint(["images", put(tmp_path, {"f": b""}) or tmp_path / "f"], capsys)
    assert not (tmp_path / "o.h5").exists()


# -- NumPy's files -----------------------------------------------------------------------------------------------------


def npz(path: Path, packed: bool = False, **arrays: np.ndarray) -> Path:
    (np.savez_compressed if packed else np.savez)(path, **arrays)
    return path


def images_of(count: int = 30, shape: tuple[int, ...] = (3, 6, 5)) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, *shape), np.uint8)


def from_arrays(path: Path, *arguments: str) -> Dataset:
    out = path.with_suffix(".h5")
    assert command.main(["arrays", str(path), "--out", str(out), *arguments]) == 0
    return read_hdf5(out)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "<f4", ">f8", "f2"])
def test_arrays_become_the_data_that_they_are(tmp_path, packed, dtype):
    x, y = images_of(), np.arange(30) % 4
    given = x if dtype == "u1" else (x / 255).astype(dtype)  # float16 is fine enough to tell 256 levels
    path = npz(
        tmp_path / "a.npz", packed, x_train=given[:20], y_train=y[:20].astype("u1"), x_test=given[20:], y_test=y[20:]
    )
    dataset = from_arrays(path)
    assert np.array_equal(dataset.train_images, x[:20]) and np.array_equal(dataset.test_images, x[20:])
    assert dataset.train_labels.tolist() == y[:20].tolist() and dataset.classes == ("0", "1", "2", "3")
    assert dataset.digest() == Dataset.of((x[:20], y[:20], x[20:], y[20:])).digest()


def test_of_x_and_y_a_share_of_each_class_is_drawn(tmp_path):
    x, y = images_of(2000, (1, 60, 60)), np.arange(2000) % 2  # several blocks
    assert x.nbytes > 2 * BLOCK
    dataset = from_arrays(npz(tmp_path / "a.npz", x=x[:, 0], y=y), "--test", "0.25", "--seed", "2")
    drawn = np.zeros(2000, bool)
    for kind in (0, 1):
        members = np.flatnonzero(y == kind)
        drawn[members] = drawn_for_test([f"{kind}/{index}" for index in members], 0.25, 2)
    assert drawn.sum() == 500
    assert np.array_equal(dataset.test_images, x[drawn]) and np.array_equal(dataset.train_labels, y[~drawn])
    targets = np.random.default_rng(6).random((2000, 3))
    soft = from_arrays(npz(tmp_path / "b.npz", x=x, y=targets))
    assert soft.train_labels.dtype == np.float32 and soft.test_labels.shape == (200, 3)


class Unpickled:
    """What would say so if anything unpickled it."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.fault
def test_arrays_that_cannot_be_used_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = images_of(), np.arange(30) % 4

    def refused(*arguments: str, **arrays: np.ndarray) -> str:
        return complaint(["arrays", npz(tmp_path / "a.npz", **arrays), "--out", tmp_path / "o.h5", *arguments], capsys)

    assert "transpose them by images.transpose(0, 3, 1, 2)" in refused(x=x.transpose(0, 2, 3, 1), y=y)
    assert "expected x_train, y_train, x_test, y_test, or x and y; it holds images" in refused(images=x)
    assert "uint8, or floats in 0..1, got int64" in refused(x=x.astype(int), y=y)
    assert "float64 must lie in 0..1" in refused(x=x.astype(float), y=y)
    assert "float64 must lie in 0..1" in refused(x=np.where(x == x.max(), np.nan, 0.5), y=y)
    assert "x has 30 images but 29 labels" in refused(x=x, y=y[1:])
    assert "y must be integers (N,)" in refused(x=x, y=y[:, None])
    assert "y must count classes from 0, got -1..2" in refused(x=x, y=y - 1)
    assert "x needs images (N, C, H, W)" in refused(x=x[:, 0, 0], y=y)
    assert "x is empty" in refused(x=x[:0], y=y[:0])
    assert "numpy.ascontiguousarray" in refused(x=np.asfortranarray(x), y=y)
    assert "leave --test away" in refused("--test", "0.1", x_train=x, y_train=y, x_test=x, y_test=y)
    assert "test images (1, 6, 5)" in refused(x_train=x, y_train=y, x_test=x[:, 0], y_test=y)
    assert "pickled objects" in refused(x=np.array([Unpickled()] * 30, dtype=object), y=y)
    assert not Path("unpickled").exists()
    content = npz(tmp_path / "a.npz", x=x, y=y).read_bytes()
    for size in (0, 50, len(content) // 2, len(content) - 1):
        (tmp_path / "t.npz").write_bytes(content[:size])
        assert "no .npz file" in complaint(["arrays", tmp_path / "t.npz"], capsys)
    at = content.index(x[7].tobytes())
    (tmp_path / "t.npz").write_bytes(content[:at] + b"\xff\0\xff\0" + content[at + 4 :])
    assert "Bad CRC-32" in complaint(["arrays", tmp_path / "t.npz", "--out", tmp_path / "o.h5"], capsys)
    assert "No such file" in complaint(["arrays", tmp_path / "gone.npz"], capsys)
    assert not (tmp_path / "o.h5").exists()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("shape", "zeros", "how", "match"),
    [
        ((1 << 30, 1, 32, 32), 1000, zipfile.ZIP_STORED, "claims 1099511627776 bytes, but the archive holds"),
        ((-1, 1, 1, 1), 1000, zipfile.ZIP_STORED, "claims the shape"),
        ((1000, 1, 80, 1000), 8 * 10**7, zipfile.ZIP_DEFLATED, "as no images do"),
        ((10, 1, 10, 10), 1000, zipfile.ZIP_BZIP2, "packed as numpy.savez does not"),
        ((10, 1, 10, 10), 999, zipfile.ZIP_STORED, "truncated: 1 bytes fewer"),
        ((10, 1, 10, 10), 1001, zipfile.ZIP_STORED, "more bytes than its header says"),
    ],
)  # fmt: skip
def test_bombs_and_false_claims_are_refused_in_little_memory(tmp_path, capsys, shape, zeros, how, match):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    labels = io.BytesIO()
    np.save(labels, np.arange(shape[0] if 0 < shape[0] < 10_000 else 10) % 2)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", how, compresslevel=1) as file:
        file.writestr("y.npy", labels.getvalue())
        with file.open("x.npy", "w") as member:
            member.write(header.getvalue())
            for at in range(0, zeros, 1 << 20):
                member.write(bytes(min(1 << 20, zeros - at)))
    tracemalloc.start()
    error = complaint(["arrays", tmp_path / "a.npz", "--out", tmp_path / "o.h5"], capsys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert match in error and not (tmp_path / "o.h5").exists()
    assert peak < 8 << 20, "the help of the command and a block of 3 MB"


# -- MNIST's files -----------------------------------------------------------------------------------------------------

IDX = {
    ("train", "images"): "train-images-idx3-ubyte", ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte", ("test", "labels"): "t10k-labels-idx1-ubyte",
}  # fmt: skip


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def put_mnist(folder: Path, packed: bool = False) -> dict[str, np.ndarray]:
    """Write the four files: 60 and 20 images of 28x28, ten classes."""
    random, arrays = np.random.default_rng(7), {}
    for (part, what), name in IDX.items():
        count = {"train": 60, "test": 20}[part]
        array = (
            np.uint8(np.arange(count) % 10) if what == "labels" else random.integers(0, 256, (count, 28, 28), np.uint8)
        )
        arrays[f"{part}_{what}"] = array
        put(folder, {name + ".gz" * packed: gzip.compress(idx(array)) if packed else idx(array)})
    return arrays


@pytest.mark.parametrize("packed", [False, True])
def test_the_files_of_mnist_become_gray_images(tmp_path, packed):
    arrays = put_mnist(tmp_path / "mnist", packed)
    assert command.main(["idx", str(tmp_path / "mnist"), "--out", str(tmp_path / "m.h5")]) == 0
    dataset = read_hdf5(tmp_path / "m.h5")
    for part in ("train", "test"):
        assert np.array_equal(getattr(dataset, f"{part}_images")[:, 0], arrays[f"{part}_images"])
        assert np.array_equal(getattr(dataset, f"{part}_labels"), arrays[f"{part}_labels"])
    assert dataset.train_images.shape == (60, 1, 28, 28) and dataset.classes == tuple("0123456789")


@pytest.mark.mpi_skip  # it starts a process that trains
def test_one_command_after_the_files_of_mnist_train(tmp_path):
    put_mnist(tmp_path / "mnist", packed=True)
    assert command.main(["idx", str(tmp_path / "mnist"), "--out", str(tmp_path / "m.h5")]) == 0
    options = ["--data", tmp_path / "m.h5", "--max-steps", "2", "--batch-size", "20", "--out", tmp_path / "run"]
    result = run(sys.executable, "-m", "cnnmpi.train", *options)
    assert result.returncode == 0, result.stderr
    assert "done: test_acc=" in result.stdout and (tmp_path / "run" / "last.h5").exists()


def test_a_data_file_of_another_source_is_not_overwritten_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "mine.npz", x=images_of(40, (1, 12, 12)), y=np.arange(40) % 4)
    assert command.main(["arrays", "a/mine.npz"]) == command.main(["arrays", "a/mine.npz"]) == 0
    before = Path("data/mine.h5").read_bytes()
    with pytest.raises(DataError, match=r"in the way: it was made from a/mine\.npz, not from b/mine\.npz; move"):
        np.savez(tmp_path / "b" / "mine.npz", x=255 - images_of(40, (1, 12, 12)), y=np.arange(40) % 4)
        find_data("b/mine.npz")
    assert "in the way" in complaint(["arrays", "b/mine.npz"], capsys) and Path("data/mine.h5").read_bytes() == before
    assert command.main(["arrays", "b/mine.npz", "--out", "data/mine.h5"]) == 0


def test_a_pipe_is_no_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for name in ("show", "verify", "arrays", "archive"):
        assert command.main([name, str(tmp_path / "pipe")]) in (1, 2)
        assert "not a file" in capsys.readouterr().err


def test_data_names_files_of_mnist_or_of_numpy_which_are_converted_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_mnist(tmp_path / "mnist", packed=True)
    x, y = images_of(40, (1, 12, 12)), np.arange(40) % 4
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    told: list[str] = []
    for name in ("mnist", "mine.npz"):
        target = Path("data") / f"{name.removesuffix('.npz')}.h5"
        assert find_data(name, "data", told.append) == target
        assert read_hdf5(target).train_images.shape[1] == 1
        before = target.stat().st_mtime_ns
        assert find_data(name, "data", told.append) == target and target.stat().st_mtime_ns == before
        if name == "mine.npz":
            np.savez(tmp_path / "mine.npz", x=255 - x, y=y)
            assert find_data(name, "data", told.append) == target and target.stat().st_mtime_ns != before
    assert len(told) == 3 and told[0] == "converting mnist to data/mnist.h5"
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"photos: a folder of images\? python -m cnnmpi.data images photos makes a"):
        find_data("photos", "data")


@pytest.mark.fault
def test_idx_files_that_cannot_be_used_are_refused(tmp_path, capsys):
    images, labels = IDX["train", "images"], IDX["train", "labels"]

    def refused(name: str, content: bytes | None, packed: bool = False) -> str:
        refused.count += 1
        folder = tmp_path / str(refused.count)
        put_mnist(folder, packed)
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            put(folder, {name: content})
        error = complaint(["idx", folder, "--out", tmp_path / "o.h5"], capsys)
        assert str(folder) in error and not (tmp_path / "o.h5").exists()
        return error

    refused.count = 0
    good = idx(images_of(60, (28, 28)))
    claims = bytes([0, 0, 8, 3]) + struct.pack(">3I", 1 << 20, 28, 28) + bytes(1000)
    assert f"{images} missing, with or without .gz" in refused(images, None)
    assert "but the file has 1016 bytes" in refused(images, claims)
    assert "but the file has" in refused(images, good[:-1]) and "but the file has" in refused(images, good + b"x")
    assert "begins with 00000801, not 00000803" in refused(images, idx(np.zeros(60, np.uint8)))
    assert "begins with 00000d03" in refused(images, b"\0\0\x0d\3" + good[4:])
    assert "truncated" in refused(images, good[:3]) and "truncated" in refused(images, b"")
    assert "train has 60 images but 59 labels" in refused(labels, idx(np.zeros(59, np.uint8)))
    assert "train images are (1, 5, 5) but test images (1, 28, 28)" in refused(images, idx(images_of(60, (5, 5))))
    assert "train is empty" in refused(images, idx(np.zeros((0, 28, 28), np.uint8)))
    assert "holds more than one set" in refused("kmnist-train-images-idx3-ubyte", good)
    packed = gzip.compress(good)
    assert "as no images do" in refused(images + ".gz", gzip.compress(claims), packed=True)
    assert "more than 4398046511104" in refused(
        images + ".gz", gzip.compress(b"\0\0\x08\3" + b"\xff" * 12), packed=True
    )
    assert "truncated" in refused(images + ".gz", packed[:-100], packed=True)
    assert "truncated" in refused(images + ".gz", gzip.compress(good[:-1]), packed=True)
    assert "more bytes than its header" in refused(images + ".gz", gzip.compress(good + bytes(10**6)), packed=True)
    assert "Not a gzipped file" in refused(images + ".gz", good, packed=True)
    assert "CRC check failed" in refused(images + ".gz", packed[:-8] + b"1234" + packed[-4:], packed=True)
    assert "No such file" in complaint(["idx", tmp_path / "gone"], capsys)


def test_an_image_larger_than_anyone_has_is_refused():
    with pytest.raises(DataError, match="claims images of 1073741824 bytes each"):
        next(streams.read_blocks("f", io.BytesIO(), (1, 1 << 15, 1 << 15), np.dtype(np.uint8)))


# -- the data file -----------------------------------------------------------------------------------------------------


def small(train: int = 700, test: int = 5, shape: tuple[int, ...] = (3, 24, 25)) -> Dataset:
    """More than one chunk, the last one not full."""
    y = np.arange(train + test) % 3
    x = images_of(train + test, shape)
    return Dataset(x[:train], y[:train], x[train:], y[train:], ("a", "bé", "c"), "drawn", "5" * 64, "pad")


def pieces_of(dataset: Dataset, sizes: tuple[int, ...]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The data set in pieces of these sizes, over and over, those for testing in between."""
    pieces, at = [], 0
    for turn in range(len(dataset.train_labels)):
        here = slice(at, at + sizes[turn % len(sizes)])
        if at < len(dataset.train_labels):
            pieces.append(("train", dataset.train_images[here], dataset.train_labels[here]))
        if turn < len(dataset.test_labels):
            pieces.append(("test", dataset.test_images[turn : turn + 1], dataset.test_labels[turn : turn + 1]))
        at = here.stop
    return pieces


@pytest.mark.parametrize("soft", [False, True])
def test_what_is_recorded_is_what_the_documents_say(tmp_path, soft):
    dataset = small()
    if soft:
        targets = np.random.default_rng(8).random((705, 3)).astype(np.float32)
        dataset = Dataset(
            dataset.train_images, targets[:700], dataset.test_images, targets[700:], ("a", "bé", "c"), "drawn"
        )
    write_hdf5(tmp_path / "d.h5", dataset)
    with h5py.File(tmp_path / "d.h5") as file:
        attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in file.attrs.items()}
        shapes, sums = [], hashlib.sha256()
        for part in ("train", "test"):
            images = getattr(dataset, f"{part}_images")
            crc32 = np.array([zlib.crc32(image.tobytes()) for image in images], "<u4")
            assert file[f"{part}/crc32"].dtype == np.uint32 and np.array_equal(file[f"{part}/crc32"], crc32)
            shapes.append(list(images.shape))
            chunk = file[f"{part}/images"].chunks
            assert chunk[1:] == images.shape[1:] and np.prod(chunk) <= CHUNK and file[f"{part}/images"].fletcher32
            assert chunk[0] == min(len(images), CHUNK // 1800)
        told = [["a", "bé", "c"], dataset.source, dataset.sha256, dataset.fit, dataset.digest()]
        mean, std = statistics(dataset.train_images)
        sums.update(json.dumps([*told, mean, std, *shapes]).encode())
        for part in ("train", "test"):
            sums.update(getattr(dataset, f"{part}_labels").astype("<f4" if soft else "<i8").tobytes())
            sums.update(file[f"{part}/crc32"][()].astype("<u4").tobytes())
        assert attributes["data_sha256"] == dataset.digest() and attributes["index_sha256"] == sums.hexdigest()
        assert attributes["mean"].tolist() == list(mean) and attributes["std"].tolist() == list(std)
        assert ("fit" in attributes) != soft


@pytest.mark.parametrize("sizes", [(1,), (581, 1), (582,), (583,), (64, 3)])  # a chunk has 582 images
def test_pieces_of_any_size_give_the_same_file(tmp_path, sizes):
    dataset = small()
    write_hdf5(tmp_path / "at once.h5", dataset)
    source = Source(dataset.classes, dataset.source, iter(pieces_of(dataset, sizes)), dataset.sha256, dataset.fit)
    written = write(tmp_path / "pieces.h5", source)
    assert (written.train, written.test, written.data_sha256) == (700, 5, dataset.digest())
    again = read_hdf5(tmp_path / "pieces.h5")
    assert again.digest() == dataset.digest() and again.fit == "pad" and again.sha256 == dataset.sha256
    with h5py.File(tmp_path / "at once.h5") as a, h5py.File(tmp_path / "pieces.h5") as b:
        assert a.attrs["index_sha256"] == b.attrs["index_sha256"] and (a.attrs["mean"] == b.attrs["mean"]).all()
        assert a["train/images"].chunks == b["train/images"].chunks


def test_a_source_may_be_larger_than_memory(tmp_path):
    def pieces():
        for k in range(400):  # 48 MB
            yield "train", np.full((10, 3, 64, 63), k % 256, np.uint8), np.zeros(10, np.int64)
        yield "test", np.zeros((1, 3, 64, 63), np.uint8), np.zeros(1, np.int64)

    tracemalloc.start()
    write(tmp_path / "d.h5", Source(("a",), "many", pieces()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * BLOCK, "a block read again, its copy channels-last, two chunks"


@pytest.mark.fault
def test_a_source_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path, good = tmp_path / "d.h5", ("train", images_of(3), np.arange(3))
    write_hdf5(path, small(5, 2))
    before = path.read_bytes()

    def broken():
        yield good
        raise DataError("the source is broken")

    for pieces, match in [
        (broken(), "the source is broken"),
        ([good], "there are no test images"),
        ([good, ("train", images_of(3, (3, 6, 6)), np.arange(3))], "follow others of"),
        ([good, ("test", images_of(3, (3, 6, 6)), np.arange(3))], "train images are"),
        ([good, ("test", images_of(3), np.arange(1, 4))], r"labels must lie in 0\.\.2, got 1\.\.3"),
        ([good, ("test", images_of(3).astype(int), np.arange(3))], "must be uint8"),
        ([good, ("test", images_of(3), np.zeros((3, 3), np.float32))], "both have labels"),
        ([good, ("train", images_of(3), np.zeros((3, 3), np.float32)), good], "cannot be written"),
    ]:
        with pytest.raises(DataError, match=match) as caught:
            write(path, Source(("a", "b", "c"), "x", pieces))
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


FULL = """
import resource, sys
from cnnmpi.data.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.fault
@pytest.mark.mpi_skip  # it starts a process: libhdf5 would crash as that ends
def test_a_disk_that_fills_up_is_one_line(tmp_path):
    path = npz(tmp_path / "a.npz", x=images_of(1000), y=np.arange(1000) % 2)
    npz(tmp_path / "b.npz", x=images_of(60_000), y=np.arange(60_000) % 2)  # several chunks
    out = tmp_path / "out" / "d.h5"
    assert run(sys.executable, "-c", FULL, "arrays", path, "--out", out).returncode == 0
    before = out.read_bytes()
    result = run(sys.executable, "-c", FULL, "arrays", tmp_path / "b.npz", "--out", out)
    assert result.returncode == 2
    assert result.stderr == f"cnnmpi.data: error: {out}: cannot be written: File too large\n"
    assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]


@pytest.mark.fault
def test_no_source_is_written_over(tmp_path, capsys):
    path = npz(tmp_path / "a.npz", x=images_of(20), y=np.arange(20) % 2)
    (tmp_path / "link.h5").symlink_to(path)
    before = path.read_bytes()
    for arguments in (["arrays", tmp_path / "link.h5", "--out", path], ["show", path, "--sheet", path]):
        assert "is to be read: name another file" in complaint(arguments, capsys)
        assert path.read_bytes() == before


# -- looking into data files -------------------------------------------------------------------------------------------


def test_verify_finds_any_change(tmp_path, capsys):
    path, dataset = tmp_path / "d.h5", small(2500)  # more than one block
    assert dataset.train_images.nbytes > BLOCK
    write_hdf5(path, dataset)
    assert command.main(["verify", str(path), str(path)]) == 0
    assert capsys.readouterr().out == f"ok {path} data_sha256={dataset.digest()}\n" * 2
    whole = path.read_bytes()

    def changed(act) -> str:
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            act(file)
        return complaint(["verify", path], capsys, code=1)

    def set_item(name, index, value):
        return lambda file: file[name].__setitem__(index, value)

    assert "train images 2400 are not what was written" in changed(set_item("train/images", (2400, 2, 0, 0), 0))
    assert "test images 1 are not" in changed(set_item("test/images", (1, 0, 0, 0), 77))
    assert "attributes, labels or checksums" in changed(set_item("train/labels", 5, 0))
    assert "attributes, labels or checksums" in changed(set_item("test/labels", 1, 0))
    assert "train images 3 are not" in changed(set_item("train/crc32", 3, 7))
    assert "attributes, labels or checksums" in changed(lambda file: file.attrs.update(classes=["a", "b", "c"]))
    assert "attributes, labels or checksums" in changed(lambda file: file.attrs.update(data_sha256=np.bytes_("0" * 64)))
    assert "attributes, labels or checksums" in changed(lambda file: file.attrs.update(mean=[0.0, 0.0, 0.0]))
    assert "attributes, labels or checksums" in changed(lambda file: file.attrs.update(std=[1.0, 1.0, 1.0]))

    def without_index(file):
        del file.attrs["index_sha256"]
        file["train/labels"][5] = 0

    assert "not what was written (data_sha256)" in changed(without_index)

    def short(file):
        del file["train/crc32"]
        file["train/crc32"] = np.zeros(3, np.uint32)

    assert "train/crc32 must be uint32 (2500,)" in changed(short)
    at = whole.index(dataset.train_images[600].tobytes())  # a bit on the disk
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert "train images" in complaint(["verify", path], capsys, code=1)
    at = whole.index(dataset.train_labels.tobytes())
    path.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    assert str(path) in complaint(["verify", path], capsys, code=1)
    assert "no such file" in complaint(["verify", tmp_path / "gone.h5"], capsys, code=1)


def test_a_file_that_records_nothing_is_read_and_said_to(tmp_path, capsys):
    dataset = small(20, 5)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        for part in ("train", "test"):
            file[f"{part}/images"], file[f"{part}/labels"] = (
                getattr(dataset, f"{part}_{x}") for x in ("images", "labels")
            )
        file.attrs["classes"] = list(dataset.classes)
    assert command.main(["verify", str(tmp_path / "d.h5")]) == 0
    assert (
        capsys.readouterr().out == f"ok {tmp_path / 'd.h5'} data_sha256={dataset.digest()}, with no digest to compare\n"
    )
    assert command.main(["show", str(tmp_path / "d.h5")]) == 0
    assert "3 channels of 24x25, 20 for training and 5 for testing" in capsys.readouterr().out


def test_show_says_what_a_file_holds_and_draws_it(tmp_path, capsys):
    dataset = small()
    dataset.train_images[2] = 200  # the first of class c
    write_hdf5(tmp_path / "d.h5", dataset)
    assert command.main(["show", str(tmp_path / "d.h5"), "--sheet", str(tmp_path / "s.png")]) == 0
    out = capsys.readouterr().out
    assert "3 channels of 24x25, 700 for training and 5 for testing" in out and "fit: pad" in out
    assert f"sha256 of the content: {dataset.digest()}" in out and "sha256 of the archive: 555" in out
    assert [line.split() for line in out.splitlines()[-3:]] == [
        ["a", "234", "1"],
        ["bé", "233", "2"],
        ["c", "233", "2"],
    ]
    assert " ".join(f"{value:.4f}" for value in statistics(dataset.train_images)[0]) in out
    with Image.open(tmp_path / "s.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (4 + 3 * 68, 160 + 10 * 68, 3)  # three rows of ten images of 64, 4 pixels between them
    assert (sheet[4 + 2 * 68 + 32, 160 + 32] == 200).all() and (sheet[0] == 255).all()
    for row in range(3):
        assert (sheet[4 + row * 68 : 68 + row * 68, :160] < 128).any()  # a name stands there
    assert "cannot be written" in complaint(["show", tmp_path / "d.h5", "--sheet", tmp_path / "no" / "s.png"], capsys)
    assert "cannot be written" in complaint(["show", tmp_path / "d.h5", "--sheet", tmp_path / "s.strange"], capsys)


def test_any_channels_classes_and_targets_can_be_shown(tmp_path, capsys):
    for channels in (1, 2, 5):
        x, y = images_of(6, (channels, 7, 9)), np.random.default_rng(9).random((6, 120))
        names = tuple("猫" * 40 + str(k) for k in range(120))
        write_hdf5(tmp_path / "d.h5", Dataset(x, y.astype(np.float32), x, y.astype(np.float32), names, "x"))
        assert command.main(["show", str(tmp_path / "d.h5"), "--sheet", str(tmp_path / "s.png")]) == 0
        assert "targets: 120 numbers for each image" in capsys.readouterr().out
        with Image.open(tmp_path / "s.png") as sheet:
            assert sheet.size == (160 + 10 * 68, 4 + 100 * 68)  # of many classes a hundred


def test_the_index_names_every_value():
    parts = [
        ((2, 1, 1, 1), np.array([0, 1]), np.array([5, 6], np.uint32)),
        ((1, 1, 1, 1), np.array([1]), np.array([7], np.uint32)),
    ]
    told = {"classes": ["a"], "source": "s", "sha256": "", "fit": "", "data_sha256": "d", "mean": [0.5], "std": [1.0]}
    others = {"classes": ["b"], "source": "t", "sha256": "1", "fit": "pad", "data_sha256": "e", "mean": [0], "std": [2]}
    digests = {index_digest(told, parts)} | {
        index_digest({**told, name: other}, parts) for name, other in others.items()
    }
    for part in (0, 1):
        for place in (1, 2):
            other = [[np.copy(value) if index else value for index, value in enumerate(each)] for each in parts]
            other[part][place][0] += 1
            digests.add(index_digest(told, other))
    assert len(digests) == 12
