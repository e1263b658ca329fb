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
"""Maximum number of pixels of an image: Pillow's limit for decompression bombs."""

MAX_FILE_BYTES = 2**30
"""Maximum size of an image file: more than `MAX_PIXELS` of 64 bits each. Some decoders read the whole file."""

MAX_PNG_EXIF = 2**20
PNG_KEYWORD = 80
"""Maximum length of the keyword of a PNG text chunk."""
PNG_EXIF = (b"Raw profile type exif", b"XML:com.adobe.xmp", b"exif", b"xmp")
"""Keywords of PNG text chunks that can contain the orientation."""

MAX_EDGE = 131_072
"""Maximum edge of an image in pixels: image processors need seconds and gigabytes for a longer one."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Image formats besides DICOM, by Pillow's names. Pillow supports more, including formats that run another program."""

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
"""The exceptions that Pillow raises for damaged or malicious files."""

_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the transposition that makes the image upright (CIPA DC-008, tag 0x0112); other values mean upright."""


@dataclass(frozen=True)
class EmbeddedMedia:
    """An image, video or audio file inside another file.

    Attributes:
        container: the file that contains it.
        name: the member or column.
        offset: position of its bytes in the container; None if `data` is set.
        length: number of bytes; None if `data` is set.
        data: the bytes; None if they are a slice of the container.
    """

    container: Path
    name: str
    offset: int | None = None
    length: int | None = None
    data: bytes | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.container}!{self.name}"

    def open(self) -> BinaryIO:
        """Open it as a seekable file, limited to its own bytes.

        Raises:
            ValueError: neither bytes nor a slice are set, or the slice is outside the container.
            OSError: the container cannot be read.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        if self.offset is None or self.length is None:
            raise ValueError(f"{self}: expected bytes or a slice, got neither")
        file = self.container.open("rb")
        try:
            size = file.seek(0, io.SEEK_END)
            end = self.offset + self.length
            if not 0 <= self.offset <= end <= size:
                raise ValueError(
                    f"{self}: expected a slice of the {size} bytes of the container, got bytes {self.offset} to {end}"
                )
            return cast(BinaryIO, io.BufferedReader(_Slice(file, self.offset, self.length)))
        except BaseException:
            file.close()
            raise


class _Slice(io.RawIOBase):
    """A slice of an open file as a file; closing it closes the underlying file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._position = 0

    @property
    def name(self) -> str:
        """The name of the underlying file."""
        return str(self._file.name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("seek before the start of the file")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._offset + self._position)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@dataclass(frozen=True)
class ImageView:
    """An image with the image settings of its source.

    Attributes:
        image: the image.
        window: the grey values that map to black and white; None uses the default of the format.
        augmentation: the drawn augmentation; None for no augmentation.
    """

    image: Path | EmbeddedMedia
    window: Window | None = None
    augmentation: ImageAugmentation | None = None

    def __str__(self) -> str:
        return str(self.image)

    @property
    def container(self) -> Path:
        """The image file, or the file that contains an embedded image."""
        return self.image.container if isinstance(self.image, EmbeddedMedia) else self.image


Media = Path | EmbeddedMedia | ImageView


def open_media(media: Media | str) -> BinaryIO:
    """Open an image, video or audio file for reading.

    Raises:
        OSError, ValueError: it cannot be opened.
    """
    if isinstance(media, ImageView):
        media = media.image
    return media.open() if isinstance(media, EmbeddedMedia) else Path(media).open("rb")


def blank_image() -> EmbeddedMedia:
    """A small black PNG image, for samples that need any image."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    return EmbeddedMedia(Path("blank"), "blank.png", data=file.getvalue())


