"""Fine-tune a model on a folder of text with ``transformers.Trainer``.

Run it: ``python examples/fine_tune.py FOLDER [MODEL] [--steps 200] [--out fine-tuned]``. MODEL is a
run of ``unimatrix train`` or a saved model; without one ``unimatrix`` starts from scratch.
"""

import argparse
import math
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from unimatrix import UniMatrixConfig, UniMatrixForCausalLM, build_tokenizer
from unimatrix.data import load_corpus


class Windows(Dataset):
    """Windows of ``num_tokens`` bytes, one behind the other."""

    def __init__(self, stream, num_tokens: int) -> None:
        self.stream, self.num_tokens = stream, num_tokens

    def __len__(self) -> int:
        return self.stream.num_tokens // self.num_tokens

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self.num_tokens
        ids = torch.from_numpy(self.stream.read_tokens(start, start + self.num_tokens))
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="fine-tuned")
    asked = parser.parse_args()

    if asked.model is None:
        model = UniMatrixForCausalLM(UniMatrixConfig.preset("unimatrix"))
    else:
        model = UniMatrixForCausalLM.from_pretrained(asked.model)
    corpus = load_corpus(asked.folder)
    trainer = Trainer(
        model,
        TrainingArguments(
            asked.out,
            max_steps=asked.steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            eval_strategy="steps",
            eval_steps=max(1, asked.steps // 4),
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Windows(corpus.train, 256),
        eval_dataset=Windows(corpus.valid, 256),
        processing_class=build_tokenizer(),
    )
    trainer.train()
    trainer.save_model()
    bits = trainer.evaluate()["eval_loss"] / math.log(2)
    print(f"bits per byte of held-out text: {bits:.3f}")


if __name__ == "__main__":
    main()
