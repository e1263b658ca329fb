"""Media of a row: resolving references to files, and opening images.

A row names an image by a path, or contains it: a member of an archive, a column of bytes, a `data:` URI. `resolve_media` turns
each into a `Media`: a checked path or an `EmbeddedMedia`. Later code does not know which form the row used. If the recipe's
source sets a window or an augmentation, the image becomes an `ImageView`, which is opened in the same way.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from PIL import ExifTags, Image

from mmtune.data.media.augmentation import ImageAugmentation
from mmtune.data.media.dicom import PYDICOM_MISSING, DicomImage, has_pydicom, is_dicom
from mmtune.data.media.fetch import fetch_media
from mmtune.data.media.media_names import (
    check_not_bare_base64,
    check_uri_scheme,
    decode_data_uri,
    file_uri_to_path,
    is_utf8,
    redact_url,
    unwrap_media,
    windows_hint,
)
from mmtune.data.media.pixels import Window, to_rgb, values_that_need_window
from mmtune.data.validation.issues import DataIssueError
from mmtune.utils.errors import reason_of
from mmtune.utils.files import user_cache

MAX_PIXELS = 89_478_485
"""Largest image that is opened: where Pillow warns of a decompression bomb."""

MAX_FILE_BYTES = 2**30
"""Largest file of an image that is opened: `MAX_PIXELS` of 64 bits each, and more. Some decoders read the whole file."""

MAX_PNG_EXIF = 2**20
PNG_KEYWORD = 80
"""Where a PNG's text chunk ends its keyword at the latest."""
PNG_EXIF = (b"Raw profile type exif", b"XML:com.adobe.xmp", b"exif", b"xmp")
"""Keywords of text chunks that may say how an image is turned."""

MAX_EDGE = 131_072
"""Longest edge of an image that is opened, in pixels: image processors take seconds and gigabytes for a longer one."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened besides DICOM, by Pillow's names. Pillow knows more, among them formats that run another program."""

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    AttributeError,
    TypeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises for bytes that are damaged or hostile. It parses in Python, so this is what parsers in Python raise."""

_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what makes the picture upright (CIPA DC-008, tag 0x0112); 1 and anything unknown is upright."""


@dataclass(frozen=True)
class EmbeddedMedia:
    """A medium that lies inside another file.

    Attributes:
        container: the file that holds it.
        name: the member or column.
        offset: where its bytes begin in the container; None when they are in hand.
        length: how many bytes they are; None when they are in hand.
        data: the bytes in hand; None when they are a slice of the container.
    """

    container: Path
    name: str
    offset: int | None = None
    length: int | None = None
    data: bytes | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.container}!{self.name}"

    def open(self) -> BinaryIO:
        """The medium as a file that is read and sought in, and that nothing can lead out of.

        Raises:
            ValueError: for a slice that is not inside the container, or with neither bytes nor a slice.
            OSError: for a container that cannot be read.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        if self.offset is None or self.length is None:
            raise ValueError(f"{self}: neither bytes nor a slice")
        file = self.container.open("rb")
        try:
            size = file.seek(0, io.SEEK_END)
            if not 0 <= self.offset <= self.offset + self.length <= size:
                raise ValueError(f"{self}: bytes {self.offset} to {self.offset + self.length} of a file of {size} bytes")
            return cast(BinaryIO, io.BufferedReader(_Slice(file, self.offset, self.length)))
        except BaseException:
            file.close()
            raise


class _Slice(io.RawIOBase):
    """A part of an open file as a file of its own; closing it closes the file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._position = 0

    @property
    def name(self) -> str:
        """The file's, as other readers have it."""
        return str(self._file.name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("sought before the beginning")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._offset + self._position)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@dataclass(frozen=True)
class ImageView:
    """An image as a source of the recipe shows it.

    Attributes:
        image: the image itself.
        window: the grey values that become black and white; None leaves it to the format.
        change: a drawn augmentation; None leaves the image as it is.
    """

    image: Path | EmbeddedMedia
    window: Window | None = None
    change: ImageAugmentation | None = None

    def __str__(self) -> str:
        return str(self.image)

    @property
    def container(self) -> Path:
        """The file itself, or the one that an embedded image lies in."""
        return self.image.container if isinstance(self.image, EmbeddedMedia) else self.image


Media = Path | EmbeddedMedia | ImageView


def open_media(media: Media | str) -> BinaryIO:
    """The medium as an open file.

    Raises:
        OSError, ValueError: one that cannot be opened.
    """
    if isinstance(media, ImageView):
        media = media.image
    return media.open() if isinstance(media, EmbeddedMedia) else Path(media).open("rb")


