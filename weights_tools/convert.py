"""Makes a model directory, as `refrag -m` loads it, from what other REFRAG codes save.

    python -m weights_tools.convert --in DIR --out DIR --chunk-len 16 --pooling cls --normalize --special-tokens --activation gelu \\
        --segment-order passages,question --template question_prefix='Question: ' --template question_suffix='\\nAnswer:' --no-policy

What DIR may hold, as public codes were found to write it (November 2026):

  vijai-mohan/Refrag2          encoder/ and decoder/ as save_pretrained writes them (or pytorch_model.bin inside), projector.pt: a state_dict
                               of one linear layer, `weight` [d_dec, d_enc] and `bias`. RoBERTa's pooler output; no policy, no tokenizers.
                               Its chunks are counted in the encoder's tokens, ours in the decoder's.
  khanhtimn/Project-III, v2    decoder/ by save_pretrained, checkpoint.pt: {config, encoder_state_dict (`model.` + RobertaModel's names),
                               projector_state_dict (`projection.0`, `projection.2`, erf GELU between; scalars `scale`, `shift` after them),
                               policy_state_dict, step, ...}. First position, divided by its L2 norm.
  simulanics/REFRAG            encoder.pt (`model.` + RobertaModel's names), projector.pt (`proj.0`, `proj.2`, tanh between), policy.pt
  and its descendants          (`net.0` [hidden, d_enc + 1], `net.2` [1, hidden]), or refrag_full.pt with all of them under `encoder.model.`,
  (fnu-anjali/REFRAG, ...)     `decoder.`, `projector.`, `policy.`. First position, divided by its L2 norm; question before passages.
  n33levo/refrag-lite          *.pt with llm_state_dict and projector_state_dict (three linear layers and LayerNorms); MiniLM as encoder.
  alejandrogarcia-hub/refrag   a projector of one linear layer, `projection.weight`; its encoder and decoder are stock.

What maps is written, what does not is refused:
  * Two linear layers [d_dec, d_enc], [d_dec, d_dec], under any names, with erf GELU between: copied. A state_dict does not say
    which function lies between, so --activation must; any other than gelu is refused, since the format has no other.
  * `scale` and `shift` go into the second layer, which gives the same function.
  * One linear layer W: as x = gelu(x) - gelu(-x) for the erf form, fc1 = [I; -I; 0] and fc2 = [W, -W, 0] give the same function. That
    takes 2 d_enc <= d_dec.
  * A policy only if it is ours under our names (weights_tools/README.md): theirs are two linear layers, or transformers without our
    positions and last norm. --no-policy writes one that prefers no chunk, for the runtime wants a policy.safetensors: with its
    expand_fraction of 0 nothing is expanded, and `refrag --policy random|perplexity-desc ... -p P` works as ever.
  * Encoder and decoder: safetensors files unchanged (hard links where the file system allows), .bin and .pt as safetensors.

Pickles are read with weights_only alone: nothing in them is executed. OUT must not exist; it is written as OUT.tmp and renamed.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 bad input file. Every error is one line.
"""
import argparse
import json
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from weights_tools.shards import entries_of, write_file, write_sharded

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TEMPLATE_KEYS = ("before", "passage_prefix", "passage_suffix", "question_prefix", "question_suffix")
MODEL_TYPES = {"encoder": ("roberta", "xlm-roberta"), "decoder": ("llama", "mistral")}
# Files beside the weights that the runtime reads.
COMPANIONS = ("config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json")


class BadInput(Exception):
    """An input file is not as it must be: where, expected, found."""


class WrongUsage(Exception):
    """The command line is not as it must be."""


# ---- reading --------------------------------------------------------------------------------------------------------

def read_pickle(path):
    """torch.load with weights_only, from disk as needed where the file allows it. Returns what the file holds."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = name[1] if name else "no file of torch.save"
        raise BadInput(f"{path}: expected tensors and plain values alone (a state_dict), found {found}") from None


def read_state(path):
    """{name: tensor} of a state_dict in a .pt file, or of a .safetensors file."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise BadInput(f"{path}: expected a safetensors file, found {error}") from None
    return checked_state(read_pickle(path), path)


