"""Arguments of short trainings through other libraries."""

from pathlib import Path
from typing import Any


def choose_arguments(folder: Path, **others: Any) -> dict[str, Any]:
    """Return TRL's own defaults, for a few steps on a CPU."""
    common = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return common | others
