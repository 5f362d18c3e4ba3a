"""The networks of refrag-smol: the lean decoder with its adapter, an encoder on its vocabulary, projector, policy.

The encoder's word embeddings are the decoder's times one matrix V [dim, d_enc], both frozen: V holds the principal directions of the decoder's, so git keeps V
alone. Its four special tokens (start, padding, end of a chunk) are the decoder's <|im_start|>, a reserved token that never occurs in text, <|im_end|>.
"""
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import RobertaConfig, RobertaModel

from weights_tools.gguf import Gguf, llama_config, llama_weights

from ..attention import NAME as SHORT_ROWS
from ..common import World, computes_in_bf16, read_config
from ..model import Policy, Projector, chunked
from .decoder import LeanDecoder

BOS, EOS, PAD = 1, 2, 3  # of the encoder: <|im_start|>, <|im_end|>, and a reserved token that never comes from text


def place(path):
    return Path(path).expanduser()


def open_gguf(cfg):
    return Gguf(place(os.environ.get("REFRAG_SMOL_GGUF", cfg["decoder"]["gguf"])))


def principal_directions(table, d_enc):
    """V [dim, d_enc] of a table [n, dim]: the d_enc directions in which its rows differ most, scaled so that table @ V has deviation .5, in values that bf16
    holds."""
    table = table.float()
    centred = (table - table.mean(0)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    v = vectors.flip(1)[:, :d_enc].float()
    return (v * (0.5 / (table @ v).std())).bfloat16().float()


class Encoder(nn.Module):
    """RoBERTa on the decoder's vocabulary. shape: the [encoder] table; embeddings [n, dim]: the decoder's."""

    def __init__(self, shape, embeddings, bf16=False):
        super().__init__()
        d_enc = shape["hidden_size"]
        config = RobertaConfig(**shape, vocab_size=PAD + 1, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, attn_implementation=SHORT_ROWS,
                               hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.body = RobertaModel(config, add_pooling_layer=False)
        del self.body.embeddings.word_embeddings
        self.config, config.vocab_size, self.bf16, self.table = config, len(embeddings), bf16, [embeddings]
        with torch.no_grad():
            self.body.embeddings.position_embeddings.weight.normal_(0, 0.15)
        self.register_buffer("directions", principal_directions(embeddings, d_enc))
        self.make_words()
        self.register_load_state_dict_post_hook(lambda module, _: module.make_words())

    @torch.no_grad()
    def make_words(self):
        self.words = (self.table[0].bfloat16().float() @ self.directions).bfloat16()

    def forward(self, chunks):
        """Chunks (ids) -> [N, d_enc] in fp32: the mean over <start> ids <end>."""
        lengths = torch.tensor([len(c) + 2 for c in chunks])
        width = int(lengths.max())
        ids = np.full((len(chunks), width), PAD)
        ids[:, 0] = BOS
        for i, c in enumerate(chunks):
            ids[i, 1 : len(c) + 1], ids[i, len(c) + 1] = c, EOS
        at = torch.arange(width)
        keep = at < lengths[:, None]
        mask = None if bool(keep.all()) else keep.long()  # without one attention takes its fast path
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            x = self.words[torch.from_numpy(ids)].float()
            hidden = self.body(inputs_embeds=x, position_ids=(at + PAD + 1)[None], attention_mask=mask).last_hidden_state.float()
        return (hidden * keep[..., None]).sum(1) / lengths[:, None]

    def exported(self):
        """{RoBERTa's name: tensor}, word embeddings made"""
        state = {k: v for k, v in self.body.state_dict().items() if "position_ids" not in k and "token_type_ids" not in k}
        return state | {"embeddings.word_embeddings.weight": self.words}


def start_projector(projector, table, token, share=1.0):
    """A projector whose slots are the token's embedding, but for about `share` of the table's deviation; `settle_projector` makes that small before a
    decoder reads slots."""
    with torch.no_grad():
        projector.fc2.bias.copy_(table[token].float())
        projector.fc2.weight.normal_(0, share * float(table.float().std()) / 0.3 / projector.fc2.in_features**0.5)


@torch.no_grad()
def settle_projector(model, chunks, share):
    """Scales the projector's last weight so that slots of `chunks` differ from the neutral token by `share` of the embeddings' deviation, in the root mean
    square."""
    added = model.slots(chunks) - model.projector.fc2.bias
    model.projector.fc2.weight.mul_(share * float(model.decoder.embed.float().std()) / added.square().mean().sqrt())


class Smol(nn.Module):
    """cfg: the run's configuration; parts: which of "encoder" (with the projector) and "policy" this stage has besides the decoder."""

    def __init__(self, cfg, parts=(), gguf=None):
        super().__init__()
        gguf = gguf or open_gguf(cfg)
        d, run = cfg["decoder"], cfg.get("run", {})
        self.cfg, config = cfg, llama_config(gguf)
        dtype = torch.bfloat16 if computes_in_bf16("cpu", run) else torch.float32
        self.decoder = LeanDecoder(config, llama_weights(gguf), d["rank"], d["alpha"] / max(1, d["rank"]), dtype)
        self.end, self.cut = config["eos_token_id"], chunked
        self.add(cfg, parts)

    def add(self, cfg, parts):
        dim, d_enc = self.decoder.embed.shape[1], cfg["encoder"]["hidden_size"]
        if "encoder" in parts:
            self.encoder = Encoder(cfg["encoder"], self.decoder.embed, self.decoder.dtype == torch.bfloat16)
            self.projector = Projector(d_enc, dim)
            start_projector(self.projector, self.decoder.embed, cfg["decoder"]["neutral_token"])
        if "policy" in parts:
            self.policy = Policy(d_enc, *(cfg["policy"][k] for k in ("dim", "hidden_dim", "n_heads", "n_layers", "norm_eps", "sees_question")))

    @property
    def device(self):
        return self.decoder.embed.device

    def parameters_changed(self):
        self.decoder.merge()

    def encode(self, chunks):
        return self.encoder(chunks)

    def slots(self, chunks):
        """Chunks -> slots [N, dim]; equal chunk objects are encoded once."""
        seen = {}
        for c in chunks:
            seen.setdefault(id(c), (len(seen), c))
        different = self.projector(self.encode([c for _, c in seen.values()]))
        return different if len(seen) == len(chunks) else different[[seen[id(c)][0] for c in chunks]]

    def hidden(self, batch, decoder=None):
        """Last hidden states [M, dim] of a `Packed`."""
        decoder = self.decoder if decoder is None else decoder
        x = decoder.embeddings(batch.ids)
        if batch.chunks:
            x = x.index_put((batch.slot_at,), self.slots(batch.chunks).to(x.dtype))
        return decoder.hidden(x, batch.rows)

    def loss(self, batch, *teaching):
        """(weighted mean of the targets' nll, nll [targets] without gradient) of a `Packed`; teaching: of VocabularyLoss."""
        at = batch.taught()
        weight = batch.weight[at]
        return self.decoder.loss(self.hidden(batch)[at], batch.labels[at], weight / weight.sum(), *teaching)


@torch.no_grad()
def reader_of(model, checkpoint):
    """A frozen decoder with the adapter of the reader's checkpoint. It shares the model's embeddings."""
    decoder = model.decoder
    own = {k: v.clone() for k, v in decoder.state_dict().items()}
    state = torch.load(place(checkpoint), weights_only=True, map_location="cpu")["model"]
    decoder.load_state_dict({k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")})
    out = decoder.frozen()
    decoder.load_state_dict(own)
    decoder.merge()
    return out


def begin(config, parts=()):
    """(configuration, world, model) of a stage's TOML."""
    cfg = read_config(config)
    run = cfg["run"]
    run["out"] = str(place(run["out"]))
    cfg["data"]["folder"] = str(place(cfg["data"]["folder"]))
    world = World(run.get("device"), run.get("threads"))
    torch.manual_seed(run["seed"])
    model = Smol(cfg, parts)
    if "init" in run:
        take_weights(model, place(run["init"]), run.get("fresh", []))
    run["precision"] = "fp32"  # the decoder has its dtype already
    return cfg, world, model


def take_weights(model, checkpoint, fresh=()):
    """What a stage's last.pt has of the model's networks; those of `fresh`, and those it lacks, stay as they are."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")["model"]
    state = {k: v for k, v in state.items() if k.split(".")[0] not in fresh}
    held = {k.split(".")[0] for k in state}
    own = model.state_dict()
    unknown = [k for k in state if k not in own and k.split(".")[0] in {n.split(".")[0] for n in own}]
    assert not unknown, f"{checkpoint}: expected the names of this model, found {unknown[0]}"
    model.load_state_dict({k: state[k] if k.split(".")[0] in held else v for k, v in own.items()})
    model.parameters_changed()
