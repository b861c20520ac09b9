"""lm-eval (extra ``lm-eval``) reads saved models through its ``hf`` model."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.byte_models import build_byte_model, prefer, quiet_transformers
from unimatrix import UniMatrixForCausalLM, build_tokenizer
from unimatrix.tokenization import BOS_ID

# Its own imports and data sets warn about each other.
pytestmark = pytest.mark.filterwarnings("ignore")

DOCUMENT = Path(__file__).parents[2] / "docs/results.md"
# Longer than the 2,048 tokens that lm-eval takes for a model whose length it cannot find out.
LONG = "The key is 4711. " + "Nothing happens here. " * 120 + "The key is"
# The spaces are in the answers: lm-eval moves them there from the end of a question.
DOCUMENTS = [
    {"question": "1 + 1 =", "choices": [" 2", " three"], "gold": 0},
    {"question": LONG, "choices": [" 4711", " x"], "gold": 1},
]
CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WRITING_TASK = """
task: local_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "eeee"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
# lm-eval divides by the bytes of the text.
ROLLING_TASK = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
TASKS = {"choice": CHOICE_TASK, "writing": WRITING_TASK, "rolling": ROLLING_TASK}


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    return folder


def save(folder: Path, model: UniMatrixForCausalLM) -> str:
    with quiet_transformers():
        model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def evaluate(model_args: dict, tasks: Path, task: str, batch_size: int | str = 2) -> dict:
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=model_args,
        tasks=[task],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=batch_size,
        log_samples=True,
        bootstrap_iters=0,
    )


def score(model: UniMatrixForCausalLM, question: str, answer: str) -> float:
    """Return the log likelihood of an answer, straight from the logits."""
    data = (question + answer).encode()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[BOS_ID, *data[:-1]]])).logits[0]
    found = logits.log_softmax(-1)[torch.arange(len(data)), list(data)]
    return float(found[len(question.encode()) :].sum())


batch_sizes = pytest.mark.parametrize("batch_size", [1, 4, "auto"])


@pytest.mark.client("lm-eval", "loglikelihood (multiple choice), batch_size={batch_size}")
@batch_sizes
def test_log_likelihoods_of_a_saved_model(batch_size, tmp_path, tasks) -> None:
    model = build_byte_model("unimatrix")
    folder = save(tmp_path / "model", model)
    result = evaluate({"pretrained": folder}, tasks, "local_choice", batch_size)
    samples = sorted(result["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
    right = 0
    for document, sample in zip(DOCUMENTS, samples, strict=True):
        expected = [score(model, document["question"], c) for c in document["choices"]]
        found = [float(answer[0][0]) for answer in sample["resps"]]
        assert found == pytest.approx(expected, abs=1e-3)
        right += int(expected[0] < expected[1]) == document["gold"]
    assert result["results"]["local_choice"]["acc,none"] == right / 2


def test_nothing_is_cut_off(tmp_path) -> None:
    folder = save(tmp_path / "model", build_byte_model("unimatrix"))
    assert HFLM(pretrained=folder, device="cpu").max_length == 2**50
    table = save(tmp_path / "table", build_byte_model("core", max_position_embeddings=128))
    assert HFLM(pretrained=table, device="cpu").max_length == 128


@pytest.mark.client("lm-eval", "generate_until, batch_size={batch_size}")
@batch_sizes
def test_writing(batch_size, tmp_path, tasks) -> None:
    folder = save(tmp_path / "model", prefer(build_byte_model("core"), ord("e")))
    result = evaluate({"pretrained": folder}, tasks, "local_writing", batch_size)
    assert result["results"]["local_writing"]["exact_match,none"] == 1.0


@pytest.mark.client(
    "lm-eval", "loglikelihood_rolling with add_bos_token=False, batch_size={batch_size}"
)
@batch_sizes
def test_rolling_log_likelihoods(batch_size, tmp_path, tasks) -> None:
    """With the argument that ``docs/results.md`` names, BOS is read once and nothing is cut."""
    model = build_byte_model("unimatrix")
    model_args = {"pretrained": save(tmp_path / "model", model), "add_bos_token": False}
    result = evaluate(model_args, tasks, "local_rolling", batch_size)
    texts = [document["question"] for document in DOCUMENTS]
    bits = -sum(score(model, "", text) for text in texts) / math.log(2)
    expected = bits / sum(len(text.encode()) for text in texts)
    assert result["results"]["local_rolling"]["bits_per_byte,none"] == pytest.approx(expected)
    assert "add_bos_token=False" in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.client("lm-eval", "a model in memory: HFLM(pretrained=model, tokenizer=tokenizer)")
def test_a_model_in_memory(tasks) -> None:
    model = build_byte_model("sparsepointer")
    reader = HFLM(pretrained=model, tokenizer=build_tokenizer(), batch_size=1)
    result = lm_eval.simple_evaluate(
        model=reader,
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert math.isfinite(result["results"]["local_choice"]["acc,none"])


@pytest.mark.slow
@pytest.mark.client("lm-eval", "the command line, on a saved model")
def test_the_command(tmp_path, tasks) -> None:
    """The command of ``docs/results.md``, with another model and task."""
    folder = save(tmp_path / "model", prefer(build_byte_model("core"), ord("e")))
    document = DOCUMENT.read_text(encoding="utf-8")
    shown = re.search(r"^python (-m lm_eval run .+)$", document, re.MULTILINE)
    assert shown is not None
    arguments = shown[1].replace("runs/RUN", folder).replace("lambada_openai", "local_writing")
    extra = ["--include_path", str(tasks), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *arguments.split(), *extra], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"local_writing.*exact_match.*1", done.stdout)
