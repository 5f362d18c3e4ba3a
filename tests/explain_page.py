#!/usr/bin/env python3
"""Opens a page of `refrag run --explain` in headless Chromium and looks at it: what it shows, errors, requests,
light and dark, narrow and wide, keyboard, contrast. Python's own library alone; Chromium is driven through
--remote-debugging-pipe. Prints each thing that is wrong; the exit code is 1 where there is one.

    tests/explain_page.py CHROMIUM PAGE.html [--shots DIRECTORY]
"""
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

WIDTHS = (360, 768, 1600)
KEYS = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}

# Of text on its background, by WCAG's formula. A canvas turns any colour that CSS can name into sRGB.
CONTRAST = """
(() => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
  const rgb = (color, under) => {
    for (const c of [under, color]) { context.fillStyle = c; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (c) => c.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const page = getComputedStyle(document.body).backgroundColor;
  let worst = [99, ""];
  for (const e of document.querySelectorAll("h1, h2, h3, p, dt, dd, td, th, li, label, small, summary, .chunk, .bar i, b, footer")) {
    if (!e.textContent.trim() || e.offsetParent === null) continue;
    let under = page;
    const style = getComputedStyle(e);
    for (let up = e; up; up = up.parentElement) {
      const c = getComputedStyle(up).backgroundColor;
      if (c !== "rgba(0, 0, 0, 0)") { under = c; break; }
    }
    const back = rgb(under, page), pair = [light(back), light(rgb(style.color, `rgb(${back})`))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < worst[0]) worst = [ratio, `${e.tagName} ${e.className}: ${e.textContent.slice(0, 40)}`];
  }
  return worst;
})()
"""


class Browser:
    def __init__(self, chromium, profile):
        to_browser, from_browser = os.pipe(), os.pipe()
        # Away from 3 and 4, which the browser reads and writes.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_browser[0], from_browser[1])]

        def as_3_and_4():
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        options = ["--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
                   "--disable-dev-shm-usage", "--disable-extensions", f"--user-data-dir={profile}"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")
        self.process = subprocess.Popen([chromium, *options, "about:blank"], preexec_fn=as_3_and_4, pass_fds=(3, 4),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (to_browser[0], from_browser[1], *ends):
            os.close(fd)
        self.write_to, self.read_from = to_browser[1], from_browser[0]
        self.buffer, self.n, self.session, self.events = b"", 0, None, []

    def receive(self, deadline):
        while b"\0" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.read_from], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self.read_from, 1 << 16)
            if not data:
                raise RuntimeError("the browser has ended")
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.n += 1
        message = {"id": self.n, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.write_to, data):]
        deadline = time.monotonic() + 60
        while True:
            answer = self.receive(deadline)
            if answer.get("id") == self.n:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def open(self, url):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 60
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive(deadline))

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def look(self, width, scheme, height=900):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def press(self, key):
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def complaints(self):
        found = []
        for event in self.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(f"exception: {parameters['exceptionDetails'].get('exception', {}).get('description')}")
            elif method == "Runtime.consoleAPICalled":
                found.append(f"console.{parameters['type']}: {parameters['args']}")
            elif method == "Log.entryAdded":
                found.append(f"log: {parameters['entry']['text']}")
        return found

    def requests(self):
        return [event["params"]["request"]["url"] for event in self.events
                if event.get("method") == "Network.requestWillBeSent"]

    def close(self):
        self.process.kill()
        self.process.wait()


class Check:
    def __init__(self):
        self.failed = 0

    def __call__(self, what, found, expected):
        if found != expected:
            self.failed += 1
            print(f"{what}: expected {str(expected)[:300]!r}, found {str(found)[:300]!r}")


def text_of(q):
    """The passages' text as the page shows it, chunk after chunk."""
    return "".join(chunk["text"] for chunk in q["chunks"])


