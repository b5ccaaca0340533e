"""A few records of each source of SMR in its published format, written by hand, with pictures drawn here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def draw(path: Path, seed: int, side: int = 48) -> Path:
    """A picture of noise; each seed gives another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(path)
    return path


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


ARXIV = {
    "id": "cs-8542",
    "image": "images/1909.00001_1.jpg",
    "options": ["A) Linear", "B) Exponential", "C) Constant", "D) None of the above"],
    "question": "How does the loss behave with the number of samples?",
    "label": "B",
    "rationale": "The curve bends upwards on a linear axis, so the loss grows exponentially.",
}
SCIENCE = {
    "question": "Which of these states is farthest north?",
    "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
    "answer": 0,
    "hint": "",
    "image": "image.png",
    "task": "closed choice",
    "grade": "grade2",
    "subject": "social science",
    "topic": "geography",
    "category": "Geography",
    "skill": "Read a map: cardinal directions",
    "lecture": "Maps have four cardinal directions. North is up.",
    "solution": "To find the answer, look at the compass rose. West Virginia is farthest north.",
    "split": "train",
}
MATHVISION = [
    {
        "id": "1",
        "question": "How many triangles are there?\n<image1>",
        "options": [],
        "image": "images/1.jpg",
        "answer": "7",
        "solution": None,
        "level": 2,
        "subject": "counting",
    },
    {
        "id": "2",
        "question": "Which picture is next? <image1>",
        "options": ["A", "B", "C", "D", "E"],
        "image": "images/2.jpg",
        "answer": "C",
        "solution": "It turns by 90 degrees each time.",
        "level": 1,
        "subject": "logic",
    },
    {
        "id": "3",
        "question": "In testmini? <image1>",
        "options": ["yes", "no"],
        "image": "images/3.jpg",
        "answer": "A",
        "solution": None,
        "level": 1,
        "subject": "logic",
    },
]
AI2D = {
    "imageName": "17.png",
    "questions": {
        "What eats the grass?": {
            "abcLabel": False,
            "answerTexts": ["hawk", "rabbit", "sun", "fox"],
            "correctAnswer": 1,
            "questionId": "17.png-0",
        },
        "What is A in the diagram?": {
            "abcLabel": True,
            "answerTexts": ["ears", "nose", "mouth", "face"],
            "correctAnswer": 3,
            "questionId": "17.png-1",
        },
    },
}
TQA = {
    "globalID": "L_0002",
    "lessonName": "earth science and its branches",
    "metaLessonID": "MTL_2",
    "topics": {},
    "adjunctTopics": {},
    "instructionalDiagrams": {
        "DD_0001": {
            "globalID": "DD_0001",
            "imageName": "layers_1.png",
            "imagePath": "teaching_images/layers_1.png",
            "processedText": "This diagram shows the layers of the Earth: crust, mantle and core.",
            "rawText": "This diagram shows the layers of the Earth: crust, mantle and core.",
        }
    },
    "questions": {
        "nonDiagramQuestions": {
            "NDQ_000001": {"beingAsked": {"processedText": "not used", "rawText": "not used"}}
        },
        "diagramQuestions": {
            "DQ_000001": {
                "answerChoices": {
                    "a": {"idStructural": "a.", "processedText": "crust", "rawText": "a. crust"},
                    "b": {"idStructural": "b.", "processedText": "core", "rawText": "b. core"},
                },
                "beingAsked": {"processedText": "Which layer is innermost?", "rawText": "Which layer ...?"},
                "correctAnswer": {"processedText": "b", "rawText": "b"},
                "globalID": "DQ_000001",
                "imageName": "layers_2.png",
                "imagePath": "question_images/layers_2.png",
                "questionType": "Diagram Multiple Choice",
            }
        },
    },
}
GEOQA = {
    "id": 12,
    "subject": "如图,AB∥CD,∠EFG=50°,则∠EGF等于()",
    "choices": ["100°", "65°", "75°", "105°"],
    "label": 1,
    "answer": "∵AB∥CD,∴∠BEF=130°,∵EG平分∠BEF,∴∠EGF=65°.故选B.",
    "formal_point": ["A", "B"],
}
GEOMETRY = {
    "id": 0,
    "problem_text": "Find $x$.",
    "choices": ["3", "4", "5", "6"],
    "answer": "C",
    "problem_type_graph": ["Triangle"],
    "problem_type_goal": ["Length"],
}
TABMWP = {
    "19": {
        "question": "How much money does Pam need to buy a pen and a ruler?",
        "choices": None,
        "answer": "1.35",
        "unit": "$",
        "table_title": None,
        "table": "pen | $0.55\nruler | $0.80",
        "solution": "Add the prices: $0.55 + $0.80 = $1.35",
        "ques_type": "free_text",
        "ans_type": "decimal_number",
        "split": "train",
    },
    "20": {
        "question": "Which is sold more?",
        "choices": ["pens", "rulers"],
        "answer": "rulers",
        "unit": None,
        "table_title": "Sales",
        "table": "pens | 3\nrulers | 5",
        "solution": "5 is more than 3.",
        "ques_type": "multi_choice",
        "ans_type": "extractive_text",
        "split": "train",
    },
}
DVQA = [
    {
        "question": "What is the value of the largest bar?",
        "question_id": 100 + number,
        "template_id": template,
        "answer": answer,
        "answer_bbox": [],
        "image": f"bar_train_{number:08}.png",
    }
    for number, (template, answer) in enumerate(
        [("reasoning", 9), ("data", "no"), ("reasoning", "yes"), ("structure", 3), ("reasoning", "east")]
    )
]
CHARTQA = [
    {
        "imgname": "41699051005347.png",
        "query": "How many food item is shown in the bar graph?",
        "label": "14",
    },
    {"imgname": "41699051005347.png", "query": "What is the difference?", "label": 57.04},
]


