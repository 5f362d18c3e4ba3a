#!/usr/bin/env python3
"""REFRAG from a passage to an answer in NumPy: read it beside the paper (arXiv 2509.01092), section 2 and appendix A.1.

For teaching and auditing. It is slow, in double precision, one request at a time, and refuses what it does not compute:
byte-level BPE shared by both sides, RoBERTa, LLaMA without RoPE scaling or biases, greedy decoding.
tests/test_reference.cpp holds the runtime to it: token for token, and to 1e-4 on logits.

    python3 weights_tools/reference.py -m weights_tools/refrag-nano --passages bench/demo/passages.jsonl -q "How long is the Urvik?"
"""
import argparse, glob, json, math, re, sys, unicodedata
import numpy as np


# ---- files: safetensors is 8 bytes of header length, a JSON header, then the tensors' bytes ---------------------------
def read_tensors(pattern):
    tensors = {}
    for path in sorted(glob.glob(pattern)):
        data = open(path, "rb").read()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, t in json.loads(data[8:start]).items():
            if name == "__metadata__":
                continue
            raw = data[start + t["data_offsets"][0] : start + t["data_offsets"][1]]
            if t["dtype"] == "BF16":  # the upper half of a float32
                values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
            else:
                values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[t["dtype"]])
            tensors[re.sub(r"^(model|roberta)\.", "", name)] = values.reshape(t["shape"]).astype(np.float64)
    return tensors


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def need(condition, what):
    if not condition:
        sys.exit(f"reference.py does not compute this: {what}")


# ---- tokenise: byte-level BPE with GPT-2's words -----------------------------------------------------------------------
class Tokenizer:
    """A word's bytes, written as printable characters, are joined pair by pair: the pair that training joined first comes first."""

    def __init__(self, path):
        spec = read_json(path)
        model, before = spec["model"], spec["pre_tokenizer"]
        need(before and before["type"] == "ByteLevel" and before.get("use_regex", True) and not before["add_prefix_space"]
             and not spec["normalizer"], f"{path} is not plain byte-level BPE")
        self.vocab = model["vocab"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.special = {t["content"]: t["id"] for t in spec["added_tokens"]}
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves; the others follow 255
        hidden = [b for b in range(256) if b not in shown]
        self.char = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
        self.piece = {i: piece for piece, i in self.vocab.items()}

    def words(self, text):
        """'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+, on each character's class."""
        def kind(c):
            if c in "\t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" or "\u2000" <= c <= "\u200a":
                return "s"
            return c if c == " " else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "p")
        kinds, at = "".join(map(kind, text)), 0
        contraction, word = re.compile("'(?:s|t|re|ve|m|ll|d)"), re.compile(" ?L+| ?N+| ?p+|[ s]+(?![^ s])|[ s]+")
        while at < len(text):
            end = (contraction.match(text, at) or word.match(kinds, at)).end()
            yield text[at:end]
            at = end

    def encode(self, text, special=False):
        """Ids. In a template piece a special token's spelling is the token (special=True), elsewhere it is ordinary text."""
        if special and self.special:
            parts = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text)
            return [i for p in parts for i in ([self.special[p]] if p in self.special else self.encode(p))]
        ids = []
        for word in self.words(text):
            pieces = [self.char[b] for b in word.encode("utf-8")]
            while len(pieces) > 1:
                pairs = list(zip(pieces, pieces[1:]))
                best = min(pairs, key=lambda pair: self.rank.get(pair, math.inf))
                if best not in self.rank:
                    break
                i = pairs.index(best)
                pieces[i : i + 2] = [best[0] + best[1]]
            ids += [self.vocab[p] for p in pieces]
        return ids

    def decode(self, ids):
        byte = {c: b for b, c in self.char.items()}
        text = bytes(byte[c] for i in ids if i not in self.special.values() for c in self.piece[i])
        return text.decode("utf-8", errors="replace")


# ---- what every network is made of -------------------------------------------------------------------------------------
def linear(w, name, x):
    y = x @ w[name + ".weight"].T
    return y + w[name + ".bias"] if name + ".bias" in w else y


def layer_norm(w, name, x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name + ".weight"] + w[name + ".bias"]


