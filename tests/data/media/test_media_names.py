"""Names of media in rows: URIs, Windows paths, and the objects in which data sets wrap them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtune.cli.main import entry_point
from mmtune.data.media.media import EmbeddedMedia, MediaRules, open_image, resolve_media


def _encoded(format: str = "JPEG") -> str:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(file, format)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("head", ["data:image;base64,", "data:image/jpeg;base64,", "DATA:IMAGE/JPEG;charset=x;BASE64,"])
def test_a_data_uri_is_read_with_a_format_or_without(media: Path, head: str) -> None:
    body = _encoded()
    lines = "\n".join(body[start : start + 76] for start in range(0, len(body), 76))  # as MIME breaks it
    for uri in (body, lines, body.replace("+", "%2B").replace("=", "%3D")):
        medium = resolve_media(head + uri, MediaRules(media))
        assert isinstance(medium, EmbeddedMedia) and open_image(medium).getpixel((3, 3))[0] > 250


def test_a_file_uri_is_a_path_below_the_root(media: Path) -> None:
    """RFC 8089: with an empty host, localhost or none, and percent-encoded."""
    (media / "a b é.png").write_bytes((media / "a.png").read_bytes())
    rules = MediaRules(media)
    for uri in (f"file://{media}/a.png", f"file://localhost{media}/a.png", f"file:{media}/a.png", f"FILE://{media}/%61.png"):
        assert resolve_media(uri, rules) == media / "a.png"
        assert resolve_media({"type": "image_url", "image_url": {"url": uri, "detail": "low"}}, rules) == media / "a.png"
    assert resolve_media((media / "a b é.png").as_uri(), rules) == media / "a b é.png"
    outside = (media.parent / "outside.png").as_uri()
    for uri in (outside, f"file://{media}/../outside.png", f"file://{media}/%2e%2e/outside.png", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="is outside media_root"):
            resolve_media(uri, rules)
    assert resolve_media(outside, MediaRules(media, outside=True)) == media.parent / "outside.png"
    for uri, host in (("file://server/share/a.png", "server"), ("file://a.png", r"a\.png"), ("file://~/a.png", "~")):
        with pytest.raises(ValueError, match=f"three slashes, got .* with the host '{host}'"):
            resolve_media(uri, rules)
    for uri in (f"file://{media}/none.png", f"file://{media}", "file:///", "file://"):
        with pytest.raises(ValueError, match=r"no such file|is outside|with the host"):
            resolve_media(uri, rules)


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf", "oss", "image", "ftp", "az", "hdfs", "blob:https", "S3"])
def test_another_scheme_is_named(media: Path, scheme: str) -> None:
    for value in (f"{scheme}://bucket/a.png", {"url": f"{scheme}://bucket/a.png"}, {"path": f"{scheme}://bucket/a.png"}):
        with pytest.raises(ValueError, match=rf"{scheme}:// URIs are not supported; download the file"):
            resolve_media(value, MediaRules(media, outside=True, urls=True))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000"])
def test_base64_without_a_data_uri_prefix_is_an_error_that_names_it(media: Path, format: str) -> None:
    body = _encoded(format)
    for value in (body, body[:100], {"url": body}):
        with pytest.raises(ValueError, match=r"without its prefix; write data:image;base64, before it") as caught:
            resolve_media(value, MediaRules(media))
        assert len(str(caught.value)) < 250
    with pytest.raises(ValueError, match="expected bytes in 'bytes', got str; write base64 as a string: data:image;base64"):
        resolve_media({"bytes": body, "path": None}, MediaRules(media))


@pytest.mark.parametrize("value", [{"url": "a.png"}, {"image_url": "a.png"}, {"image_url": {"url": "a.png"}}, {"image": "a.png"}])
def test_an_object_that_names_one_medium_is_read(media: Path, value: dict[str, Any]) -> None:
    for wrapped in (value, value | {"type": "image"}, value | {"bytes": None}, {"image": value}):
        assert resolve_media(wrapped, MediaRules(media)) == media / "a.png"


@pytest.mark.parametrize("value", [{"url": "a.png", "caption": "x"}, {"file": "a.png"}, {"image": "a.png", "path": "b.png"}])
def test_an_object_of_another_form_is_rejected_with_the_supported_forms(media: Path, value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf'or {{"path": ...}}, .*; got an object with {", ".join(value)}'):
        resolve_media(value, MediaRules(media))


@pytest.mark.parametrize(
    "name", ["imgs\\a.png", "imgs\\sub\\..\\a.png", ".\\imgs/a.png", "imgs/sub\\..\\a.png", "{root}\\imgs\\a.png"]
)
def test_a_windows_path_is_read_with_forward_slashes(media: Path, name: str) -> None:
    (media / "imgs" / "sub").mkdir(parents=True)
    (media / "imgs" / "a.png").write_bytes((media / "a.png").read_bytes())
    assert resolve_media(name.replace("{root}", str(media)), MediaRules(media)) == media / "imgs" / "a.png"


def test_a_file_whose_name_has_a_backslash_has_priority(media: Path) -> None:
    (media / "imgs").mkdir()
    for name in ("imgs\\a.png", "imgs/a.png"):
        (media / name).write_bytes((media / "a.png").read_bytes())
    assert resolve_media("imgs\\a.png", MediaRules(media)) == media / "imgs\\a.png"


@pytest.mark.parametrize(
    "name", ["C:\\data\\a.png", "C:/data/a.png", "file:///C:/data/a.png", "imgs\\none.png", "\\\\host\\x\\a.png"]
)
def test_a_missing_windows_path_is_reported_as_a_windows_path(media: Path, name: str) -> None:
    with pytest.raises(ValueError, match="this is a Windows path; write it relative to media_root"):
        resolve_media(name, MediaRules(media))


def test_a_windows_path_does_not_lead_out_of_the_root(media: Path) -> None:
    for name in ("..\\outside.png", "sub\\..\\..\\outside.png"):
        with pytest.raises(ValueError, match="is outside media_root"):
            resolve_media(name, MediaRules(media))


def _case(folder: Path, images: list[str], source: str = "") -> Path:
    rows = []
    for image in images:
        question = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}
        rows.append({"messages": [question, {"role": "assistant", "content": "red"}]})
    (folder / "rows.json").write_text(json.dumps(rows))
    text = f"""
model: {{base: builtin:tiny-llava}}
data:
  train: [{{path: {folder / "rows.json"}, template: messages{source}}}]
output_dir: {folder / "run"}
"""
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_rows_with_uris_and_windows_paths_are_checked(media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (media / "imgs").mkdir()
    (media / "imgs" / "a.png").write_bytes((media / "a.png").read_bytes())
    good = [f"data:image;base64,{_encoded()}", (media / "a.png").as_uri(), "imgs\\a.png"]
    assert entry_point(["data", "check", str(_case(media, good))]) == 0
    assert entry_point(["data", "show", str(media / "recipe.yaml"), "--index", "2"]) == 0
    assert f"image 1: {media / 'imgs' / 'a.png'}" in capsys.readouterr().out.replace("\n", "")
    assert entry_point(["data", "check", str(_case(media, [*good, _encoded()])), "--out", str(media / "found.jsonl")]) == 1
    issues = [json.loads(line) for line in (media / "found.jsonl").read_text().splitlines()]
    [error] = [each for each in issues if each["issue"] == "media_path"]
    assert error["row"] == "rows.json[3]" and "write data:image;base64, before it" in error["detail"]