def blank_image() -> EmbeddedMedia:
    """A small black image in hand, where a picture is needed and none in particular."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    return EmbeddedMedia(Path("blank"), "blank.png", data=file.getvalue())


@dataclass(frozen=True)
class MediaRules:
    """What a source's rows may name.

    Attributes:
        root: where relative paths start, and what they may not lead out of.
        outside: whether files outside of `root` are allowed.
        urls: whether http and https URLs are fetched, within the limits of `fetch_media`.
        cache: where they are kept; None is `~/.cache/mmtune/media`.
    """

    root: Path
    outside: bool = False
    urls: bool = False
    cache: Path | None = None


def resolve_media(value: Any, rules: MediaRules) -> Path | EmbeddedMedia:
    """Resolve a row's reference to an image, video or audio file to a file path or embedded bytes.

    Args:
        value: a path, a `file:` or `data:` URI, a URL, bytes, an `EmbeddedMedia`, `{"bytes", "path"}` (the format of `datasets`
            and parquet files), or an object with one of these under `path`, `url`, `image_url` or `image`.
        rules: which files and URLs are allowed.

    Raises:
        DataIssueError: the file does not exist or is outside the media root (links followed), URLs are not allowed, the URI
            scheme is not supported, or the value has another type.
    """
    value = unwrap_media(value)
    if isinstance(value, EmbeddedMedia):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = {"bytes": value}
    if isinstance(value, dict):
        data, path = value["bytes"], value.get("path")
        if not isinstance(data, (bytes, bytearray, memoryview)):
            told = f"'bytes' holds {type(data).__name__}, not bytes; base64 goes into a string: data:image;base64,..."
            raise DataIssueError("media_path", told)
        return EmbeddedMedia(rules.root, path if isinstance(path, str) and path else "bytes", data=bytes(data))
    name = str(value) if isinstance(value, Path) else value
    if not isinstance(name, str):
        raise DataIssueError("media_path", f"expected the path of an image or its bytes, found {type(name).__name__}")
    scheme = name[:8].lower()
    if scheme.startswith("data:"):
        return EmbeddedMedia(rules.root, "data: URI", data=decode_data_uri(name))
    if scheme.startswith("file:/"):
        return _from_path(file_uri_to_path(name), rules)
    if scheme.startswith(("http://", "https://")):
        if not rules.urls:
            raise DataIssueError(
                "media_url", f"'{redact_url(name)[:100]}' is a URL; `allow_urls: true` in its source would fetch it"
            )
        return fetch_media(name, rules.cache or user_cache("media"))
    check_uri_scheme(name)
    return _from_path(name, rules)


def _from_path(name: str, rules: MediaRules) -> Path:
    """The file of a path; of one with backslashes that no file has, of the same path with forward slashes."""
    if not is_utf8(name):
        shown = name[:200].encode("utf-8", "backslashreplace").decode()
        raise DataIssueError("media_path", f"the name '{shown}' is not valid Unicode; rename the file")
    root = rules.root.resolve()
    for written in dict.fromkeys((name, name.replace("\\", "/"))):
        try:
            path = (root / written).resolve()
            is_file = path.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long a name; links in a circle; a null byte, a lone surrogate
            check_not_bare_base64(name)
            raise DataIssueError("media_path", f"cannot look up '{name[:200]}': {reason_of(error)}"[:400]) from error
        if is_file:
            break
    if not is_file:
        check_not_bare_base64(name)
    windows = (
        "" if is_file else windows_hint(name, "as this machine names the file" if rules.outside else "relative to media_root")
    )
    if not rules.outside and not path.is_relative_to(root):
        told = f"'{name}' lies outside media_root {root}; `allow_outside_root: true` in its source would allow it"
        raise DataIssueError("media_outside_root", told + windows)
    if not is_file:
        raise DataIssueError("media_missing", f"no such file: {name if windows else path}{windows}")
    return path


def image_size(media: Media | str) -> tuple[int, int]:
    """(width, height) in pixels of the upright image, from the file's header alone: what `open_image` will give.

    Raises:
        ValueError: for a file that is no image, has no pixels, or has too many.
    """
    with open_image_header(media) as (image, orientation):
        return augmented_size(media, (image.height, image.width) if orientation >= 5 else (image.width, image.height))


def augmented_size(media: Media | str, size: tuple[int, int]) -> tuple[int, int]:
    """The size of an image of which the file has `size`, upright: an `ImageView` may change it."""
    return media.change.size(size) if isinstance(media, ImageView) and media.change is not None else size


def open_image(media: Media | str) -> Image.Image:
    """The whole image, upright by its EXIF tag and in RGB, 8 bits a channel, with the changes of an `ImageView`.

    Transparency is composited on white. Grey values of 16 bits keep the upper 8 without a window. An animation shows its first
    frame, a file of several pages its first page. DICOM is read as `DicomImage.shown` says.

    Raises:
        ValueError: for a file that is no image, is cut short, has no pixels or too many.
    """
    window, change = (media.window, media.change) if isinstance(media, ImageView) else (None, None)
    with open_image_header(media) as (image, orientation):
        try:
            shown = image.shown(window).convert("RGB") if isinstance(image, DicomImage) else to_rgb(image, window)
            if orientation in _TRANSPOSED:
                shown = shown.transpose(_TRANSPOSED[orientation])
        except DECODE_ERRORS as error:
            raise DataIssueError("image_damaged", f"cannot decode {media}: {reason_of(error)}") from error
    return shown if change is None else change.apply(shown)


@contextmanager
def open_image_header(media: Media | str) -> Iterator[tuple[Image.Image, int]]:
    """An image whose header was read and found fit, with its EXIF orientation. Both files are closed at the end."""
    try:
        file = open_media(media)
    except (OSError, ValueError) as error:
        raise DataIssueError("image_unreadable", f"not an image that can be opened: {media}: {reason_of(error)}") from error
    with file:
        if (length := file.seek(0, io.SEEK_END)) > MAX_FILE_BYTES:
            raise DataIssueError("image_too_large", f"{media} has {length} bytes, more than {MAX_FILE_BYTES}")
        file.seek(0)
        try:
            image, orientation = _opened(file)
        except DECODE_ERRORS as error:
            bomb = isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning))
            kind = "image_too_large" if bomb else "image_unreadable"
            reason = (
                f"none of {', '.join(FORMATS)}, DICOM" if isinstance(error, Image.UnidentifiedImageError) else reason_of(error)
            )
            raise DataIssueError(kind, f"not an image that can be opened: {media}: {reason}") from error
        with image:
            if not 0 < image.width * image.height <= MAX_PIXELS:
                bound = f"more than {MAX_PIXELS}" if image.width * image.height else "which is none"
                kind = "image_too_large" if image.width * image.height else "image_zero_size"
                raise DataIssueError(kind, f"{media} has {image.width} x {image.height} pixels, {bound}")
            if max(image.size) > MAX_EDGE:
                told = f"{media} has {image.width} x {image.height} pixels, and an edge has at most {MAX_EDGE}"
                raise DataIssueError("image_too_large", told)
            try:
                values = values_that_need_window(image)
            except DECODE_ERRORS as error:
                raise DataIssueError("image_unreadable", f"{media} has a damaged header: {error}") from error
            if values is not None and (not isinstance(media, ImageView) or media.window is None):
                told = f"{media} holds {values} values, whose range is not known; give its source a line `window: [LOW, HIGH]`"
                raise DataIssueError(
                    "image_unreadable", f"{told}, the values that become black and white (in chat: --window LOW HIGH)"
                )
            yield image, orientation


def _opened(file: BinaryIO) -> tuple[Image.Image, int]:
    if not is_dicom(file):
        image = Image.open(file, formats=FORMATS)
        return image, _orientation(image, file)
    if not has_pydicom():
        raise ValueError(PYDICOM_MISSING)
    return DicomImage(file), 1


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """The EXIF orientation that is still to be applied, 1 to 8, without decoding."""
    if image.format == "TIFF":
        return 1  # Pillow gives the upright size and turns the pixels by itself
    if image.format == "PNG":
        found = _png_exif(file)
    else:
        found = image.getexif().get(ExifTags.Base.Orientation)
    return found if isinstance(found, int) and found in _TRANSPOSED else 1


def exif_damage(image: Image.Image) -> str | None:
    """Why the EXIF orientation of an opened image cannot be known, in Pillow's words; None where nothing is damaged.

    Pillow only warns of damaged EXIF data, and gives the entries in front of the damage.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if image.format == "PNG":
            found = _png_exif(cast(BinaryIO, image.fp))  # type: ignore[attr-defined]
        else:
            exif = Image.Exif()  # `image.getexif` has read it before, and does not warn again
            exif.load(image.info.get("exif", b""))
            found = exif.get(ExifTags.Base.Orientation)
    return " ".join(str(said[0].message).split()) if said and found is None else None