def rms_norm(weight, x, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(q, k, v, causal=False):
    """q [rows, heads, d], k and v [entries, kv heads, d]; the last row sees the last entry. -> [rows, heads * d]"""
    group = q.shape[1] // k.shape[1]  # query heads that share one KV head
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("rhd,ehd->hre", q, k) / math.sqrt(q.shape[2])
    if causal:
        row, entry = np.ogrid[: len(q), : len(k)]
        scores = np.where(entry > row + len(k) - len(q), -np.inf, scores)
    return np.einsum("hre,ehd->rhd", softmax(scores), v).reshape(len(q), -1)


# ---- compress: M_enc maps each chunk by itself to one vector c_i, phi carries it into the decoder's space ----------------
class Encoder:
    def __init__(self, path, rule):
        self.w, self.config, self.rule = read_tensors(path + "/*.safetensors"), read_json(path + "/config.json"), rule
        need(self.config["hidden_act"] == "gelu", "an encoder without gelu")

    def __call__(self, chunk_ids):
        """c_i [d_enc] of one chunk's ids."""
        w, c = self.w, self.config
        ids = [c["bos_token_id"], *chunk_ids, c["eos_token_id"]] if self.rule["special_tokens"] else chunk_ids
        first = c["pad_token_id"] + 1  # RoBERTa counts positions from here
        e = "embeddings."
        x = w[e + "word_embeddings.weight"][ids] + w[e + "token_type_embeddings.weight"][0]
        x = layer_norm(w, e + "LayerNorm", x + w[e + "position_embeddings.weight"][first : first + len(ids)], c["layer_norm_eps"])
        for i in range(c["num_hidden_layers"]):
            n = f"encoder.layer.{i}."
            q, k, v = (linear(w, f"{n}attention.self.{part}", x).reshape(len(ids), c["num_attention_heads"], -1)
                       for part in ("query", "key", "value"))
            x = layer_norm(w, n + "attention.output.LayerNorm", x + linear(w, n + "attention.output.dense", attention(q, k, v)),
                           c["layer_norm_eps"])
            y = linear(w, n + "output.dense", gelu(linear(w, n + "intermediate.dense", x)))
            x = layer_norm(w, n + "output.LayerNorm", x + y, c["layer_norm_eps"])
        pooled = {"mean": x.mean(0), "cls": x[0]}.get(self.rule["pooling"])
        if pooled is None:
            pooled = np.tanh(linear(w, "pooler.dense", x[0]))
        return pooled / max(np.linalg.norm(pooled), 1e-12) if self.rule["normalize"] else pooled


def project(w, c):
    return linear(w, "fc2", gelu(linear(w, "fc1", c)))  # e_i = phi(c_i), B.2


# ---- sense: pi_theta, a two-layer transformer over the chunk embeddings, gives each chunk a logit ----------------------
def policy_logits(w, config, chunks, question):
    """chunks [L, d_enc]; question [pieces, d_enc], which count in no L. -> s [L]"""
    D, eps = config["dim"], config["norm_eps"]
    x = linear(w, "in_proj", np.concatenate([chunks, question]) if config["sees_question"] else chunks)
    if config["sees_question"]:
        x[len(chunks) :] += w["question_type"]
    angle = np.arange(len(x))[:, None] / 10000.0 ** (np.arange(0, D, 2) / D)
    x += np.stack([np.sin(angle), np.cos(angle)], -1).reshape(len(x), D)
    for i in range(config["n_layers"]):
        n = f"layers.{i}."
        h = layer_norm(w, n + "norm1", x, eps)
        q, k, v = (linear(w, n + part, h).reshape(len(x), config["n_heads"], -1) for part in "qkv")
        x = x + linear(w, n + "o", attention(q, k, v))
        x = x + linear(w, n + "fc2", gelu(linear(w, n + "fc1", layer_norm(w, n + "norm2", x, eps))))
    return linear(w, "head", layer_norm(w, "norm", x, eps))[: len(chunks), 0]


def choose(s, p):
    """T' = pL chunks one after another without replacement: pi(l_t = i) = softmax(s - n)_i, n infinite where already picked."""
    wanted = 0 if p == 0 else len(s) if p == 1 else min(len(s), max(1, math.floor(p * len(s) + 0.5)))
    picked = []
    while len(picked) < wanted:
        n = np.array([math.inf if i in picked else 0.0 for i in range(len(s))])
        picked.append(int(np.argmax(s - n)))  # greedy; of equal logits the lower index
    return picked


# ---- decode: a plain causal LLaMA over the mixed rows ------------------------------------------------------------------
class Decoder:
    def __init__(self, path):
        self.w, self.config = read_tensors(path + "/*.safetensors"), read_json(path + "/config.json")
        c = self.config
        rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 10000.0), "rope_type": "default"}
        need(rope["rope_type"] == "default" and not c.get("rope_scaling"), "RoPE scaling")
        need(c["hidden_act"] == "silu" and not c.get("attention_bias") and not c.get("mlp_bias"), "a decoder with biases")
        self.head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        self.inv_freq = rope["rope_theta"] ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        self.embedding = self.w["embed_tokens.weight"]
        self.head = self.embedding if c["tie_word_embeddings"] else self.w["lm_head.weight"]
        self.kv = [(np.zeros((0, c["num_key_value_heads"], self.head_dim)),) * 2 for _ in range(c["num_hidden_layers"])]

    def rope(self, x, position):
        angle = position[:, None, None] * np.concatenate([self.inv_freq, self.inv_freq])
        a, b = np.split(x, 2, axis=-1)
        return x * np.cos(angle) + np.concatenate([-b, a], -1) * np.sin(angle)

    def __call__(self, x):
        """Rows [n, d_dec] that follow those seen before. Their keys and values are kept. -> logits after the last row."""
        w, c, eps = self.w, self.config, self.config["rms_norm_eps"]
        position = len(self.kv[0][0]) + np.arange(len(x))  # 0, 1, 2, ... over the mixed sequence
        for i in range(c["num_hidden_layers"]):
            n = f"layers.{i}."
            h = rms_norm(w[n + "input_layernorm.weight"], x, eps)
            q, k, v = (linear(w, f"{n}self_attn.{part}_proj", h).reshape(len(x), -1, self.head_dim) for part in "qkv")
            keys = np.concatenate([self.kv[i][0], self.rope(k, position)])
            values = np.concatenate([self.kv[i][1], v])
            self.kv[i] = keys, values
            x = x + linear(w, n + "self_attn.o_proj", attention(self.rope(q, position), keys, values, causal=True))
            h = rms_norm(w[n + "post_attention_layernorm.weight"], x, eps)
            gate = linear(w, n + "mlp.gate_proj", h)
            x = x + linear(w, n + "mlp.down_proj", gate / (1 + np.exp(-gate)) * linear(w, n + "mlp.up_proj", h))
        return self.head @ rms_norm(w["norm.weight"], x[-1], eps)


