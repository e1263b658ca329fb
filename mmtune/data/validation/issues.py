"""Issue types of data validation: name, severity and fix."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class IssueType:
    """An issue type. Rows with an error are quarantined in training; rows with a warning or note are used."""

    severity: Severity
    fix: str


ISSUE_TYPES: dict[str, IssueType] = {
    # rows
    "row_not_json": IssueType("error", "write the row as one valid JSON object"),
    "row_malformed": IssueType("error", "write the row in the format of the file"),
    "row_not_object": IssueType("error", "write the row as an object with named fields"),
    "field_missing": IssueType("error", "add the field, or choose a data template that fits these rows"),
    "field_type": IssueType("error", "change the field to the type that the data template reads"),
    "template_fails": IssueType("error", "simplify the data template: it exceeds the limits for one row"),
    "role_unknown": IssueType("error", "rename the speaker, or add it to the data template's roles"),
    "role_order": IssueType(
        "error",
        "order the turns: an optional system message, then user and assistant alternating; tool results follow their calls",
    ),
    "tool_malformed": IssueType(
        "error", "write a call as {name, arguments} with arguments as an object, and tools as a list of function schemas"
    ),
    "answer_missing": IssueType("error", "end the conversation with an answer of the assistant, or remove the last question"),
    "answer_empty": IssueType("error", "write the answer, or remove the row"),
    "nothing_supervised": IssueType(
        "error", "add an answer of the assistant with a weight other than 0: only answers are supervised"
    ),
    "several_answers": IssueType("error", "set data.supervise: last, or split the conversation into one row for each answer"),
    "turn_weight": IssueType("error", "set the weight of the assistant's turn to 0 or 1, or remove the key"),
    "reference_weight": IssueType("error", "end a held-out row with an answer of weight 1"),
    "reference_tool_call": IssueType("error", "end a held-out row with an answer of text: a tool call cannot be scored"),
    "image_in_answer": IssueType("error", "move the image to the user's turn"),
    "placeholder_count": IssueType("error", "write one placeholder for each image of the row"),
    "text_not_unicode": IssueType("error", "write the text again from its source: it has a lone surrogate"),
    "too_long": IssueType("error", "raise data.max_tokens, shorten the row, or set another data.over_length"),
    "label_unknown": IssueType("error", "add the label to the verbalizer, or correct it"),
    "partner_missing": IssueType("error", "make exactly one row of the joined file match the row"),
    "shots_too_few": IssueType("error", "lower the number of examples, or use a file with more rows"),
    "chat_template": IssueType("error", "change the row so that the chat template can render it, or use another chat template"),
    "answer_edge": IssueType("error", "remove the white space at the edge of the answer"),
    "row_unusable": IssueType("error", "fix the problem in the detail, or remove the row"),
    # media
    "media_missing": IssueType("error", "add the file, or correct the path or media_root"),
    "media_path": IssueType("error", "write the path of a file relative to media_root"),
    "media_outside_root": IssueType("error", "move the file into media_root, or set media_root to a folder that contains it"),
    "media_unread": IssueType("error", "rename the key to one that the template reads, or add it to the source's `ignore`"),
    "media_url": IssueType("error", "download the file and give its path, or allow URLs in the recipe"),
    "media_fetch": IssueType("error", "correct the URL, or download the file and give its path"),
    "media_unsupported": IssueType("error", "remove the row: this modality is not supported yet"),
    "image_empty": IssueType("error", "download the file again: it is empty"),
    "image_unreadable": IssueType("error", "download the file again, or convert it to JPEG or PNG"),
    "image_truncated": IssueType("error", "download the file again: its end is missing"),
    "image_damaged": IssueType("error", "download the file again: its content is damaged"),
    "image_refused": IssueType("error", "change the image's shape: the model's image processor rejects it"),
    "image_zero_size": IssueType("error", "replace the image: it has no pixels"),
    "image_too_large": IssueType("error", "resize the image below the limit"),
    # boxes, points and quadrilaterals that the data template declares
    "box_outside": IssueType("error", "correct the numbers: they must be inside the upright image in the declared convention"),
    "box_malformed": IssueType(
        "error",
        "write finite numbers: four of a box and eight of a quadrilateral with an area, two of a point; in a row with one image",
    ),
    "box_unit": IssueType("error", "set `unit` in the data template to that of the numbers, or correct them"),
    "box_placeholder": IssueType("error", "write the messages in a data template of columns that declares `boxes`"),
    "box_unmoved": IssueType("error", "declare the boxes in the data template, or remove resize, crop and flip from augment"),
    # between training and held-out rows
    "row_leaked": IssueType(
        "error", "remove the row from one side; or set evaluate.leakage: warn, and the score includes rows seen in training"
    ),
    "image_leaked": IssueType(
        "error",
        "give every source with these images the same fraction in held_out, and the same seed; or set evaluate.leakage: warn",
    ),
    # warnings and notes: the row is used
    "too_long_by_policy": IssueType("warning", "nothing, if data.over_length handles long rows as you want"),
    "control_token": IssueType("warning", "check that it is meant as text: it does not become the real token"),
    "tool_undeclared": IssueType("warning", "add the function's schema to the row's tools, or correct the name in the call"),
    "text_nul": IssueType("warning", "remove the NUL characters from the text"),
    "duplicate_id": IssueType("warning", "give every row a unique id, or remove the copies"),
    "duplicate_row": IssueType("warning", "remove the copies, or set a weight of the source to repeat it"),
    "row_shared": IssueType("warning", "remove the row from one side: the score includes a row seen in training"),
    "image_shared": IssueType("warning", "nothing, if the held-out questions may be about images seen in training"),
    "image_near_duplicate": IssueType("warning", "look at both images, and remove one of the rows if they are the same picture"),
    "box_suspect": IssueType(
        "warning", "nothing, if the field is not a box in pixels of the upright image; the data template does not read it"
    ),
    "box_convention": IssueType("warning", "set `unit` and `layout` in the data template to those that fit"),
    "image_end_marker": IssueType("warning", "save the image again: it can be decoded, but its end marker is missing"),
    "image_elongated": IssueType(
        "warning", "crop the image, or pad its shorter edge: image processors reject it or resize it to a huge one"
    ),
    "image_animated": IssueType("warning", "extract the right frame: only the first one is used"),
    "image_exif_damaged": IssueType(
        "warning", "check that the image is upright, and save it without EXIF data: it is used as stored"
    ),
    "image_rotated": IssueType("note", "nothing: it is rotated when opened; boxes must be in the upright image"),
    "image_palette": IssueType("note", "nothing: it is converted to RGB when opened"),
    "image_transparent": IssueType("note", "nothing, if the background should be white: it is composited on white when opened"),
    "image_cmyk": IssueType("note", "nothing: it is converted to RGB when opened, without a colour profile"),
    "image_16bit": IssueType(
        "note", "nothing, if its values use the full range: the upper 8 bits are kept; otherwise set window in the source"
    ),
    "field_unknown": IssueType("note", "nothing: the data template does not read the field"),
}


class DataIssueError(ValueError):
    """A data issue in code that does not know the row's id; callers convert it to a RowError.

    Args:
        issue: the issue type, a key of `ISSUE_TYPES`.
        detail: what is wrong, what was expected, and how to fix it.
    """

    def __init__(self, issue: str, detail: str) -> None:
        super().__init__(detail)
        self.issue = issue
        self.detail = detail

    def __reduce__(self) -> tuple[type[DataIssueError], tuple[str, str]]:
        return type(self), (self.issue, self.detail)  # sent between processes


def issue_type_of(error: ValueError, otherwise: str = "row_unusable") -> str:
    """The issue type of an error (a key of `ISSUE_TYPES`); `otherwise` if it is not a DataIssueError."""
    return error.issue if isinstance(error, DataIssueError) else otherwise


@dataclass(frozen=True)
class Issue:
    """One issue found by data validation.

    Attributes:
        row: the row's id.
        field: the field of the row or of its messages.
        issue: the issue type, a key of `ISSUE_TYPES`.
        detail: what is wrong.
        fix: how to fix it.
    """

    row: str
    field: str
    issue: str
    detail: str
    fix: str

    @property
    def severity(self) -> Severity:
        """The severity of the issue type."""
        return ISSUE_TYPES[self.issue].severity

    def as_json(self) -> dict[str, str]:
        """The issue as a JSON object."""
        return asdict(self)


def new_issue(row: str, field: str, name: str, detail: str) -> Issue:
    """Create an issue with the fix of its type."""
    return Issue(row, field, name, detail, ISSUE_TYPES[name].fix)
