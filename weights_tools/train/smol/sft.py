"""Stage 4: questions over passages in chunks, for every degree of expansion; the reader at full context teaches beside the answer's tokens.

A row is the template's beginning, the passages as slots or tokens, then questions as branches. Chunks are expanded that hold an answer, that BM25 finds
for a question, or at random. Rows with everything expanded hold the adapter where the reader is. Text as in stage 3 is some of the parts.

    python -m weights_tools.train.smol.sft weights_tools/train/configs/smol/sft.toml
"""
import sys

import torch

from ..common import train
from ..model import n_expand
from ..sft import Task
from .bm25 import Bm25
from .cpt import held_part, shares, text_part
from .model import begin, reader_of
from .questions import Asker, Template
from .rows import Branched, Pieces, pack
from .texts import held_out_windows, open_text


def context_of(template, task, expanded):
    """`Pieces` of everything before the question; `expanded`: chunks that are tokens."""
    row, before = Pieces(template.before), None
    for i, (chunk, passage) in enumerate(zip(task.chunks, task.passage_of)):
        if passage != before:
            row.tokens(template.prefix if before is None else [*template.suffix, *template.prefix])
            before = passage
        row.tokens(chunk) if i in expanded else row.slot(chunk)
    return row.tokens(template.suffix)


def chosen(template, task, n, how, rng):
    """n chunks of a task: first those that hold answers ("answers"), those of the largest scores for one of the questions ("bm25"), or any."""
    order = rng.permutation(len(task.chunks)).tolist()
    question, _, _, _ = task.qas[rng.integers(len(task.qas))]
    if how == "answers":
        held = {h for i in rng.permutation(len(task.qas)) for h in task.qas[i][3]}
        order.sort(key=lambda i: i not in held)
    elif how == "bm25":
        texts = [template.segments.tokenizer.decode(list(c), skip_special_tokens=False) for c in task.chunks]
        score = Bm25(texts).scores(question)
        order.sort(key=lambda i: -score[i])
    return set(order[:n])


def draw_task(asker, template, rng, data, k, max_answer=64):
    """A `Task` that fits, its questions cut to those that do."""
    while True:
        _, passages, asked = asker.row(rng)
        if sum(len(p["text"]) for p in passages) > 7 * data["max_context"]:
            continue
        task = Task(template, passages, asked, lambda ids, k: [ids[i : i + k] for i in range(0, len(ids), k)], k)
        if sum(map(len, task.chunks)) > data["max_context"]:
            continue
        room, kept = data["max_asked"], []
        for q in task.qas:
            if len(q[2]) <= max_answer and len(q[1]) + len(q[2]) <= room:
                kept.append(q)
                room -= len(q[1]) + len(q[2])
        task.qas = kept
        if kept:
            return task


def question_row(template, task, expanded):
    """The row of a task, and that of the same as tokens alone as its lesson."""
    branches = [(question, answer) for _, question, answer, _ in task.qas]
    everything = context_of(template, task, set(range(len(task.chunks))))
    return context_of(template, task, expanded).row(branches, Branched(everything.ids, branches))


def question_part(model, reader, template, asker, rng, data):
    """(loss, positions, {figure}) of rows of questions with the same p."""
    p = float(rng.choice(data["question_p"], p=data["question_p_weights"]))
    rows, size = [], 0
    while size < data["positions"]:
        task = draw_task(asker, template, rng, data, int(rng.choice(data["question_chunk_lens"])))
        how = str(rng.choice(["answers", "bm25", "random"], p=data["chosen_weights"]))
        rows.append(question_row(template, task, chosen(template, task, n_expand(p, len(task.chunks)), how, rng)))
        size += len(rows[-1])
    if p == 1:
        loss, size, nll = held_part(model, reader, rows, data["held_teacher"])
    else:
        lessons = pack([r.lesson for r in rows], model.decoder.dtype)
        with torch.no_grad():
            said = model.hidden(lessons, reader)[lessons.taught()]
        loss, nll = model.loss(pack(rows, model.decoder.dtype), torch.full((len(said),), data["teacher"]), said)
    return loss, size, {f"answers p{p:g}": nll.mean()}


def main(config):
    cfg, world, model = begin(config, ("encoder",))
    data, text = cfg["data"], open_text(cfg)
    template = Template(f"{data['folder']}/tokenizer.json", cfg["template"], model.end)
    reader = reader_of(model, cfg["run"]["reader"])
    asker = Asker(data["folder"], data["tasks"], data["sizes"], data["unanswerable"], data["others"])
    watched = held_out_windows(cfg, data["watched"], data["watched_context"] + 64)

    def loss_of(rng, fraction, number):
        if rng.random() < data["text"]:
            return text_part(model, reader, template, text, rng, data, 1.0)  # the curriculum is over
        return question_part(model, reader, template, asker, rng, data)

    train(cfg, model, loss_of, set(cfg["run"]["trains"]), world, lambda: shares(model, reader, template, watched, data))


if __name__ == "__main__":
    main(sys.argv[1])
