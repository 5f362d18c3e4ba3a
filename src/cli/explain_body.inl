R"html(<body>
<header>
<p class="eyebrow">refrag &middot; how an answer came about</p>
<label class="chooser" id="chooser" hidden>Question <select id="questions"></select></label>
<h1 id="question"></h1>
<p class="reply" id="answer"></p>
<dl class="facts" id="facts"></dl>
</header>
<noscript><p>This page draws itself with the script that it holds: please allow scripts for it.</p></noscript>
<div class="columns">
<main>
<section id="passages-section" aria-labelledby="passages-title">
<h2 id="passages-title">Passages</h2>
<p class="quiet" id="passages-note"></p>
<fieldset class="controls" id="shading"><legend>Shade by</legend></fieldset>
<ul class="legend" id="passages-legend"></ul>
<div id="passages"></div>
</section>
<section aria-labelledby="strip-title">
<h2 id="strip-title">What the decoder read</h2>
<p class="quiet">One box a position, in order. A chunk takes one position when it is compressed, and one for each of its
tokens when it is expanded.</p>
<ul class="legend" id="strip-legend"></ul>
<div class="strip" id="strip" role="group" aria-label="The decoder's input; arrow keys go from chunk to chunk"></div>
<div class="bars" id="positions"></div>
</section>
<section aria-labelledby="time-title">
<h2 id="time-title">Time to the first token</h2>
<p class="quiet" id="time-note"></p>
<div class="bars" id="times"></div>
<div class="scroll"><table class="plain" id="times-table"></table></div>
</section>
<section aria-labelledby="attention-title">
<h2 id="attention-title">Where the answer looked</h2>
<p class="quiet" id="attention-note"></p>
<div id="attention">
<div class="scroll"><table class="plain" id="shares"></table></div>
<h3>Chunk by chunk</h3>
<fieldset class="controls" id="attention-rows"><legend>Rows</legend></fieldset>
<fieldset class="controls" id="attention-value"><legend>Value</legend></fieldset>
<p class="quiet" id="attention-scale"></p>
<div class="scroll"><table class="heat" id="heat"></table></div>
</div>
</section>
<section id="table-section" aria-label="All chunks">
<details><summary>Every chunk as a table</summary>
<div class="scroll"><table class="plain" id="chunks-table"></table></div>
</details>
</section>
</main>
<aside aria-label="The chosen chunk"><div class="details" id="details" aria-live="polite"></div></aside>
</div>
<footer id="footer"></footer>
)html"
