"""What the doctor can find: each kind by its name, how grave it is, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Kind:
    """A kind of finding. An error is a row that training quarantines; a warning trains, though perhaps not as meant."""

    severity: Severity
    fix: str


KINDS: dict[str, Kind] = {
    # rows
    "row_not_json": Kind("error", "write the row as one valid JSON object"),
    "row_malformed": Kind("error", "write the row again as the file's format has it"),
    "row_not_object": Kind("error", "write the row as an object of named fields"),
    "field_missing": Kind("error", "add the field, or name the data template that fits these rows"),
    "field_type": Kind("error", "give the field the type that the data template reads"),
    "template_fails": Kind("error", "simplify the data template: it does more work than one row may take"),
    "role_unknown": Kind("error", "rename the speaker, or add it to the data template's roles"),
    "role_order": Kind("error", "order the turns: a system message first if any, then user and assistant in turns"),
    "answer_missing": Kind("error", "end the conversation with the assistant's answer, or cut the last question"),
    "answer_empty": Kind("error", "write the answer, or remove the row"),
    "nothing_supervised": Kind("error", "add an answer of the assistant whose weight is not 0: loss falls on nothing else"),
    "turn_weight": Kind("error", "give the assistant's turn weight 0 or 1, or leave the key out"),
    "reference_weight": Kind("error", "end a held-out row with an answer of weight 1"),
    "image_in_answer": Kind("error", "move the image to the user's turn"),
    "placeholder_count": Kind("error", "give one placeholder for each image of the row"),
    "text_not_unicode": Kind("error", "write the text again from its source: half of a surrogate pair stands alone"),
    "too_long": Kind("error", "raise data.max_tokens, shorten the row, or choose what data.over_length does with it"),
    "label_unknown": Kind("error", "add the label to the verbalizer, or correct it"),
    "partner_missing": Kind("error", "give the row exactly one partner in the joined file"),
    "shots_too_few": Kind("error", "ask for fewer examples, or take them from a file with more rows"),
    "chat_template": Kind("error", "change the row so that the chat template can write it, or take another chat template"),
    "answer_edge": Kind("error", "take the white space from the edge of the answer"),
    "row_unusable": Kind("error", "mend what the detail names, or remove the row"),
    # media
    "media_missing": Kind("error", "put the file there, or correct the path or media_root"),
    "media_path": Kind("error", "give the path of a file, relative to media_root"),
    "media_outside_root": Kind("error", "move the file under media_root, or set media_root to a folder that holds it"),
    "media_unread": Kind("error", "rename the key to one that the template reads, or name it in the source's `ignore`"),
    "media_url": Kind("error", "download the file and give its path, or allow URLs in the recipe"),
    "media_fetch": Kind("error", "correct the URL, or download the file and give its path"),
    "media_unsupported": Kind("error", "remove the row: this kind of medium cannot be encoded yet"),
    "image_empty": Kind("error", "the file holds nothing: fetch it again"),
    "image_unreadable": Kind("error", "fetch the file again, or convert it to JPEG or PNG"),
    "image_truncated": Kind("error", "fetch the file again: its end is missing"),
    "image_damaged": Kind("error", "fetch the file again: its content is damaged"),
    "image_refused": Kind("error", "change the image's shape: the model's image processor takes none like it"),
    "image_zero_size": Kind("error", "replace the image: it has no pixels"),
    "image_too_large": Kind("error", "scale the image down below the limit"),
    # boxes that the data template declares
    "box_outside": Kind("error", "correct the box: it should lie within the upright image"),
    "box_malformed": Kind("error", "write the box as four numbers, with an area, beside one image"),
    "box_unmoved": Kind("error", "declare the boxes in the data template, or take resize, crop and flip out of augment"),
    # what trains all the same
    "too_long_by_policy": Kind("warning", "nothing, if data.over_length does what you want with long rows"),
    "control_token": Kind("warning", "check that it is meant as text: it is not taken for the real token"),
    "text_nul": Kind("warning", "take the NUL characters out of the text"),
    "duplicate_id": Kind("warning", "give every row its own id, or remove the copies"),
    "duplicate_row": Kind("warning", "remove the copies, or give the source a weight to repeat it"),
    "row_held_out": Kind("warning", "remove the row from the training data, or the score will be of what was learnt"),
    "box_suspect": Kind(
        "warning", "nothing, if the field is no box in pixels of the upright image; the data template does not read it"
    ),
    "image_end_marker": Kind("warning", "write the image again: it decodes, but its end marker is missing"),
    "image_elongated": Kind("warning", "crop the image, or pad its shorter edge: image processors refuse it or blow it up"),
    "image_animated": Kind("warning", "extract the frame you mean: only the first is used"),
    "image_exif_damaged": Kind(
        "warning", "check that the picture is upright, and save it without EXIF data: it is used as stored"
    ),
    "image_rotated": Kind("note", "nothing: it is turned upright when opened; boxes must be of the upright image"),
    "image_palette": Kind("note", "nothing: it is converted to RGB when opened"),
    "image_transparent": Kind("note", "nothing, if the picture is right on white: transparency is composited on it when opened"),
    "image_cmyk": Kind("note", "nothing: it is converted to RGB when opened, without a colour profile"),
    "image_16bit": Kind("note", "nothing, if its values fill their range: 8 bits are kept; otherwise give its source a window"),
    "field_unknown": Kind("note", "nothing: the data template does not read the field"),
}


class Unusable(ValueError):
    """What is wrong with a part of a row, said where the row's id is not known.

    Args:
        finding: its kind, a name in `KINDS`.
        detail: what was wrong and what would be right.
    """

    def __init__(self, finding: str, detail: str) -> None:
        super().__init__(detail)
        self.finding = finding
        self.detail = detail

    def __reduce__(self) -> tuple[type[Unusable], tuple[str, str]]:
        return type(self), (self.finding, self.detail)  # sent between processes


def kind_of(error: ValueError, otherwise: str = "row_unusable") -> str:
    """The kind of fault that an error says, a name in `KINDS`; `otherwise` if it says none."""
    return error.finding if isinstance(error, Unusable) else otherwise


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's list.

    Attributes:
        row: the row's id.
        field: the field of the row or of its messages.
        finding: a name in `KINDS`.
        detail: what was found.
        fix: what to do about it.
    """

    row: str
    field: str
    finding: str
    detail: str
    fix: str

    @property
    def severity(self) -> Severity:
        """How grave it is."""
        return KINDS[self.finding].severity

    def as_json(self) -> dict[str, str]:
        """The five keys of a line of JSON Lines."""
        return asdict(self)


def finding(row: str, field: str, name: str, detail: str) -> Finding:
    """A finding with the fix of its kind."""
    return Finding(row, field, name, detail, KINDS[name].fix)
