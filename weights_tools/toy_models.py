"""Small random RoBERTa and LLaMA directories with vocabularies of their own, for tests: real layouts, no meaning."""
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel
from transformers.utils import logging

logging.disable_progress_bar()

TEXT = [
    "The keeper of the lighthouse at Gull Point wrote down every ship: its name, its port, and the hour.",
    "A chunk of sixteen tokens becomes one vector; naïve café, 東京 and 🙂 are several bytes a character.",
    "In 1893 the ferry carried 412 passengers. Numbers, names and dates are what questions ask for.",
]


def byte_level_tokenizer(specials, vocab_size, around):
    """around: (front, back) special tokens that the post-processor puts around a text, or None."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    if around:
        tokenizer.post_processor = processors.RobertaProcessing((around[1], tokenizer.token_to_id(around[1])), (around[0], tokenizer.token_to_id(around[0])), add_prefix_space=False)
    return tokenizer


def byte_fallback_tokenizer():
    """In SentencePiece's manner, as LLaMA 2 and Mistral: a space becomes U+2581, one is put in front, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    characters = sorted({c for text in TEXT for c in text.replace(" ", "\u2581") if ord(c) < 128 or c == "\u2581"})
    vocab = {p: i for i, p in enumerate(pieces + characters)}
    merges = []
    for pair in ("th", "he", "in", "er", "an", "re", "on", "at", "en", "or"):
        vocab[pair] = len(vocab)
        merges.append((pair[0], pair[1]))
    for pair in (("\u2581", "th"), ("\u2581", "a"), ("th", "e")):
        vocab["".join(pair)] = len(vocab)
        merges.append(pair)
    merges.append(("\u2581th", "e"))
    vocab["\u2581the"] = len(vocab)
    table = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                         for i, c in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                                                     {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": [list(m) for m in merges]},
    }
    return Tokenizer.from_str(json.dumps(table))


def make_encoder(folder, seed=0, **changes):
    """A RoBERTa directory (vocabulary 320, its own tokenizer). Returns the model in fp32."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=80,
                 type_vocab_size=1, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    model = RobertaModel(RobertaConfig(**shape | changes)).eval()
    model.save_pretrained(folder)
    tokenizer = byte_level_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], 320, ("<s>", "</s>"))
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    return model


def make_decoder(folder, seed=1, byte_fallback=False, **changes):
    """A LLaMA directory whose vocabulary is another than the encoder's: <unk>, <s>, </s> are 0, 1, 2. Returns the model in fp32."""
    torch.manual_seed(seed)
    tokenizer = byte_fallback_tokenizer() if byte_fallback else byte_level_tokenizer(["<unk>", "<s>", "</s>"], 300, None)
    shape = dict(vocab_size=-(-tokenizer.get_vocab_size() // 16) * 16, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()
    model.save_pretrained(folder)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    return model
