"""Makes tests/data/<name>_golden.json with nothing but transformers, for tests/models/test_real_llm_states.py.

    python -m demo.real_llm smollm2 && python -m tests.make_real_llm_golden smollm2

For three sentences the token ids, and for the last token's state in each layer the first four coordinates, the mean and
the Euclidean norm, in float32 on a CPU; and the greedy continuation of a fourth text.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.models.table import model_source

SENTENCES = (
    "A feast of images, and not one idea that survives the ride home.",
    "The committee will meet on Tuesday.",
    "Wie viele  Bücher hast du 2023 gelesen?\nTwelve, or 13.",
)
PROMPT, NUM_NEW_TOKENS = "The capital of France is", 15
DATA = Path(__file__).parent / "data"


@torch.inference_mode()
def main(name: str) -> None:
    path = Path(model_source(name))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    sentences = []
    for text in SENTENCES:
        input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
        last = [states[0, -1] for states in model(input_ids, output_hidden_states=True).hidden_states]
        layers = [{"first": s[:4].tolist(), "mean": s.mean().item(), "norm": s.norm().item()} for s in last]
        sentences.append({"text": text, "input_ids": input_ids[0].tolist(), "layers": layers})
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)[0]
    new = output[prompt["input_ids"].shape[1] :].tolist()
    continuation = {"prompt": PROMPT, "new_ids": new, "text": tokenizer.decode(output)}
    golden = DATA / f"{name}_golden.json"
    golden.write_text(json.dumps({"sentences": sentences, "continuation": continuation}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
