"""Everything that can be asked about pictures of shapes, with its answer, in English or in Chinese."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.shapes.scene import COLOURS, FORMS, KINDS, LAYOUTS, Scene, Shape

COLOURS_ZH = dict(zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "紫色", "黑色"), strict=True))
FORMS_ZH = dict(zip(FORMS, ("圆形", "方形", "三角形", "十字形", "星形"), strict=True))
PLACES_ZH = {
    "top left": "左上",
    "top": "上边",
    "top right": "右上",
    "left": "左边",
    "middle": "中间",
    "right": "右边",
    "bottom left": "左下",
    "bottom": "下边",
    "bottom right": "右下",
}
NOTHING = "nothing"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about drawn shapes and its answer: one turn of a conversation.

    Attributes:
        kind: What sort of question it is, to mix sorts evenly.
        text: What the user asks.
        answer: The one right answer.
    """

    kind: str
    text: str
    answer: str


def chinese(name: str) -> str:
    """The Chinese name of a shape: "red circle" -> "红色圆形"."""
    colour, form = name.split()
    return COLOURS_ZH[colour] + FORMS_ZH[form]


def preamble(num_images: int, language: str = "en") -> str:
    """What stands before the first question: the images, named where there are several.

    The name FOLLOWS its image, where a causal model can gather what it has just seen:
    "<image> is image 1.\\n<image> is image 2.\\n".
    """
    if num_images == 1:
        return "<image>\n"
    text = "<image> is image {}.\n" if language == "en" else "<image>是图{}。\n"
    return "".join(text.format(number) for number in range(1, num_images + 1))


def questions(scenes: Sequence[Scene]) -> list[Question]:
    """All English questions about one picture or several; Chinese questions among them are answered in English too."""
    if len(scenes) == 1:
        scene = scenes[0]
        return list(_about_one_shape(scene) if scene.layout == "one" else _about_places(scene))
    return list(_about_images(scenes))


def chinese_questions(scenes: Sequence[Scene]) -> list[Question]:
    """All Chinese questions with Chinese answers about one picture or several."""
    found = []
    for number, scene in enumerate(scenes, start=1):
        for shape in scene.shapes:
            if len(scenes) > 1:
                asked = {"what": f"图{number}里是什么？"}
            elif scene.layout == "one":
                asked = {"what": "这是什么？", "colour": "这是什么颜色？", "form": "这是什么形状？"}
            else:
                asked = {"what": f"{PLACES_ZH[shape.place]}是什么？"}
            answers = {
                "what": chinese(shape.name),
                "colour": COLOURS_ZH[shape.colour],
                "form": FORMS_ZH[shape.form],
            }
            found += [Question(kind=kind, text=text, answer=answers[kind]) for kind, text in asked.items()]
    return found


def _about_one_shape(scene: Scene) -> Iterator[Question]:
    shape = scene.shapes[0]
    yield Question(kind="what", text="What is this?", answer=shape.name)
    yield Question(kind="what_zh", text="这是什么？", answer=shape.name)
    yield Question(kind="colour", text="What colour is this?", answer=shape.colour)
    yield Question(kind="colour_zh", text="这是什么颜色？", answer=shape.colour)
    yield Question(kind="form", text="What form is this?", answer=shape.form)
    yield Question(kind="form_zh", text="这是什么形状？", answer=shape.form)
    yield from _in_general(scene)


def _about_places(scene: Scene) -> Iterator[Question]:
    shapes = {shape.place: shape for shape in scene.shapes}
    for place in LAYOUTS[scene.layout].places:
        answer = shapes[place].name if place in shapes else NOTHING
        yield Question(kind="place", text=f"What is at the {place}?", answer=answer)
        yield Question(kind="place_zh", text=f"{PLACES_ZH[place]}是什么？", answer=answer)
    for shape in scene.shapes:
        yield Question(kind="where", text=f"Where is the {shape.name}?", answer=shape.place)
        if _alone(scene, "form", shape):
            yield Question(kind="colour", text=f"What colour is the {shape.form}?", answer=shape.colour)
        if _alone(scene, "colour", shape):
            yield Question(kind="form", text=f"Which form is {shape.colour}?", answer=shape.form)
    names = ", ".join(shape.name for shape in scene.shapes)
    yield Question(kind="list", text="List all shapes.", answer=names)
    yield from _in_general(scene)


def _in_general(scene: Scene) -> Iterator[Question]:
    yield Question(kind="count", text="How many shapes are there?", answer=str(len(scene.shapes)))
    present = {shape.name for shape in scene.shapes}
    for colour, form in KINDS:
        name = f"{colour} {form}"
        yield Question(kind="exists", text=f"Is there a {name}?", answer="yes" if name in present else "no")
    for shape in scene.shapes if scene.snapped else ():
        ref = f"<|ref|>{shape.name}<|/ref|>"
        box = f"{ref}<|det|>[[{', '.join(map(str, scene.box(shape)))}]]<|/det|>"
        yield Question(kind="box", text=ref, answer=box)


def _about_images(scenes: Sequence[Scene]) -> Iterator[Question]:
    """Questions about several pictures of one shape each, all different."""
    for number, scene in enumerate(scenes, start=1):
        shape = scene.shapes[0]
        yield Question(kind="image", text=f"What is in image {number}?", answer=shape.name)
        yield Question(kind="image_zh", text=f"图{number}里是什么？", answer=shape.name)
        yield Question(kind="colour", text=f"What colour is in image {number}?", answer=shape.colour)
        yield Question(kind="form", text=f"Which form is in image {number}?", answer=shape.form)
        yield Question(kind="which", text=f"Which image shows a {shape.name}?", answer=f"image {number}")


def _alone(scene: Scene, attribute: str, shape: Shape) -> bool:
    return [getattr(other, attribute) for other in scene.shapes].count(getattr(shape, attribute)) == 1
