"""What the tests of transformers itself need."""

import pytest

# Marks of its own, which it gives the tests that no small model on a CPU can take.
_THEIR_MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in _THEIR_MARKS:
        config.addinivalue_line("markers", f"{name}: a mark of transformers' own tests")
