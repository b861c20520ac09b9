"""transformers knows the models, whichever of the two is imported first."""

import logging
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import Trainer, TrainingArguments, pipeline

from tests.byte_models import build_byte_model
from unimatrix import build_tokenizer

SMOOTHING = 0.1
# What transformers and others look a model up by, in a process of its own.
KNOWN = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import modeling_auto
assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["unimatrix"] == "UniMatrixForCausalLM"
config = AutoConfig.for_model("unimatrix")
assert type(AutoModelForCausalLM.from_config(config)).__module__ == "unimatrix.modeling"
assert type(AutoModel.from_config(config)).__name__ == "UniMatrixModel"
import transformers
assert transformers.UniMatrixForCausalLM is type(AutoModelForCausalLM.from_config(config))
"""


@pytest.mark.parametrize(
    "before",
    [
        "import unimatrix",
        "from transformers import AutoModelForCausalLM; import unimatrix",
        "from unimatrix.modeling import UniMatrixForCausalLM",
    ],
)
def test_known_in_any_order(before: str) -> None:
    code = f"{before}\n{KNOWN}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, unimatrix; from unimatrix.errors import InputError;"
        "heavy = {'torch', 'transformers', 'numba', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pipeline_takes_it_for_a_language_model(caplog) -> None:
    logging.getLogger("transformers").propagate = True
    model, tokenizer = build_byte_model("core"), build_tokenizer()
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    logging.getLogger("transformers").propagate = False
    assert "not supported" not in caplog.text
    assert writer.task == "text-generation"


def smooth(logits: torch.Tensor, labels: torch.Tensor, num_items: int | None) -> torch.Tensor:
    """Return the label-smoothed loss of the next tokens, straight from its definition."""
    log_p, targets = log_softmax(logits[:, :-1], -1), labels[:, 1:]
    counted = targets != -100
    nll = -log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1))[..., 0]
    each = (1 - SMOOTHING) * nll - SMOOTHING * log_p.mean(-1)
    return each[counted].sum() / (counted.sum() if num_items is None else num_items)


@pytest.mark.parametrize("num_items", [None, 50])
@pytest.mark.parametrize("through_peft", [False, True])
@pytest.mark.parametrize("preset", ["core", "unimatrix"])
def test_label_smoothing_shifts(
    preset: str, through_peft: bool, num_items: int | None, tmp_path
) -> None:
    model = build_byte_model(preset, dropout=0.0)
    if through_peft:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM", r=2)
        model = peft.get_peft_model(model, lora)
    arguments = TrainingArguments(
        tmp_path, label_smoothing_factor=SMOOTHING, report_to=[], use_cpu=True
    )
    trainer = Trainer(model, arguments)
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        found = trainer.compute_loss(
            model, {"input_ids": ids, "labels": labels.clone()}, num_items_in_batch=num_items
        )
        expected = smooth(model(input_ids=ids).logits, labels, num_items)
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


def test_a_smoothed_training_learns_the_next_byte(tmp_path) -> None:
    """Unshifted labels teach a model the byte that it has just read."""
    rows = [{"input_ids": list(b"abcd" * 6), "labels": list(b"abcd" * 6)}] * 8
    model = build_byte_model("core", dropout=0.0)
    arguments = TrainingArguments(
        tmp_path,
        label_smoothing_factor=SMOOTHING,
        max_steps=40,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    logits = model.eval()(torch.tensor([list(b"abcdabc")])).logits
    assert bytes(logits[0].argmax(-1).tolist()) == b"bcdabcd"
