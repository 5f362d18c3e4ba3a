R"js("use strict";
// Helpers, the chosen question and chunk, and what is said of a chunk. The views follow.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// Text goes into the page by textContent alone: it is other people's.
function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}
function fill(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null));
  return element;
}

const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const digits = (x) => (Math.abs(x) >= 1000 ? x.toFixed(0) : String(Number(x.toPrecision(3)))).replace("-", "\u2212");
const ms = (x) => (x < 0.001 ? "0 ms" : x >= 10000 ? `${digits(x / 1000)} s` : `${digits(x)} ms`);
const percent = (x) => `${digits(x * 100)}%`;
const times = (x) => `${x >= 10 ? x.toFixed(0) : x.toFixed(1)}\u00d7`;
const sum = (values) => values.reduce((a, b) => a + b, 0);
const mean = (values) => sum(values) / Math.max(1, values.length);
const shown = (token) => token.replaceAll("\n", "\u23ce").replaceAll("\t", "\u21e5");

// What the score of a chunk is, by the policy that gave it.
const scores = {
  "model": "policy\u2019s logit", "bm25": "BM25 score", "perplexity-asc": "nats a token, read alone",
  "perplexity-desc": "nats a token, read alone",
};
const kinds = [
  ["start", "start token"], ["template", "template"], ["compressed", "compressed chunks"],
  ["expanded", "expanded chunks"], ["vectors", "given vectors"], ["question", "question"],
  ["answer", "answer so far"],
];

let q = null;          // the question that is shown
let chosen = -1;       // one of its chunks
let shading = "score"; // of passages: "score", "attention"

// A question as the views want it: of each chunk its run of the input and its attention.
function prepare(raw) {
  const question = { ...raw, runOf: raw.chunks.map(() => -1), hasScores: raw.chunks.some((c) => c.logit !== null) };
  raw.input.forEach((run, r) => {
    if (run.kind === "chunk") {
      question.runOf[run.chunk] = r;
      run.kind = raw.chunks[run.chunk].expanded ? "expanded" : "compressed";
    }
  });
  question.attends = raw.attention.error === undefined;
  question.byRun = question.attends
    ? raw.input.map((_, r) => mean(raw.attention.by_layer.map((row) => row[r]))) : [];
  question.attentionOf = (c) => (question.attends && question.runOf[c] >= 0 ? question.byRun[question.runOf[c]] : null);
  const ranks = (valueOf) => {
    const order = raw.chunks.map((_, c) => c).sort((a, b) => valueOf(b) - valueOf(a));
    const rank = [];
    order.forEach((c, place) => { rank[c] = place + 1; });
    return rank;
  };
  question.scoreRank = ranks((c) => raw.chunks[c].logit ?? -Infinity);
  question.attentionRank = ranks((c) => question.attentionOf(c) ?? -Infinity);
  return question;
}

const documentName = (d) => {
  const { id, title } = q.documents[d];
  return title ? `${id} \u00b7 ${title}` : id;
};
const scoreName = () => scores[q.policy] ?? "policy\u2019s logit";
function stateOf(chunk) {
  if (chunk.n_positions === 0) return "left out";
  if (chunk.n_positions === 1) return `${chunk.expanded ? "expanded" : "compressed"}, position ${chunk.position}`;
  return `expanded, positions ${chunk.position} to ${chunk.position + chunk.n_positions - 1}`;
}
function chunkLabel(c) {
  const chunk = q.chunks[c];
  const parts = [`Chunk ${c + 1} of ${q.chunks.length}`, stateOf(chunk)];
  if (chunk.logit !== null) parts.push(`${scoreName()} ${digits(chunk.logit)}`);
  if (q.attentionOf(c) !== null) parts.push(`attention ${percent(q.attentionOf(c))}`);
  return parts.join(", ");
}

function showDetails(extra) {
  const panel = byId("details");
  panel.classList.toggle("empty", chosen < 0);
  if (chosen < 0) {
    fill(panel, make("h2", "", "No chunk chosen"),
         make("p", "quiet", "Choose one in the text, in the strip or in the attention map: with a click, or with Tab " +
                            "and the arrow keys."));
    return;
  }
  const chunk = q.chunks[chosen], list = make("dl"), n = q.chunks.length;
  const add = (name, value) => list.append(make("dt", "", name), make("dd", "", value));
  add("Passage", documentName(chunk.document));
  add("State", stateOf(chunk));
  if (chunk.logit !== null) add(scoreName(), `${digits(chunk.logit)} (rank ${q.scoreRank[chosen]} of ${n})`);
  const attention = q.attentionOf(chosen);
  if (attention !== null) add("Attention", `${percent(attention)} (rank ${q.attentionRank[chosen]} of ${n})`);
  if (extra) add(extra[0], extra[1]);
  add("Length", `${plural(chunk.tokens, "token")}, bytes ${chunk.begin} to ${chunk.end}`);
  if (chunk.cached) add("Embedding", "kept from before");
  fill(panel, make("h2", "", `Chunk ${chosen + 1} of ${n}`), make("blockquote", "", chunk.text.trim()), list);
}

function choose(c, extra) {
  for (const element of document.querySelectorAll(".chosen")) element.classList.remove("chosen");
  chosen = c;
  if (c >= 0)
    for (const element of document.querySelectorAll(`.chunk[data-chunk="${c}"], .run[data-chunk="${c}"]`))
      element.classList.add("chosen");
  showDetails(extra);
}

// One stop of the Tab key for all of `items`; arrow keys, Home and End go on from there. `next(index, key)`
// gives an index, or undefined where the key means nothing.
function roving(items, next, onFocus) {
  const focus = (index) => {
    for (const item of items) item.tabIndex = -1;
    items[index].tabIndex = 0;
    items[index].focus();
  };
  items.forEach((item, index) => {
    item.tabIndex = index === 0 ? 0 : -1;
    item.addEventListener("focus", () => onFocus(index));
    item.addEventListener("click", () => focus(index));
    item.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const to = next(index, event.key);
      if (to === undefined) return;
      event.preventDefault();
      focus(Math.max(0, Math.min(items.length - 1, to)));
    });
  });
}
const inLine = (n) => (index, key) =>
  ({ ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: n - 1 })[key];

function radios(fieldset, name, choices, current, onChange) {
  const legend = fieldset.querySelector("legend");
  fill(fieldset, legend, ...choices.map(([value, text]) => {
    const label = make("label"), input = make("input");
    input.type = "radio";
    input.name = name;
    input.value = value;
    input.checked = value === current;
    input.addEventListener("change", () => onChange(value));
    label.append(input, " ", text);
    return label;
  }));
}
function legendItem(sample, text) {
  const item = make("li");
  item.append(sample, text);
  return item;
}
function row(cells, tag = "td") {
  const line = make("tr");
  for (const [text, className] of cells) line.append(make(tag, className, text));
  return line;
}
)js"