def check_content(browser, check, q):
    count = lambda selector: browser.value(f"document.querySelectorAll({json.dumps(selector)}).length")
    check("question", browser.value("document.getElementById('question').textContent"), q["question"])
    check("answer", browser.value("document.getElementById('answer').textContent"), q["answer"] or "(nothing)")
    check("chunks", count("#passages .chunk"), len(q["chunks"]))
    check("passages", count("#passages .passage"), len(q["documents"]))
    check("passages' text", browser.value("[...document.querySelectorAll('#passages p')].map((p) => p.textContent).join('')"),
          text_of(q))
    check("expanded chunks", count("#passages .chunk.expanded"), q["n_expanded"])
    check("boxes of the strip", count("#strip .box"), q["positions"] + max(0, q["new_tokens_shown"] - 1))
    check("rows of the table", count("#chunks-table tbody tr"), len(q["chunks"]))
    check("images", count("img, iframe, object, embed, link"), 0)
    if "error" in q["full"]:
        check("full context said to be missing", q["full"]["error"] in browser.value("document.getElementById('times').textContent"), True)
    in_input = sum(1 for chunk in q["chunks"] if chunk["n_positions"] > 0)
    if "error" in q["attention"] or in_input == 0:
        return
    for rows, table in (("layer", "by_layer"), ("token", "by_token")):
        browser.value(f"document.querySelector('#attention-rows [value={rows}]').click()")
        check(f"heat map by {rows}", count("#heat td.shade"), (len(q["attention"][table]) + 1) * in_input)
    shares = browser.value("[...document.querySelectorAll('#shares tbody tr td:nth-child(2)')].map((td) => parseFloat(td.textContent))")
    check("shares add up to 100%, each rounded to 3 digits", abs(sum(shares) - 100) < 0.05 * len(shares), True)


def check_keyboard(browser, check, q):
    active = "(document.activeElement.className || '') + '|' + (document.activeElement.dataset.chunk ?? '')"
    for part in (".chunk", ".run") if len(q["chunks"]) > 1 else ():
        browser.value(f"document.body.focus(); document.querySelector('{part}[tabindex=\"0\"]') !== null")
        for _ in range(40):
            browser.press("Tab")
            if browser.value(f"document.activeElement.matches('{part}')"):
                break
        check(f"Tab reaches a {part}", browser.value(f"document.activeElement.matches('{part}')"), True)
        first = int(browser.value(active).split("|")[1])
        browser.press("ArrowRight")
        second = int(browser.value(active).split("|")[1])
        check(f"ArrowRight goes on in {part}", second > first, True)
        check("details follow the focus", browser.value("document.querySelector('#details h2').textContent"),
              f"Chunk {second + 1} of {len(q['chunks'])}")
        check("the focus can be seen", browser.value("getComputedStyle(document.activeElement).outlineStyle"), "solid")
        check("the chunk is marked everywhere", browser.value("document.querySelectorAll('.chosen').length") >= 1, True)
        browser.press("Home")
        check(f"Home goes to the first {part}", int(browser.value(active).split("|")[1]), first)


def main():
    arguments = sys.argv[1:]
    shots = arguments[arguments.index("--shots") + 1] if "--shots" in arguments else None
    chromium, page = arguments[:2]
    check, profile = Check(), tempfile.mkdtemp()
    browser = Browser(chromium, profile)
    try:
        url = "file://" + os.path.abspath(page)
        browser.open(url)
        data = json.loads(browser.value("document.getElementById('data').textContent"))
        for index, q in enumerate(data["questions"]):
            q["new_tokens_shown"] = len(q["answer_tokens"])
            if index > 0:
                browser.value(f"(() => {{ const s = document.getElementById('questions'); s.value = {index};"
                              "s.dispatchEvent(new Event('change')); })()")
            check_content(browser, check, q)
            for width in WIDTHS:
                for scheme in ("light", "dark"):
                    browser.look(width, scheme)
                    overflow = browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                    check(f"overflow at {width} pixels", overflow, 0)
                    worst, where = browser.value(CONTRAST)
                    check(f"contrast, {scheme}, {width} pixels: {where}: {worst:.2f}", worst >= 4.5, True)
                    if shots:
                        whole = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
                        with open(os.path.join(shots, f"{index}-{width}-{scheme}.png"), "wb") as out:
                            out.write(base64.b64decode(whole))
            schemes = []
            for scheme in ("light", "dark"):
                browser.look(1600, scheme)
                schemes.append(browser.value("getComputedStyle(document.body).backgroundColor"))
            check("dark is another background", schemes[0] != schemes[1], True)
            check_keyboard(browser, check, q)
        if not data["questions"]:
            check("a page has a question", False, True)
        check("requests", set(browser.requests()), {url})
        check("errors and messages", browser.complaints(), [])
        check("a script from a passage", browser.value("typeof window.hacked"), "undefined")
        # Even markup that got in could run nothing and fetch nothing.
        browser.value("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://localhost:9/x\" onerror=\"window.hacked = 1\">')")
        browser.value("new Promise((done) => setTimeout(done, 300))")
        time.sleep(0.3)
        check("an inline handler", browser.value("typeof window.hacked"), "undefined")
        check("the policy refused it", any("Content Security Policy" in text for text in browser.complaints()), True)
    finally:
        browser.close()
        shutil.rmtree(profile, ignore_errors=True)
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
