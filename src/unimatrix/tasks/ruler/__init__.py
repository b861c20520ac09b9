"""Long-context tasks after RULER, with its limits and lengths scaled from tokens to bytes.

Source: RULER ``scripts/synthetic.yaml`` and ``config_tasks.sh``: the same tasks under the same
names with the same numbers of needles, keys, values, queries, hops and repetitions. Ours differ in
this: answers may have 4 bytes for a token of RULER's, prompt and answer together have exactly the
length asked for, words and wording are our own (keys have three words where RULER's have two),
essays are a text of the caller's, and examples are a pure function of (task, seed, index). Not here
are the two tasks of questions on SQuAD and HotpotQA, which need these data sets.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from unimatrix.errors import require_choice
from unimatrix.tasks.ruler.example import LongExample, LongTask, score_references
from unimatrix.tasks.ruler.frequencies import CommonWords, FrequentWords
from unimatrix.tasks.ruler.needles import NeedleSearch
from unimatrix.tasks.ruler.variables import VariableTracking

Text = NDArray[np.uint8]

_BUILDERS: dict[str, Callable[[int, Text], LongTask]] = {
    "niah_single_1": lambda n, _: NeedleSearch(total_bytes=n, haystack="noise"),
    "niah_single_2": lambda n, text: NeedleSearch(total_bytes=n, haystack="essay", text=text),
    "niah_single_3": lambda n, text: NeedleSearch(
        total_bytes=n, haystack="essay", text=text, value_kind="code"
    ),
    "niah_multikey_1": lambda n, text: NeedleSearch(
        total_bytes=n, haystack="essay", text=text, keys=4
    ),
    "niah_multikey_2": lambda n, _: NeedleSearch(total_bytes=n, haystack="needles"),
    "niah_multikey_3": lambda n, _: NeedleSearch(
        total_bytes=n, haystack="needles", key_kind="code", value_kind="code"
    ),
    "niah_multivalue": lambda n, text: NeedleSearch(
        total_bytes=n, haystack="essay", text=text, values=4
    ),
    "niah_multiquery": lambda n, text: NeedleSearch(
        total_bytes=n, haystack="essay", text=text, keys=4, queries=4
    ),
    "vt": lambda n, _: VariableTracking(total_bytes=n),
    "cwe": lambda n, _: CommonWords(total_bytes=n),
    "fwe": lambda n, _: FrequentWords(total_bytes=n),
}
RULER_TASKS = tuple(_BUILDERS)
"""Names of the tasks, as RULER has them."""


def build_task(name: str, total_bytes: int, text: Text) -> LongTask:
    """Return a task at a length.

    Args:
        name: one of ``RULER_TASKS``.
        total_bytes: of prompt and answer.
        text: [bytes] uint8, from which essays are cut.

    Raises:
        InputError: for an unknown name, or a length too short for the task.
    """
    require_choice("there is no task", name, RULER_TASKS)
    return _BUILDERS[name](total_bytes, text)


__all__ = ["RULER_TASKS", "LongExample", "LongTask", "build_task", "score_references"]
