"""DICOM: grey values through the file's own window or the recipe's, colours as RGB, errors for unsupported files."""

from __future__ import annotations

import io
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)

from mmtune.data.media.image_headers import inspect_image
from mmtune.data.media.media import EmbeddedMedia, ImageView, MediaRules, image_size, open_image, resolve_media

VALUES = np.random.default_rng(0).integers(0, 4096, (5, 8)).astype(np.uint16)


def _dicom(pixels: Any, photometric: str = "MONOCHROME2", syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A file with the Image Pixel module (PS3.3, C.7.6.3) of some pixels: (frames,) rows, columns(, 3)."""
    pixels = np.asarray(pixels)
    colours = photometric.startswith(("RGB", "YBR"))
    rows, columns = pixels.shape[-3:-1] if colours else pixels.shape[-2:]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = CTImageStorage, generate_uid(), syntax
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = rows, columns
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3 if colours else 1), photometric
    if colours:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored, dataset.HighBit = dataset.BitsAllocated, dataset.BitsAllocated - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for name, value in elements.items():
        delattr(dataset, name) if value is None else setattr(dataset, name, value)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _media(data: bytes) -> EmbeddedMedia:
    return EmbeddedMedia(Path("rows"), "scan.dcm", data=data)


def _grey(data: bytes, window: tuple[float, float] | None = None) -> np.ndarray[Any, Any]:
    media = ImageView(_media(data), window)
    image = open_image(media)
    assert image.mode == "RGB" and image.size == image_size(media)
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def _linear(values: Any, low: float, high: float) -> np.ndarray[Any, Any]:
    share = (np.asarray(values, dtype=np.float64) - low) / (high - low)
    return np.floor(np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)


def _standard(values: Any, center: float, width: float) -> np.ndarray[Any, Any]:
    """PS3.3, C.11.2.1.2.1, as the standard writes it, to 0..255."""
    x = np.asarray(values, dtype=np.float64)
    y = ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
    y = np.where(x <= center - 0.5 - (width - 1) / 2, 0, np.where(x > center - 0.5 + (width - 1) / 2, 255, y))
    return np.floor(y + 0.5).astype(np.uint8)


def test_without_a_window_the_full_range_is_shown() -> None:
    assert np.array_equal(_grey(_dicom(VALUES)), _linear(VALUES, VALUES.min(), VALUES.max()))
    assert _grey(_dicom(np.full((2, 2), 7, np.uint16))).max() == 0


def test_grey_values_are_rescaled_and_go_through_the_files_window() -> None:
    """A CT: stored from 0, in Hounsfield units by its slope and intercept, shown by its first window."""
    rescaled = VALUES * 1.5 - 1024
    data = _dicom(VALUES, RescaleSlope="1.5", RescaleIntercept="-1024", WindowCenter=["40", "300"], WindowWidth=["400", "2000"])
    assert np.array_equal(_grey(data), _standard(rescaled, 40, 400))
    assert np.array_equal(_grey(data, (-1000.0, 400.0)), _linear(rescaled, -1000, 400))
    signed = VALUES.astype(np.int16) - 2000
    assert np.array_equal(_grey(_dicom(signed, WindowCenter="-600", WindowWidth="1500")), _standard(signed, -600, 1500))
    narrow = _grey(_dicom(VALUES, WindowCenter="2000", WindowWidth="1"))
    assert np.array_equal(narrow, np.where(VALUES > 1999.5, 255, 0))


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_the_other_functions_of_a_window(function: str) -> None:
    """PS3.3, C.11.2.1.3."""
    grey = _grey(_dicom(VALUES, WindowCenter="2000", WindowWidth="1000", VOILUTFunction=function))
    if function == "LINEAR_EXACT":
        assert np.array_equal(grey, _linear(VALUES, 1500, 2500))
    else:
        assert np.array_equal(grey, _linear(1 / (1 + np.exp(-4 * (VALUES - 2000.0) / 1000)), 0, 1))


@pytest.mark.parametrize(("kind", "element"), [("f4", "FloatPixelData"), ("f8", "DoubleFloatPixelData")])
def test_floating_point_pixels_are_read(kind: str, element: str) -> None:
    """PS3.3, C.7.6.24: a parametric map, without BitsStored, HighBit and PixelRepresentation."""
    values = (VALUES / 4096.0).astype(kind)
    absent = dict.fromkeys(("PixelData", "BitsStored", "HighBit", "PixelRepresentation"))
    data = _dicom(values, **{element: values.tobytes()}, **absent)
    assert np.array_equal(_grey(data, (0.25, 0.75)), _linear(values, 0.25, 0.75))
    assert np.array_equal(_grey(data), _linear(values, values.min(), values.max()))


def test_monochrome1_shows_low_values_white() -> None:
    for window in (None, (1000.0, 3000.0)):
        assert np.array_equal(_grey(_dicom(VALUES, "MONOCHROME1"), window), 255 - _grey(_dicom(VALUES), window))


def test_a_lut_replaces_the_window() -> None:
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4, 0, 8])
    table.add_new("LUTData", "US", [0, 200, 100, 255])
    stored = np.array([[0, 1, 2, 3, 9, 9]], np.uint8)
    grey = _grey(_dicom(stored, VOILUTSequence=Sequence([table])))
    assert grey.tolist() == [[0, 200, 100, 255, 255, 255]]
    assert np.array_equal(_grey(_dicom(stored, VOILUTSequence=Sequence([table])), (0.0, 9.0)), _linear(stored, 0, 9))


def test_an_enhanced_file_keeps_its_settings_for_each_frame() -> None:
    transformation, window, other_window = Dataset(), Dataset(), Dataset()
    transformation.RescaleSlope, transformation.RescaleIntercept, transformation.RescaleType = "2", "-100", "US"
    window.WindowCenter, window.WindowWidth = "500", "800"
    other_window.WindowCenter, other_window.WindowWidth = "900", "300"
    shared, first, second = Dataset(), Dataset(), Dataset()
    shared.PixelValueTransformationSequence = Sequence([transformation])
    first.FrameVOILUTSequence, second.FrameVOILUTSequence = Sequence([window]), Sequence([other_window])
    groups = {
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence([first, second]),
    }
    data = _dicom(np.stack([VALUES, VALUES[::-1]]), NumberOfFrames="2", **groups)
    assert np.array_equal(_grey(data), _standard(VALUES * 2.0 - 100, 500, 800))
    issues = dict(inspect_image(_media(data)).issues)
    assert issues == {"image_animated": "several frames", "image_16bit": "DICOM with 16 bits per channel"}


def test_colours_are_rgb() -> None:
    colours = np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(open_image(_media(_dicom(colours, "RGB")))), colours)
    wide = colours.astype(np.uint16) * 257
    assert np.array_equal(np.asarray(open_image(_media(_dicom(wide, "RGB")))), colours)
    assert np.array_equal(np.asarray(open_image(ImageView(_media(_dicom(colours, "RGB")), (0.0, 9.0)))), colours)
    index = np.array([[0, 1, 2, 2]], np.uint8)
    palette = {}
    for name, levels in {"Red": (1, 2, 3), "Green": (10, 20, 30), "Blue": (100, 150, 255)}.items():
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = np.array([level * 257 for level in levels], "<u2").tobytes()
    pixels = np.asarray(open_image(_media(_dicom(index, "PALETTE COLOR", **palette))))
    assert pixels.tolist() == [[[1, 10, 100], [2, 20, 150], [3, 30, 255], [3, 30, 255]]]
    luma = np.array([[[81, 90, 240]]], np.uint8).repeat(2, axis=1)  # JFIF's YCbCr of a red
    pixels = np.asarray(open_image(_media(_dicom(luma, "YBR_FULL"))))
    assert np.abs(pixels[0, 0].astype(int) - [238, 14, 14]).max() <= 1


def test_compressed_pixels_are_decoded_or_the_package_is_named() -> None:
    from pydicom.pixels.encoders import RLELosslessEncoder

    options = {"bits_allocated": 16, "bits_stored": 16, "photometric_interpretation": "MONOCHROME2"}
    settings = {"rows": 5, "columns": 8, "samples_per_pixel": 1, "number_of_frames": 1, "pixel_representation": 0, **options}
    frame = RLELosslessEncoder.encode(VALUES, **settings)
    plain = _grey(_dicom(VALUES))
    assert np.array_equal(_grey(_dicom(VALUES, syntax=RLELossless, PixelData=encapsulate([frame]))), plain)
    file = io.BytesIO()
    Image.fromarray(VALUES).save(file, "JPEG2000", irreversible=False, no_jp2=True)
    assert np.array_equal(_grey(_dicom(VALUES, syntax=JPEG2000Lossless, PixelData=encapsulate([file.getvalue()]))), plain)
    with pytest.raises(ValueError, match=r"scan\.dcm: .*JPEG Lossless.*pylibjpeg"):
        open_image(_media(_dicom(VALUES, syntax=JPEGLosslessSV1, PixelData=encapsulate([b"\xff\xd8\xff\xd9"]))))


def test_a_dicom_file_is_detected_by_its_content(tmp_path: Path) -> None:
    data = _dicom(VALUES)
    (tmp_path / "scan").write_bytes(data)
    (tmp_path / "all").write_bytes(b"before" + data + b"behind")
    expected = np.asarray(open_image(_media(data)))
    path = resolve_media("scan", MediaRules(tmp_path))
    for media in (path, EmbeddedMedia(tmp_path / "all", "scan", offset=6, length=len(data))):
        assert image_size(media) == (8, 5) and np.array_equal(np.asarray(open_image(media)), expected)


def test_the_size_of_a_dicom_image_is_read_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydicom.pixels.pixel_array", lambda *_, **__: pytest.fail("decoded"))
    media = _media(_dicom(VALUES, PixelData=b"\0\0"))
    assert image_size(media) == (8, 5)
    assert inspect_image(media).size == (8, 5)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: _dicom(VALUES, Rows=40_000, Columns=40_000), "expected an image of 1 to 89,478,485 pixels, got 40000 x 40000"),
        (
            lambda: _dicom(VALUES, PhotometricInterpretation="HSV"),
            "expected a photometric interpretation of MONOCHROME1, .* got HSV",
        ),
        (lambda: _dicom(VALUES, Rows=0), "cannot open image"),
        (
            lambda: _dicom(VALUES)[:200],
            "expected an image in the DICOM file; missing attributes: Rows, Columns, PhotometricInterpretation",
        ),
        (lambda: _dicom(VALUES)[:-20], "cannot decode"),
        (lambda: _dicom(VALUES, PixelData=b"\0\0"), "cannot decode"),
        (lambda: b"\0" * 128 + b"DICM" + b"\xff" * 500, "cannot open image"),
        (lambda: _dicom(VALUES).replace(b"(\0\0\1US\2", b"(\0\0\1US\3"), "cannot open image"),  # BitsAllocated
    ],
)
def test_unsupported_dicom_files_are_rejected(data: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        open_image(_media(data()))


def test_a_deflated_file_is_rejected_before_decompression(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some kilobytes of it could unpack to any size, before a header says how large the image is."""
    data = _dicom(VALUES, syntax=DeflatedExplicitVRLittleEndian)
    monkeypatch.setattr(zlib, "decompress", lambda *_, **__: pytest.fail("unpacked"))
    for read in (image_size, open_image):
        with pytest.raises(ValueError, match=r"transfer syntax Deflated .* is not supported"):
            read(_media(data))


def test_without_pydicom_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _dicom(VALUES)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for read in (image_size, open_image):
        with pytest.raises(ValueError, match=r"scan\.dcm: DICOM files need pydicom; .* pip install 'mmtune\[dicom\]'"):
            read(_media(data))
