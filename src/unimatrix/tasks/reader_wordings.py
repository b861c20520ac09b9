"""What a reader's documents say beside the grammar of bindings: updates, mentions, distractions."""

from typing import NamedTuple

from unimatrix.tasks.wordings import MANY, Wordings


class ReaderWordings(NamedTuple):
    """Sentences with the fields of ``Wordings``, and ``{number}`` and ``{name}`` in distractions.

    Attributes:
        bindings: how bindings are told and asked for.
        updates: that tell a later value of a key.
        first_questions: that ask for the value told first, and give it.
        mentions: of a key, without a value.
        denials: that say that a key has no value, or none that is known.
        distractions: with numbers and names that nobody asks for.
    """

    bindings: Wordings
    updates: tuple[str, ...]
    first_questions: tuple[str, ...]
    mentions: tuple[str, ...]
    denials: tuple[str, ...]
    distractions: tuple[str, ...]


_OF_RULER = "special magic"
"""In sentences of RULER, which no reader trains on: ``unimatrix eval-long`` measures reading."""

READER = ReaderWordings(
    bindings=MANY._replace(
        needles=tuple(wording for wording in MANY.needles if _OF_RULER not in wording),
        questions=(
            *(wording for wording in MANY.questions if _OF_RULER not in wording),
            "What {noun} does {key} use? {value}.",
            "Do you know the {noun} of {key}? {value}.",
            "Give me the {noun} of {key}. {value}.",
            "Which is the {noun} of {key}? {value}.",
            "What is the {noun} of {key} now? {value}.",
            "What is {key}? {value}.",
            "And what about {key}? {value}.",
            "{key} {noun}? {value}.",
            "{noun} of {key}? {value}.",
            "Please look for the {noun} of {key}: {value}.",
        ),
    ),
    updates=(
        "The {noun} of {key} is now {value}.",
        "The {noun} of {key}{aside} was changed to {value}.",
        "{key}'s {noun} is now {value}.",
        "{key} now has the {noun} {value}.",
        "{key} now has {value}.",
        "From now on {key} has {value}.",
        "From now on the {noun} of {key} is {value}.",
        "The new {noun} of {key} is {value}.",
        "{key} got a new {noun}: {value}.",
        "Later {key}{aside} was given {value} instead.",
        "Correction: the {noun} of {key} is {value}.",
        "Update: {key} -> {value}.",
        "They replaced the {noun} of {key} by {value}.",
        "Then the {noun} of {key} became {value}.",
    ),
    first_questions=(
        "What was the {noun} of {key} at first? {value}.",
        "What was {key}'s first {noun}? {value}.",
        "Which {noun} did {key} have at first? {value}.",
        "Which {noun} was {key} given first? {value}.",
        "What was the original {noun} of {key}? {value}.",
        "What did {key} have in the beginning? {value}.",
        "Tell me the first {noun} of {key}: {value}.",
    ),
    mentions=(
        "{key}{aside} was there too.",
        "We asked {key} and got no answer.",
        "Everybody spoke of {key} that evening.",
        "{key}{aside} said nothing.",
        "They went to {key} and came back.",
        "I had a letter about {key}.",
        "Ask me about {key} another time.",
        "{key} again?",
    ),
    denials=(
        "Nobody told us the {noun} of {key}.",
        "The {noun} of {key} is not known.",
        "{key} has no {noun} yet.",
        "We forgot to note the {noun} of {key}.",
        "What {key} has, nobody can say.",
    ),
    distractions=(
        "There were {number} of them.",
        "It was {number} miles to the town.",
        "The bill was {number} in all.",
        "In the year {number} nothing happened.",
        "See page {number}.",
        "Chapter {number}.",
        "Only {number} were left when {name} came.",
        "{name} waited {number} days.",
        "Between {name} and {name} lay {number} steps.",
        "He counted to {number} and stopped.",
        "Nobody there had heard of {name}.",
        "The number {number} stood on the wall.",
    ),
)
"""What ``unimatrix train reader`` learns from."""
