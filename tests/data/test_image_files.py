"""Image files of every depth and kind, damaged ones, and folders as users have them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastnull.data.image_files import BAD, BadImageError, ImageFiles, ImageFolder, eight_bits, read_image

RAMP = numpy.arange(256, dtype=numpy.uint16).reshape(16, 16)  # one of each byte


def png(values: numpy.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG of [H, W, channels]: PIL writes none but grey ones."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _deep() -> dict[str, bytes]:
    deep = RAMP * 257
    grey = Image.fromarray(deep)
    floats = Image.fromarray((RAMP / 255).astype(numpy.float32))
    twelve = Image.fromarray((RAMP * 16).astype(numpy.uint16))
    rgb = deep[..., None].repeat(3, 2)
    opaque = numpy.full_like(deep, 65535)[..., None]
    return {
        "grey.png": encoded(grey, "PNG"),
        "grey.tiff": encoded(grey, "TIFF"),
        "big_endian.tif": encoded(Image.fromarray(deep.astype(">u2")), "TIFF"),
        "packed.tiff": encoded(grey, "TIFF", compression="tiff_lzw"),
        "grey.pgm": encoded(grey, "PPM"),
        "plain.pgm": b"P2 16 16 65535\n" + " ".join(map(str, deep.ravel())).encode(),
        "ten_bits.pgm": b"P5 16 16 1020\n" + (RAMP * 4).astype(">u2").tobytes(),
        "white_is_zero.tiff": encoded(Image.fromarray(65535 - deep), "TIFF", tiffinfo={262: 0}),
        "float.tiff": encoded(floats, "TIFF"),
        "grey_alpha.png": png(numpy.concatenate([deep[..., None], opaque], 2), 4),
        "rgb.png": png(rgb, 2),
        "rgba.png": png(numpy.concatenate([rgb, opaque], 2), 6),
        "twelve_in_sixteen.png": encoded(twelve, "PNG"),
    }


@pytest.mark.parametrize("name", sorted(_deep()))
def test_more_than_eight_bits_are_scaled(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(_deep()[name])
    pixels = numpy.asarray(read_image(tmp_path / name))
    assert pixels.shape == (16, 16, 3)
    assert (pixels == pixels[..., :1]).all()
    # values that use 12 of 16 bits are dark: what the file says is what is read
    expected = (RAMP * 16 / 257).round() if name.startswith("twelve") else RAMP
    assert numpy.abs(pixels[..., 0].astype(int) - expected).max() <= (1 if name == "ten_bits.pgm" else 0)


def test_eight_bits_round_to_nearest() -> None:
    values = numpy.arange(65536, dtype=numpy.uint16).reshape(256, 256)
    found = numpy.asarray(eight_bits(Image.fromarray(values), "L")).astype(float)
    assert numpy.abs(found - values / 257).max() <= 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((RAMP / 1.0).astype(numpy.float32), "must lie in 0 to 1; they go from 0 to 255"),
        (numpy.full((4, 4), numpy.nan, numpy.float32), "must lie in 0 to 1; they go from nan"),
        (RAMP.astype(numpy.int32) * 2**20, "unsigned, of 16 bits or fewer"),
        (RAMP.astype(numpy.int32) - 99, "unsigned, of 16 bits or fewer"),
    ],
)
def test_pixels_without_a_known_range_are_refused(tmp_path: Path, values: numpy.ndarray, message: str) -> None:
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    with pytest.raises(BadImageError, match=rf"odd\.tiff: .*{message}"):
        read_image(tmp_path / "odd.tiff")


def _usual() -> dict[str, tuple[bytes, int]]:
    """File → its bytes, and how far from the ramp its pixels may be."""
    grey = Image.fromarray(RAMP.astype(numpy.uint8))
    rgb = grey.convert("RGB")
    clear = Image.fromarray(numpy.full((16, 16), 7, numpy.uint8))
    alpha = Image.merge("LA", (grey, clear))
    rotated = Image.Exif()
    rotated[0x112] = 3
    return {
        "grey_alpha.png": (encoded(alpha, "PNG"), 0),
        "rgba.png": (encoded(alpha.convert("RGBA"), "PNG"), 0),
        "rgba.webp": (encoded(alpha.convert("RGBA"), "WEBP", lossless=True, exact=True), 0),
        "palette.png": (encoded(rgb.quantize(256), "PNG"), 0),
        "palette_clear.png": (encoded(rgb.quantize(256), "PNG", transparency=3), 0),
        "palette_bytes.png": (encoded(rgb.quantize(256), "PNG", transparency=bytes(range(256))), 0),
        "grey_clear.png": (encoded(grey, "PNG", transparency=3), 0),
        "UPPER.JPG": (encoded(rgb, "JPEG", quality=100), 3),
        "rotated.jpg": (encoded(rgb, "JPEG", quality=100, exif=rotated), 3),  # as torchvision and timm read it
        "cmyk.jpeg": (encoded(rgb.convert("CMYK"), "JPEG", quality=100), 6),
        "progressive.jfif": (encoded(rgb, "JPEG", quality=100, progressive=True), 3),
        "lossless.webp": (encoded(rgb, "WEBP", lossless=True), 0),
        "moving.gif": (encoded(grey, "GIF", save_all=True, append_images=[clear]), 0),  # the first picture
        "moving.webp": (encoded(rgb, "WEBP", save_all=True, append_images=[clear.convert("RGB")], lossless=True), 0),
        "pages.tiff": (encoded(rgb, "TIFF", save_all=True, append_images=[clear]), 0),
        "cmyk.tiff": (encoded(rgb.convert("CMYK"), "TIFF"), 0),
        "rows.bmp": (encoded(rgb, "BMP"), 0),
        "a png named.jpg": (encoded(rgb, "PNG"), 0),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(_usual()))
def test_files_as_users_have_them(tmp_path: Path, name: str) -> None:
    data, tolerance = _usual()[name]
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / name).write_bytes(data)
    image, label = ImageFolder(tmp_path)[0]
    assert (image.mode, image.size, label) == ("RGB", (16, 16), 0)
    pixels = numpy.asarray(image).astype(int)
    assert numpy.abs(pixels - RAMP[..., None]).max() <= tolerance
    assert pickle.loads(pickle.dumps(image)).size == image.size  # it needs its file no more


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    dots = Image.fromarray(RAMP.astype(numpy.uint8)).convert("1")
    for name in ("a.png", "b.tiff", "c.bmp", "d.gif", "e.pbm"):
        dots.save(tmp_path / name)
        assert set(numpy.unique(numpy.asarray(read_image(tmp_path / name)))) == {0, 255}


def _damaged() -> dict[str, bytes]:
    grey = Image.fromarray(RAMP.astype(numpy.uint8))
    files = {kind: encoded(grey, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}
    huge_bmp, huge_gif, huge_png = (bytearray(files[kind]) for kind in ("BMP", "GIF", "PNG"))
    huge_bmp[18:26] = struct.pack("<ii", 60000, 60000)
    huge_gif[6:10] = struct.pack("<HH", 65535, 65535)
    huge_png[16:24] = struct.pack(">II", 60000, 60000)
    huge_png[29:33] = struct.pack(">I", zlib.crc32(huge_png[12:29]))
    huge_tiff = files["TIFF"]
    for tag in (256, 257):  # width, height
        huge_tiff = huge_tiff.replace(struct.pack("<HHIHH", tag, 4, 1, 16, 0), struct.pack("<HHII", tag, 4, 1, 60000))
    return {
        "huge.bmp": bytes(huge_bmp), "huge.gif": bytes(huge_gif), "huge.png": bytes(huge_png), "huge.tiff": huge_tiff,
        "huge.ppm": b"P6 60000 60000 255\n", "empty.png": b"", "text.jpg": b"no picture", "zeros.gif": bytes(99),
        **{f"half.{kind.lower()}": data[: len(data) // 2] for kind, data in files.items()},
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Image size")
@pytest.mark.parametrize("name", sorted(_damaged()))
def test_damaged_files_are_named_and_can_be_skipped(tmp_path: Path, name: str) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / name).write_bytes(_damaged()[name])
    with pytest.raises(BadImageError, match=rf"cannot read the image file .*cat/{name}"):
        read_image(tmp_path / "cat" / name)
    skipping = ImageFiles(ImageFolder(tmp_path), lambda image: torch.zeros(3, 1, 1), 3, skip_bad=True)
    assert skipping[0][1] == BAD


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_any_damage_is_a_bad_image_or_an_image(tmp_path: Path, kind: str) -> None:
    whole = encoded(Image.fromarray(RAMP.astype(numpy.uint8)), kind)
    source = numpy.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(whole)
        for place in source.integers(0, min(len(whole), 200), 4):
            broken[place] = source.integers(256)
        path = tmp_path / "broken.img"
        path.write_bytes(broken)
        with contextlib.suppress(BadImageError):  # any other error fails
            read_image(path)


def test_scarce_files_are_no_fault_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is skipped has to be broken: too many open files would empty a test set."""
    (tmp_path / "a.png").write_bytes(encoded(Image.new("L", (4, 4)), "PNG"))

    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many open files") as caught:
        read_image(tmp_path / "a.png")
    assert not isinstance(caught.value, BadImageError)


