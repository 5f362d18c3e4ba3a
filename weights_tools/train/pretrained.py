"""The four networks around a decoder and an encoder that exist already: [decoder] path and [encoder] path name Hugging Face
directories (config.json, safetensors, tokenizer.json), each side with its own vocabulary.

The decoder is whatever AutoModelForCausalLM makes of its config.json, as long as it has `model.embed_tokens`, `model.layers` and
`lm_head` (LLaMA, Mistral, Qwen2, Qwen3); the runtime itself reads llama and mistral. The encoder is a RoBERTa. Weights are read
from disk row by row and held in fp32; under FSDP a process reads the rows of its own shard and no others.
"""
import contextlib
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, RobertaModel

from weights_tools.shards import open_weights

from .model import Refrag, chunked

SPACE = "\u2581"  # how SentencePiece's vocabularies spell a space


# ---- chunks of one vocabulary in another ----------------------------------------------------------------------------

def byte_alphabet():
    """{the printable character of a byte-level vocabulary: the byte}"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def components(node):
    """Every {"type": ...} table of a tokenizer.json's component, sequences opened."""
    if isinstance(node, dict):
        yield node
        for key in ("normalizers", "pretokenizers", "decoders", "processors"):
            for inner in node.get(key) or []:
                yield from components(inner)


class Pieces:
    """What each id of a tokenizer.json stands for, in bytes: byte-level BPE, or pieces with U+2581 for a space and <0xNN> for bytes.

    bytes_of[id]: special tokens are no text and give b"". adds_space: a space that is not in the text comes before its first word."""

    def __init__(self, path):
        path = Path(path)
        table = json.loads(path.read_text(encoding="utf-8"))
        used = {c["type"]: c for part in ("normalizer", "pre_tokenizer", "decoder") for c in components(table.get(part))}
        kind = table["model"].get("type", "BPE" if "merges" in table["model"] else "no BPE")  # old files leave it out
        if kind != "BPE" or not ({"ByteLevel", "ByteFallback", "Metaspace"} & used.keys()):
            raise ValueError(f"{path}: expected byte-level BPE or BPE with byte fallback, found {kind} with {', '.join(sorted(used)) or 'nothing'}")
        vocab = table["model"]["vocab"]
        added = {t["id"]: t for t in table.get("added_tokens") or []}
        self.bytes_of = [b""] * (1 + max([*vocab.values(), *added]))
        if "ByteLevel" in used:
            alphabet = byte_alphabet()
            for piece, i in vocab.items():
                if i not in added:
                    self.bytes_of[i] = bytes(alphabet[c] for c in piece)
            pre = [c for c in components(table.get("pre_tokenizer")) if c["type"] == "ByteLevel"]
            self.adds_space = any(c.get("add_prefix_space") for c in pre)
        else:
            for piece, i in vocab.items():
                is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
                self.bytes_of[i] = bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()
            self.adds_space = "Prepend" in used or used.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        for i, token in added.items():
            self.bytes_of[i] = b"" if token["special"] else token["content"].encode()


def chunk_texts(pieces, k):
    """pieces: the bytes of a run of tokens, in order -> for each k of them the characters whose first byte is among its bytes.

    A character that began before the run is no chunk's, one that ends after it is left out: neither is known."""
    texts, data = [], b"".join(pieces)
    ends = np.cumsum([len(p) for p in pieces])
    is_first = [b & 0xC0 != 0x80 for b in data]
    for back in range(1, min(3, len(data)) + 1):  # a character cut off at the end
        if is_first[-back]:
            if 1 + (data[-back] >= 0xC0) + (data[-back] >= 0xE0) + (data[-back] >= 0xF0) > back:
                data = data[:-back]
            break
    begin = 0
    while begin < len(data) and not is_first[begin]:
        begin += 1
    for last in range(k, len(pieces) + k, k):
        end = max(min(int(ends[min(last, len(pieces)) - 1]), len(data)), begin)
        while end < len(data) and not is_first[end]:  # the rest of the last character
            end += 1
        texts.append(data[begin:end])
        begin = end
    return [t.decode("utf-8", errors="replace") for t in texts]


