"""How bindings are told and asked for: a few sentences, or a grammar with sentences held out."""

from typing import NamedTuple


class Wordings(NamedTuple):
    """Sentences with ``{key}``, ``{value}``, perhaps ``{noun}``, and ``{aside}`` behind the key.

    Attributes:
        needles: that tell a binding.
        questions: that ask for it and give the answer; nothing but ``.`` follows the value.
        nouns: what a value is called; told and asked for may differ.
        kinds: of values: ``number``, ``amount``, ``hex``, ``word``, ``code``, ``identifier``,
            ``phrase``.
    """

    needles: tuple[str, ...]
    questions: tuple[str, ...]
    nouns: tuple[str, ...] = ("number",)
    kinds: tuple[str, ...] = ("number",)


FEW = Wordings(
    needles=(
        "One of the special magic numbers for {key} is: {value}.",
        "The code of {key} is {value}.",
        "{key} has the number {value}.",
        "Remember that {value} belongs to {key}.",
    ),
    questions=(
        "What is the special magic number for {key}? "
        "The number for {key} mentioned above is {value}.",
        "Question: which number belongs to {key}? Answer: {value}.",
        "Tell the code of {key} as it was given in the text: {value}.",
    ),
)
"""Four sentences and three questions about numbers."""

MANY = Wordings(
    needles=(
        "The {noun} of {key}{aside} is {value}.",
        "The {noun} for {key}{aside} is {value}.",
        "{key}'s {noun}{aside} is {value}.",
        "{key}{aside} has the {noun} {value}.",
        "{key}{aside} got the {noun} {value}.",
        "{key} was given {value}.",
        "{key}{aside} was assigned the {noun} {value}.",
        "They gave {key}{aside} the {noun} {value}.",
        "Remember that {value} belongs to {key}.",
        "Remember: {key} is {value}.",
        "One of the special magic {noun}s for {key} is: {value}.",
        "For {key}{aside}, use {value}.",
        "For {key} the {noun} is {value}.",
        "{key}: {value}.",
        "{key} = {value}.",
        "{key} -> {value}.",
        "{key}, {value}.",
        "- {key}: {value}",
        '"{key}": "{value}",',
        "set {key} {value};",
        "{value} is the {noun} of {key}.",
        "{value} is what {key} has.",
        "{value} was the {noun} given to {key}.",
        "Note: the {noun} of {key}{aside} was set to {value}.",
        "Note that {key}{aside} has {value}.",
        "We wrote down {value} for {key}.",
        "I wrote {value} beside {key}.",
        "If anyone asks about {key}{aside}, say {value}.",
        "The {noun} that goes with {key}{aside} is {value}.",
        "{value} goes with {key}.",
        "On the card of {key}{aside} stood {value}.",
        "Keep {value} in mind; it is the {noun} of {key}.",
        "In the list {key} has {value}.",
        "Beside {key}{aside} the list has {value}.",
        "{key} answers to the {noun} {value}.",
        "He told me that the {noun} of {key}{aside} is {value}.",
        "Nobody else knows that {key} has the {noun} {value}.",
        "Whoever looks for {key}{aside} must know {value}.",
    ),
    questions=(
        "What is the {noun} of {key}? {value}.",
        "What is the {noun} for {key}? It is {value}.",
        "What is {key}'s {noun}? {value}.",
        "What is the special magic {noun} for {key}? "
        "The {noun} for {key} mentioned above is {value}.",
        "Question: which {noun} belongs to {key}? Answer: {value}.",
        "Question: what is the {noun} of {key}? Answer: {value}.",
        "Q: {key}? A: {value}.",
        "Q: what does {key} have? A: {value}.",
        "Tell the {noun} of {key} as it was given in the text: {value}.",
        "Tell me the {noun} of {key}: {value}.",
        "What goes with {key}? {value}.",
        "What belongs to {key}? {value}.",
        "{key}'s {noun}, please: {value}.",
        "Which {noun} was {key} given? It was {value}.",
        "Which {noun} does {key} have? {value}.",
        "Look up {key} in the text: {value}.",
        "And {key}? {value}.",
        "Recall the {noun} of {key}. It is {value}.",
        "According to the text, {key} has the {noun} {value}.",
        "The text says that the {noun} of {key} is {value}.",
        "I asked for {key}, and they said {value}.",
        "{key}: {value}.",
    ),
    nouns=("number", "code", "password", "key", "token", "secret", "name", "pin", "label", "value"),
    kinds=("number", "number", "hex", "word", "code", "phrase"),
)
"""A grammar: hundreds of sentences about values of five kinds."""

UNSEEN = Wordings(
    needles=(
        "By the way, {key} can be reached with {value}.",
        "Our records show {value} under the entry {key}.",
        "The door of {key} opens with {value}.",
        "Please file {key} as {value}.",
        "{value}: that is how they mark {key}.",
        "Since Monday {key} carries the badge {value}.",
        "Once more, for {key} you want {value}, nothing else.",
        "A note pinned to {key} reads {value}.",
        "{key} (see {value}).",
        "You will find {key} listed with {value}.",
    ),
    questions=(
        "Could you repeat what was said about {key}? {value}.",
        "I forgot which one was for {key}. It was {value}.",
        "Find the entry {key}; the answer is {value}.",
        "How do they mark {key}? With {value}.",
        "Under {key} we have {value}.",
        "Somebody wants to know about {key}; tell them {value}.",
        "Give the badge {key} carries: {value}.",
        "The answer for {key} must be {value}.",
        "Complete this: {key} belongs with {value}.",
        "Does anyone remember {key}? Yes, {value}.",
    ),
)
"""Sentences that the grammar does not make, for tests."""