def write_sources(root: Path) -> Path:
    """All ten below a folder, with their pictures: 16 samples pass, and one of AI2D lacks its letters."""
    write_lines(root / "arxivqa/arxivqa.jsonl", [ARXIV])
    draw(root / "arxivqa" / ARXIV["image"], 1)
    others = {
        "2": {**SCIENCE, "image": None},
        "3": {**SCIENCE, "split": "test"},
    }
    write(root / "scienceqa/problems.json", {"1": SCIENCE, **others})
    draw(root / "scienceqa/train/1/image.png", 2)
    write_lines(root / "mathvision/test.jsonl", MATHVISION)
    write_lines(root / "mathvision/testmini.jsonl", MATHVISION[2:])
    for number in (1, 2):
        draw(root / f"mathvision/images/{number}.jpg", 10 + number)
    write(root / "ai2d/questions/17.png.json", AI2D)
    write(root / "ai2d/questions/18.png.json", {**AI2D, "imageName": "18.png"})
    (root / "ai2d/ai2d_test_ids.csv").write_text("18\n")
    draw(root / "ai2d/images/17.png", 20)
    write(root / "textbookqa/train/tqa_v1_train.json", [TQA])
    draw(root / "textbookqa/train/teaching_images/layers_1.png", 30)
    draw(root / "textbookqa/train/question_images/layers_2.png", 31)
    write(root / "GeoQA3/json/12.json", GEOQA)
    draw(root / "GeoQA3/image/12.png", 40)
    write(root / "Geometry3K/train/0/data.json", GEOMETRY)
    draw(root / "Geometry3K/train/0/img_diagram.png", 50)
    write(root / "tabmwp/problems_train.json", TABMWP)
    for name in TABMWP:
        draw(root / f"tabmwp/tables/{name}.png", 60 + int(name))
    write(root / "DVQA/train_qa.json", DVQA)
    for record in DVQA:
        draw(root / "DVQA/images" / record["image"], 100 + record["question_id"])
    write(root / "ChartQA/train/train_human.json", CHARTQA)
    draw(root / "ChartQA/train/png/41699051005347.png", 90)
    return root
