R"css(
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --ink: #16181c; --quiet: #565c66; --line: #d9dde3;
  --low: #f1f4f8; --high: #6fa8e6; --mark: #b04a00; --focus: #16181c; --token: #8b93a0; --deep: #1d4f8f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --panel: #1c1f25; --ink: #eceef1; --quiet: #a4abb6; --line: #363b44;
    --low: #20242b; --high: #2f6cb3; --mark: #f2a65a; --focus: #ffffff; --token: #6e7684; --deep: #9cc6f5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 78rem; padding: 1.5rem clamp(0.9rem, 3vw, 2.5rem) 4rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: clamp(1.3rem, 3.4vw, 1.9rem); line-height: 1.25; margin: 0.2rem 0 0; font-weight: 600; }
h2 { font-size: 1.15rem; margin: 0 0 0.25rem; font-weight: 600; }
h3 { font-size: 0.95rem; margin: 1.1rem 0 0.2rem; font-weight: 600; }
p { margin: 0.35rem 0; }
.quiet { color: var(--quiet); font-size: 0.9rem; max-width: 46rem; }
.eyebrow { color: var(--quiet); font-size: 0.85rem; margin: 0; }
.number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
[hidden] { display: none !important; }

.reply { font-size: clamp(1.1rem, 2.6vw, 1.4rem); margin: 0.5rem 0 0; white-space: pre-wrap; }
.reply::before { content: "\2192\2002"; color: var(--quiet); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.9rem 1.5rem; margin: 1.2rem 0 0;
  max-width: 58rem; }
.facts dt { color: var(--quiet); font-size: 0.85rem; }
.facts dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts dd small { display: block; font-size: 0.85rem; font-weight: 400; color: var(--quiet); }
.chooser { display: block; margin: 0.6rem 0; font-size: 0.9rem; color: var(--quiet); }
select, input { font: inherit; color: inherit; accent-color: var(--deep); }
select { max-width: 100%; background: var(--panel); border: 1px solid var(--line); border-radius: 4px; padding: 0.2rem; }

.columns { display: grid; grid-template-columns: minmax(0, 1fr); gap: 2.6rem; margin-top: 2.2rem; }
main { display: grid; gap: 2.6rem; min-width: 0; grid-template-columns: minmax(0, 1fr); }
section { min-width: 0; }
@media (min-width: 68rem) {
  .columns { grid-template-columns: minmax(0, 1fr) 19rem; }
}
aside { min-width: 0; }
.details { background: var(--panel); border-radius: 8px; padding: 0.9rem 1rem; font-size: 0.9rem; }
@media (min-width: 68rem) { .details { position: sticky; top: 1.2rem; max-height: calc(100vh - 2.4rem); overflow: auto; } }
@media (max-width: 67.99rem) {
  .details { position: sticky; bottom: 0; max-height: 40vh; overflow: auto; border-top: 1px solid var(--line);
    border-radius: 8px 8px 0 0; }
  aside { position: sticky; bottom: 0; z-index: 2; order: 2; }
  .details.empty { display: none; }
}
.details h2 { font-size: 1rem; }
.details dl { display: grid; grid-template-columns: auto 1fr; gap: 0.1rem 0.9rem; margin: 0.5rem 0 0; }
.details dt { color: var(--quiet); }
.details dt::first-letter { text-transform: uppercase; }
.details dd { margin: 0; font-variant-numeric: tabular-nums; }
.details blockquote { margin: 0.5rem 0 0; white-space: pre-wrap; }

.controls { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; border: 0; padding: 0; margin: 0.5rem 0; font-size: 0.9rem; }
.controls legend { float: left; padding: 0; margin-right: 0.8rem; color: var(--quiet); }
.controls label { white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.3rem; align-items: center; margin: 0.4rem 0 0.7rem;
  font-size: 0.85rem; color: var(--quiet); list-style: none; padding: 0; }
.legend li { display: flex; align-items: center; gap: 0.4rem; }
.ramp { width: 7rem; height: 0.8rem; border-radius: 2px; background: linear-gradient(to right, var(--low), var(--high));
  border: 1px solid var(--line); }
.sample { padding: 0 0.35rem; border-radius: 3px; background: var(--low); color: var(--ink); }
.shade, .box.shade { background: color-mix(in oklab, var(--high) calc(var(--v, 0) * 100%), var(--low)); }

