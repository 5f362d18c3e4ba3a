"""Writes the networks' goldens: small random models in Hugging Face's layout, and what they must compute.

    python -m weights_tools.make_golden [--out tests/golden]

  networks/NAME/              a model directory: config.json and weights (F32, BF16 or F16; one in shards)
  networks/NAME.json          inputs: token ids, and `source` rows (an id, or -1 - i for slot i)
  networks/NAME.safetensors   outputs in F32, from `transformers` in fp32 on the weights as stored (rounded)
  tiny-refrag/                a complete REFRAG model directory; its expectations are networks/tiny-refrag.*

The projector, the policy and the prompt's assembly are written out here a second time, in PyTorch, from the format's
description and not from the runtime. Seeds are fixed: the same library versions give the same files. Never run by the tests.
"""
import argparse
import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM, RobertaModel

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
BOS, EOS = 0, 2
LLAMA3_ROPE = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}


# ---- models ---------------------------------------------------------------------------------------------------------


def randomize(model, seed, dtype, embed_std=0.6):
    """Weights wide enough that attention is far from uniform and logits are of order 1 to 10, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name.lower():
            value = noise * 0.2 + (1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            value = noise * 0.3
        elif "embed" in name:
            value = noise * embed_std
        else:
            query_or_key = any(part in name for part in ("q_proj", "k_proj", "query", "key"))
            gain = 3.0 if "lm_head" in name else 1.6 if query_or_key else 1.0
            value = noise * gain / math.sqrt(p.shape[1])
        p.data = value.to(dtype).float()
    return model.eval()


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def save_tensors(path, tensors, dtype=torch.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    floats = lambda t: t.to(dtype) if t.is_floating_point() else t
    save_file({n: floats(t.detach()).contiguous().clone() for n, t in tensors.items()}, str(path), metadata={"format": "pt"})


def save_sharded(directory, tensors):
    """Two shards and their index, split in the middle of the names."""
    names = list(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for i, half in enumerate(halves):
        shard = f"model-{i + 1:05}-of-{len(halves):05}.safetensors"
        save_tensors(directory / shard, {n: tensors[n] for n in half})
        weight_map.update({n: shard for n in half})
    total = sum(t.numel() * 4 for t in tensors.values())
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_config(directory, config, old_spelling=False):
    """config.json as transformers 5 writes it, or with RoPE in the spelling of transformers 4."""
    values = config.to_dict()
    if old_spelling:
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = None if rope["rope_type"] == "default" else {"type": rope.pop("rope_type"), **rope}
        values["torch_dtype"] = "float32"
        values["transformers_version"] = "4.46.0"
    write_json(directory / "config.json", values)


def weights_of(model):
    """The state dict without the copy that a tied head is."""
    state = model.state_dict()
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    return state


# ---- RoBERTa and LLaMA alone ----------------------------------------------------------------------------------------


def roberta_config(**changes):
    values = dict(vocab_size=100, hidden_size=48, num_attention_heads=3, num_hidden_layers=2, intermediate_size=80,
                  max_position_embeddings=40, type_vocab_size=1, layer_norm_eps=1e-5)
    return RobertaConfig(**{**values, **changes})


def roberta_outputs(model, sequences):
    """Per sequence, rows stacked: the embedding's output and each layer's; cls and mean of the last."""
    states, cls, mean = [], [], []
    for ids in sequences:
        out = model(torch.tensor([ids]), output_hidden_states=True)
        states.append(torch.stack(out.hidden_states)[:, 0])
        cls.append(out.last_hidden_state[0, 0])
        mean.append(out.last_hidden_state[0].mean(0))
    states = torch.cat(states, dim=1)
    return {"hidden_states": states.reshape(-1, states.shape[-1]), "cls": torch.stack(cls), "mean": torch.stack(mean)}


def encoder_sequences(generator, lengths, vocab_size):
    draw = lambda n: torch.randint(4, vocab_size, (n,), generator=generator).tolist()
    return [[0] + draw(n - 2) + [2] if n > 2 else draw(n) for n in lengths]


def make_roberta(out):
    generator = torch.Generator().manual_seed(11)
    sequences = encoder_sequences(generator, [18, 1, 38, 2, 10], 100)

    mlm = randomize(RobertaForMaskedLM(roberta_config()), 1, torch.float32)
    tensors = {n: t for n, t in mlm.state_dict().items() if n != "lm_head.decoder.weight"}
    tensors["roberta.embeddings.position_ids"] = torch.arange(40).unsqueeze(0)  # I64, as older checkpoints have it
    save_config(out / "roberta-mlm", mlm.config)
    save_tensors(out / "roberta-mlm/model.safetensors", tensors)
    save_tensors(out / "roberta-mlm.safetensors", roberta_outputs(mlm.roberta, sequences))

    pooled = randomize(RobertaModel(roberta_config(type_vocab_size=2, layer_norm_eps=1e-12)), 2, torch.float16)
    save_config(out / "roberta-pooler", pooled.config)
    save_tensors(out / "roberta-pooler/model.safetensors", pooled.state_dict(), torch.float16)
    outputs = roberta_outputs(pooled, sequences)
    outputs["pooler"] = torch.cat([pooled(torch.tensor([ids])).pooler_output for ids in sequences])
    save_tensors(out / "roberta-pooler.safetensors", outputs)
    for name in ("roberta-mlm", "roberta-pooler"):
        write_json(out / f"{name}.json", {"sequences": sequences})


def greedy(model, embeds, n, what):
    """Ids of n greedy steps after the input rows, recomputed in full each time; the choices must be clear ones."""
    ids = []
    for _ in range(n):
        logits = model(inputs_embeds=embeds.unsqueeze(0)).logits[0, -1]
        top = logits.topk(2).values
        assert top[0] - top[1] > 1e-3, f"{what}: a near tie in the greedy continuation: choose another seed"
        ids.append(int(logits.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings().weight[ids[-1:]]])
    return ids


def embed(model, source, chunk_rows):
    """Decoder input rows: a token's embedding, or slot i for -1 - i."""
    table = model.get_input_embeddings().weight
    return torch.stack([table[s] if s >= 0 else chunk_rows[-1 - s] for s in source])


