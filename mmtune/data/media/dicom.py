"""DICOM images by pydicom, an optional dependency: the first frame, as 8-bit grey or RGB."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from mmtune.data.media.pixels import Window, windowed

PREAMBLE, MAGIC = 128, b"DICM"
PYDICOM_MISSING = "a DICOM file, which pydicom reads; install it: pip install 'mmtune[dicom]'"
DEFLATED = "1.2.840.10008.1.2.1.99"
"""The transfer syntax that zlib compresses with the header: a small file may unpack to any size before its header is read."""

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
REQUIRED = ("Rows", "Columns", "PhotometricInterpretation", "BitsAllocated")
FRAME_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
FRAME_PARTS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file begins as DICOM files do (PS3.10, section 7.1); the position stays where it is."""
    position = file.tell()
    head = file.read(PREAMBLE + len(MAGIC))
    file.seek(position)
    return head[PREAMBLE:] == MAGIC


def has_pydicom() -> bool:
    """Whether pydicom is installed."""
    return importlib.util.find_spec("pydicom") is not None


class DicomImage(ImageFile.ImageFile):
    """The header of a DICOM file; `shown` decodes the first frame."""

    format = "DICOM"
    format_description = "DICOM"

    def _open(self) -> None:
        with _damage_named():
            self._read_header()

    def _read_header(self) -> None:
        from pydicom import dcmread

        assert self.fp is not None
        _refuse_deflated(cast(BinaryIO, self.fp))
        header = dcmread(self.fp, stop_before_pixels=True)
        missing = [name for name in REQUIRED if header.get(name) is None]
        if missing:
            raise ValueError(f"the DICOM file holds no image: it has no {', '.join(missing)}")
        _copy_frame_settings(header)
        self._header: Any = header
        self._size = (int(header.Columns), int(header.Rows))
        self.photometric = str(header.PhotometricInterpretation)
        if self.photometric not in GREY + COLOUR:
            raise ValueError(f"photometric interpretation {self.photometric}; expected one of {', '.join(GREY + COLOUR)}")
        self._mode = "L" if self.photometric in GREY else "RGB"
        self.bits = int(header.get("BitsStored") or header.BitsAllocated)  # floating-point pixels have the latter alone
        self.n_frames = int(header.get("NumberOfFrames") or 1)
        self.is_animated = self.n_frames > 1

    def shown(self, window: Window | None) -> Image.Image:
        """The first frame, in mode L or RGB.

        Grey values go through RescaleSlope and RescaleIntercept or the modality LUT, then through `window`; without one through
        the file's VOI LUT or its first WindowCenter and WindowWidth (PS3.3, C.11.2), or else from their least to their largest.
        MONOCHROME1 is inverted. Of colours with more than 8 bits the upper 8 are kept.

        Args:
            window: (low, high) in rescaled values; colours take none.

        Raises:
            ValueError and others: pixels that are damaged, or compressed in a way that needs another package.
        """
        with _damage_named():
            return self._first_frame(window)

    def _first_frame(self, window: Window | None) -> Image.Image:
        from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

        assert self.fp is not None
        self.fp.seek(0)
        pixels = pixel_array(cast(BinaryIO, self.fp), index=0)
        if self.photometric in GREY:
            grey = self._grey(np.asarray(apply_modality_lut(pixels, self._header)), window)
            return Image.fromarray(255 - grey if self.photometric == "MONOCHROME1" else grey)
        bits = self.bits
        if self.photometric == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, self._header)
            bits = pixels.dtype.itemsize * 8
        return Image.fromarray((pixels >> max(0, bits - 8)).astype(np.uint8))

    def _grey(self, values: NDArray[Any], window: Window | None) -> NDArray[np.uint8]:
        from pydicom.pixels import apply_voi

        header = self._header
        if window is not None:
            return windowed(values, window)
        if "VOILUTSequence" in header:
            bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
            return windowed(apply_voi(values, header), (0, 2**bits - 1))
        if header.get("WindowCenter") is None or header.get("WindowWidth") is None:
            return windowed(values, (float(values.min()), float(values.max())))
        center, width = _first(header.WindowCenter), _first(header.WindowWidth)
        function = header.get("VOILUTFunction") or "LINEAR"
        if function == "SIGMOID":
            return windowed(1 / (1 + np.exp(-4 * (values.astype(np.float64) - center) / width)), (0, 1))
        if function == "LINEAR_EXACT":
            return windowed(values, (center - width / 2, center + width / 2))
        return windowed(values, (center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2))


@contextmanager
def _damage_named() -> Iterator[None]:
    """Turn pydicom's own errors, which are no ValueErrors, into these."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    try:
        yield
    except (BytesLengthException, InvalidDicomError) as error:
        raise ValueError(str(error)[:200]) from error


def _refuse_deflated(file: BinaryIO) -> None:
    from pydicom.filereader import read_dataset, read_preamble

    read_preamble(file, force=False)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == DEFLATED:
        raise ValueError("it is compressed as a whole (Deflated Explicit VR Little Endian); save it with another transfer syntax")
    file.seek(0)


def _copy_frame_settings(header: Any) -> None:
    """Put the first frame's rescale and window, which enhanced multi-frame files keep in sequences, where others have them."""
    for group in FRAME_GROUPS:
        for item in list(header.get(group) or ())[:1]:
            for part in FRAME_PARTS:
                for settings in list(item.get(part) or ())[:1]:
                    header.update(settings)


def _first(value: Any) -> float:
    """Of one number, or of several of which the first is the file's preferred one."""
    return float(value if isinstance(value, (int, float, str)) else value[0])
