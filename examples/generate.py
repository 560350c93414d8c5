"""Writes on from a prompt with a quantized model, word by word.

python examples/generate.py MODEL PROMPT [--new-tokens 128] [--temperature 0.7] [--chat]

A model that one GPU does not hold: [--device-map balanced] [--max-memory 0=20GiB 1=20GiB cpu=60GiB]
"""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer, TextStreamer

from autoq import AutoQForCausalLM
from autoq.errors import AutoQError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or hub name of a quantized model")
    parser.add_argument("prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token every time")
    parser.add_argument("--chat", action="store_true", help="give the prompt as a user's message")
    parser.add_argument("--device-map", default="auto", help="auto, balanced, sequential, or a device")
    parser.add_argument("--max-memory", nargs="+", metavar="DEVICE=SIZE", help="what each device may hold")
    arguments = parser.parse_args()
    if arguments.new_tokens < 1 or arguments.temperature < 0:
        parser.error("--new-tokens should be at least 1, and --temperature at least 0")
    if not all("=" in entry for entry in arguments.max_memory or ()):
        parser.error("--max-memory takes entries such as 0=20GiB")

    memory = arguments.max_memory and dict(entry.split("=", 1) for entry in arguments.max_memory)
    model = AutoQForCausalLM.from_quantized(
        arguments.model,
        device_map=arguments.device_map,
        max_memory=memory and {int(name) if name.isdigit() else name: size for name, size in memory.items()},
    )
    if len(model.hf_device_map) > 1:
        print("\n".join(f"{part}: {device}" for part, device in model.hf_device_map.items()))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.chat and not tokenizer.chat_template:
        parser.error(f"the tokenizer of {arguments.model} has no chat template; leave --chat out")
    if arguments.chat:
        messages = [{"role": "user", "content": arguments.prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(arguments.prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        parser.error("the prompt is empty")
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {"do_sample": False}
    )
    model.generate(
        **inputs.to(model.device),
        **sampling,
        max_new_tokens=arguments.new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=arguments.chat, skip_special_tokens=True),
    )


if __name__ == "__main__":
    try:
        main()
    except (AutoQError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
