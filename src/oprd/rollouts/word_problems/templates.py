"""What word problems are made of: templates, names, things and what holds them.

A template's steps are written with its numbers a, b, c, d and the results x, y, z of the steps before.
"""

from typing import NamedTuple


class Template(NamedTuple):
    """A story with a question, and the steps that answer it."""

    story: str
    steps: tuple[str, ...]


class Cast(NamedTuple):
    """Who and what a problem may be about: of things and bags the singular, which takes an s."""

    names: tuple[str, ...]
    things: tuple[str, ...]
    bags: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAINING_CAST = Cast(
    names=_words(
        "Anna Ben Carla David Emma Felix Grace Henry Irene Jack Kate Leo Mia Noah Olga Paul Rosa Sam "
        "Tina Victor"
    ),
    things=_words(
        "apple balloon bead button card coin cookie crayon egg flower key lemon marble nail pen pencil pear "
        "ring shell stamp"
    ),
    bags=_words("bag basket jar packet tray"),
)
HELD_OUT_CAST = Cast(
    names=_words("Aisha Bruno Chen Diego Elif Farah Goran Hana Ivo Jamal Keiko Luca"),
    things=_words("badge candle carrot eraser muffin orange plum spoon sticker ticket"),
    bags=_words("tin crate carton sack"),
)

TRAINING = (
    Template(
        "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?", ("a + b",)
    ),
    Template("There are {a} {things} on a table. {name} takes {b} of them. How many are left?", ("a - b",)),
    Template(
        "{name} buys {a} {bags} of {things}. There are {b} {things} in each {bag}. How many {things} is "
        "that?",
        ("a * b",),
    ),
    Template(
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
        ("a / b",),
    ),
    Template("One {thing} costs {a} dollars. How many dollars do {b} {things} cost?", ("a * b",)),
    Template(
        "{name} is {a} years old, and {other} is {b} years older than {name}. How old is {other}?", ("a + b",)
    ),
    Template("{name} wants {a} {things} and has {b}. How many {things} are missing?", ("a - b",)),
    Template("{name} lays {a} {things} in rows of {b}. How many rows are there?", ("a / b",)),
    Template("{name} runs for {a} minutes and {other} for {b}. How many minutes is that?", ("a + b",)),
    Template(
        "{name} fills {a} {bags} with {b} {things} each and gives {c} {things} to {other}. How many "
        "{things} does {name} keep?",
        ("a * b", "x - c"),
    ),
    Template(
        "{name} has {a} {things}. {other} has {b} more than {name}. How many {things} do they have together?",
        ("a + b", "a + x"),
    ),
    Template(
        "{name} had {a} {things}, lost {b} of them and then got {c} new ones. How many {things} does "
        "{name} have now?",
        ("a - b", "x + c"),
    ),
    Template(
        "A {bag} holds {a} {things}. {name} has {b} full {bags} and {c} loose {things}. How many {things}"
        " does {name} have?",
        ("a * b", "x + c"),
    ),
    Template(
        "{name} picks {a} {things} and {other} picks {b}. They pack all of them into {bags} of {c}. How "
        "many {bags} do they fill?",
        ("a + b", "x / c"),
    ),
    Template(
        "{name} pays {a} dollars for {b} {things}. {other} buys {c} {things} at the same price. How many "
        "dollars does {other} pay?",
        ("a / b", "x * c"),
    ),
    Template(
        "A bus has {a} rows of {b} seats. People sit on {c} of the seats. How many seats are free?",
        ("a * b", "x - c"),
    ),
    Template(
        "{name} reads {a} pages a day for {b} days. The book has {c} pages. How many pages are left to read?",
        ("a * b", "c - x"),
    ),
    Template(
        "{name} earns {a} dollars an hour, works for {b} hours and then spends {c} dollars on {things}. "
        "How many dollars are left?",
        ("a * b", "x - c"),
    ),
    Template(
        "{name} has {a} {things} and {other} has {b} fewer. How many {things} do they have together?",
        ("a - b", "a + x"),
    ),
    Template(
        "{name} opens {a} {bags} of {b} {things} and shares all the {things} equally among {c} children. "
        "How many {things} does each child get?",
        ("a * b", "x / c"),
    ),
    Template(
        "On Monday {name} sells {a} {things}, and on Tuesday {b} times as many. How many {things} does "
        "{name} sell on both days?",
        ("a * b", "a + x"),
    ),
    Template(
        "From a rope of {a} metres {name} cuts {b} pieces of {c} metres each. How many metres are left?",
        ("b * c", "a - x"),
    ),
    Template(
        "{a} children and {b} adults go on a trip in cars. Each car takes {c} people. How many cars do "
        "they need?",
        ("a + b", "x / c"),
    ),
    Template(
        "{other} has {b} {things} more than {name}, who has {a}. Their friend has {c} fewer than {other}."
        " How many {things} does the friend have?",
        ("a + b", "x - c"),
    ),
    Template(
        "{name} buys {a} {bags} of {b} {things}, gives {c} {things} to {other} and shares the rest "
        "equally among {d} friends. How many {things} does each friend get?",
        ("a * b", "x - c", "y / d"),
    ),
    Template(
        "{name} has {a} {things} and {other} has {b} times as many. Together they give away {c}. How many"
        " {things} do they have left?",
        ("a * b", "a + x", "y - c"),
    ),
    Template(
        "{name} buys {a} {things} for {b} dollars each and a hat for {c} dollars, and pays with {d} "
        "dollars. How many dollars does {name} get back?",
        ("a * b", "x + c", "d - y"),
    ),
    Template(
        "There are {a} {things} in one {bag}, {b} in another and {c} in a third. {name} shares them "
        "equally among {d} children. How many {things} does each child get?",
        ("a + b", "x + c", "y / d"),
    ),
    Template(
        "{name} saves {a} dollars a week for {b} weeks, gets {c} dollars from {other} and then spends {d}"
        " dollars. How many dollars does {name} have left?",
        ("a * b", "x + c", "y - d"),
    ),
    Template(
        "{name} fills {a} {bags} with {b} {things} each, and {other} fills {c} {bags} with {d} {things} "
        "each. How many {things} is that in all?",
        ("a * b", "c * d", "x + y"),
    ),
    Template(
        "{name} walks {a} kilometres on each of {b} days. {other} walks {c} kilometres on each of {d} "
        "days. How many kilometres more than {other} does {name} walk?",
        ("a * b", "c * d", "x - y"),
    ),
    Template(
        "A shop has {a} {things}. It sells {b} in the morning and {c} in the afternoon, and packs the "
        "rest into {bags} of {d}. How many {bags} is that?",
        ("a - b", "x - c", "y / d"),
    ),
    Template(
        "In a hall stand {a} rows of {b} chairs, and {c} more along the wall. Guests sit on {d} of all "
        "the chairs. How many chairs are empty?",
        ("a * b", "x + c", "y - d"),
    ),
)

