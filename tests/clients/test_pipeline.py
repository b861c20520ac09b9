"""transformers' pipeline for text."""

import pytest
from transformers import pipeline

from tests.byte_models import build_byte_model, prefer, save_model
from unimatrix import build_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.client("transformers", 'pipeline("text-generation"), preset {preset}')
@pytest.mark.parametrize("preset", ["core", "unimatrix"])
def test_text_generation_of_a_saved_model(tmp_path, preset) -> None:
    model = build_byte_model(preset)
    if preset == "core":
        prefer(model, ord("e"))
    folder = save_model(tmp_path / "model", model)
    build_tokenizer().save_pretrained(folder)
    writer = pipeline("text-generation", model=folder, device="cpu")
    given = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    # Rows of unequal length are padded on the left.
    found = writer(["one", "twenty-two"], batch_size=2, **given)
    alone = [writer(text, **given) for text in ("one", "twenty-two")]
    assert [row[0]["generated_text"] for row in found] == [a[0]["generated_text"] for a in alone]
    if preset == "core":
        assert alone[0][0]["generated_text"] == "eeee"


@pytest.mark.client("transformers", 'pipeline("text-generation"), a chat')
def test_a_chat_takes_a_template(tmp_path) -> None:
    folder = save_model(tmp_path / "model", prefer(build_byte_model("core"), ord("e")))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    writer = pipeline("text-generation", model=folder, device="cpu")
    chat = [{"role": "user", "content": "say <|eos|>"}]
    found = writer(chat, max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert found[-1] == {"role": "assistant", "content": "eee"}
