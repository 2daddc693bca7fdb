"""A real headless browser, where the machine has one: what it makes of a page, as it tells itself."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
PROBE = """
<script>
addEventListener("load", () => {
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  const all = (what) => [...document.querySelectorAll(what)];
  const found = {
    titles: all("h2").map((e) => e.textContent),
    tables: all("table").map(box),
    plots: all("svg").map(box),
    texts: all("svg text").filter((e) => box(e)[0] > 0).map((e) => e.textContent),
    bars: all("svg path").filter((e) => box(e)[1] > 0).length,
    loaded: performance.getEntriesByType("resource").map((e) => e.name),
    errors: window.faults,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""
FAULTS = (
    "<script>window.faults = []; addEventListener('error', (e) => faults.push(String(e)), true);</script>"
)


def find() -> str | None:
    """The browser's program, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def seen(program: str, page: str, folder: Path) -> dict[str, Any]:
    """What the browser lays out of a page's text: sizes of tables and plots, texts, resources, faults.

    The page is opened from a file, with a script of ours that measures it; every host name fails.
    """
    path = folder / "page.html"
    path.write_text(page.replace("<head>", f"<head>{FAULTS}").replace("</body>", f"{PROBE}</body>"), "utf-8")
    words = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1200,900", "--dump-dom", path.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    (text,) = re.findall(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    found: dict[str, Any] = json.loads(html.unescape(text))
    return found
