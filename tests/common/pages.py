"""Pages of HTML in a real browser, and text that tries to be more than text."""

import html
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "<script>document.title='pwned'</script>",
    '"><img src=x onerror="document.title=\'pwned\'">',
    "</figcaption></figure><h2>forged</h2>",
    "&lt;b&gt; stays as written",
    "left \u202eright to left\u202c again",
    "\u0633\u0644\u0627\u0645\u200c\u0647\u0627 and \u05e9\u05dc\u05d5\u05dd",
    "tab\tand\nline\x00\x1b[31m",
    "👩‍👩‍👧 \U000e0041",
)


def browse(page: Path, folder: Path) -> tuple[str, Image.Image]:
    """Return the DOM and a screenshot of the page in a new browser without a network."""
    screen = folder / "page.png"
    dom = _chromium(page, folder, "--dump-dom")
    _chromium(page, folder, f"--screenshot={screen}")
    return dom, Image.open(screen)


def audit(pages: Sequence[Path], views: Sequence[tuple[int, str]], folder: Path) -> list[dict[str, Any]]:
    """Return what axe-core finds in each page, in each view: a width in pixels, and light or dark.

    A result has the page, the width, whether it is dark, how much wider the page is than that, the rules that it passes
    and those that it violates, with their impact and the elements.
    """
    axe, frames = _axe(folder), ""
    for number, page in enumerate(pages):
        text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))  # it forbids the script
        scripts = f'<script src="{axe.as_uri()}"></script><script>{_AUDIT % json.dumps(page.name)}</script>'
        copy = folder / f"audited_{number}.html"
        copy.write_text(text.replace("</head>", f"{scripts}</head>", 1), encoding="utf-8")
        for width, scheme in views:
            style = f"width: {width}px; height: 900px; border: 0; color-scheme: {scheme}"
            frames += f'<iframe src="{copy.as_uri()}" style="{style}"></iframe>'
    whole = folder / "audit.html"
    whole.write_text(f"<!doctype html><body>{frames}<script>{_COLLECT % (len(pages) * len(views))}</script>")
    dom = _chromium(whole, folder, "--dump-dom", "--virtual-time-budget=100000")
    return json.loads(html.unescape(re.search("<pre>(.*)</pre>", dom, re.DOTALL)[1]))  # type: ignore[index]


_AUDIT = """addEventListener("load", async () => {
  const found = await axe.run(), root = document.documentElement
  parent.postMessage({page: %s, width: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches,
    wider: root.scrollWidth - root.clientWidth, passes: found.passes.map(rule => rule.id),
    violations: found.violations.map(one => [one.id, one.impact, one.nodes.map(node => node.html)])}, "*")
})"""
_COLLECT = """const found = []
addEventListener("message", ({data}) => {
  if (found.push(data) < %d) return
  document.body.innerHTML = "<pre></pre>"
  document.querySelector("pre").textContent = JSON.stringify(found)
})"""


def _axe(folder: Path) -> Path:
    """Return axe-core from npm; skip the test where it cannot be had."""
    command = ["npm", "pack", "axe-core@4.14.1", "--silent", "--fetch-retries=0"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"axe-core cannot be had from npm: {error}")
    with tarfile.open(folder / done.stdout.split()[-1]) as packed:
        packed.extract("package/axe.min.js", folder, filter="data")
    return folder / "package" / "axe.min.js"


def _chromium(page: Path, folder: Path, *wishes: str) -> str:
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--no-first-run", "--window-size=1200,3000", f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    command = [str(BROWSER), *flags, *wishes, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
