"""Pages of HTML in a real browser, and text that tries to be more than text."""

import shutil
import subprocess
from pathlib import Path

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
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--no-first-run", "--window-size=1200,3000",
    ]  # fmt: skip
    screen = folder / "page.png"
    profile = [f"--user-data-dir={folder / 'profile'}"]
    for wish in (["--dump-dom"], [f"--screenshot={screen}"]):
        command = [str(BROWSER), *flags, *profile, *wish, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        if wish == ["--dump-dom"]:
            dom = done.stdout
    return dom, Image.open(screen)