@dataclass(frozen=True)
class MediaRules:
    """Which files and URLs the rows of a source may use.

    Attributes:
        root: the media root: base of relative paths; files must be inside it.
        outside: whether files outside `root` are allowed.
        urls: whether http and https URLs are fetched, within the limits of `fetch_media`.
        cache: cache directory of fetched files; None is `~/.cache/mmtune/media`.
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
            detail = f"expected bytes in 'bytes', got {type(data).__name__}; write base64 as a string: data:image;base64,..."
            raise DataIssueError("media_path", detail)
        return EmbeddedMedia(rules.root, path if isinstance(path, str) and path else "bytes", data=bytes(data))
    name = str(value) if isinstance(value, Path) else value
    if not isinstance(name, str):
        raise DataIssueError("media_path", f"expected the path of an image or its bytes, got {type(name).__name__}")
    scheme = name[:8].lower()
    if scheme.startswith("data:"):
        return EmbeddedMedia(rules.root, "data: URI", data=decode_data_uri(name))
    if scheme.startswith("file:/"):
        return _from_path(file_uri_to_path(name), rules)
    if scheme.startswith(("http://", "https://")):
        if not rules.urls:
            raise DataIssueError(
                "media_url", f"'{redact_url(name)[:100]}' is a URL; set `allow_urls: true` in the source to fetch it"
            )
        return fetch_media(name, rules.cache or user_cache("media"))
    check_uri_scheme(name)
    return _from_path(name, rules)


def _from_path(name: str, rules: MediaRules) -> Path:
    """Resolve a path to a file; if it does not exist, try it with forward slashes in place of backslashes."""
    if not is_utf8(name):
        escaped = name[:200].encode("utf-8", "backslashreplace").decode()
        raise DataIssueError("media_path", f"the file name '{escaped}' is not valid Unicode; rename the file")
    root = rules.root.resolve()
    for candidate in dict.fromkeys((name, name.replace("\\", "/"))):
        try:
            path = (root / candidate).resolve()
            is_file = path.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, a cycle of links, a null byte, a lone surrogate
            check_not_bare_base64(name)
            raise DataIssueError("media_path", f"invalid path '{name[:200]}': {reason_of(error)}"[:400]) from error
        if is_file:
            break
    if not is_file:
        check_not_bare_base64(name)
    hint = ""
    if not is_file:
        hint = windows_hint(name, "as a path of this machine" if rules.outside else "relative to media_root")
    if not rules.outside and not path.is_relative_to(root):
        detail = f"'{name}' is outside media_root {root}; set `allow_outside_root: true` in the source to allow it"
        raise DataIssueError("media_outside_root", detail + hint)
    if not is_file:
        raise DataIssueError("media_missing", f"no such file: {name if hint else path}{hint}")
    return path


def image_size(media: Media | str) -> tuple[int, int]:
    """(width, height) in pixels of the image that `open_image` returns, read from the header alone.

    Raises:
        DataIssueError: not an image, no pixels, or too many pixels.
    """
    with open_image_header(media) as (image, orientation):
        return augmented_size(media, (image.height, image.width) if orientation >= 5 else (image.width, image.height))


def augmented_size(media: Media | str, size: tuple[int, int]) -> tuple[int, int]:
    """The size after the augmentation of an `ImageView`, for an image whose upright size in the file is `size`."""
    return media.augmentation.size(size) if isinstance(media, ImageView) and media.augmentation is not None else size


def open_image(media: Media | str) -> Image.Image:
    """Decode an image: upright (EXIF), RGB, 8 bits per channel, with the window and augmentation of an `ImageView`.

    Transparency is composited on white. Without a window, 16-bit grey values keep their upper 8 bits. Of an animation or a file
    with several pages, the first frame or page is used. For DICOM files see `DicomImage.first_frame`.

    Raises:
        DataIssueError: not an image, truncated, no pixels, or too many pixels.
    """
    window, augmentation = (media.window, media.augmentation) if isinstance(media, ImageView) else (None, None)
    with open_image_header(media) as (image, orientation):
        try:
            rgb = image.first_frame(window).convert("RGB") if isinstance(image, DicomImage) else to_rgb(image, window)
            if orientation in _TRANSPOSED:
                rgb = rgb.transpose(_TRANSPOSED[orientation])
        except DECODE_ERRORS as error:
            raise DataIssueError("image_damaged", f"cannot decode {media}: {reason_of(error)}") from error
    return rgb if augmentation is None else augmentation.apply(rgb)


@contextmanager
def open_image_header(media: Media | str) -> Iterator[tuple[Image.Image, int]]:
    """Open an image, check its header, and yield it with its EXIF orientation. The files are closed at the end.

    Raises:
        DataIssueError: not an image that can be opened; names the file.
    """
    try:
        file = open_media(media)
    except (OSError, ValueError) as error:
        raise DataIssueError("image_unreadable", f"cannot open image {media}: {reason_of(error)}") from error
    with file:
        if (length := file.seek(0, io.SEEK_END)) > MAX_FILE_BYTES:
            raise DataIssueError(
                "image_too_large", f"{media}: expected an image file of at most {MAX_FILE_BYTES} bytes, got {length}"
            )
        file.seek(0)
        try:
            image, orientation = _open_format(file)
        except DECODE_ERRORS as error:
            bomb = isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning))
            issue_type = "image_too_large" if bomb else "image_unreadable"
            unknown_format = f"unknown image format; expected one of {', '.join(FORMATS)}, DICOM"
            reason = unknown_format if isinstance(error, Image.UnidentifiedImageError) else reason_of(error)
            if bomb:
                reason = f"expected an image of 1 to {MAX_PIXELS:,} pixels, got more; make it smaller"
            raise DataIssueError(issue_type, f"cannot open image {media}: {reason}") from error
        with image:
            if not 0 < image.width * image.height <= MAX_PIXELS:
                issue_type = "image_too_large" if image.width * image.height else "image_zero_size"
                detail = f"{media}: expected an image of 1 to {MAX_PIXELS:,} pixels, got {image.width} x {image.height}"
                raise DataIssueError(issue_type, f"{detail}; make it smaller" if issue_type == "image_too_large" else detail)
            if max(image.size) > MAX_EDGE:
                detail = f"{media}: expected edges of at most {MAX_EDGE:,} pixels, got {image.width} x {image.height}"
                raise DataIssueError("image_too_large", detail)
            try:
                values = values_that_need_window(image)
            except DECODE_ERRORS as error:
                raise DataIssueError("image_unreadable", f"{media}: the image header is damaged: {error}") from error
            if values is not None and (not isinstance(media, ImageView) or media.window is None):
                detail = f"{media} has {values} values, whose range is unknown; set `window: [LOW, HIGH]` in the source"
                raise DataIssueError(
                    "image_unreadable", f"{detail}, the values that map to black and white (in chat: --window LOW HIGH)"
                )
            yield image, orientation


def _open_format(file: BinaryIO) -> tuple[Image.Image, int]:
    if not is_dicom(file):
        image = Image.open(file, formats=FORMATS)
        return image, _orientation(image, file)
    if not has_pydicom():
        raise ValueError(PYDICOM_MISSING)
    return DicomImage(file), 1


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """The EXIF orientation (1 to 8) that is not yet applied, read without decoding."""
    if image.format == "TIFF":
        return 1  # Pillow applies the orientation of TIFF files itself
    if image.format == "PNG":
        orientation = _png_orientation(file)
    else:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if isinstance(orientation, int) and orientation in _TRANSPOSED else 1


def exif_damage(image: Image.Image) -> str | None:
    """Pillow's warning if damaged EXIF data hide the orientation of an opened image; None if nothing is damaged.

    Pillow only warns about damaged EXIF data, and returns the entries before the damage.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if image.format == "PNG":
            orientation = _png_orientation(cast(BinaryIO, image.fp))  # type: ignore[attr-defined]
        else:
            exif = Image.Exif()  # `image.getexif` caches its result, and does not warn again
            try:
                exif.load(image.info.get("exif", b""))
            except SyntaxError as error:  # an unknown byte order, which Pillow's JPEG reader ignores
                return reason_of(error)
            orientation = exif.get(ExifTags.Base.Orientation)
    return " ".join(str(caught[0].message).split()) if caught and orientation is None else None