class Cutter:
    """(decoder ids, k) -> chunks that carry their encoder ids (weights_tools/README.md): the encoder's tokenizer reads a chunk's text alone.

    A list is a whole segment (a passage, a question), whose first token may begin with a space that is not in the text; an array
    is a piece out of the middle of one. (Where the tokenizer adds no second space to a text that begins with one, ids do not tell the
    two apart, and such a text loses its first space here; where it normalises text to NFC or NFKC, the chunk is the normalised text.)
    Chunks of more than max_ids encoder ids are cut off: the runtime refuses those."""

    def __init__(self, decoder_tokenizer, encoder_tokenizer, max_ids):
        self.pieces, self.max_ids = Pieces(decoder_tokenizer), max_ids
        self.encoder = Tokenizer.from_file(str(encoder_tokenizer))
        self.encoder.encode_special_tokens = True
        self.encoder.no_padding()
        self.encoder.no_truncation()

    def texts(self, ids, k):
        pieces = [self.pieces.bytes_of[int(i)] for i in ids]
        if pieces and self.pieces.adds_space and not isinstance(ids, np.ndarray):
            pieces[0] = pieces[0].removeprefix(b" ")
        return chunk_texts(pieces, k)

    def __call__(self, ids, k):
        chunks = chunked(ids, k)
        for chunk, e in zip(chunks, self.encoder.encode_batch(self.texts(ids, k), add_special_tokens=False)):
            chunk.encoder = e.ids[: self.max_ids]
        return chunks


# ---- the networks ---------------------------------------------------------------------------------------------------

def beginning(folder, config, end):
    """The id every row begins with: the rule of the runtime (weights_tools/README.md), or where it finds none the end token."""
    path = Path(folder) / "tokenizer_config.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tokenizer = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    first = None
    for processor in components(tokenizer.get("post_processor")):
        if processor["type"] == "TemplateProcessing" and processor["single"] and "SpecialToken" in processor["single"][0]:
            first = processor["special_tokens"][processor["single"][0]["SpecialToken"]["id"]]["ids"][0]
            break
    if not table.get("add_bos_token", first is not None):
        return end
    if first is None:
        word = table.get("bos_token")
        word = word.get("content") if isinstance(word, dict) else word
        first = next((t["id"] for t in tokenizer.get("added_tokens", []) if t["content"] == word), config.bos_token_id)
    return end if first is None else first


def first_end(folder, config):
    """The first end token, of generation_config.json or config.json."""
    path = Path(folder) / "generation_config.json"
    ends = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    ends = config.eos_token_id if ends is None else ends
    return ends[0] if isinstance(ends, (list, tuple)) else ends


@contextlib.contextmanager
def no_memory_for_parameters():
    """Parameters made inside are on the meta device; buffers are real. Initialisation costs nothing."""
    register = nn.Module.register_parameter

    def on_meta(module, name, param):
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def give_memory(module):
    """Meta parameters -> fp32 ones without values, tied ones tied. Memory that is never written takes no room."""
    made = {}
    for m in module.modules():
        for name, p in list(m._parameters.items()):
            if p is not None and p.device.type == "meta":
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=torch.float32))
                m._parameters[name] = made[id(p)]
    return module


