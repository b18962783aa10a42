"""`help` names every verb, recipe and key, with default, unit and meaning."""

import pytest

from train.config import compose
from train.config.fields import list_keys
from train.door import help
from train.door.launch import LOADERS, VERBS


def test_overview_names_verbs_and_recipes():
    text = help.overview()
    recipes = compose.recipes()
    assert len(recipes) >= 2
    for name, description in recipes.items():
        assert f"  {name} " in text
        assert description.split()[0] in text
    for verb in set(VERBS) - {"train"}:
        assert f"bash launch.sh {verb} " in text


@pytest.mark.parametrize(("verb", "least"), [("train", 50), ("export", 5), ("infer", 10), ("eval", 5)])
def test_every_key_is_listed(verb, least):
    words = help.verb_help(verb).split()
    text = " ".join(words)
    specs = list_keys(help.SCHEMAS[verb])
    assert len(specs) >= least
    assert set(help.SCHEMAS) == set(LOADERS)
    for spec in specs:
        assert spec.name in words
        assert " ".join(spec.doc.split()) in text
        assert spec.unit in text


def test_a_line_of_help():
    text = help.verb_help("train")
    assert "  data.max_tiles = 9                      Most local tiles of one image" in text
    assert "[tiles, 1 to 9]" in text
    assert "  data.path = null " in text
    assert "  lora.groups = [attention,experts,shared_experts,dense_mlp]\n" in text
    assert "[cosine|constant]" in text


def test_lines_fit():
    long = [line for verb in help.SCHEMAS for line in help.verb_help(verb).splitlines() if len(line) > 120]
    assert not long


def test_help_of_an_unknown_verb():
    with pytest.raises(ValueError, match=r"no keys for 'infr'; help takes one of .*; did you mean infer\?"):
        help.verb_help("infr")
