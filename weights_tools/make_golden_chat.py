"""Makes tests/golden/chat.json: prompts as `transformers` makes them from published chat templates, for tests/test_chat_template.cpp.

    .venv/bin/python weights_tools/make_golden_chat.py

The vocabularies are small ones trained here, each built like that of the family: its pre-tokenizer, its special tokens, its way
with spaces. A case without passages has the ids of apply_chat_template(add_generation_prompt=True). Passages are compressed apart,
so with passages a case has the ids of each stretch of the rendered text between them.
"""

import json
import pathlib

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).resolve().parent.parent

# As published with the named models.
TEMPLATES = {
    # Llama-2-7b-chat-hf
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
              "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
              "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
              "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
              "{% if loop.index0 == 0 and system_message != false %}"
              "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
              "{% else %}{% set content = message['content'] %}{% endif %}"
              "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
              "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    # Meta-Llama-3-8B-Instruct
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}"
              "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
              "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # SmolLM2-135M-Instruct
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
               "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
               "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # ChatML as OpenHermes-2.5-Mistral-7B has it: nothing is said by itself.
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Mistral-7B-Instruct-v0.2
    "mistral": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
               "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
               "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
               "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
               "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    # Mistral-7B-Instruct-v0.3, without its tools.
    "mistral_control": "{%- if messages[0][\"role\"] == \"system\" %}\n    {%- set system_message = messages[0][\"content\"] %}\n"
                       "    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n{%- endif %}\n"
                       "{{- bos_token }}\n{%- for message in loop_messages %}\n    {%- if message[\"role\"] == \"user\" %}\n"
                       "        {%- if loop.last and system_message is defined %}\n"
                       "            {{- \"[INST] \" + system_message + \"\\n\\n\" + message[\"content\"] + \"[/INST]\" }}\n"
                       "        {%- else %}\n            {{- \"[INST] \" + message[\"content\"] + \"[/INST]\" }}\n        {%- endif %}\n"
                       "    {%- elif message[\"role\"] == \"assistant\" %}\n        {{- \" \" + message[\"content\"]|trim + eos_token}}\n"
                       "    {%- endif %}\n{%- endfor %}\n",
}

TEXT = [
    "The old mill stands on a hill above the river.\n\nWho owns it?\nThe owners:\n\n- a family;\n- the town.\n",
    "system\nYou are helpful.\nuser\nassistant\n[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhere is the mill? [/INST] on a hill ",
    "A red lantern hangs over the door. In 1893 the ferry carried 412 people.\n\nWhat hangs over the door?",
]
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(specials, words, bos):
    tokenizer = Tokenizer(models.BPE())
    if words:
        split = pre_tokenizers.Split(Regex(words), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + len(specials) + 60, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


def sentencepiece_manner(specials, metaspace_first):
    """A space is U+2581, and one is put in front: of every stretch, or with metaspace_first of the text alone."""
    characters = sorted({c for text in TEXT for c in text.replace(" ", "\u2581") if c != "\n"})
    vocab = {p: i for i, p in enumerate(specials + [f"<0x{b:02X}>" for b in range(256)] + characters)}
    merges = []
    for left, right in [("\u2581", "["), ("\u2581[", "/"), ("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("\u2581", "W"), ("\u2581", "a"), ("i", "n"), ("]", "\u2581"), (".", "\u2581")]:
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace_first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


SMOL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TOKENIZERS = {  # name: (tokenizer, BOS, EOS)
    "byte_level_digits": (byte_level(SMOL, None, None), None, "<|im_end|>"),
    "byte_level_llama3": (byte_level(LLAMA3, LLAMA3_WORDS, LLAMA3[0]), LLAMA3[0], "<|eot_id|>"),
    "space_before_each": (sentencepiece_manner(["<unk>", "<s>", "</s>"], False), "<s>", "</s>"),
    "space_before_first": (sentencepiece_manner(["<unk>", "<s>", "</s>"], True), "<s>", "</s>"),
    "space_before_first_control": (sentencepiece_manner(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], True), "<s>", "</s>"),
}
FAMILIES = [  # template, format, vocabulary
    ("llama2", "llama2", "space_before_each"), ("llama2", "llama2", "space_before_first"),
    ("llama3", "llama3", "byte_level_llama3"), ("smollm2", "chatml", "byte_level_digits"), ("chatml", "chatml", "byte_level_digits"),
    ("mistral", "mistral", "space_before_each"), ("mistral", "mistral", "space_before_first"),
    ("mistral_control", "mistral", "space_before_first_control"),
]
PASSAGES = ["Mill\nThe old mill stands on a hill.", "A red lantern hangs over the door"]
TURNS = [["Where is the mill?", "on a hill"], ["  Who owns it? ", " The town, since 1893.\n"]]
CONVERSATIONS = [  # system, turns, question, passages
    (None, [], "Where is the mill?", []),
    (None, TURNS, "And the red lantern? 412.", []),
    ("Be brief.", [], "What hangs over the door?", []),
    (" Answer in one word.\n", TURNS[:1], "\n\nWho owns it?\n", []),
    (None, [], "Who owns it?", PASSAGES),
    ("Be brief.", TURNS[:1], "Who owns it?", PASSAGES),
    ("Be brief.", [], "\n  Who owns it? ", []),
    (None, [], "  Who owns it?\n", PASSAGES),
]


def case_of(family, conversation):
    template, chat_format, vocabulary = family
    system, turns, question, passages = conversation
    tokenizer, bos, eos = TOKENIZERS[vocabulary]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=TEMPLATES[template])
    messages = []
    questions = [q for q, _ in turns] + [question]
    # Mistral's first template has no system message: its text stands before the first question.
    merged = system is not None and template == "mistral"
    if system is not None and not merged:
        messages.append({"role": "system", "content": system})
    for i, said in enumerate(questions):
        if i == 0:
            said = "".join(p + "\n\n" for p in passages) + said
            if merged:
                said = system + "\n\n" + said
        messages.append({"role": "user", "content": said})
        if i < len(turns):
            messages.append({"role": "assistant", "content": turns[i][1]})
    text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    stretches = []
    rest = text
    for passage in passages:
        before, rest = rest.split(passage, 1)
        stretches.append(before)
    stretches.append(rest)
    ids = [fast(s, add_special_tokens=False)["input_ids"] for s in stretches]
    if not passages:
        assert ids == [fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)]
    token_id = lambda t: None if t is None else fast.convert_tokens_to_ids(t)
    return {"template": template, "format": chat_format, "tokenizer": vocabulary, "bos_id": token_id(bos), "eos_id": token_id(eos), "system": system,
            "turns": turns, "question": question, "passages": len(passages), "text": text, "ids": ids}


def main():
    golden = {"templates": TEMPLATES, "tokenizers": {name: t.to_str() for name, (t, _, _) in TOKENIZERS.items()},
              "cases": [case_of(f, c) for f in FAMILIES for c in CONVERSATIONS]}
    path = ROOT / "tests/golden/chat.json"
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n")
    print(f"{path}: {len(golden['cases'])} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
