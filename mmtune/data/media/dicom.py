"""DICOM images, read with pydicom (an optional dependency): the first frame, as 8-bit grey or RGB."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from mmtune.data.media.pixels import Window, apply_window

PREAMBLE, MAGIC = 128, b"DICM"
PYDICOM_MISSING = "DICOM files need pydicom; install it: pip install 'mmtune[dicom]'"
DEFLATED = "1.2.840.10008.1.2.1.99"
"""Transfer syntax with zlib compression of the whole file: a small file can expand to any size before its header is read."""

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
REQUIRED = ("Rows", "Columns", "PhotometricInterpretation", "BitsAllocated")
FRAME_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
FRAME_PARTS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file has the DICOM preamble (PS3.10, section 7.1). The file position does not change."""
    position = file.tell()
    head = file.read(PREAMBLE + len(MAGIC))
    file.seek(position)
    return head[PREAMBLE:] == MAGIC


def has_pydicom() -> bool:
    """Whether pydicom is installed."""
    return importlib.util.find_spec("pydicom") is not None


class DicomImage(ImageFile.ImageFile):
    """The header of a DICOM file; `first_frame` decodes the first frame."""

    format = "DICOM"
    format_description = "DICOM"

    def _open(self) -> None:
        with _pydicom_errors_as_value_errors():
            self._read_header()

    def _read_header(self) -> None:
        from pydicom import dcmread

        assert self.fp is not None
        _check_not_deflated(cast(BinaryIO, self.fp))
        header = dcmread(self.fp, stop_before_pixels=True)
        missing = [name for name in REQUIRED if header.get(name) is None]
        if missing:
            raise ValueError(f"expected an image in the DICOM file; missing attributes: {', '.join(missing)}")
        _copy_frame_settings(header)
        self._header: Any = header
        self._size = (int(header.Columns), int(header.Rows))
        self.photometric = str(header.PhotometricInterpretation)
        if self.photometric not in GREY + COLOUR:
            raise ValueError(f"expected a photometric interpretation of {', '.join(GREY + COLOUR)}, got {self.photometric}")
        self._mode = "L" if self.photometric in GREY else "RGB"
        self.bits = int(header.get("BitsStored") or header.BitsAllocated)  # floating-point pixels have only BitsAllocated
        self.n_frames = int(header.get("NumberOfFrames") or 1)
        self.is_animated = self.n_frames > 1

    def first_frame(self, window: Window | None) -> Image.Image:
        """Decode the first frame, in mode L or RGB.

        Grey values are mapped by RescaleSlope and RescaleIntercept or the modality LUT, and then by `window`; without a window
        by the file's VOI LUT or its first WindowCenter and WindowWidth (PS3.3, C.11.2), or else from minimum to maximum.
        MONOCHROME1 is inverted. Colours of more than 8 bits keep their upper 8 bits.

        Args:
            window: (low, high) in rescaled values; ignored for colours.

        Raises:
            ValueError and others: the pixels are damaged, or their compression needs another package.
        """
        with _pydicom_errors_as_value_errors():
            return self._decode_first_frame(window)

    def _decode_first_frame(self, window: Window | None) -> Image.Image:
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
            return apply_window(values, window)
        if "VOILUTSequence" in header:
            bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
            return apply_window(apply_voi(values, header), (0, 2**bits - 1))
        if header.get("WindowCenter") is None or header.get("WindowWidth") is None:
            return apply_window(values, (float(values.min()), float(values.max())))
        center, width = _first(header.WindowCenter), _first(header.WindowWidth)
        function = header.get("VOILUTFunction") or "LINEAR"
        if function == "SIGMOID":
            return apply_window(1 / (1 + np.exp(-4 * (values.astype(np.float64) - center) / width)), (0, 1))
        if function == "LINEAR_EXACT":
            return apply_window(values, (center - width / 2, center + width / 2))
        return apply_window(values, (center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2))


@contextmanager
def _pydicom_errors_as_value_errors() -> Iterator[None]:
    """Convert pydicom's errors that are not ValueErrors to ValueErrors."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    try:
        yield
    except (BytesLengthException, InvalidDicomError) as error:
        raise ValueError(str(error)[:200]) from error


def _check_not_deflated(file: BinaryIO) -> None:
    from pydicom.filereader import read_dataset, read_preamble

    read_preamble(file, force=False)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == DEFLATED:
        raise ValueError(
            "the transfer syntax Deflated Explicit VR Little Endian is not supported; save the file with another one"
        )
    file.seek(0)


def _copy_frame_settings(header: Any) -> None:
    """Copy the rescale and window of the first frame from the sequences of enhanced multi-frame files to the top level."""
    for group in FRAME_GROUPS:
        for item in list(header.get(group) or ())[:1]:
            for part in FRAME_PARTS:
                for settings in list(item.get(part) or ())[:1]:
                    header.update(settings)


def _first(value: Any) -> float:
    """The number, or the first of several, which is the preferred one."""
    return float(value if isinstance(value, (int, float, str)) else value[0])
