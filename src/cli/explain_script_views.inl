R"js(
function showHead() {
  byId("question").textContent = q.question;
  document.title = `${q.question} \u00b7 refrag`;
  byId("answer").textContent = q.answer === "" ? "(nothing)" : q.answer;
  const facts = byId("facts");
  fill(facts);
  const add = (name, value, small) => {
    const box = make("div"), dd = make("dd", "", value);
    dd.append(make("small", "", small));
    box.append(make("dt", "", name), dd);
    facts.append(box);
  };
  add("Decoder positions", q.positions.toLocaleString("en"),
      `for ${plural(q.plain_tokens, "token")}, ${times(q.plain_tokens / Math.max(1, q.positions))} shorter`);
  add("Chunks expanded", `${q.n_expanded} of ${q.n_chunks}`, `k ${q.k}, p ${q.p}, policy ${q.policy}`);
  const full = q.full.error === undefined ? q.full.ttft_ms : 0;
  const ratio = full / q.ttft_ms;
  add("First token after", ms(q.ttft_ms),
      full === 0 ? "the full context was not measured"
                 : `full context ${ms(full)}, ${ratio >= 1 ? `${times(ratio)} as long` : "which is shorter"}`);
  add("Answer", plural(q.new_tokens, "token"),
      q.tokens_per_s > 0 ? `${digits(q.tokens_per_s)} tokens/s after the first` : `ended by: ${q.finish}`);
}

// Values scaled to 0 .. 1 between their least and their largest.
function scaled(values) {
  const known = values.filter((value) => value !== null);
  const low = Math.min(...known), high = Math.max(...known);
  return { low, high, of: (value) => (value === null ? null : high > low ? (value - low) / (high - low) : 0.5) };
}

function showShades() {
  const values = q.chunks.map((chunk, c) => (shading === "score" ? chunk.logit : q.attentionOf(c)));
  const scale = scaled(values), shades = values.map(scale.of);
  for (const element of document.querySelectorAll("[data-chunk].chunk, .box.compressed[data-shade], .box.expanded[data-shade]")) {
    const v = shades[element.dataset.chunk ?? element.dataset.shade];
    element.style.setProperty("--v", v === null ? 0 : v.toFixed(3));
  }
  const ramp = make("span", "ramp"), text = (value) => (shading === "score" ? digits(value) : percent(value));
  const items = [];
  if (values.some((value) => value !== null)) {
    const item = make("li");
    item.append(text(scale.low), ramp, text(scale.high), ` ${shading === "score" ? scoreName() : "of the answer\u2019s attention"}`);
    items.push(item);
  }
  items.push(legendItem(make("span", "sample expanded", "text"), "expanded: read as tokens"));
  const others = q.unexpanded === "drop" ? ["sample dropped", "left out"] : ["sample", "compressed: one position"];
  items.push(legendItem(make("span", others[0], "text"), others[1]));
  fill(byId("passages-legend"), ...items);
}

function showPassages() {
  byId("passages-section").hidden = byId("table-section").hidden = q.chunks.length === 0;
  byId("passages-note").textContent = q.hasScores
    ? `${plural(q.chunks.length, "chunk")} of at most ${plural(q.k, "token")}. The shade says how much ` +
      (q.policy === "model" ? "the policy wanted a chunk expanded; " : "a chunk scored; ") + "the outline, that it was."
    : `${plural(q.chunks.length, "chunk")} of at most ${plural(q.k, "token")}. The policy \u201c${q.policy}\u201d gives no ` +
      "scores; an outline says that a chunk was expanded.";
  const choices = [];
  if (q.hasScores) choices.push(["score", scoreName()]);
  if (q.attends) choices.push(["attention", "attention of the answer"]);
  if (!choices.some(([value]) => value === shading)) shading = choices.length > 0 ? choices[0][0] : "score";
  byId("shading").hidden = choices.length < 2;
  radios(byId("shading"), "shading", choices, shading, (value) => { shading = value; showShades(); });

  const passages = q.documents.map((_, d) => {
    const article = make("article", "passage"), text = make("p");
    article.append(make("h3", "", q.documents[d].id), text);
    return article;
  });
  const items = q.chunks.map((chunk, c) => {
    const state = chunk.expanded ? "expanded" : chunk.n_positions === 0 ? "dropped" : "compressed";
    // White space before it stands outside: at a line's end it would be a box of its own.
    const [, before, text] = /^(\s*)([^]*)$/.exec(chunk.text);
    const span = make("span", `chunk shade ${state}`, text || chunk.text);
    span.dataset.chunk = c;
    span.title = chunkLabel(c);
    span.setAttribute("role", "button");
    span.setAttribute("aria-label", `${chunkLabel(c)}: ${chunk.text}`);
    passages[chunk.document].querySelector("p").append(text ? before : "", span);
    return span;
  });
  fill(byId("passages"), ...passages);
  roving(items, inLine(items.length), (c) => choose(c));
}