HELD_OUT = (
    Template(
        "A ribbon is {a} centimetres long. {name} cuts off {b} centimetres. How many centimetres remain?",
        ("a - b",),
    ),
    Template("{name} plants {a} rows of trees with {b} trees in a row. How many trees is that?", ("a * b",)),
    Template(
        "{name} needs {a} {things} and has {b}. {other} brings {c} more. How many {things} are still "
        "missing?",
        ("a - b", "x - c"),
    ),
    Template(
        "{name} packs {a} {things} into {bags} of {b} and sells each {bag} for {c} dollars. How many "
        "dollars does {name} get?",
        ("a / b", "x * c"),
    ),
    Template(
        "A school trip is planned for {a} girls and {b} boys, but {c} of the children are ill. How many "
        "children go?",
        ("a + b", "x - c"),
    ),
    Template(
        "A lunch costs {a} dollars and a drink {b} dollars. {name} pays both for {c} people. How many "
        "dollars does {name} pay?",
        ("a + b", "x * c"),
    ),
    Template(
        "A tank holds {a} litres. {name} pours {b} buckets of {c} litres into the empty tank. How many "
        "more litres fit?",
        ("b * c", "a - x"),
    ),
    Template(
        "In a game {name} scores {a} points in each of {b} rounds, and {other} scores {c} points in each "
        "of {d} rounds. How many points do both score together?",
        ("a * b", "c * d", "x + y"),
    ),
    Template(
        "{name} cooks {a} pots of soup, {b} bowls a pot. Guests eat {c} bowls at noon and {d} in the "
        "evening. How many bowls are left?",
        ("a * b", "x - c", "y - d"),
    ),
    Template(
        "{name} had {a} dollars and bought {b} {things} at {c} dollars each. Then {other} paid back {d} "
        "dollars. How many dollars does {name} have now?",
        ("b * c", "a - x", "y + d"),
    ),
)
