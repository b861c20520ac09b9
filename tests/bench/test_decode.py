import pytest

from tests.cli.command import run_command
from unimatrix.bench.decode import time_decoding
from unimatrix.configuration import UniMatrixConfig
from unimatrix.modeling import UniMatrixForCausalLM


def test_timings_name_what_was_timed() -> None:
    done: list[int] = []
    preset, baseline = time_decoding(
        ["core"], 5, 2, new_tokens=4, num_rounds=2, seed=0, on_round=done.append
    )
    config = UniMatrixConfig.preset("core", max_position_embeddings=None)
    assert preset.parameters == UniMatrixForCausalLM(config).num_parameters()
    assert (preset.model, baseline.model) == ("core", "llama-sdpa")
    for timing in (preset, baseline):
        assert (timing.prompt_tokens, timing.new_tokens, timing.batch_size) == (5, 4, 2)
        assert timing.fastest_us <= timing.median_us <= timing.slowest_us
    assert baseline.speedup == 1
    assert done == [1, 2, 3]


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command(as_json: bool) -> None:
    options = ("--decode", "--preset", "rosa", "--rounds", 1, "--tokens", 4)
    answer = run_command("bench", *options, *(["--json"] if as_json else []))
    assert answer.exit_code == 0
    if as_json:
        assert [row["model"] for row in answer.result["decode"]] == ["rosa", "llama-sdpa"]
    else:
        assert "a new token of 1 streams after 4, greedy" in answer.text