function showStrip() {
  let position = 0;
  const runs = q.input.map((run) => {
    const isChunk = run.chunk !== undefined, group = make("span", "run");
    for (let i = 0; i < run.n; ++i, ++position) {
      const box = make("span", `box ${run.kind}${isChunk ? " shade" : ""}`);
      if (isChunk) box.dataset.shade = run.chunk;
      const token = run.tokens ? ` \u201c${shown(run.tokens[i])}\u201d` : "";
      box.title = `position ${position}: ${isChunk ? `chunk ${run.chunk + 1}, ${run.kind}` : run.kind}${token}`;
      group.append(box);
    }
    if (isChunk) {
      group.dataset.chunk = run.chunk;
      group.setAttribute("role", "button");
      group.setAttribute("aria-label", chunkLabel(run.chunk));
    } else {
      group.setAttribute("role", "img");
      group.setAttribute("aria-label", `${run.kind}, ${plural(run.n, "position")}`);
    }
    return group;
  });
  fill(byId("strip"), ...runs);
  const items = runs.filter((run) => run.dataset.chunk !== undefined);
  roving(items, inLine(items.length), (index) => choose(Number(items[index].dataset.chunk)));

  const present = kinds.filter(([kind]) => q.input.some((run) => run.kind === kind));
  fill(byId("strip-legend"), ...present.map(([kind, name]) => {
    const n = sum(q.input.filter((run) => run.kind === kind).map((run) => run.n));
    return legendItem(make("span", `box ${kind}`), `${name}, ${n}`);
  }));
  bars(byId("positions"), [
    ["REFRAG", [[q.positions, "c4", ""]], plural(q.positions, "position")],
    ["Full context", [[q.plain_tokens, "c4", ""]], plural(q.plain_tokens, "position")],
  ]);
}

// Each bar: name, parts of [value, class, label], total as text, or the text alone where there are no parts.
function bars(element, list) {
  const largest = Math.max(1e-9, ...list.map(([, parts]) => sum(parts.map(([value]) => value))));
  fill(element);
  for (const [name, parts, total] of list) {
    const bar = make("div", "bar"), inner = make("span", "parts");
    inner.style.width = `${(sum(parts.map(([value]) => value)) / largest) * 78}%`;
    for (const [value, className, label] of parts) {
      const part = make("i", className, value > 0.1 * largest ? label : "");
      part.style.flex = `${value} 1 0`;
      if (label) part.title = label;
      inner.append(part);
    }
    if (parts.length > 0) bar.append(inner);
    bar.append(make(parts.length > 0 ? "b" : "span", "", total));
    element.append(make("span", "", name), bar);
  }
}

