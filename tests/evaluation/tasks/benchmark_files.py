"""Small files in the layout in which benchmarks publish theirs: the same names, keys and nesting, a few rows of our own."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from mmtune.builtin.digits import TUNE_TASKS, Split, write_split


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (shade, 255 - shade, 99)).save(path)


def _pope(folder: Path) -> None:
    questions = {
        "random": [("snowboard", "yes"), ("car", "no"), ("person", "yes"), ("boat", "no")],
        "popular": [("person", "yes"), ("chair", "no"), ("dog", "yes")],
        "adversarial": [("person", "yes"), ("skis", "no"), ("snowboard", "yes"), ("backpack", "no"), ("tree", "no")],
    }
    for name, rows in questions.items():
        lines = [
            {"question_id": number, "image": f"COCO_val2014_{310196 + number // 3:012d}.jpg", "text": text, "label": label}
            for number, (thing, label) in enumerate(rows, start=1)
            for text in [f"Is there a {thing} in the image?"]
        ]
        (folder / f"coco_pope_{name}.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    for number in range(2):
        _image(folder / "val2014" / f"COCO_val2014_{310196 + number:012d}.jpg", 80 * number)


def _textvqa(folder: Path) -> None:
    answers = [
        ["dakota"] * 7 + ["dakota digital"] * 2 + ["clos culombu"],
        ["copenhagen"] * 10,
        ["3"] * 2 + ["three"] * 2 + ["four"] * 6,
        ["mccoy's"] * 5 + ["mccoys"] * 5,
    ]
    questions = ["what is the brand of this camera?", "what does the small white text spell?", "how many?", "Whose Pub is this?"]
    rows = [
        {
            "question": question,
            "image_id": f"{number:016x}",
            "image_classes": ["Camera"],
            "flickr_original_url": "https://example.org/o.jpg",
            "flickr_300k_url": "https://example.org/z.jpg",
            "image_width": 40,
            "image_height": 30,
            "answers": each,
            "question_tokens": question.split(),
            "question_id": 34602 + number,
            "set_name": "val",
        }
        for number, (question, each) in enumerate(zip(questions, answers, strict=True))
    ]
    header = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    _json(folder / "TextVQA_0.5.1_val.json", {**header, "data": rows})
    tokens = [["DAKOTA", "DIGITAL", "Single-Use"], [], ["3"], ["McCoy's", "PUB"]]
    ocr = [{"image_id": f"{number:016x}", "ocr_tokens": each, "ocr_info": []} for number, each in enumerate(tokens)]
    _json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"dataset_name": "textvqa", "data": ocr})
    for number in range(len(rows)):
        _image(folder / "train_images" / f"{number:016x}.jpg", 50 * number)


def _vqa_v2(folder: Path) -> None:
    rows = [
        ("What is this photo taken looking through?", ["net"] * 8 + ["netting"] * 2, "other"),
        ("Is he holding a bat?", ["yes"] * 10, "yes/no"),
        ("How many players are there?", ["2"] * 3 + ["1"] * 7, "number"),
    ]
    questions, annotations = [], []
    for number, (question, answers, kind) in enumerate(rows):
        key = {"image_id": 458752 + number // 2, "question_id": (458752 + number // 2) * 1000 + number}
        questions.append({**key, "question": question})
        texts = [{"answer": each, "answer_confidence": "yes", "answer_id": n} for n, each in enumerate(answers, start=1)]
        most = max(answers, key=answers.count)
        annotations.append(
            {**key, "question_type": "what", "multiple_choice_answer": most, "answers": texts, "answer_type": kind}
        )
    header = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    _json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**header, "task_type": "Open-Ended", "questions": questions})
    _json(folder / "v2_mscoco_val2014_annotations.json", {**header, "annotations": annotations})
    for number in range(2):
        _image(folder / "val2014" / f"COCO_val2014_{458752 + number:012d}.jpg", 90 * number)


def _chartqa(folder: Path) -> None:
    human = [("How many food items are shown?", "14"), ("What is the difference?", "0.57"), ("Which is largest?", "Germany")]
    augmented = [("What was the share in 2019?", "36%"), ("Which year?", "2015")]
    for name, rows in {"human": human, "augmented": augmented}.items():
        _json(
            folder / f"test_{name}.json",
            [{"imgname": f"{name}_{n}.png", "query": query, "label": label} for n, (query, label) in enumerate(rows)],
        )
        for number in range(len(rows)):
            _image(folder / "png" / f"{name}_{number}.png", 60 * number + len(name))


def _docvqa(folder: Path) -> None:
    rows = [
        ("What is the 'actual' value per 1000, during the year 1975?", ["0.28"]),
        ("What is name of university?", ["university of california", "University of California"]),
        ("What is the name of the company?", ["itc limited", "ITC Limited"]),
    ]
    data = [
        {
            "questionId": 49153 + number,
            "question": question,
            "question_types": ["figure/diagram"],
            "image": f"documents/pybv0228_{81 + number // 2}.png",
            "docId": 14465 + number // 2,
            "ucsf_document_id": "pybv0228",
            "ucsf_document_page_no": str(81 + number // 2),
            "answers": answers,
            "data_split": "val",
        }
        for number, (question, answers) in enumerate(rows)
    ]
    _json(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": data})
    for number in range(2):
        _image(folder / "documents" / f"pybv0228_{81 + number}.png", 90 * number)


def _scienceqa_img(folder: Path) -> None:
    def problem(question: str, choices: list[str], answer: int, split: str, **changes: Any) -> dict[str, Any]:
        fixed = {"task": "closed choice", "grade": "grade4", "topic": "geography", "category": "States", "skill": "Read a map"}
        own = {"question": question, "choices": choices, "answer": answer, "hint": "", "image": "image.png", "split": split}
        return {**own, **fixed, "subject": "social science", "lecture": "", "solution": "", **changes}

    problems = {
        "1": problem("Which is marked?", ["Lisbon", "Oslo"], 0, "train"),
        "4": problem("Which of these states is farthest north?", ["Ohio", "Utah", "Maine", "Texas"], 2, "test"),
        "11": problem("Which is better?", ["a brick", "a pillow"], 1, "test", image=None),
        "16": problem("Which material?", ["metal", "wool", "glass"], 1, "test", hint="Select one.", subject="natural science"),
        "17": problem("Is it a solid?", ["no", "yes"], 1, "test", subject="natural science"),
    }
    _json(folder / "problems.json", problems)
    for number in (4, 16, 17):
        _image(folder / "images" / "test" / str(number) / "image.png", 10 * number)


CAPTIONS = [
    ["a man riding a red moped on a dirt road", "a man with a red helmet on a small moped", "man riding a motor bike"],
    ["two dogs run in a green park", "two brown dogs are running", "dogs play on the grass in a park"],
    ["a plate of food on a table", "a white plate with rice and beans", "food on a plate next to a fork"],
]


def _karpathy(folder: Path, name: str, images: str, filename: str, **fields: Any) -> None:
    rows = []
    for number, captions in enumerate([*CAPTIONS, ["a bus in a street"]]):
        sentences = [{"tokens": each.split(), "raw": each, "imgid": number, "sentid": n} for n, each in enumerate(captions)]
        split = "test" if number < len(CAPTIONS) else "train"
        rows.append({**fields, "filename": filename.format(number), "imgid": number, "split": split, "sentences": sentences})
        _image(folder / images / filename.format(number), 70 * number)
    _json(folder / f"dataset_{name}.json", {"images": rows, "dataset": name})


def _mmmu(folder: Path) -> None:
    def row(name: str, question: str, options: list[str], answer: str, images: int = 1) -> dict[str, Any]:
        fields = {"id": f"validation_{name}", "question": question, "options": repr(options), "explanation": "", "answer": answer}
        media = {f"image_{n}": _embedded(60 * n) if n <= images else None for n in range(1, 8)}
        kind = "multiple-choice" if options else "open"
        further = {"img_type": "['Plots']", "topic_difficulty": "Easy", "question_type": kind, "subfield": "Drawing"}
        return {**fields, **media, **further}

    rows = [
        row("Art_Theory_1", "<image 1> Who painted it?", ["Klee", "Klimt", "Manet", "Monet"], "B"),
        row("Art_Theory_2", "Which belongs to <image 1>?", ["<image 3>", "<image 2>"], "A", images=3),
        row("Chemistry_30", "Name the compound. <image 1>", [], "['$MgS$', 'MgS']"),
        row("Chemistry_13", "What is the pH in <image 1>?", [], "12.97"),
        row("Chemistry_14", "Which law does <image 1> show?", ["Boyle's law", "Hess' law", "none"], "C"),
    ]
    for subject in ("Art_Theory", "Chemistry"):
        path = folder / subject / "validation-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        parquet.write_table(pa.Table.from_pylist([each for each in rows if subject in each["id"]]), path)


def _mmbench_en(folder: Path) -> None:
    questions = [
        (241, "Which river is shown?", ["Rhine", "Seine", "Thames"], 1, "ocr", "nan"),
        (242, "What is on the left?", ["a cup", "a plate", "a fork", "a knife"], 3, "spatial_relationship", "The table is set."),
        (243, "What is on the right?", ["a cup", "a plate", "a fork", "a knife"], 0, "spatial_relationship", "nan"),
        (250, "Is it raining?", ["no", "yes"], 0, "ocr", "nan"),
    ]
    rows = []
    for number, question, options, answer, category, hint in questions:
        for turn in range(len(options)):
            shifted = [options[(place - turn) % len(options)] for place in range(len(options))]
            letters = dict(zip("ABCD", [*shifted, "nan", "nan"], strict=False))
            fixed = {"source": "example", "L2-category": "perception", "comment": "nan", "split": "dev"}
            own = {
                "index": number + 1_000_000 * turn,
                "question": question,
                "hint": hint,
                "answer": "ABCD"[shifted.index(options[answer])],
            }
            rows.append({**own, **letters, "category": category, "image": _embedded(min(number, 242)), **fixed})
    path = folder / "en" / "dev-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(sorted(rows, key=lambda row: row["index"])), path)


def _refcoco(folder: Path) -> None:
    expressions = {
        "val": [("the red part", [4.0, 3.0, 20.0, 15.0]), ("left side", [0.0, 0.0, 20.0, 30.0])],
        "testA": [("lower right corner", [30.0, 20.0, 40.01, 30.0]), ("the middle", [10.5, 6.2, 30.1, 24.9])],
        "testB": [("all of it", [0.0, 0.0, 40.0, 30.0])],
    }
    for number, (name, rows) in enumerate(expressions.items()):
        image = f"data/coco/train2014/COCO_train2014_{581857 + number:012d}.jpg"
        _image(folder / image, 90 * number)
        lines = [{"image": image, "sent": text, "bbox": box, "height": 30, "width": 40} for text, box in rows]
        path = folder / "data" / "refcoco" / f"refcoco_{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def _embedded(shade: int) -> dict[str, Any]:
    """An image as `datasets` stores it."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade % 256, 255 - shade % 256, 99)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{shade}.png"}


def _digits(folder: Path) -> None:
    rows = write_split("eval", Split(scenes=4, held_out=True, tasks=TUNE_TASKS, questions=1, seed=0), folder)
    _json(folder / "eval.json", rows)


BENCHMARKS: dict[str, Callable[[Path], None]] = {
    "chartqa": _chartqa,
    "coco_caption": lambda folder: _karpathy(folder, "coco", "val2014", "COCO_val2014_{:012d}.jpg", filepath="val2014"),
    "digits": _digits,
    "docvqa": _docvqa,
    "flickr30k": lambda folder: _karpathy(folder, "flickr30k", "flickr30k-images", "100009{:04d}.jpg"),
    "mmbench_en": _mmbench_en,
    "mmmu": _mmmu,
    "pope": _pope,
    "refcoco": _refcoco,
    "scienceqa_img": _scienceqa_img,
    "textvqa": _textvqa,
    "textvqa_ocr": _textvqa,
    "vqa_v2": _vqa_v2,
}
"""By the name of the task: a function that writes its files into a folder."""
