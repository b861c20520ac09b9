"""How many questions about documents it has not seen a reader answers."""

from unimatrix.errors import InputError
from unimatrix.inference.text_reader import TextReader
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.tasks.reader import QUESTION_KINDS, ReaderText


def measure_answers(
    model: UniMatrixForCausalLM, task: ReaderText, num_questions: int, seed: int
) -> dict[str, float]:
    """Return the shares of questions whose answer is right to the byte: all, and by their kind.

    Args:
        model: as for ``TextReader``, which is asked as ``unimatrix ask`` does.
        task: of documents with names and text that were not trained on.
        num_questions: each about a document of its own; at least one of each kind.
        seed: of the documents.

    Raises:
        InputError: as ``TextReader``, or for too few questions.
    """
    if num_questions < len(QUESTION_KINDS):
        raise InputError(
            f"num_questions is {num_questions}; ask at least {len(QUESTION_KINDS)}, one of each "
            "kind"
        )
    right: dict[str, list[bool]] = {kind: [] for kind in QUESTION_KINDS}
    for index in range(num_questions):
        example = task.draw_question(seed, index)
        reader = TextReader(model)
        reader.read(example.text)
        answer = reader.ask(example.question)
        right[example.kind].append(answer.data == example.answer.encode())
    everything = [found for kind in right.values() for found in kind]
    shares = {kind: sum(found) / len(found) for kind, found in right.items()}
    return {"all": sum(everything) / num_questions, **shares}