@pytest.mark.parametrize("kind", ["pipe", "folder", "lost link"])
def test_what_is_no_regular_file_is_named_and_waits_for_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.png"
    {"pipe": os.mkfifo, "folder": os.mkdir, "lost link": lambda path: os.symlink("nowhere", path)}[kind](path)
    with pytest.raises(BadImageError, match=r"odd\.png"):
        read_image(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_line_with_and_without_workers(tmp_path: Path, workers: int) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "bad.png").write_bytes(b"")
    batches = DataLoader(ImageFiles(ImageFolder(tmp_path), lambda image: torch.zeros(3, 1, 1), 3), num_workers=workers)
    with pytest.raises(BadImageError) as caught:
        list(batches)
    assert str(caught.value) == (
        f"data: cannot read the image file {tmp_path}/cat/bad.png: cannot identify image file 'bad.png' "
        "(--skip-bad skips and counts such files)"
    )


def _write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.new("L", (4, 4)), "PNG"))
    return path


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _write(root / "cat" / "a.png")
    _write(tmp_path / "elsewhere" / "deep" / "b.png")
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "again").symlink_to(tmp_path / "elsewhere" / "deep")  # there already
    (root / "cat" / "loop").symlink_to(root)
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(root / "cat")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "link.png").symlink_to(tmp_path / "elsewhere" / "deep" / "b.png")
    found = ImageFolder(root)
    assert found.classes == ["cat", "dog"]
    names = [(path.name, label) for path, label in found.files]
    assert sorted(name for name, label in names if label == 0) == ["a.png", "b.png", "link.png"]
    assert ("b.png", 1) in names


