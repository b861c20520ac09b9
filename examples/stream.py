"""Read a text, save the state of the stream to a file, and go on from it later.

Run it: ``python examples/stream.py MODEL TEXT``. The file has the same size after a kilobyte
and after a gigabyte of text, and whoever loads it goes on without the text.
"""

import sys
from pathlib import Path

import torch

from unimatrix import Decoder, UniMatrixCache, UniMatrixForCausalLM, decode_bytes, encode_bytes

READ_AT_ONCE = 2048
BOS_ID = 257


def read(model: UniMatrixForCausalLM, text: bytes) -> UniMatrixCache:
    """Read a text in parts, so that the memory that this takes does not grow with it."""
    ids = torch.tensor([[BOS_ID, *encode_bytes(text)]])
    cache = None
    for part in ids.split(READ_AT_ONCE, dim=1):
        with torch.no_grad():
            output = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    return cache


def write(
    model: UniMatrixForCausalLM, cache: UniMatrixCache, prompt: bytes, num_bytes: int
) -> bytes:
    """Go on from a state with a prompt, always by the likeliest byte."""
    decoder = Decoder(model, cache)
    for byte in prompt:
        logits = decoder.step(torch.tensor([byte]))
    written = []
    for _ in range(num_bytes):
        written.append(logits[:, :256].argmax(dim=-1))
        logits = decoder.step(written[-1])
    return decode_bytes(torch.cat(written))


def main(folder: str, text: str) -> None:
    model = UniMatrixForCausalLM.from_pretrained(folder).eval()
    read(model, Path(text).read_bytes()).save("stream.safetensors")

    cache = UniMatrixCache.load("stream.safetensors")
    print(f"{int(cache.num_tokens[0]):,} tokens in a state of {cache.num_bytes():,} bytes")
    print(write(model, cache, b"\n", 200).decode(errors="replace"))


if __name__ == "__main__":
    main(*sys.argv[1:])