const stages = [
  ["tokenize", "Tokenise", "passages not yet cut, texts, question"], ["encode", "Encode", "chunks without an embedding"],
  ["sense", "Sense", "the policy and its choice"], ["project", "Project", "chunk embeddings to the decoder\u2019s size"],
  ["prefill", "Prefill", "the decoder reads the prompt"], ["sample", "Sample", "the first token"],
];
function showTimes() {
  const full = q.full.error === undefined ? q.full : null;
  const partsOf = (answer) => {
    const parts = stages.map(([key, name], i) => [answer.times_ms[key], `c${i}`, name]);
    const rest = answer.ttft_ms - sum(parts.map(([value]) => value));
    if (rest > 0) parts.push([rest, "c6", "Between"]);
    return parts.filter(([value]) => value > 0.003 * answer.ttft_ms);
  };
  bars(byId("times"), [
    ["REFRAG", partsOf(q), ms(q.ttft_ms)],
    ["Full context", full ? partsOf(full) : [], full ? ms(full.ttft_ms) : `not measured: ${q.full.error}`],
  ]);
  const reused = Math.max(q.n_reused, full ? full.n_reused : 0) === 0 ? ""
    : ` From an earlier prompt that began alike REFRAG took over ${plural(q.n_reused, "position")}` +
      (full ? `, the full context ${plural(full.n_reused, "position")}.` : ".");
  byId("time-note").textContent =
    `The full context is the same question with every chunk expanded, asked in the same process up to its first token. ` +
    (q.n_cached === 0 ? "No chunk embedding was kept from before."
                      : `${q.n_cached} of ${plural(q.n_chunks, "chunk embedding")} were kept from before.`) + reused +
    (q.retrieve_ms === undefined ? "" : ` Finding the passages took ${ms(q.retrieve_ms)}, which is in neither.`);
  const head = make("thead"), body = make("tbody"), foot = make("tfoot");
  const columns = [["REFRAG", "number"], ["Full context", "number"]];
  head.append(row([["Stage", ""], ...columns, ["what it is", "what"]], "th"));
  const cell = (answer, key) => (answer ? ms(answer.times_ms[key]) : "\u2013");
  stages.forEach(([key, name, what], i) => {
    const line = row([["", ""], [cell(q, key), "number"], [cell(full, key), "number"], [what, "what"]]);
    line.firstChild.append(make("span", `swatch c${i}`), name);
    body.append(line);
  });
  foot.append(row([["First token", ""], [ms(q.ttft_ms), "number"], [full ? ms(full.ttft_ms) : "\u2013", "number"], ["", "what"]]));
  fill(byId("times-table"), head, body, foot);
}

function showShares() {
  const head = make("thead"), body = make("tbody");
  head.append(row([["Of all attention", ""], ["share", "number"], ["positions", "number"], ["mean of a position", "number"]], "th"));
  for (const [kind, name] of kinds) {
    const runs = q.input.map((run, r) => [run, r]).filter(([run]) => run.kind === kind);
    if (runs.length === 0) continue;
    const share = sum(runs.map(([, r]) => q.byRun[r])), n = sum(runs.map(([run]) => run.n));
    body.append(row([[name, ""], [percent(share), "number"], [n.toLocaleString("en"), "number"], [percent(share / n), "number"]]));
  }
  fill(byId("shares"), head, body);
}

