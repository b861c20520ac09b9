"""Words, numbers and keys of the long-context tasks; RULER takes its own from word lists."""

from unimatrix.tasks.ruler.example import Draws

_CONSONANTS = "bdfghjklmnprstvz"
_VOWELS = "aeiou"
_NUM_SYLLABLES = len(_CONSONANTS) * len(_VOWELS)
_ADJECTIVES = (
    "amber ancient brave bright broad calm careful clear clever cold crisp curious dark deep "
    "distant eager early fair famous fierce gentle golden grand green happy hollow honest humble "
    "kind late light little lively lonely lucky mellow modest narrow noble patient plain proud "
    "quick quiet rapid sharp silver slow smooth solid steady strange sturdy subtle swift tall "
    "tender thick tidy vast warm wide wild young"
)
_MATERIALS = (
    "apple ash barley birch brass brick bronze canvas cedar chalk cherry clay coal copper coral "
    "cork cotton crystal elm fern flax flint garnet ginger glass grain granite gravel hazel ivory "
    "jade lemon linen maple marble mint moss nickel oak olive onyx paper pearl pepper pine plum "
    "quartz reed ruby saffron salt sand satin slate steel stone sugar tin topaz velvet walnut "
    "wax willow wool"
)
_NOUNS = (
    "anchor arrow badger barn basket beacon bell boat bridge brook cabin candle castle chapel "
    "cloud compass cottage crane crown desk door drum eagle engine falcon fence ferry field forge "
    "fountain fox garden gate hammer harbor heron hill island kettle ladder lamp lantern meadow "
    "mill mirror orchard otter owl path piano quill raven ribbon river saddle sparrow table tower "
    "valley violin wagon well wheel window"
)
_KEY_PARTS = [words.split() for words in (_ADJECTIVES, _MATERIALS, _NOUNS)]
LONGEST_KEY = sum(max(map(len, words)) for words in _KEY_PARTS) + len(_KEY_PARTS) - 1
"""Characters of the longest key of words."""

NUM_DIGITS = 7
"""Of a number that is a value."""
UUID_CHARACTERS = 36


def draw_key(draws: Draws) -> str:
    """Draw a key of words, such as ``quiet-copper-harbor``: one of 262,144."""
    return "-".join(words[draws.below(len(words))] for words in _KEY_PARTS)


def draw_number(draws: Draws) -> str:
    """Draw a number of 7 digits without a leading zero."""
    smallest = 10 ** (NUM_DIGITS - 1)
    return str(smallest + draws.below(9 * smallest))


def draw_uuid(draws: Draws) -> str:
    """Draw 36 characters in the form of a random UUID."""
    digits = f"{draws.below(2**64):016x}{draws.below(2**64):016x}"
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def draw_letters(draws: Draws, letters: str, length: int) -> str:
    """Draw ``length`` letters of an alphabet."""
    return "".join(letters[draws.below(len(letters))] for _ in range(length))


def spell(draws: Draws, length: int) -> str:
    """Draw one word of ``length`` letters, consonants and vowels in turn."""
    pairs = (length + 1) // 2
    word = ""
    for _ in range(pairs):
        syllable = draws.below(_NUM_SYLLABLES)
        word += _CONSONANTS[syllable // len(_VOWELS)] + _VOWELS[syllable % len(_VOWELS)]
    return word[:length]