def _png_exif(file: BinaryIO) -> Any:
    """A PNG may say its orientation behind its pixels, and Pillow decodes them to get there.

    So the chunks are walked, those that may say it are put together into a PNG without pixels, and Pillow reads that.
    """
    position = file.tell()
    file.seek(8)
    kept: dict[bytes, bytes] = {}  # of several chunks that say the same, Pillow takes the last
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        start = file.read(min(length, PNG_KEYWORD)) if kind in (b"iTXt", b"tEXt", b"zTXt") else b""
        keyword = start.split(b"\0")[0]
        if kind == b"IEND":
            break
        if kind in (b"IHDR", b"eXIf") or keyword in PNG_EXIF:
            if length > MAX_PNG_EXIF:
                raise ValueError(f"a PNG chunk of {length} bytes, where EXIF data has at most {MAX_PNG_EXIF}")
            if kind != b"IHDR":
                kept.pop(keyword or kind, None)
            kept[keyword or kind] = head + start + file.read(length - len(start) + 4)
        else:
            file.seek(length - len(start) + 4, io.SEEK_CUR)
    file.seek(position)
    if kept.keys() <= {b"IHDR"}:
        return None
    no_pixels = struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))
    with Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(kept.values()) + no_pixels), formats=["PNG"]) as bare:
        return Image.Image.getexif(bare).get(ExifTags.Base.Orientation)
