"""Writes tests/golden/nano.json and nano.safetensors: what the trainer's own networks compute on the default model, for a
question over three passages. The runtime must agree (tests/test_nano.cpp). Run again whenever the default model changes:

    python -m weights_tools.make_golden_nano
"""
import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .train.batches import Qa, Segments
from .train.export import load_directory
from .train.model import BOS, MixedBatch, n_expand

PASSAGES = [
    {"title": "Velmora", "text": "Velmora is a city in Trask. Velmora was founded in 1482. The workshops of Velmora produce clocks."},
    {"text": "The Orsin is a river in Brelk. The length of the Orsin is 312 km. Farmers along the Orsin grow barley."},
    {"title": "Tea", "text": "Tea reached the caf\u00e9s of the coast by ship; \u6c34 and leaves, nothing more."},
]
QUESTION = "What do the workshops of Velmora produce?"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="weights_tools/refrag-nano")
    parser.add_argument("--out", default="tests/golden")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, refrag = load_directory(args.model)
    segments = Segments(f"{args.model}/decoder/tokenizer.json")
    qa = Qa(segments, refrag["template"])
    facts, tensors = {"passages": PASSAGES, "question": QUESTION, "cases": []}, {}
    for k in refrag["chunk_lens"]:
        chunks, of_passage = [], []
        for passage in PASSAGES:
            ids = segments.passage(passage)
            cut = [ids[i : i + k] for i in range(0, len(ids), k)]
            chunks += cut
            of_passage.append(len(cut))
        question = segments(QUESTION)
        pieces = [question[i : i + k] for i in range(0, len(question), k)]
        c = model.encode(chunks + pieces)
        is_question = torch.tensor([[False] * len(chunks) + [True] * len(pieces)])
        logits = model.policy(c[None], is_question, torch.ones_like(is_question))[0, : len(chunks)]
        wanted = n_expand(refrag["expand_fraction"], len(chunks))
        # Stable: of equal logits the lower index comes first.
        expanded = sorted(torch.sort(logits, descending=True, stable=True).indices[:wanted].tolist())

        batch, row, at = MixedBatch(), [("tokens", [BOS] + segments(refrag["template"]["before"]))], 0
        for n in of_passage:
            row.append(("tokens", segments(refrag["template"]["passage_prefix"])))
            for i in range(at, at + n):
                row.append(("tokens", chunks[i]) if i in expanded else ("slot", batch.chunk(chunks[i])))
            row.append(("tokens", qa.suffix))
            at += n
        row.append(("tokens", qa.question(QUESTION)))
        batch.add_row(row)
        ids, _, slot_at, chunk_of = batch.tensors()
        slots = model.projector(model.encode(batch.chunks))[chunk_of]
        hidden = model.hidden(ids, slots, slot_at)
        facts["cases"].append({"k": k, "chunks": chunks, "expanded": expanded, "positions": ids.shape[1]})
        tensors[f"chunk_emb.{k}"] = c[: len(chunks)].contiguous()
        tensors[f"policy_logits.{k}"] = logits.contiguous()
        tensors[f"next_logits.{k}"] = model.decoder.lm_head(hidden[:, -1]).float().contiguous()
    out = Path(args.out)
    (out / "nano.json").write_text(json.dumps(facts, indent=1) + "\n")
    save_file(tensors, out / "nano.safetensors")
    (out / "nano.safetensors").chmod(0o644)
    print(f"wrote {out}/nano.json and nano.safetensors from {args.model}")


if __name__ == "__main__":
    main()
