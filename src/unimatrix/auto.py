"""Registration with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from unimatrix.configuration import UniMatrixConfig
from unimatrix.modeling import UniMatrixForCausalLM, UniMatrixModel
from unimatrix.tokenization import UniMatrixTokenizer


def register() -> None:
    """Make the Auto classes know UniMatrix; calling it again changes nothing."""
    AutoConfig.register("unimatrix", UniMatrixConfig, exist_ok=True)
    AutoModel.register(UniMatrixConfig, UniMatrixModel, exist_ok=True)
    AutoModelForCausalLM.register(UniMatrixConfig, UniMatrixForCausalLM, exist_ok=True)
    AutoTokenizer.register(UniMatrixConfig, fast_tokenizer_class=UniMatrixTokenizer, exist_ok=True)