def _png_orientation(file: BinaryIO) -> Any:
    """The EXIF orientation of a PNG file, whose chunk can follow the pixels, which Pillow would have to decode first.

    The chunks that can contain it are copied into a PNG without pixels, which Pillow reads.
    """
    position = file.tell()
    file.seek(8)
    chunks: dict[bytes, bytes] = {}  # of several chunks with the same keyword, Pillow uses the last
    while len(head := file.read(8)) == 8:
        length, chunk_type = struct.unpack(">I4s", head)
        start = file.read(min(length, PNG_KEYWORD)) if chunk_type in (b"iTXt", b"tEXt", b"zTXt") else b""
        keyword = start.split(b"\0")[0]
        if chunk_type == b"IEND":
            break
        if chunk_type in (b"IHDR", b"eXIf") or keyword in PNG_EXIF:
            if length > MAX_PNG_EXIF:
                raise ValueError(f"expected EXIF data of at most {MAX_PNG_EXIF} bytes, got a PNG chunk of {length} bytes")
            if chunk_type != b"IHDR":
                chunks.pop(keyword or chunk_type, None)
            chunks[keyword or chunk_type] = head + start + file.read(length - len(start) + 4)
        else:
            file.seek(length - len(start) + 4, io.SEEK_CUR)
    file.seek(position)
    if chunks.keys() <= {b"IHDR"}:
        return None
    no_pixels = struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))
    with Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunks.values()) + no_pixels), formats=["PNG"]) as bare:
        return Image.Image.getexif(bare).get(ExifTags.Base.Orientation)