# ---- the whole: question and passages in, answer out -------------------------------------------------------------------
def answer(directory, passages, question, k=None, p=None, n_predict=256, n_top=5):
    rule = read_json(directory + "/refrag.json")
    need(rule["encoder"]["vocabulary"] == "shared", "an encoder with a vocabulary of its own")
    k, p = k or rule["chunk_len"], rule["expand_fraction"] if p is None else p
    tokenizer = Tokenizer(directory + "/decoder/tokenizer.json")
    encoder, decoder = Encoder(directory + "/encoder", rule["encoder"]), Decoder(directory + "/decoder")
    heads = {name: read_tensors(f"{directory}/{name}.safetensors") for name in ("projector", "policy")}
    piece = {name: tokenizer.encode(text, special=True) for name, text in rule["template"].items()}

    def cut(ids):  # chunks of k tokens; the last one is shorter
        return [ids[i : i + k] for i in range(0, len(ids), k)]

    def tokens(ids):
        return list(decoder.embedding[ids])

    # Compress and sense. No chunk crosses a passage; the question's pieces are sensed beside them.
    chunks = [cut(tokenizer.encode(f"{d['title']}\n{d['text']}" if d.get("title") else d["text"])) for d in passages]
    flat = [ids for of_passage in chunks for ids in of_passage]
    need(flat and question, "a request without passages or without a question")
    c = np.array([encoder(ids) for ids in flat])
    c_question = np.array([encoder(ids) for ids in cut(tokenizer.encode(question))])
    s = policy_logits(heads["policy"], rule["policy"], c, c_question)
    expanded = set(choose(s, p))

    # Expand. The mixed rows keep the order of the context: k token embeddings for an expanded chunk, one e_i for another.
    context, index = [], 0
    for of_passage in chunks:
        context += tokens(piece["passage_prefix"])
        for ids in of_passage:
            context += tokens(ids) if index in expanded else [project(heads["projector"], c[index])]
            index += 1
        context += tokens(piece["passage_suffix"])
    asked = tokens(piece["question_prefix"] + tokenizer.encode(question) + piece["question_suffix"])
    settings = read_json(directory + "/decoder/tokenizer_config.json")
    need("add_bos_token" in settings, "tokenizer_config.json without add_bos_token")
    rows = tokens([decoder.config["bos_token_id"]] * settings["add_bos_token"] + piece["before"])
    rows += context + asked if rule["segment_order"][0] == "passages" else asked + context

    # Decode: the prompt's rows, then one token after another.
    ends = read_json(directory + "/decoder/generation_config.json")["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    ids, steps, x = [], [], np.array(rows)
    while len(ids) < n_predict:
        logits = decoder(x)
        logprobs = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        best = np.argsort(-logprobs, kind="stable")[: n_top]
        if best[0] in ends:
            break
        ids.append(int(best[0]))
        steps.append([{"id": int(i), "logprob": float(logprobs[i])} for i in best])
        x = decoder.embedding[ids[-1:]]
    text = tokenizer.decode(ids)
    return {"answer": text[1:] if text.startswith(" ") else text, "ids": ids, "positions": len(rows),
            "chunks": [{"ids": ids, "logit": float(s[i]), "expanded": i in expanded} for i, ids in enumerate(flat)],
            "logprobs": steps}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--passages", required=True, help='JSON Lines of {"title", "text"}')
    parser.add_argument("-q", "--question", required=True)
    parser.add_argument("-k", "--chunk-len", type=int)
    parser.add_argument("-p", "--expand-fraction", type=float)
    parser.add_argument("-n", "--n-predict", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="chunks with ids and logits, and log-probabilities, too")
    args = parser.parse_args()
    with open(args.passages, encoding="utf-8") as file:
        passages = [json.loads(line) for line in file if line.strip()]
    result = answer(args.model, passages, args.question, args.chunk_len, args.expand_fraction, args.n_predict)
    if args.json:
        return print(json.dumps(result))
    print(result["answer"])
    chosen = [i for i, chunk in enumerate(result["chunks"]) if chunk["expanded"]]
    print("chunks", len(result["chunks"]), "| expanded", *chosen, "| decoder positions", result["positions"], file=sys.stderr)


if __name__ == "__main__":
    main()