class PretrainedRefrag(Refrag):
    """cfg["encoder"] beside `path`: pooling ("mean"), normalize (false), special_tokens (true), vocabulary ("own")."""

    def __init__(self, cfg):
        d, e = cfg["decoder"], cfg["encoder"]
        self.pooling, self.normalize, self.special_tokens = e.get("pooling", "mean"), e.get("normalize", False), e.get("special_tokens", True)
        config, encoder_config = AutoConfig.from_pretrained(d["path"]), AutoConfig.from_pretrained(e["path"])
        if encoder_config.model_type not in ("roberta", "xlm-roberta"):
            raise ValueError(f"{e['path']}: expected a RoBERTa, found {encoder_config.model_type}")
        encoder_config.hidden_dropout_prob = encoder_config.attention_probs_dropout_prob = 0.0
        with no_memory_for_parameters():
            decoder = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
            encoder_config._attn_implementation = "sdpa"
            encoder = RobertaModel(encoder_config, add_pooling_layer=self.pooling == "pooler")
        decoder.tie_weights()
        pooling = self.pooling, self.normalize, self.special_tokens
        super().__init__(cfg, give_memory(decoder), give_memory(encoder))
        self.pooling, self.normalize, self.special_tokens = pooling
        self.eos = first_end(d["path"], config)
        self.bos = beginning(d["path"], config, self.eos)
        self.encoder_bos, self.encoder_pad, self.encoder_eos = encoder_config.bos_token_id, encoder_config.pad_token_id, encoder_config.eos_token_id
        if e.get("vocabulary", "own") == "own":
            room = encoder_config.max_position_embeddings - self.encoder_pad - 1 - 2 * self.special_tokens
            self.cut = Cutter(Path(d["path"]) / "tokenizer.json", Path(e["path"]) / "tokenizer.json", room)

    def encode(self, chunks):
        """chunks -> chunk_emb [N, d_enc], pooled as the configuration says."""
        rows = [c.encoder if getattr(c, "encoder", None) is not None else c for c in chunks]
        around = int(self.special_tokens)
        ids = np.full((len(rows), max(1, max(map(len, rows)) + 2 * around)), self.encoder_pad)
        for i, row in enumerate(rows):
            ids[i, around : len(row) + around] = row
            if around:
                ids[i, 0], ids[i, len(row) + 1] = self.encoder_bos, self.encoder_eos
        ids = torch.from_numpy(ids).to(self.device)
        keep = ids != self.encoder_pad
        out = self.encode_body[0](ids, attention_mask=None if bool(keep.all()) else keep.long())
        if self.pooling == "mean":
            weight = keep[..., None].to(out.last_hidden_state.dtype)
            c = (out.last_hidden_state * weight).sum(1) / weight.sum(1)
        else:
            c = out.last_hidden_state[:, 0] if self.pooling == "cls" else out.pooler_output
        return nn.functional.normalize(c.float(), dim=-1) if self.normalize else c


def directory_weights(path, side):
    """{our name: Stored} of a Hugging Face directory; side "decoder" or "encoder"."""
    out = {}
    for name, stored in open_weights(path).items():
        name = name.removeprefix("roberta.")
        if side == "decoder" and not name.startswith(("model.", "lm_head.")):
            name = f"model.{name}"
        out[f"{side}.{name}"] = stored
    return out


@torch.no_grad()
def fill(model, weights):
    """Copies what `weights` ({name: Stored}) has into the model's parameters; of a sharded one this process's rows.
    ValueError where a shape differs or a decoder's or encoder's parameter is missing."""
    for name, p in model.named_parameters():
        if name not in weights:
            if name.startswith(("decoder.", "encoder.")):
                raise ValueError(f"{name}: expected it among the weights, found none")
            continue
        stored = weights[name]
        if tuple(p.shape) != stored.shape:
            raise ValueError(f"{name}: expected {list(p.shape)}, found {list(stored.shape)}")
        if isinstance(p, DTensor):
            # FSDP gives each process ceil(rows / processes) rows, the last ones fewer or none.
            size, rank = p.device_mesh.size(), p.device_mesh.get_local_rank()
            share = -(-p.shape[0] // size)
            begin, end = min(rank * share, p.shape[0]), min((rank + 1) * share, p.shape[0])
            if end > begin:
                p.to_local().copy_(stored.read(begin, end))
        else:
            p.copy_(stored.read())


def load_pretrained(cfg, init=None):
    """The model of a stage: its decoder and encoder from [decoder] and [encoder] path, or everything that `init` has from there (what an
    earlier stage left: its folder `weights`, or its last.pt); [run] fresh names networks to take from neither. With sharding "fsdp" the
    weights are read after sharding: model.pending holds them."""
    run = cfg.get("run", {})
    model = PretrainedRefrag(cfg)
    weights = directory_weights(cfg["decoder"]["path"], "decoder") | directory_weights(cfg["encoder"]["path"], "encoder")
    if init:
        weights |= {k: v for k, v in open_weights(init).items() if k.split(".")[0] not in run.get("fresh", [])}
    if run.get("sharding", "none") == "fsdp":
        model.pending = weights
    else:
        fill(model, weights)
    return model
