"""What is read of docstrings and of the pages of documentation."""

import inspect

import pytest

from bench import pages
from bench.docstrings import arguments, without_arguments
from bench.errors import InputError
from bench.registry import ATTACKS, DEFENSES

TEXT = """Do a thing.

    More of it.

    Args:
        first: What it is; a line
            and another: with a colon.
        second (int): What that is.
        **others: The rest.

    Returns:
        a: thing.
    """


def test_arguments_are_read_with_all_of_their_lines() -> None:
    assert arguments(TEXT) == {
        "first": "What it is; a line and another: with a colon.",
        "second": "What that is.",
        "others": "The rest.",
    }
    assert without_arguments(TEXT) == "Do a thing.\n\nMore of it.\n\nReturns:\n    a: thing."
    assert arguments(None) == {}
    assert without_arguments("One line.") == "One line."


def test_docstrings_of_ours_name_the_parameters_of_their_signatures() -> None:
    """No more and no fewer, each once, in their order; what was cut off would be a name less."""
    compared = 0
    for registry in (ATTACKS, DEFENSES):
        for entry in (registry[name] for name in registry):
            if entry.library is not None or entry.module.partition(".")[0] not in ("attacks", "defenses"):
                continue
            target = entry.make.__init__ if inspect.isclass(entry.make) else entry.make
            names = [each for each in inspect.signature(target).parameters if each != "self"]
            assert list(arguments(entry.make.__doc__)) == names, entry.name
            assert all(arguments(entry.make.__doc__).values()), entry.name
            compared += len(names)
    assert compared > 200


def test_a_page_is_paragraphs_and_items_without_links() -> None:
    text = "One\ntwo [three](four.md#five).\n\n- an item\n  goes on\n- another\n"
    text += "\n| a | b |\n| - | - |\nReturns:\nx"
    assert pages.plain(text) == [
        "One two three.",
        "",
        "- an item goes on",
        "- another",
        "",
        "| a | b |",
        "| - | - |",
        "Returns:",
        "x",
    ]


def test_words_are_explained_whatever_their_letters() -> None:
    (held,) = pages.explained("HELD")
    assert (held.word, held.page) == ("held", "glossary.md")
    assert len(pages.explained("at-chance")) == 2
    with pytest.raises(InputError, match="no page explains 'shard-size'"):
        pages.explained("shard-size")
    assert all("\n" not in each.word and len(each.word) < 30 for each in pages.entries())
