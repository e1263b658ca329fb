"""What the doctor can find: each kind by its name, how grave it is, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class IssueType:
    """A type of issue. An error is a row that training quarantines; a warning trains, though perhaps not as meant."""

    severity: Severity
    fix: str


ISSUE_TYPES: dict[str, IssueType] = {
    # rows
    "row_not_json": IssueType("error", "write the row as one valid JSON object"),
    "row_malformed": IssueType("error", "write the row again as the file's format has it"),
    "row_not_object": IssueType("error", "write the row as an object of named fields"),
    "field_missing": IssueType("error", "add the field, or name the data template that fits these rows"),
    "field_type": IssueType("error", "give the field the type that the data template reads"),
    "template_fails": IssueType("error", "simplify the data template: it does more work than one row may take"),
    "role_unknown": IssueType("error", "rename the speaker, or add it to the data template's roles"),
    "role_order": IssueType("error", "order the turns: a system message first if any, then user and assistant in turns"),
    "answer_missing": IssueType("error", "end the conversation with the assistant's answer, or cut the last question"),
    "answer_empty": IssueType("error", "write the answer, or remove the row"),
    "nothing_supervised": IssueType("error", "add an answer of the assistant whose weight is not 0: loss falls on nothing else"),
    "turn_weight": IssueType("error", "give the assistant's turn weight 0 or 1, or leave the key out"),
    "reference_weight": IssueType("error", "end a held-out row with an answer of weight 1"),
    "image_in_answer": IssueType("error", "move the image to the user's turn"),
    "placeholder_count": IssueType("error", "give one placeholder for each image of the row"),
    "text_not_unicode": IssueType("error", "write the text again from its source: half of a surrogate pair stands alone"),
    "too_long": IssueType("error", "raise data.max_tokens, shorten the row, or choose what data.over_length does with it"),
    "label_unknown": IssueType("error", "add the label to the verbalizer, or correct it"),
    "partner_missing": IssueType("error", "give the row exactly one partner in the joined file"),
    "shots_too_few": IssueType("error", "ask for fewer examples, or take them from a file with more rows"),
    "chat_template": IssueType("error", "change the row so that the chat template can write it, or take another chat template"),
    "answer_edge": IssueType("error", "take the white space from the edge of the answer"),
    "row_unusable": IssueType("error", "correct what the detail names, or remove the row"),
    # media
    "media_missing": IssueType("error", "put the file there, or correct the path or media_root"),
    "media_path": IssueType("error", "give the path of a file, relative to media_root"),
    "media_outside_root": IssueType("error", "move the file under media_root, or set media_root to a folder that holds it"),
    "media_unread": IssueType("error", "rename the key to one that the template reads, or name it in the source's `ignore`"),
    "media_url": IssueType("error", "download the file and give its path, or allow URLs in the recipe"),
    "media_fetch": IssueType("error", "correct the URL, or download the file and give its path"),
    "media_unsupported": IssueType("error", "remove the row: this kind of medium cannot be encoded yet"),
    "image_empty": IssueType("error", "the file holds nothing: fetch it again"),
    "image_unreadable": IssueType("error", "fetch the file again, or convert it to JPEG or PNG"),
    "image_truncated": IssueType("error", "fetch the file again: its end is missing"),
    "image_damaged": IssueType("error", "fetch the file again: its content is damaged"),
    "image_refused": IssueType("error", "change the image's shape: the model's image processor takes none like it"),
    "image_zero_size": IssueType("error", "replace the image: it has no pixels"),
    "image_too_large": IssueType("error", "scale the image down below the limit"),
    # boxes that the data template declares
    "box_outside": IssueType("error", "correct the box: it should lie within the upright image"),
    "box_malformed": IssueType("error", "write the box as four numbers, with an area, beside one image"),
    "box_unmoved": IssueType("error", "declare the boxes in the data template, or take resize, crop and flip out of augment"),
    # what trains all the same
    "too_long_by_policy": IssueType("warning", "nothing, if data.over_length does what you want with long rows"),
    "control_token": IssueType("warning", "check that it is meant as text: it is not taken for the real token"),
    "text_nul": IssueType("warning", "take the NUL characters out of the text"),
    "duplicate_id": IssueType("warning", "give every row its own id, or remove the copies"),
    "duplicate_row": IssueType("warning", "remove the copies, or give the source a weight to repeat it"),
    "row_held_out": IssueType("warning", "remove the row from the training data, or the score will be of what was learnt"),
    "box_suspect": IssueType(
        "warning", "nothing, if the field is no box in pixels of the upright image; the data template does not read it"
    ),
    "image_end_marker": IssueType("warning", "write the image again: it decodes, but its end marker is missing"),
    "image_elongated": IssueType("warning", "crop the image, or pad its shorter edge: image processors refuse it or blow it up"),
    "image_animated": IssueType("warning", "extract the frame you mean: only the first is used"),
    "image_exif_damaged": IssueType(
        "warning", "check that the picture is upright, and save it without EXIF data: it is used as stored"
    ),
    "image_rotated": IssueType("note", "nothing: it is turned upright when opened; boxes must be of the upright image"),
    "image_palette": IssueType("note", "nothing: it is converted to RGB when opened"),
    "image_transparent": IssueType("note", "nothing, if the image is right on white: it is composited on white when opened"),
    "image_cmyk": IssueType("note", "nothing: it is converted to RGB when opened, without a colour profile"),
    "image_16bit": IssueType(
        "note", "nothing, if its values fill the range: 8 bits are kept; otherwise give its source a window"
    ),
    "field_unknown": IssueType("note", "nothing: the data template does not read the field"),
}


class DataIssueError(ValueError):
    """What is wrong with a part of a row, said where the row's id is not known.

    Args:
        issue: its kind, a name in `ISSUE_TYPES`.
        detail: what was wrong and what would be right.
    """

    def __init__(self, issue: str, detail: str) -> None:
        super().__init__(detail)
        self.issue = issue
        self.detail = detail

    def __reduce__(self) -> tuple[type[DataIssueError], tuple[str, str]]:
        return type(self), (self.issue, self.detail)  # sent between processes


def issue_type_of(error: ValueError, otherwise: str = "row_unusable") -> str:
    """The kind of fault that an error says, a name in `ISSUE_TYPES`; `otherwise` if it says none."""
    return error.issue if isinstance(error, DataIssueError) else otherwise


@dataclass(frozen=True)
class Issue:
    """One line of the doctor's list.

    Attributes:
        row: the row's id.
        field: the field of the row or of its messages.
        issue: a name in `ISSUE_TYPES`.
        detail: what was found.
        fix: what to do about it.
    """

    row: str
    field: str
    issue: str
    detail: str
    fix: str

    @property
    def severity(self) -> Severity:
        """How grave it is."""
        return ISSUE_TYPES[self.issue].severity

    def as_json(self) -> dict[str, str]:
        """The five keys of a line of JSON Lines."""
        return asdict(self)


def issue(row: str, field: str, name: str, detail: str) -> Issue:
    """An issue with the fix of its kind."""
    return Issue(row, field, name, detail, ISSUE_TYPES[name].fix)
