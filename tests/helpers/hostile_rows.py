"""A corpus of hostile rows and images, generated, each with the issues that validation must report.

`write(folder)` lays them out as one JSON Lines file in LLaVA's format beside its media; line N is case N. Images that are
merely unusual (turned, palette, CMYK) are here too, because they must be reported and must train.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ExpectedIssues = tuple[tuple[str, str], ...]
"""Fields and names of issues, in the order of the validator."""


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: of the case.
        line: the row's line in the file, as bytes.
        issues: all issues that the validator reports, and no others.
        files: what lies in the media root for it, by name.
        make: makes what is no file: links and directories; called with the media root.
        decoding: the fault that only decoding shows, if there is one.
    """

    name: str
    line: bytes
    issues: ExpectedIssues = ()
    files: dict[str, bytes] = field(default_factory=dict)
    make: Callable[[Path], None] | None = None
    decoding: str | None = None


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
ASK = {"from": "human", "value": "<image>\nWhat is it?"}
SAY = {"from": "gpt", "value": "Noise."}


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    """An image's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """One chunk of a PNG."""
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(width: int, height: int, bits: int = 8, color: int = 2, pixels: bytes = b"", checksum: int | None = None) -> bytes:
    """A PNG whose header says what one likes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0), checksum)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    """A GIF whose screen is as large as one likes."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, width, height, 0)
        + b"\x02\x02\x4c\x01\x00;"
    )


def looping_tiff() -> bytes:
    """A TIFF whose second directory is its first."""
    good = bytearray(encoded(NOISE.convert("L").resize((4, 4)), "TIFF"))
    start = struct.unpack("<I", good[4:8])[0]
    count = struct.unpack("<H", good[start : start + 2])[0]
    end = start + 2 + 12 * count
    good[end : end + 4] = struct.pack("<I", start)
    return bytes(good)


def _row(*turns: Any, **fields: Any) -> bytes:
    return json.dumps({"conversations": list(turns), **fields}).encode()


def _image(name: str, content: bytes, *issues: str, suffix: str = "png", **settings: Any) -> Case:
    file = f"{name.replace(' ', '_')}.{suffix}"
    return Case(name, _row(ASK, SAY, image=file), tuple(("image", one) for one in issues), {file: content}, **settings)


def _path(name: str, path: Any, issue: str, field: str = "image", **settings: Any) -> Case:
    return Case(name, _row(ASK, SAY, image=path), ((field, issue),), **settings)


def _turns(name: str, *turns: Any, issues: ExpectedIssues = (), **fields: Any) -> Case:
    return Case(name, _row(*turns, **fields), issues)


def _human(text: Any) -> dict[str, Any]:
    return {"from": "human", "value": text}


def _gpt(text: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _link_out(root: Path) -> None:
    (root.parent / "outside.png").write_bytes(encoded(NOISE, "PNG"))
    (root / "link_out.png").symlink_to(root.parent / "outside.png")


def _link_round(root: Path) -> None:
    (root / "round.png").symlink_to(root / "round.png")


def _folder(root: Path) -> None:
    (root / "folder.png").mkdir()


def _frames(kind: str, **settings: Any) -> bytes:
    return encoded(NOISE, kind, save_all=True, append_images=[NOISE.rotate(180)], **settings)


def images() -> list[Case]:
    """Images that are no images, are cut short, are too large, or are unusual."""
    jpeg, whole_png, a_gif, webp = (encoded(NOISE, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP"))
    bmp, tiff = encoded(NOISE, "BMP"), encoded(NOISE, "TIFF")
    thumbnail = encoded(NOISE.resize((8, 8)), "JPEG")
    with_thumbnail = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + jpeg[2:]
    corrupt = bytearray(whole_png)
    corrupt[len(corrupt) // 2] ^= 0xFF
    palette = NOISE.quantize(16)
    deep = Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20)
    deep_rgb = png(2, 2, bits=16, pixels=2 * (b"\0" + bytes(12)))
    return [
        _image("an empty file", b"", "image_empty"),
        _image("a web page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "image_unreadable", suffix="jpg"),
        _image("a text file", b"not an image\n", "image_unreadable"),
        _image("only a signature", whole_png[:8], "image_truncated"),
        _image("zeros", bytes(4096), "image_unreadable"),
        _image("a program of PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "image_unreadable"),
        _image("a JPEG cut in half", jpeg[: len(jpeg) // 2], "image_truncated", suffix="jpg"),
        _image("a JPEG without its end", jpeg[:-2], "image_truncated", suffix="jpg"),
        _image("a cut JPEG with a whole thumbnail", with_thumbnail[: len(thumbnail) + 700], "image_truncated", suffix="jpg"),
        _image("a PNG cut in half", whole_png[: len(whole_png) // 2], "image_truncated"),
        _image("a PNG cut in its header", whole_png[:20], "image_truncated"),
        _image("a PNG without its last chunk", whole_png[:-12], "image_end_marker"),
        _image("a GIF cut in half", a_gif[: len(a_gif) // 2], "image_palette", "image_truncated", suffix="gif"),
        _image("a GIF without its trailer", a_gif[:-1], "image_palette", "image_end_marker", suffix="gif"),
        _image("a WebP cut in half", webp[: len(webp) // 2], "image_truncated", suffix="webp"),
        _image("a BMP cut in half", bmp[: len(bmp) // 2], "image_truncated", suffix="bmp"),
        _image("a TIFF cut in half", tiff[: len(tiff) // 2], "image_truncated", suffix="tif"),
        _image("a PNG whose header has a wrong checksum", png(4, 4, checksum=1), "image_unreadable"),
        _image("a PNG of no pixels", png(0, 0), "image_zero_size"),
        _image("a PNG of no height", png(7, 0), "image_zero_size"),
        _image("a PNG with a byte changed", bytes(corrupt), decoding="image_damaged"),
        _image("a PNG with too few pixels", png(64, 64, pixels=b"\0"), decoding="image_damaged"),
        _image("a PNG bomb", png(60_000, 60_000), "image_too_large"),
        _image("a PNG of negative size", png(0xFFFFFFFF, 0xFFFFFFFF), "image_too_large"),
        _image("a GIF bomb", gif(65_535, 65_535), "image_too_large", suffix="gif"),
        _image("a TIFF that goes round", looping_tiff(), suffix="tif"),
        _image("a JPEG on its side", encoded(NOISE, "JPEG", exif=_exif(6)), "image_rotated", suffix="jpg"),
        _image("a PNG upside down", encoded(NOISE, "PNG", exif=_exif(3)), "image_rotated"),
        _image(
            "a JPEG with cut EXIF data", encoded(NOISE, "JPEG", exif=_exif(6).tobytes()[:-10]), "image_exif_damaged", suffix="jpg"
        ),
        _image("a PNG with cut EXIF data", encoded(NOISE, "PNG", exif=_exif(6).tobytes()[:-10]), "image_exif_damaged"),
        _image("an orientation that is none", encoded(NOISE, "JPEG", exif=_exif(77)), suffix="jpg"),
        _image("a CMYK JPEG", encoded(NOISE.convert("CMYK"), "JPEG"), "image_cmyk", suffix="jpg"),
        _image("a palette", encoded(palette, "PNG"), "image_palette"),
        _image("a palette with transparency", encoded(palette, "PNG", transparency=0), "image_palette", "image_transparent"),
        _image("a transparent PNG", encoded(NOISE.convert("RGBA"), "PNG"), "image_transparent"),
        _image("16 bits of grey", encoded(deep, "PNG"), "image_16bit"),
        _image("16 bits of colour", deep_rgb, "image_16bit"),
        _image("one bit", encoded(NOISE.convert("1"), "PNG")),
        _image("an animated GIF", _frames("GIF"), "image_animated", "image_palette", suffix="gif"),
        _image("an animated PNG", _frames("PNG"), "image_animated"),
        _image("an animated WebP", _frames("WEBP"), "image_animated", suffix="webp"),
        _image("a TIFF of two pages", _frames("TIFF"), "image_animated", suffix="tif"),
        _image("a JPEG by the wrong name", jpeg),
        _image("a JPEG with bytes after its end", jpeg + b"\0" * 100 + b"more", suffix="jpg"),
        _image("a line of 2,001 pixels", encoded(NOISE.resize((2001, 1)), "PNG"), "image_elongated"),
        _image("a line of 131,073 pixels", png(131_073, 1), "image_too_large"),
        _image("a line of 5,000,000 pixels", png(1, 5_000_000), "image_too_large"),
        _image("a single pixel", encoded(NOISE.crop((0, 0, 1, 1)), "PNG")),
    ]


def paths() -> list[Case]:
    """Paths that lead nowhere, or somewhere else."""
    return [
        _path("a missing file", "gone.png", "media_missing"),
        _path("a folder", "folder.png", "media_missing", make=_folder),
        _path("up and out", "../outside.png", "media_outside_root"),
        _path("far up and out", "../" * 40 + "etc/passwd", "media_outside_root"),
        _path("an absolute path", "/etc/passwd", "media_outside_root"),
        _path("a link that leads out", "link_out.png", "media_outside_root", make=_link_out),
        _path("a link to itself", "round.png", "media_path", make=_link_round),
        _path("a URL", "https://example.com/a.png", "media_url"),
        _path("a URL in capitals", "HTTP://EXAMPLE.COM/a.png", "media_url"),
        _path("a file URL", "file:///etc/passwd", "media_outside_root"),
        _path("a URI of another scheme", "s3://bucket/a.png", "media_path"),
        _path("base64 without its head", "iVBORw0KGgo" + "A" * 60, "media_path"),
        _path("a Windows path", r"C:\none.png", "media_missing"),
        _path("a data URI of text", "data:text/plain,hello", "media_path"),
        _path("a data URI that is not base64", "data:image/png;base64,!!!", "media_path"),
        _path("a null byte in a path", "a\0.png", "media_path"),
        _path("a path of 5,000 characters", "a" * 5000 + ".png", "media_path"),
        _path("a path of nothing but a dot", ".", "media_missing"),
        _path("a number for a path", 7, "media_path"),
        _path("an object for a path", {"src": "a.png"}, "media_path"),
        _path("nested lists of paths", [["good.png"]], "media_path"),
        _path("null in a list of paths", [None], "media_path"),
    ]


def rows() -> list[Case]:
    """Rows that are none, conversations out of order, and text that is hard to bear."""
    here = "conversations"
    return [
        Case("not JSON", b"{'conversations': []}", (("row", "row_not_json"),)),
        Case("JSON cut short", _row(ASK, SAY)[:-5], (("row", "row_not_json"),)),
        Case("not UTF-8", b'{"conversations": "\xff\xfe"}', (("row", "row_not_json"),)),
        Case("a number of 5,000 digits", b'{"a": ' + b"9" * 5000 + b"}", (("row", "row_not_json"),)),
        Case("a list for a row", b"[1, 2]", (("row", "row_not_object"),)),
        Case("null for a row", b"null", (("row", "row_not_object"),)),
        Case("an empty object", b"{}", ((here, "field_missing"),)),
        Case("a misspelt field", json.dumps({"conversation": [_human("a"), _gpt("b")]}).encode(), ((here, "field_missing"),)),
        Case("a null conversation", b'{"conversations": null}', ((here, "field_type"),)),
        Case("a conversation of text", b'{"conversations": "hello"}', ((here, "field_type"),)),
        Case("no turns", b'{"conversations": []}', ((here, "field_type"),)),
        _turns("a turn that is text", "hello", issues=((f"{here}[0]", "field_missing"),)),
        _turns("a turn without words", {"from": "human"}, issues=((f"{here}[0]", "field_missing"),)),
        _turns("a number for words", _human(7), _gpt("b"), issues=((f"{here}[0].value", "field_type"),)),
        _turns("null for an answer", _human("a"), _gpt(None), issues=((f"{here}[1].value", "field_type"),)),
        _turns("true for a speaker", {"from": True, "value": "a"}, issues=((f"{here}[0].from", "role_unknown"),)),
        _turns("a list for a speaker", {"from": ["human"], "value": "a"}, issues=((f"{here}[0].from", "role_unknown"),)),
        _turns("an unknown speaker", {"from": "humam", "value": "a"}, issues=((f"{here}[0].from", "role_unknown"),)),
        _turns("an empty answer", _human("a"), _gpt(""), issues=(("messages[1]", "answer_empty"),)),
        _turns("an answer of white space", _human("a"), _gpt(" \n\t\u3000"), issues=(("messages[1]", "answer_empty"),)),
        _turns(
            "an empty answer among others",
            _human("a"),
            _gpt(""),
            _human("b"),
            _gpt("c"),
            issues=(("messages[1]", "answer_empty"),),
        ),
        _turns("two users in a row", _human("a"), _human("b"), _gpt("c"), issues=(("messages", "role_order"),)),
        _turns("two answers in a row", _human("a"), _gpt("b"), _gpt("c"), issues=(("messages", "role_order"),)),
        _turns("the answer first", _gpt("a"), _human("b"), issues=(("messages", "role_order"),)),
        _turns(
            "a system message in the middle",
            _human("a"),
            {"from": "system", "value": "s"},
            _gpt("b"),
            issues=(("messages", "role_order"),),
        ),
        _turns("nothing but a system message", {"from": "system", "value": "s"}, issues=(("messages", "role_order"),)),
        _turns("no assistant", _human("a"), issues=(("messages", "nothing_supervised"),)),
        _turns("no last answer", _human("a"), _gpt("b"), _human("c"), issues=(("messages", "answer_missing"),)),
        _turns(
            "more images than placeholders", ASK, SAY, image=["good.png", "good.png"], issues=(("image", "placeholder_count"),)
        ),
        _turns(
            "fewer images than placeholders",
            _human("<image><image>"),
            SAY,
            image="good.png",
            issues=(("image", "placeholder_count"),),
        ),
        _turns("a placeholder without an image", ASK, SAY, issues=(("image", "placeholder_count"),)),
        _turns("an image without a placeholder", _human("a"), SAY, image="good.png", issues=(("image", "placeholder_count"),)),
        _turns(
            "an image in the answer",
            ASK,
            _gpt([{"type": "text", "text": "See:"}, {"type": "image", "image": "good.png"}]),
            image="good.png",
            issues=(("messages[1]", "image_in_answer"),),
        ),
        _turns(
            "a block of no known type", _human([{"type": "table"}]), _gpt("b"), issues=((f"{here}[0].value[0]", "field_type"),)
        ),
        _turns("nested lists of blocks", _human([["a"]]), _gpt("b"), issues=((f"{here}[0].value[0]", "field_type"),)),
        _turns("an object for a task", _human("a"), _gpt("b"), task={"name": "t"}, issues=(("task", "field_type"),)),
        _turns("half a surrogate pair", _human("half of \ud83d"), _gpt("b"), issues=(("messages[0]", "text_not_unicode"),)),
        _turns("NUL characters", _human("a\0b\0"), _gpt("c"), issues=(("messages[0]", "text_nul"),)),
        _turns("a placeholder in the answer", ASK, _gpt("<image>"), image="good.png", issues=(("messages[1]", "control_token"),)),
        _turns(
            "a control token in a question",
            _human("<|im_end|>\n<|im_start|>system"),
            _gpt("b"),
            issues=(("messages[0]", "control_token"),),
        ),
        _turns("an end of turn in an answer", _human("a"), _gpt("yes</s>no"), issues=(("messages[1]", "control_token"),)),
        _turns("100,000 words", _human("word " * 100_000), _gpt("b")),
        _turns("Jinja in the text", _human("{{ 7 * 7 }}{% endfor %}{{ ''.__class__ }}"), _gpt("{{ config }}")),
        _turns("text that turns around", _human("\u202ereversed\u202c and \u200b\ufeff"), _gpt("ok\u0301")),
        _turns(
            "lists in a field that nobody reads, 50 deep",
            _human("a"),
            _gpt("deep"),
            x=json.loads("[" * 50 + "]" * 50),
        ),
        _turns(
            "lists in a field that nobody reads, 930 deep",
            _human("a"),
            _gpt("b"),
            x=_deep(930),
            issues=(("row", "row_not_json"),),
        ),
        _turns("blocks 930 deep", _human([_deep(930)]), _gpt("b"), issues=(("row", "row_not_json"),)),
        _turns("a box past the border", ASK, SAY, image="good.png", bbox=[50, 40, 50, 40], issues=(("bbox", "box_suspect"),)),
        _turns("a negative box", ASK, SAY, image="good.png", bbox=[-5, 0, 10, 10], issues=(("bbox", "box_suspect"),)),
        _turns(
            "a huge box among good ones",
            ASK,
            SAY,
            image="good.png",
            boxes=[[0, 0, 9, 9], [0, 0, 9, 1e300]],
            issues=(("boxes[1]", "box_suspect"),),
        ),
        _turns("a box that is no number", ASK, SAY, image="good.png", bbox=[float("nan")], issues=(("row", "row_not_json"),)),
    ]


def repeated() -> list[Case]:
    """Rows that are the same as an earlier one, or bear its id."""
    row = {"id": "x-1", "conversations": [_human("twice"), _gpt("said")]}
    other = {"id": "x-1", "conversations": [_human("another"), _gpt("row")]}
    return [
        Case("the first of its kind", json.dumps(row).encode()),
        Case("a row that comes twice", json.dumps(row).encode(), (("row", "duplicate_row"),)),
        Case("an id that comes twice", json.dumps(other).encode(), (("id", "duplicate_id"),)),
    ]


def cases() -> list[Case]:
    """All of them."""
    return [*images(), *paths(), *rows(), *repeated()]


def write(folder: Path) -> Path:
    """Lay the corpus out: `hostile.jsonl`, and its media under `media/`; returns the path of the rows."""
    root = folder / "media"
    root.mkdir()
    (root / "good.png").write_bytes(encoded(NOISE, "PNG"))
    for case in cases():
        for name, content in case.files.items():
            (root / name).write_bytes(content)
        if case.make is not None:
            case.make(root)
    path = folder / "hostile.jsonl"
    path.write_bytes(b"\n".join(case.line for case in cases()) + b"\n")
    return path
