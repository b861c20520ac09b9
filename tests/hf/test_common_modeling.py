"""transformers' own tests of any model, run as its file for Mamba-2 runs them.

They come from its source distribution; see ``transformers_source.py``.
"""

import unittest
from typing import Any

import pytest

from tests.hf.transformers_source import import_tests
from unimatrix import UniMatrixConfig, UniMatrixForCausalLM, UniMatrixModel
from unimatrix.tokenization import VOCAB_SIZE

common = import_tests("test_modeling_common")
pytestmark = [pytest.mark.common, pytest.mark.filterwarnings("ignore")]


class ModelTester:
    """Small inputs and configurations, in the form that the tests ask for."""

    batch_size, seq_length, vocab_size = 3, 7, 99
    hidden_size, num_hidden_layers = 32, 2
    is_training = True

    def __init__(self, preset: str) -> None:
        self.preset = preset

    def get_config(self) -> UniMatrixConfig:
        return UniMatrixConfig.preset(
            self.preset,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=2,
            head_dim=8,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[UniMatrixConfig, dict[str, Any]]:
        shape = [self.batch_size, self.seq_length]
        return self.get_config(), {"input_ids": common.ids_tensor(shape, self.vocab_size)}


class CommonTests(common.ModelTesterMixin):
    preset = ""
    all_model_classes = (UniMatrixModel, UniMatrixForCausalLM)
    has_attentions = False

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.preset)

    def test_model_forward_default_config_values(self) -> None:
        # The default ids of PAD, BOS and EOS are those of the default vocabulary.
        self.model_tester.vocab_size = VOCAB_SIZE
        super().test_model_forward_default_config_values()

    @unittest.skip("the distribution lacks the tests of generation; see test_generation_cases.py")
    def test_generation_tester_mixin_inheritance(self) -> None: ...


class TestCore(CommonTests, unittest.TestCase):
    preset = "core"


class ReadsTokenIds(CommonTests):
    """What retrieves by token id refuses embeddings: test_forward_arguments.py has the sentence."""

    @unittest.skip("inputs_embeds says no token ids, which this preset reads")
    def test_inputs_embeds(self) -> None: ...

    @unittest.skip("inputs_embeds says no token ids, which this preset reads")
    def test_inputs_embeds_matches_input_ids(self) -> None: ...


class TestSparsePointer(ReadsTokenIds, unittest.TestCase):
    preset = "sparsepointer"


_ONE_FUNCTION = (
    "the test lets the last pass through a layer stand for all of them, and from the second depth "
    "step on this one is handed a read more; test_gradient_checkpointing.py compares gradients"
)


class TestUniMatrix(ReadsTokenIds, unittest.TestCase):
    preset = "unimatrix"

    @unittest.skip(_ONE_FUNCTION)
    def test_training_gradient_checkpointing(self) -> None: ...

    @unittest.skip(_ONE_FUNCTION)
    def test_training_gradient_checkpointing_use_reentrant_false(self) -> None: ...

    @unittest.skip(_ONE_FUNCTION)
    def test_training_gradient_checkpointing_use_reentrant_true(self) -> None: ...

    @unittest.skip(
        "a pointer that found nothing has the share 0, whose ln the test takes for a fault"
    )
    def test_batching_equivalence(self) -> None: ...