def test_hidden_names_are_neither_classes_nor_images(tmp_path: Path) -> None:
    for name in (
        "cat/a.png", "cat/._a.png", "cat/.hidden.png", "cat/.ipynb_checkpoints/a-checkpoint.png", "cat/@eaDir/a.png",
        ".ipynb_checkpoints/b.png", ".git/c.png", "__MACOSX/cat/._a.png", "dog/folder.png/b.png",
    ):  # fmt: skip
        _write(tmp_path / name)
    (tmp_path / "README.txt").write_text("no class")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    found = ImageFolder(tmp_path)
    assert found.classes == ["cat", "dog"]
    assert [path.name for path, _ in found.files] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10²", "5²", "5"], ["5", "5²", "10²"]),
        (["x10", "x9", "x"], ["x", "x9", "x10"]),
        (["1", "01", "001"], ["001", "01", "1"]),  # equal as numbers, never in the disk's order
        (["Ⅷ", "½", "３", "2"], ["2", "３", "½", "Ⅷ"]),
        (["９9", "99"], ["99", "９9"]),
    ],
)
def test_any_name_is_a_class(tmp_path: Path, names: list[str], order: list[str]) -> None:
    for name in names:
        _write(tmp_path / name / "a.png")
    assert ImageFolder(tmp_path).classes == order


def test_names_that_are_no_text_on_one_line(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/two\nlines \xff"
    os.mkdir(folder)
    with open(folder + b"/bad\n.png", "wb"):
        pass
    found = ImageFolder(tmp_path)
    assert len(found.classes) == 1
    assert ImageFiles(found, lambda image: image, 3).name(0) == r"two\nlines \udcff/bad\n.png"
    with pytest.raises(BadImageError) as caught:
        found[0]
    message = str(caught.value)
    assert r"two\nlines \udcff/bad\n.png" in message
    assert message.isprintable()


def test_a_broken_link_among_the_classes_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").symlink_to(tmp_path / "not mounted")
    with pytest.raises(ValueError, match="dog is a broken link"):
        ImageFolder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "cat" / "a.png")
    closed = tmp_path / "cat" / "closed"
    closed.mkdir(mode=0)
    with pytest.raises(ValueError, match=r"cannot read the folder .*closed"):
        ImageFolder(tmp_path)