def llama_golden(out, name, model, seed):
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size
    ids = [1] + torch.randint(3, vocab, (51,), generator=generator).tolist()
    chunk_rows = torch.randn((7, model.config.hidden_size), generator=generator) * 0.6
    slot_rows = {1: 0, 2: 1, 3: 2, 20: 6, 31: 3, 32: 4, 51: 5}  # first, last, both sides of a page border; not in order
    source = [-1 - slot_rows[i] if i in slot_rows else t for i, t in enumerate(ids)]
    plain = model(torch.tensor([ids]), output_hidden_states=True)
    mixed = embed(model, source, chunk_rows)
    states = torch.cat([h[0] for h in plain.hidden_states])  # input, after each layer but the last, normed last
    save_tensors(out / f"{name}.safetensors", {"logits": plain.logits[0], "hidden_states": states, "chunk_rows": chunk_rows,
                                               "mixed_logits": model(inputs_embeds=mixed.unsqueeze(0)).logits[0]})
    write_json(out / f"{name}.json", {"ids": ids, "source": source, "greedy": greedy(model, embed(model, ids, chunk_rows), 12, name),
                                      "mixed_greedy": greedy(model, mixed, 12, name)})
    print(f"{name}: logits of standard deviation {plain.logits.std():.2f}")


def make_llama(out):
    base = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=56, vocab_size=96,
                max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
    default_rope = {"rope_theta": 10000.0, "rope_type": "default"}

    llama2 = LlamaForCausalLM(LlamaConfig(**base, rms_norm_eps=1e-5, rope_parameters=default_rope))
    randomize(llama2, 3, torch.float32)
    tensors = weights_of(llama2)
    for i in range(2):  # older checkpoints carry the table
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    save_config(out / "llama2", llama2.config, old_spelling=True)
    save_tensors(out / "llama2/model.safetensors", tensors)
    llama_golden(out, "llama2", llama2, 13)

    grouped = {**base, "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    llama3 = LlamaForCausalLM(LlamaConfig(**grouped, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE))
    randomize(llama3, 4, torch.float32, embed_std=0.3)  # a tied head would else repeat each token for ever
    save_config(out / "llama3", llama3.config)
    save_sharded(out / "llama3", weights_of(llama3))
    llama_golden(out, "llama3", llama3, 14)

    linear_rope = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    biased = {**base, "num_attention_heads": 4, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
    bias = LlamaForCausalLM(LlamaConfig(**biased, rope_parameters=linear_rope))
    randomize(bias, 5, torch.bfloat16)
    save_config(out / "llama-bias", bias.config, old_spelling=True)
    save_tensors(out / "llama-bias/model.safetensors", {n.removeprefix("model."): t for n, t in weights_of(bias).items()},
                 torch.bfloat16)
    llama_golden(out, "llama-bias", bias, 15)


# ---- a whole REFRAG model -------------------------------------------------------------------------------------------

K = 8
D_ENC, D_DEC, D_POLICY, H_POLICY, POLICY_HEADS = 32, 40, 24, 40, 2
PASSAGES = [
    {"id": "lamp", "title": "The lamp room", "text": "The keeper lights the lamp at dusk. Its beam turns once in twelve seconds."},
    {"id": "log", "text": "Storm, 3 April: waves over the gallery; the café’s boat is safe — 漁船 too."},
    {"id": "oil", "title": "", "text": "Oil: 40 casks."},
    {"id": "stairs", "title": "Stairs", "text": "There are 217 steps from the door to the lamp, and the keeper counts them aloud."},
]
QUESTION = "How many steps are there to the lamp?"
TEMPLATE = {"before": "Passages:\n", "passage_prefix": "- ", "passage_suffix": "\n", "question_prefix": "Question: ",
            "question_suffix": "\nAnswer:"}


def make_tokenizer():
    """Byte-level BPE of 320 pieces: four specials, 256 bytes and the merges that the passages themselves suggest."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [p["text"] for p in PASSAGES] + [QUESTION, *TEMPLATE.values()]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIALS, min_frequency=1,
                                                             initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                                             show_progress=False))
    assert tokenizer.get_vocab_size() == 320
    return tokenizer


def random_heads(shapes, seed, dtype, gains):
    """Weights [out, in] of standard deviation gain / sqrt(in); norms about 1; biases small."""
    generator = torch.Generator().manual_seed(seed)
    heads = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            noise = noise * gains.get(name, 1.0) / math.sqrt(shape[1])
        elif "norm" in name and name.endswith("weight"):
            noise = 1.0 + 0.2 * noise
        else:
            noise = 0.3 * noise
        heads[name] = noise.to(dtype).float()
    return heads


def policy_shapes(n_layers, sees_question):
    d, h = D_POLICY, H_POLICY
    shapes = {"in_proj.weight": (d, D_ENC), "in_proj.bias": (d,)}
    for i in range(n_layers):
        for norm in ("norm1", "norm2"):
            shapes |= {f"layers.{i}.{norm}.weight": (d,), f"layers.{i}.{norm}.bias": (d,)}
        for name, rows, cols in (("q", d, d), ("k", d, d), ("v", d, d), ("o", d, d), ("fc1", h, d), ("fc2", d, h)):
            shapes |= {f"layers.{i}.{name}.weight": (rows, cols), f"layers.{i}.{name}.bias": (rows,)}
    shapes |= {"norm.weight": (d,), "norm.bias": (d,), "head.weight": (1, d), "head.bias": (1,)}
    return shapes | ({"question_type": (d,)} if sees_question else {})


def policy_forward(w, n_layers, n_heads, chunks, question=None, eps=1e-5):
    """Logits [L]: a pre-norm transformer over chunks at 0 .. L-1 and question pieces at L, L+1, ..."""
    linear = lambda name, x: F.linear(x, w[name + ".weight"], w[name + ".bias"])
    norm = lambda name, x: F.layer_norm(x, (D_POLICY,), w[name + ".weight"], w[name + ".bias"], eps)
    x = linear("in_proj", chunks)
    if question is not None and len(question) > 0:
        x = torch.cat([x, linear("in_proj", question) + w["question_type"]])
    angle = torch.arange(len(x)).double()[:, None] / 10000.0 ** (torch.arange(0, D_POLICY, 2).double() / D_POLICY)
    x = x + torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(len(x), D_POLICY).float()
    heads = lambda t: t.reshape(len(x), n_heads, -1).transpose(0, 1)
    for i in range(n_layers):
        h = norm(f"layers.{i}.norm1", x)
        q, k, v = (heads(linear(f"layers.{i}.{name}", h)) for name in "qkv")
        weights = (q @ k.transpose(1, 2) / math.sqrt(D_POLICY / n_heads)).softmax(-1)
        x = x + linear(f"layers.{i}.o", (weights @ v).transpose(0, 1).reshape(len(x), D_POLICY))
        x = x + linear(f"layers.{i}.fc2", F.gelu(linear(f"layers.{i}.fc1", norm(f"layers.{i}.norm2", x))))
    return linear("head", norm("norm", x))[: len(chunks), 0]


def pieces(ids, k):
    return [ids[i : i + k] for i in range(0, len(ids), k)]


def build_prompt(tokenizer):
    """Segments in the input's order, BOS first, and the chunks of all passages."""
    plain = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    segments, chunks = [{"kind": "bos", "ids": [BOS]}, {"kind": "template", "ids": plain(TEMPLATE["before"])}], []
    for number, passage in enumerate(PASSAGES):
        text = passage["title"] + "\n" + passage["text"] if passage.get("title") else passage["text"]
        ids = plain(text)
        segments += [{"kind": "template", "ids": plain(TEMPLATE["passage_prefix"])},
                     {"kind": "passage", "passage": number, "ids": ids},
                     {"kind": "template", "ids": plain(TEMPLATE["passage_suffix"])}]
        chunks += [{"passage": number, "ids": piece} for piece in pieces(ids, K)]
    segments += [{"kind": "template", "ids": plain(TEMPLATE["question_prefix"])}, {"kind": "question", "ids": plain(QUESTION)},
                 {"kind": "template", "ids": plain(TEMPLATE["question_suffix"])}]
    return segments, chunks


def mixed_source(segments, chunks, expanded):
    """The decoder's rows: ids, and -1 - i for compressed chunk i."""
    source, following = [], iter(range(len(chunks)))
    for segment in segments:
        if segment["kind"] != "passage":
            source += segment["ids"]
            continue
        for piece in pieces(segment["ids"], K):
            i = next(following)
            source += piece if i in expanded else [-1 - i]
    return source


def make_tiny_refrag(model_dir, out):
    tokenizer = make_tokenizer()
    tokenizer_json = json.loads(tokenizer.to_str())
    encoder = RobertaModel(RobertaConfig(vocab_size=320, hidden_size=D_ENC, num_attention_heads=2, num_hidden_layers=2,
                                         intermediate_size=56, max_position_embeddings=40, type_vocab_size=1,
                                         layer_norm_eps=1e-5), add_pooling_layer=False)
    randomize(encoder, 6, torch.float16)
    decoder = LlamaForCausalLM(LlamaConfig(vocab_size=320, hidden_size=D_DEC, num_hidden_layers=2, num_attention_heads=4,
                                           num_key_value_heads=2, head_dim=16, intermediate_size=64, rms_norm_eps=1e-5,
                                           max_position_embeddings=512, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=1,
                                           rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}))
    randomize(decoder, 7, torch.bfloat16)
    projector_shapes = {"fc1.weight": (D_DEC, D_ENC), "fc1.bias": (D_DEC,), "fc2.weight": (D_DEC, D_DEC), "fc2.bias": (D_DEC,)}
    # A normalised chunk embedding has entries of about 1 / sqrt(D_ENC): the gain makes up for it.
    projector = random_heads(projector_shapes, 8, torch.float32, {"fc1.weight": 4.0})
    gains = {"in_proj.weight": 5.0, "head.weight": 2.0}
    policy = random_heads(policy_shapes(2, True), 9, torch.bfloat16, gains)

    save_config(model_dir / "encoder", encoder.config)
    save_tensors(model_dir / "encoder/model.safetensors", encoder.state_dict(), torch.float16)
    save_config(model_dir / "decoder", decoder.config)
    save_tensors(model_dir / "decoder/model.safetensors", weights_of(decoder), torch.bfloat16)
    save_tensors(model_dir / "projector.safetensors", projector)
    save_tensors(model_dir / "policy.safetensors", policy, torch.bfloat16)
    for side in ("encoder", "decoder"):
        write_json(model_dir / side / "tokenizer.json", tokenizer_json)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(model_dir / "decoder/tokenizer_config.json",
               {"add_bos_token": True, "add_eos_token": False, **special, "tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(model_dir / "decoder/generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 1})
    policy_json = {"n_layers": 2, "n_heads": POLICY_HEADS, "dim": D_POLICY, "hidden_dim": H_POLICY, "norm_eps": 1e-5,
                   "sees_question": True}
    refrag_json = {"format": 1, "chunk_len": K, "chunk_lens": [4, K], "chunk_unit": "decoder_tokens",
                   "encoder": {"vocabulary": "shared", "special_tokens": True, "pooling": "mean", "normalize": True},
                   "projector": {"activation": "gelu"}, "policy": policy_json, "expand_fraction": 0.25, "template": TEMPLATE,
                   "segment_order": ["passages", "question"]}
    write_json(model_dir / "refrag.json", refrag_json)

    # ---- what it must compute ----
    segments, chunks = build_prompt(tokenizer)
    question_pieces = pieces(next(s["ids"] for s in segments if s["kind"] == "question"), K)

    def encode(ids):
        return F.normalize(encoder(torch.tensor([[BOS] + ids + [EOS]])).last_hidden_state[0].mean(0), dim=0, eps=1e-12)

    chunk_emb = torch.stack([encode(c["ids"]) for c in chunks])
    question_emb = torch.stack([encode(p) for p in question_pieces])
    chunk_rows = F.linear(F.gelu(F.linear(chunk_emb, projector["fc1.weight"], projector["fc1.bias"])),
                     projector["fc2.weight"], projector["fc2.bias"])
    logits = policy_forward(policy, 2, POLICY_HEADS, chunk_emb, question_emb)
    outputs = {"chunk_emb": chunk_emb, "question_emb": question_emb, "chunk_rows": chunk_rows, "policy_logits": logits,
               "policy_logits_no_question": policy_forward(policy, 2, POLICY_HEADS, chunk_emb)}
    n_some = max(1, math.floor(0.25 * len(chunks) + 0.5))
    ranked = logits.sort(descending=True).values
    assert ranked[n_some - 1] - ranked[n_some] > 0.01, "a near tie where the policy's choice ends: choose another seed"
    modes = {"none": [], "some": sorted(logits.topk(n_some).indices.tolist()), "all": list(range(len(chunks)))}
    expectations = {}
    for mode, expanded in modes.items():
        source = mixed_source(segments, chunks, expanded)
        rows = embed(decoder, source, chunk_rows)
        outputs[f"logits_{mode}"] = decoder(inputs_embeds=rows.unsqueeze(0)).logits[0, -4:]  # the last 4 rows
        expectations[mode] = {"expanded": expanded, "source": source, "greedy": greedy(decoder, rows, 8, mode)}
    save_tensors(out / "tiny-refrag.safetensors", outputs)
    write_json(out / "tiny-refrag.json", {"passages": PASSAGES, "question": QUESTION, "segments": segments, "chunks": chunks,
                                          "question_pieces": question_pieces, "modes": expectations})

    # A policy that does not see the question, deeper and with other heads, in the same layout.
    plain = random_heads(policy_shapes(3, False), 10, torch.float16, gains)
    save_tensors(out / "policy-plain/policy.safetensors", plain, torch.float16)
    write_json(out / "policy-plain/refrag.json",
               {**refrag_json, "policy": {**policy_json, "n_layers": 3, "n_heads": 4, "norm_eps": 1e-3, "sees_question": False}})
    save_tensors(out / "policy-plain.safetensors", {"policy_logits": policy_forward(plain, 3, 4, chunk_emb, eps=1e-3)})
    print(f"tiny-refrag: {len(chunks)} chunks, policy logits of standard deviation {logits.std():.2f},"
          f" decoder logits of {outputs['logits_some'].std():.2f}, expanded {modes['some']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tests/golden"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    networks, tiny = args.out / "networks", args.out / "tiny-refrag"
    for folder in (networks, tiny):
        shutil.rmtree(folder, ignore_errors=True)
    make_roberta(networks)
    make_llama(networks)
    make_tiny_refrag(tiny, networks)


if __name__ == "__main__":
    main()
