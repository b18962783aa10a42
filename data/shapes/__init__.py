"""Pictures of shapes and questions about them: a data set that needs no download.

The rows are ordinary `messages` + `images` JSONL, so generated data takes exactly the path of the user's own.
"""

from data.shapes.draw import draw
from data.shapes.questions import Question, questions
from data.shapes.scene import Scene, Shape, sample_scene, split_of
from data.shapes.write import TASKS, rows, write_shapes

__all__ = [
    "TASKS",
    "Question",
    "Scene",
    "Shape",
    "draw",
    "questions",
    "rows",
    "sample_scene",
    "split_of",
    "write_shapes",
]
