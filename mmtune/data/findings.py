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
    "row_not_object": Kind("error", "write the row as an object of named fields"),
    "field_missing": Kind("error", "add the field, or name the data template that fits these rows"),
    "field_type": Kind("error", "give the field the type that the data template reads"),
    "role_unknown": Kind("error", "rename the speaker, or add it to the data template's roles"),
    "role_order": Kind("error", "order the turns: a system message first if any, then user and assistant in turns"),
    "answer_missing": Kind("error", "end the conversation with the assistant's answer, or cut the last question"),
    "answer_empty": Kind("error", "write the answer, or remove the row"),
    "nothing_supervised": Kind("error", "add an answer of the assistant: loss falls on nothing else"),
    "image_in_answer": Kind("error", "move the image to the user's turn"),
    "placeholder_count": Kind("error", "give one placeholder for each image of the row"),
    "text_not_unicode": Kind("error", "write the text again from its source: half of a surrogate pair stands alone"),
    "too_long": Kind("error", "raise data.max_tokens, shorten the row, or choose what data.over_length does with it"),
    "row_unusable": Kind("error", "mend what the detail names, or remove the row"),
    # media
    "media_missing": Kind("error", "put the file there, or correct the path or media_root"),
    "media_path": Kind("error", "give the path of a file, relative to media_root"),
    "media_outside_root": Kind("error", "move the file under media_root, or set media_root to a folder that holds it"),
    "media_url": Kind("error", "download the file and give its path, or allow URLs in the recipe"),
    "media_unsupported": Kind("error", "remove the row: this kind of medium cannot be encoded yet"),
    "image_empty": Kind("error", "the file holds nothing: fetch it again"),
    "image_unreadable": Kind("error", "fetch the file again, or convert it to JPEG or PNG"),
    "image_truncated": Kind("error", "fetch the file again: its end is missing"),
    "image_damaged": Kind("error", "fetch the file again: its content is damaged"),
    "image_zero_size": Kind("error", "replace the image: it has no pixels"),
    "image_too_large": Kind("error", "scale the image down below the limit"),
    # what trains all the same
    "too_long_by_policy": Kind("warning", "nothing, if data.over_length does what you want with long rows"),
    "control_token": Kind("warning", "check that it is meant as text: it is not taken for the real token"),
    "text_nul": Kind("warning", "take the NUL characters out of the text"),
    "duplicate_id": Kind("warning", "give every row its own id, or remove the copies"),
    "duplicate_row": Kind("warning", "remove the copies, or give the source a weight to repeat it"),
    "row_held_out": Kind("warning", "remove the row from the training data, or the score will be of what was learnt"),
    "box_outside": Kind("warning", "correct the box: it should lie within the image"),
    "box_malformed": Kind("warning", "write the box as four numbers"),
    "image_end_marker": Kind("warning", "write the image again: it decodes, but its end marker is missing"),
    "image_animated": Kind("warning", "extract the frame you mean: only the first is used"),
    "image_rotated": Kind("note", "nothing: it is turned upright when opened; boxes must be of the upright image"),
    "image_palette": Kind("note", "nothing: it is converted to RGB when opened"),
    "image_transparent": Kind("note", "nothing, if the picture is right without transparency, which is dropped"),
    "image_cmyk": Kind("note", "nothing: it is converted to RGB when opened, without a colour profile"),
    "image_16bit": Kind("note", "nothing: it is reduced to 8 bits when opened"),
    "field_unknown": Kind("note", "nothing: the data template does not read the field"),
}


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