.passage { margin: 0 0 1.1rem; }
.passage h3 { margin: 0 0 0.1rem; color: var(--quiet); font-weight: 500; font-size: 0.85rem; }
.passage p { white-space: pre-wrap; line-height: 1.95; margin: 0; max-width: 46rem; }
.chunk { cursor: pointer; border-radius: 3px; padding: 0.16rem 0; margin-right: 2px; color: var(--ink);
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.chunk.expanded, .sample.expanded { box-shadow: 0 0 0 2px var(--mark); }
.chunk.expanded { margin: 0 4px 0 2px; }
.chunk.dropped, .sample.dropped { font-style: italic; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
.chosen { outline: 3px solid var(--focus); outline-offset: 1px; }

.strip { line-height: 0; padding: 2px; }
.run { cursor: default; }
.run[data-chunk] { cursor: pointer; }
.box { display: inline-block; width: 9px; height: 16px; margin: 1px; border-radius: 2px; vertical-align: bottom;
  background: var(--token); }
.box.template, .box.start { height: 5px; }
.box.start { background: var(--ink); }
.box.compressed { border-radius: 50%; height: 10px; width: 10px; margin-bottom: 4px; border: 1px solid var(--deep); }
.box.expanded { border: 2px solid var(--mark); }
.box.vectors { border-radius: 50%; height: 10px; }
.box.answer { background: var(--ink); }
.box.question { background: repeating-linear-gradient(45deg, var(--token) 0 2px, var(--page) 2px 4px); border: 1px solid var(--token); }
.legend .box { flex: none; margin: 0; }

.bars { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.55rem 0.9rem; margin: 0.7rem 0; align-items: center; }
.bars > span { font-size: 0.9rem; }
.bar { display: flex; align-items: center; min-width: 0; }
.bar .parts { display: flex; height: 1.5rem; min-width: 1px; }
.bar .parts i { display: block; height: 100%; border-right: 1px solid var(--page); overflow: hidden; font-style: normal;
  font-size: 0.75rem; line-height: 1.5rem; padding-left: 0.25rem; white-space: nowrap; color: #16181c; }
.bar b { margin-left: 0.5rem; white-space: nowrap; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
.c0 { background: #c9ccd1; } .c1 { background: #ffb000; } .c2 { background: #fe9d73; } .c3 { background: #dc7fb4; }
.c4 { background: #7fb0ff; } .c5 { background: #66c2a5; } .c6 { background: #eceef1; }
.swatch { display: inline-block; width: 0.8rem; height: 0.8rem; border-radius: 2px; margin-right: 0.45rem; vertical-align: -0.08rem;
  border: 1px solid var(--line); }
@media (max-width: 40rem) { .bars { grid-template-columns: minmax(0, 1fr); gap: 0.1rem; } .bars .bar { margin-bottom: 0.6rem; } }

.scroll { overflow-x: auto; max-width: 100%; padding: 3px; }
table { border-collapse: collapse; font-size: 0.88rem; }
table.plain { width: 100%; max-width: 46rem; }
table.plain th, table.plain td { text-align: left; padding: 0.22rem 0.8rem 0.22rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
table.plain th.number, table.plain td.number { text-align: right; }
table.plain td:first-child { overflow-wrap: normal; }
@media (max-width: 34rem) { table.plain { font-size: 0.8rem; } table.plain .what { display: none; } }
table.plain th.number { white-space: normal; }
table.plain thead th { color: var(--quiet); font-weight: 500; }
table.plain tfoot td, table.plain tfoot th { font-weight: 600; border-bottom: 0; }
.heat { border-collapse: separate; border-spacing: 1px; font-size: 0.8rem; }
.heat th { font-weight: 400; color: var(--quiet); text-align: right; padding: 0 0.5rem 0 0; white-space: pre; position: sticky;
  left: 0; background: var(--page); max-width: 9rem; overflow: hidden; text-overflow: ellipsis; }
.heat thead th { position: static; text-align: left; padding: 0 0.2rem; border-left: 2px solid var(--line); max-width: 0; }
.heat thead th:first-child { border: 0; max-width: 9rem; }
.heat td { min-width: var(--width, 13px); height: 15px; padding: 0; border-radius: 1px; cursor: pointer; }
.heat td.first { box-shadow: -2px 0 0 0 var(--line); }
.heat tr.mean td { height: 22px; }
.heat tr.mean th { color: var(--ink); font-weight: 600; }
.heat tr.shapes td { background: none; text-align: center; line-height: 0; cursor: default; }
.heat tr.shapes .box { margin: 0; }
.heat tr.shapes .expanded { height: 10px; width: 10px; background: none; }
details > summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 0.8rem; color: var(--quiet); font-size: 0.85rem; }
@media print { aside { display: none; } }
)css"
