"""Answers to rows without answers, written as rows in the form of the data template `messages`.

Each process appends its rows to a part beside the output, after every few batches. The main process joins the parts at the end,
so that a job that was interrupted continues, also with another number of processes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import ProcessorMixin

from mmtune.data.dataset import check_headers
from mmtune.data.encoding.native_regions import with_native_regions
from mmtune.data.linked_rows import image_digests
from mmtune.data.message import RowError, Sample, all_text_of, prompt_messages, text_message
from mmtune.data.message_rows import messages_row
from mmtune.data.sources.reader import SourceReader
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext
from mmtune.evaluation.predictions.answering import generate_predictions
from mmtune.evaluation.predictions.decoding import DecodingSettings
from mmtune.evaluation.predictions.prediction import Prediction
from mmtune.recipe.recipe import Source
from mmtune.run_directory import versions
from mmtune.utils.errors import UserError
from mmtune.utils.files import replace_text

BATCHES_AT_ONCE = 16
"""Batches of questions that are sorted by length together, and written together."""
SHOWN_ROWS = 10


class UnansweredRows:
    """The rows of a source by index, as samples whose last answer is a placeholder.

    Attributes:
        media_root: the folder that media paths are relative to.
        content: the digest of all questions and images.

    Args:
        source: the source; its data template may read answers that the rows lack.

    Raises:
        UserError: a missing or unreadable file, an unknown template, or rows that cannot be answered, by id.
    """

    def __init__(self, source: Source) -> None:
        self._reader = SourceReader(source, answered=False)
        self._rows = self._reader.open()
        self.media_root = self._reader.rules.root.resolve()
        errors = []
        content = hashlib.blake2b(digest_size=16)
        for index in range(len(self._rows)):
            try:
                sample = self[index]
                check_headers(sample)
                content.update(question_digest(sample))
            except RowError as error:
                errors.append(str(error))
        self.content = content.hexdigest()
        if errors:
            more = [f"and {len(errors) - SHOWN_ROWS} more"] * (len(errors) > SHOWN_ROWS)
            listing = "\n  ".join([*errors[:SHOWN_ROWS], *more])
            raise UserError(f"{len(errors)} of {len(self._rows)} rows cannot be answered:\n  {listing}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self._reader.sample(*self._rows[index])


def question_digest(sample: Sample) -> bytes:
    """The digest of a question, 16 bytes: of its messages and the content of its images.

    Raises:
        RowError: an image cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    asked = [{**message, "content": all_text_of(message)} for message in prompt_messages(sample)]
    digest.update(json.dumps([sample.id, asked, sample.tools]).encode("utf-8", "surrogatepass"))
    digest.update(b"".join(image_digests(sample.id, sample.images)))
    return digest.digest()


@dataclass(frozen=True)
class PredictedFile:
    """A file of predicted rows.

    Attributes:
        path: the file.
        media_root: the folder that its media paths are relative to.
        rows: the number of rows in it.
        empty: ids of rows whose answer is empty; they are not in the file, because such a row cannot train.
        near_ties: how many answers rounding could change.
    """

    path: Path
    media_root: Path
    rows: int
    empty: list[str]
    near_ties: int


def predict_rows(
    model: nn.Module,
    processor: ProcessorMixin,
    rows: UnansweredRows,
    out: Path,
    decoding: DecodingSettings,
    batch_size: int,
    job: Mapping[str, Any],
    dist: DistributedContext = SINGLE_PROCESS,
) -> PredictedFile:
    """Answer every row, and write the answered rows in their order.

    Args:
        rows: the rows.
        out: the file to write.
        decoding: how to generate.
        batch_size: answers per batch.
        job: what the answers depend on besides the rows, as JSON values; parts of another job are an error.
        dist: the processes, which share the rows.

    Raises:
        RowError: a row that cannot be encoded.
        UserError: parts of another job lie beside `out`.
    """
    root = _media_root(rows, out)
    job = {**job, **asdict(decoding), "rows": len(rows), "content": rows.content, "versions": versions()}
    job["media_root"] = os.path.relpath(root, out.parent.resolve())
    done = set(dist.broadcast_object([*read_parts(out, job)] if dist.is_main_process else None))
    indices = [index for index in range(len(rows)) if index not in done][dist.rank :: dist.size]
    if done and dist.is_main_process:
        print(f"{out}: continues: {len(done):,} of {len(rows):,} rows are answered")
    part = _part(out, job, dist.rank)
    step = BATCHES_AT_ONCE * batch_size
    for start in range(0, len(indices), step):
        chunk = indices[start : start + step]
        samples = [with_native_regions(rows[index], processor) for index in chunk]
        label = f"rows {start + 1:,} to {start + len(chunk):,} of {len(indices):,}"
        predictions = generate_predictions(model, processor, samples, decoding, batch_size, label)
        lines = [
            json.dumps([index, prediction.near_tie, messages_row(_answered(sample, prediction), root)], ensure_ascii=False) + "\n"
            for index, sample, prediction in zip(chunk, samples, predictions, strict=True)
        ]
        with part.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    dist.barrier()
    joined = _join_parts(out, root, job) if dist.is_main_process else None
    result: PredictedFile = dist.broadcast_object(joined)
    return result


def _answered(sample: Sample, prediction: Prediction) -> Sample:
    """The sample with the prediction as its last answer."""
    answer = text_message("assistant", prediction.text.strip())
    return replace(sample, messages=[*prompt_messages(sample), answer])


def _media_root(rows: UnansweredRows, out: Path) -> Path:
    """The folder of the output if the media are inside it, so that the file needs no `media_root`; otherwise theirs."""
    folder = out.parent.resolve()
    return folder if rows.media_root.is_relative_to(folder) else rows.media_root


def _part(out: Path, job: Mapping[str, Any], rank: int) -> Path:
    """The part of a process, which begins with the job."""
    path = out.with_name(f".{out.name}.part-{rank}")
    if not path.exists():
        replace_text(path, json.dumps(job) + "\n")
    return path


def parts_of(out: Path) -> list[Path]:
    """The parts of an unfinished file of predictions."""
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.part-*"))


def read_parts(out: Path, job: Mapping[str, Any]) -> dict[int, tuple[bool, dict[str, Any]]]:
    """The rows in the parts of an unfinished file by index: whether a row is a near tie, and the row.

    Raises:
        UserError: the parts are of another job.
    """
    answered: dict[int, tuple[bool, dict[str, Any]]] = {}
    for path in parts_of(out):
        header, *lines = _whole_lines(path)
        if (different := [key for key, value in json.loads(json.dumps(job)).items() if header.get(key) != value]) != []:
            raise UserError(
                f"{path}: an unfinished prediction with another {', '.join(different)}; finish it with the same command, "
                "give another --out, or discard it with --overwrite"
            )
        answered.update({index: (near_tie, row) for index, near_tie, row in lines})
    return answered


def _whole_lines(path: Path) -> Iterator[Any]:
    """The JSON of every complete line. A line without an end was cut off by a kill: it is removed, and its row answered again."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return map(json.loads, whole.splitlines())


def _join_parts(out: Path, root: Path, job: Mapping[str, Any]) -> PredictedFile:
    parts = read_parts(out, job)
    answered = [parts[index] for index in sorted(parts)]
    rows = [row for _, row in answered if row["messages"][-1]["content"]]
    empty = [row["id"] for _, row in answered if not row["messages"][-1]["content"]]
    replace_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for path in parts_of(out):
        path.unlink()
    return PredictedFile(out, root, len(rows), empty, sum(near_tie for near_tie, _ in answered))