let heatRows = "layer", heatValue = "share";
function showHeat() {
  const columns = q.chunks.map((_, c) => c).filter((c) => q.runOf[c] >= 0);
  const table = heatRows === "layer" ? q.attention.by_layer : q.attention.by_token;
  const names = heatRows === "layer" ? table.map((_, l) => `layer ${l + 1}`)
    : table.map((_, t) => (t < q.answer_tokens.length ? `\u201c${shown(q.answer_tokens[t])}\u201d` : "end"));
  const valueOf = (line, c) => line[q.runOf[c]] / (heatValue === "share" ? 1 : q.chunks[c].n_positions);
  const lines = [["mean", columns.map((c) => mean(table.map((line) => valueOf(line, c))))],
                 ...table.map((line, i) => [names[i], columns.map((c) => valueOf(line, c))])];
  const largest = Math.max(1e-12, ...lines.map(([, values]) => Math.max(...values)));
  byId("attention-scale").textContent = `The strongest shade is ${percent(largest)}, on a square-root scale. ` +
    (heatValue === "share" ? "A chunk\u2019s share is the sum over its positions."
                           : "The mean over a chunk\u2019s positions and the answer\u2019s tokens, as the paper\u2019s Figure 7 averages.");
  const isFirst = (i) => i === 0 || q.chunks[columns[i]].document !== q.chunks[columns[i - 1]].document;
  const head = make("thead"), body = make("tbody"), group = make("tr"), shapes = make("tr", "shapes"), cells = [];
  group.append(make("th"));
  shapes.append(make("th"));
  columns.forEach((c, i) => {
    if (isFirst(i)) {
      const th = make("th", "", q.documents[q.chunks[c].document].id);
      th.title = documentName(q.chunks[c].document);
      th.colSpan = columns.filter((other) => q.chunks[other].document === q.chunks[c].document).length;
      group.append(th);
    }
    const td = make("td");
    td.append(make("span", `box ${q.chunks[c].expanded ? "expanded" : "compressed"}`));
    shapes.append(td);
  });
  head.append(group, shapes);
  lines.forEach(([name, values], r) => {
    const line = make("tr", r === 0 ? "mean" : "");
    line.append(make("th", "", name));
    values.forEach((value, i) => {
      const td = make("td", `shade${isFirst(i) ? " first" : ""}`);
      td.style.setProperty("--v", Math.sqrt(value / largest).toFixed(3));
      td.title = `chunk ${columns[i] + 1}, ${name}: ${percent(value)}`;
      td.setAttribute("aria-label", td.title);
      line.append(td);
      cells.push(td);
    });
    body.append(line);
  });
  const n = columns.length;
  byId("heat").style.setProperty("--width", `${Math.max(13, Math.min(28, Math.floor(640 / n)))}px`);
  fill(byId("heat"), head, body);
  const next = (index, key) => {
    const column = index % n;
    if (key === "ArrowUp") return index >= n ? index - n : undefined;
    if (key === "ArrowDown") return index + n < cells.length ? index + n : undefined;
    if (key === "Home") return index - column;
    if (key === "End") return index - column + n - 1;
    return inLine(cells.length)(index, key);
  };
  roving(cells, next, (index) => {
    const [name, values] = lines[Math.floor(index / n)];
    const isMean = index < n && heatValue === "share";  // which the details say anyway
    choose(columns[index % n], isMean ? undefined : [name, percent(values[index % n])]);
  });
}

function showAttention() {
  byId("attention").hidden = !q.attends;
  byId("attention-note").textContent = q.attends
    ? "How the positions that chose the answer\u2019s tokens divided their attention: softmax(q k / \u221ad), the mean over " +
      "heads, measured in a pass of its own after the answer."
    : `Not measured: ${q.attention.error}`;
  if (!q.attends) return;
  showShares();
  const some = q.runOf.some((r) => r >= 0);
  for (const id of ["attention-rows", "attention-value", "attention-scale", "heat"]) byId(id).hidden = !some;
  byId("attention").querySelector("h3").hidden = !some;
  if (!some) return;
  radios(byId("attention-rows"), "rows", [["layer", "layers"], ["token", "tokens of the answer"]], heatRows,
         (value) => { heatRows = value; showHeat(); });
  radios(byId("attention-value"), "value", [["share", "share of a chunk"], ["mean", "mean of a position (Figure 7)"]],
         heatValue, (value) => { heatValue = value; showHeat(); });
  showHeat();
}

function showTable() {
  const head = make("thead"), body = make("tbody");
  head.append(row([["#", "number"], ["passage", ""], ["state", ""], [scoreName(), "number"], ["attention", "number"], ["text", ""]], "th"));
  q.chunks.forEach((chunk, c) => {
    const attention = q.attentionOf(c);
    body.append(row([[String(c + 1), "number"], [documentName(chunk.document), ""], [stateOf(chunk), ""],
      [chunk.logit === null ? "\u2013" : digits(chunk.logit), "number"],
      [attention === null ? "\u2013" : percent(attention), "number"], [chunk.text, ""]]));
  });
  fill(byId("chunks-table"), head, body);
}

function show(index) {
  q = prepare(structuredClone(data.questions[index]));
  showHead();
  showPassages();
  showStrip();
  showShades();
  showTimes();
  showAttention();
  showTable();
  choose(-1);
}

byId("footer").textContent = `refrag ${data.version} \u00b7 ${data.model} \u00b7 ${data.device}`;
if (data.questions.length > 1) {
  byId("chooser").hidden = false;
  fill(byId("questions"), ...data.questions.map(({ question }, i) => {
    const option = make("option", "", question);
    option.value = i;
    return option;
  }));
  byId("questions").addEventListener("change", () => show(Number(byId("questions").value)));
}
if (data.questions.length > 0) show(0);
)js"