def checked_state(state, where):
    for inner in ("state_dict", "model_state_dict", "projector_state_dict", "policy_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(inner), dict):
            state = state[inner]
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) for k in state):
        raise BadInput(f"{where}: expected a state_dict (names and tensors), found {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise BadInput(f"{where}: {name}: expected a dense tensor, found {type(value).__name__}")
    return state


def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: expected JSON, found {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected an object, found {type(value).__name__}")
    return value


def without_prefix(state, prefix):
    return {name[len(prefix):]: t for name, t in state.items() if name.startswith(prefix)}


class Source:
    """What --in holds: the state of each part, wherever it lies. Parts not there are None."""

    def __init__(self, folder):
        self.folder = folder
        self.states = {"encoder": None, "decoder": None, "projector": None, "policy": None}
        self.where = {part: folder / f"{part}.pt" for part in self.states}
        for part in self.states:
            for path in (folder / f"{part}.pt", folder / f"{part}.safetensors", folder / f"{part}.pth"):
                if path.is_file():
                    self.states[part], self.where[part] = read_state(path), path
        if (full := folder / "refrag_full.pt").is_file():
            whole = checked_state(read_pickle(full), full)
            for part in self.states:
                if found := without_prefix(whole, f"{part}."):
                    self.states[part], self.where[part] = found, full
        if (checkpoint := folder / "checkpoint.pt").is_file():
            whole = read_pickle(checkpoint)
            for part in self.states:
                if isinstance(whole, dict) and f"{part}_state_dict" in whole:
                    self.states[part], self.where[part] = checked_state(whole[f"{part}_state_dict"], checkpoint), checkpoint
        for part in ("encoder", "decoder"):
            state = self.states[part]
            for prefix in ("module.", "_orig_mod.", "model." if part == "encoder" else ""):
                if state and prefix and all(name.startswith(prefix) for name in state):
                    state = without_prefix(state, prefix)
            self.states[part] = state


# ---- heads ----------------------------------------------------------------------------------------------------------

def natural(name):
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def shape(tensor):
    return "[" + ", ".join(map(str, tensor.shape)) + "]"


def map_projector(state, where, d_enc, d_dec, activation):
    """Their state_dict as {fc1.weight [d_dec, d_enc], fc1.bias, fc2.weight [d_dec, d_dec], fc2.bias}, the same function."""
    layers, scalars, others = {}, {}, []
    for name, tensor in state.items():
        if tensor.dtype not in (*FLOATS, torch.float64):
            raise BadInput(f"{where}: {name}: expected F32, F16 or BF16, found {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise BadInput(f"{where}: {name}: expected finite numbers, found inf or nan")
        stem, _, kind = name.rpartition(".")
        if kind in ("weight", "bias"):
            layers.setdefault(stem, {})[kind] = tensor
        elif kind in ("scale", "shift") and tensor.numel() == 1:
            scalars[kind] = tensor.reshape(())
        else:
            others.append(name)
    for stem, layer in layers.items():
        if layer.get("weight", torch.zeros(1)).ndim != 2 or ("bias" in layer and layer["bias"].shape != layer["weight"].shape[:1]):
            others.append(f"{stem}.* " + " ".join(f"{kind} {shape(t)}" for kind, t in layer.items()))
    expected = f"expected two linear layers, [{d_dec}, {d_enc}] and [{d_dec}, {d_dec}]"
    if others:
        raise BadInput(f"{where}: {expected}, found beside them {', '.join(sorted(others)[:4])} (a LayerNorm or another module the format has not)")
    stems = sorted(layers, key=natural)
    found = ", ".join(f"{s or 'weight'} {shape(layers[s]['weight'])}" for s in stems)
    wide = {s: {k: t.to(torch.float32) if t.dtype == torch.float64 else t for k, t in layers[s].items()} for s in stems}
    if len(stems) == 1 and list(wide[stems[0]]["weight"].shape) == [d_dec, d_enc]:
        head = linear_as_two(wide[stems[0]], where, d_enc, d_dec)
    elif len(stems) == 2 and [list(wide[s]["weight"].shape) for s in stems] == [[d_dec, d_enc], [d_dec, d_dec]]:
        if activation is None:
            raise WrongUsage("--activation: expected the function between the projector's two layers, found none (a state_dict does not say it)")
        if activation != "gelu":
            raise BadInput(f"{where}: activation: expected gelu (the erf form, the only one of the format), found {activation}")
        zeros = torch.zeros(d_dec, dtype=wide[stems[0]]["weight"].dtype)
        head = {f"fc{i}.{kind}": wide[s].get(kind, zeros) for i, s in enumerate(stems, 1) for kind in ("weight", "bias")}
    else:
        raise BadInput(f"{where}: {expected}, found {found}")
    if scalars:
        scale, shift = (scalars.get(k, torch.tensor(v)).double() for k, v in (("scale", 1.0), ("shift", 0.0)))
        head["fc2.weight"] = (head["fc2.weight"].double() * scale).float()
        head["fc2.bias"] = (head["fc2.bias"].double() * scale + shift).float()
    return head


def linear_as_two(layer, where, d_enc, d_dec):
    """W c + b through a hidden layer of d_dec: W (gelu(c) - gelu(-c)) + b."""
    if 2 * d_enc > d_dec:
        raise BadInput(f"{where}: expected two linear layers, found one; it can be written as two where 2 d_enc <= d_dec, "
                       f"here 2 x {d_enc} > {d_dec}")
    weight = layer["weight"]
    fc1, fc2 = torch.zeros(d_dec, d_enc, dtype=weight.dtype), torch.zeros(d_dec, d_dec, dtype=weight.dtype)
    fc1[:d_enc] = torch.eye(d_enc)
    fc1[d_enc : 2 * d_enc] = -torch.eye(d_enc)
    fc2[:, :d_enc], fc2[:, d_enc : 2 * d_enc] = weight, -weight
    zeros = torch.zeros(d_dec, dtype=weight.dtype)
    return {"fc1.weight": fc1, "fc1.bias": zeros, "fc2.weight": fc2, "fc2.bias": layer.get("bias", zeros)}


def policy_shapes(d_enc, dim, hidden_dim, n_layers, sees_question):
    """{name: shape} of policy.safetensors."""
    shapes = {"in_proj.weight": (dim, d_enc), "in_proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (1, dim),
              "head.bias": (1,)}
    for i in range(n_layers):
        for name, rows, columns in (*((n, dim, dim) for n in "qkvo"), ("fc1", hidden_dim, dim), ("fc2", dim, hidden_dim)):
            shapes |= {f"layers.{i}.{name}.weight": (rows, columns), f"layers.{i}.{name}.bias": (rows,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"layers.{i}.{norm}.weight": (dim,), f"layers.{i}.{norm}.bias": (dim,)}
    return shapes | ({"question_type": (dim,)} if sees_question else {})


def map_policy(state, where, d_enc, n_heads):
    """(tensors, refrag.json's "policy") of a policy that is ours under our names, perhaps behind `policy.`."""
    state = without_prefix(state, "policy.") or state
    refused = f"{where}: expected the policy of weights_tools/README.md (in_proj, layers.0.q, ..., norm, head), found "
    if "in_proj.weight" not in state or "layers.0.fc1.weight" not in state:
        raise BadInput(refused + ", ".join(sorted(state)[:4]) + ", ...; --no-policy leaves it out")
    dim, hidden_dim = state["in_proj.weight"].shape[0], state["layers.0.fc1.weight"].shape[0]
    n_layers = 1 + max(int(m[1]) for name in state if (m := re.match(r"layers\.(\d{1,4})\.", name)))
    shapes = policy_shapes(d_enc, dim, hidden_dim, n_layers, "question_type" in state)
    for name in sorted(shapes.keys() | state.keys()):
        if name not in shapes or name not in state or tuple(state[name].shape) != shapes[name]:
            given = f"{name} {shape(state[name])}" if name in state else f"no {name}"
            raise BadInput(refused + f"{given}; --no-policy leaves it out")
        if state[name].dtype not in FLOATS:
            raise BadInput(f"{where}: {name}: expected F32, F16 or BF16, found {state[name].dtype}")
    if n_heads is None:
        raise WrongUsage("--policy-heads: expected the policy's number of attention heads, found none (its tensors do not say it)")
    if n_heads < 1 or dim % n_heads:
        raise WrongUsage(f"--policy-heads: expected a divisor of the policy's width {dim}, found {n_heads}")
    return state, {"n_layers": n_layers, "n_heads": n_heads, "dim": dim, "hidden_dim": hidden_dim, "norm_eps": 1e-5,
                   "sees_question": "question_type" in state}


def indifferent_policy(d_enc):
    """The smallest policy whose logits are all 0."""
    table = {"n_layers": 1, "n_heads": 1, "dim": 32, "hidden_dim": 32, "norm_eps": 1e-5, "sees_question": False}
    return {name: torch.zeros(s) for name, s in policy_shapes(d_enc, 32, 32, 1, False).items()}, table


# ---- encoder and decoder --------------------------------------------------------------------------------------------

def link_or_copy(source, target):
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def weight_files(folder):
    """("safetensors" or "bin", files, index or None) of a Hugging Face directory, or None without weights."""
    for kind, stem, end in (("safetensors", "model", "safetensors"), ("bin", "pytorch_model", "bin")):
        index = folder / f"{stem}.{end}.index.json"
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
                raise BadInput(f"{index}: expected a weight_map of tensor and file names, found none or another")
            files = [folder / n for n in sorted(set(names.values()))]
            for file in files:
                if not file.is_file():
                    raise BadInput(f"{index}: expected {file.name} beside it, found none")
            return kind, files, index
        if (single := folder / f"{stem}.{end}").is_file():
            return kind, [single], None
    return None


def check_side(side, state, config, where):
    """The tensor that says whose weights these are, and its shape."""
    name, prefix = ("embeddings.word_embeddings.weight", "roberta.") if side == "encoder" else ("embed_tokens.weight", "model.")
    for name in (prefix + name, name):
        if name in state:
            expected = [config.get("vocab_size"), config.get("hidden_size")]
            if list(state[name]) != expected:
                raise BadInput(f"{where}: {name}: expected {expected} (config.json's vocab_size, hidden_size), found {list(state[name])}")
            return
    raise BadInput(f"{where}: expected {prefix}{name}, found {', '.join(sorted(state)[:3])}, ...")


def safetensors_shapes(path):
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: expected a safetensors file, found {error}") from None


def storable(state, tied, where):
    """Tensors fit for safetensors: floats, contiguous, each with its own bytes; the tied head is left out."""
    out = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.float64:
            tensor = tensor.float()
        if tied and name == "lm_head.weight":
            continue
        if not tensor.dtype.is_floating_point and not name.endswith(("position_ids", "token_type_ids", ".masked_bias", ".bias")):
            raise BadInput(f"{where}: {name}: expected F32, F16 or BF16, found {tensor.dtype}")
        out[name] = tensor
    return out


def write_side(side, source, given, out, max_bytes):
    """Writes OUT/encoder or OUT/decoder. given: the directory of --encoder or --decoder, or None. Returns its config.json."""
    folder, out_side = source.folder / side, out / side
    out_side.mkdir()
    looked = [f for f in (folder, given) if f is not None]

    def find(name):
        return next((f / name for f in looked if (f / name).is_file()), None)

    config_path = find("config.json")
    if config_path is None:
        raise WrongUsage(f"--{side}: expected a Hugging Face directory with the {side}'s config.json and tokenizer.json, "
                         f"found neither there nor in {folder}")
    config = read_json(config_path)
    if config.get("model_type") not in MODEL_TYPES[side]:
        raise BadInput(f"{config_path}: model_type: expected {' or '.join(MODEL_TYPES[side])}, found {config.get('model_type')!r}")
    if not isinstance(config.get("hidden_size"), int):
        raise BadInput(f"{config_path}: hidden_size: expected a number, found {config.get('hidden_size')!r}")
    if find("tokenizer.json") is None and (find("vocab.json") is None or find("merges.txt") is None):
        raise BadInput(f"{folder}: expected tokenizer.json, found none (--{side} names a directory that has it; "
                       "convert_tokenizer.py makes one from a tokenizer.model)")
    for name in COMPANIONS:
        if path := find(name):
            shutil.copyfile(path, out_side / name)
    if (state := source.states[side]) is not None:
        where = source.where[side]
        check_side(side, {n: t.shape for n, t in state.items()}, config, where)
        write_sharded(out_side, entries_of(storable(state, bool(config.get("tie_word_embeddings")), where)), max_bytes)
        return config
    for place in looked:
        if files := weight_files(place):
            break
    else:
        raise BadInput(f"{folder}: expected model.safetensors, pytorch_model.bin or their shards, found none")
    kind, paths, index = files
    if kind == "safetensors":
        shapes = {}
        for path in paths:
            shapes |= safetensors_shapes(path)
            link_or_copy(path, out_side / path.name)
        if index:
            shutil.copyfile(index, out_side / index.name)
        check_side(side, shapes, config, place)
        return config
    entries = []
    for path in paths:
        state = checked_state(read_pickle(path), path)
        entries += entries_of(storable(state, bool(config.get("tie_word_embeddings")), path))
    check_side(side, {e.name: list(e.shape) for e in entries}, config, place)
    write_sharded(out_side, entries, max_bytes)
    return config


# ---- the whole ------------------------------------------------------------------------------------------------------

def unescaped(value):
    """A word of the command line with \\n, \\t, \\\\ as the characters they name."""
    try:
        return json.loads('"' + value.replace('"', '\\"') + '"', strict=False) if "\\" in value else value
    except ValueError:
        raise WrongUsage(f"--template: expected the escapes of JSON (\\\\n, \\\\t, ...), found {ascii(value)}") from None


def read_template(words):
    """--template: a JSON file, or key=value once or more; keys left out are empty."""
    template = dict.fromkeys(TEMPLATE_KEYS, "")
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in TEMPLATE_KEYS:
            template[key] = unescaped(value)
        elif equals and not Path(word).is_file():
            raise WrongUsage(f"--template: expected one of {', '.join(TEMPLATE_KEYS)}, found {key}")
        else:
            values = read_json(Path(word))
            for key, value in values.items():
                if key not in TEMPLATE_KEYS or not isinstance(value, str):
                    raise BadInput(f"{word}: {key}: expected texts for {', '.join(TEMPLATE_KEYS)}, found another key or type")
            template |= values
    return template


def convert(options):
    folder, out = Path(options.folder), Path(options.out)
    if not folder.is_dir():
        raise WrongUsage(f"--in: expected a directory, found {'a file' if folder.exists() else 'none'} at {folder}")
    if out.exists() or out.is_symlink():
        raise WrongUsage(f"--out: expected a path that does not exist yet, found {out}")
    template = read_template(options.template)
    source = Source(folder)
    if source.states["projector"] is None:
        raise BadInput(f"{folder}: expected projector.pt, checkpoint.pt or refrag_full.pt, found none")
    if source.states["policy"] is None and not options.no_policy:
        raise WrongUsage(f"--no-policy: expected it where there is no policy.pt or policy.safetensors, as in {folder}")
    temporary = out.with_name(out.name + ".tmp")
    temporary.mkdir(parents=True)
    try:
        encoder = write_side("encoder", source, options.encoder, temporary, options.max_shard_size)
        decoder = write_side("decoder", source, options.decoder, temporary, options.max_shard_size)
        d_enc, d_dec = encoder["hidden_size"], decoder["hidden_size"]
        head = map_projector(source.states["projector"], source.where["projector"], d_enc, d_dec, options.activation)
        write_file(temporary / "projector.safetensors", entries_of(head))
        if options.no_policy:
            policy, policy_table = indifferent_policy(d_enc)
        else:
            policy, policy_table = map_policy(source.states["policy"], source.where["policy"], d_enc, options.policy_heads)
        write_file(temporary / "policy.safetensors", entries_of(policy))
        refrag = {
            "format": 1, "chunk_len": options.chunk_len, "chunk_lens": options.chunk_lens or [options.chunk_len], "chunk_unit": "decoder_tokens",
            "encoder": {"vocabulary": "own", "special_tokens": options.special_tokens, "pooling": options.pooling, "normalize": options.normalize},
            "projector": {"activation": "gelu"}, "policy": policy_table,
            "expand_fraction": 0.0 if options.no_policy else options.expand_fraction,
            "template": template, "segment_order": options.segment_order.split(","),
        }
        (temporary / "refrag.json").write_text(json.dumps(refrag, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in sorted(temporary.rglob("*")):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    policy = "no policy" if options.no_policy else "with its policy"
    print(f"{out}: encoder {d_enc}, decoder {d_dec}, chunks of {options.chunk_len} tokens, {policy}")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise WrongUsage(message)


def count(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def parse(arguments):
    p = OneLineParser(prog="convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--in", dest="folder", required=True, metavar="DIR", help="what another code saved")
    p.add_argument("--out", required=True, metavar="DIR", help="the model directory; must not exist")
    p.add_argument("--encoder", type=Path, metavar="DIR",
                   help="where the encoder's config, tokenizer and weights are taken from if --in lacks them")
    p.add_argument("--decoder", type=Path, metavar="DIR", help="the same for the decoder")
    p.add_argument("--chunk-len", type=count, required=True, metavar="K", help="decoder tokens of a chunk")
    p.add_argument("--chunk-lens", type=lambda s: [count(k) for k in s.split(",")], metavar="LIST",
                   help="every K it was trained for (default: K alone)")
    p.add_argument("--pooling", choices=("cls", "mean", "pooler"), required=True, help="how a chunk's outputs become one vector")
    p.add_argument("--normalize", action=argparse.BooleanOptionalAction, required=True, help="divide chunk embeddings by their L2 norm")
    p.add_argument("--special-tokens", action=argparse.BooleanOptionalAction, required=True, help="the encoder reads a chunk as <s> ids </s>")
    p.add_argument("--activation", metavar="NAME", help="the function between the projector's two layers; needed where it has two")
    p.add_argument("--segment-order", choices=("passages,question", "question,passages"), required=True)
    p.add_argument("--template", action="append", required=True, metavar="FILE|KEY=VALUE",
                   help="texts around passages and question: " + ", ".join(TEMPLATE_KEYS))
    p.add_argument("--no-policy", action="store_true", help="write a policy that prefers no chunk")
    p.add_argument("--policy-heads", type=int, metavar="N", help="attention heads of the policy")
    p.add_argument("--expand-fraction", type=float, default=0.1, metavar="P", help="chunks to expand by default (0.1; 0 with --no-policy)")
    p.add_argument("--max-shard-size", type=count, default=5_000_000_000, metavar="BYTES", help="of files written anew (5000000000)")
    options = p.parse_args(arguments)
    if options.chunk_lens and options.chunk_len not in options.chunk_lens:
        raise WrongUsage(f"--chunk-lens: expected a list that holds {options.chunk_len}, found {options.chunk_lens}")
    if not 0 <= options.expand_fraction <= 1:
        raise WrongUsage(f"--expand-fraction: expected 0 to 1, found {options.expand_fraction}")
    return options


def main(arguments):
    try:
        convert(parse(arguments))
        return 0
    except WrongUsage as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    except BadInput as error:
        print(f"convert: {error}", file=sys.stderr)
        return 3
    except (OSError, ValueError, MemoryError) as error:
        print("convert: " + " ".join(str(error or "out of memory").split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
