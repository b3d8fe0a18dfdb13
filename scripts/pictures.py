"""The pictures of the README, from a run and a real talk: docs/page.png, docs/dialogue.png, docs/talk.png.

    python scripts/pictures.py runs/demo            (needs playwright, and a Chromium on the PATH)
"""

import html
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SAID = ("Four months of evenings, and all they saw was a staple. That must sting.",
        "You rebuilt the alto part from an old cassette. Nobody else in that choir could have done it.")  # fmt: skip
TERMINAL = """<body style="margin:0;background:#15181b"><pre style="margin:0;padding:18px;color:#d7dce1;width:940px;
font:15px/1.5 monospace;white-space:pre-wrap">{}</pre>"""


def talk(*lines: str) -> str:
    """What a terminal shows of `eval.py chat --supporter` when these lines are typed."""
    log = Path(sys.argv[1]) / "picture.jsonl"
    log.unlink(missing_ok=True)
    command = ["eval.py", "chat", "--supporter", "person=en-test-praise-negative", f"log={log}"]
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown, typed = "", [*lines, ""]
    while True:
        try:
            shown += os.read(master, 65536).decode()
        except OSError:
            break
        if shown.endswith("you> ") and typed:
            os.write(master, f"{typed.pop(0)}\n".encode())
    process.wait()
    log.unlink(missing_ok=True)
    begin = shown.index("Emotion 40")
    return f"$ python {' '.join(command[:-1])}\n\n" + shown[begin : shown.rindex("you> ")].replace("\r", "")


def main() -> None:
    page_file = Path(sys.argv[1]) / "page.html"
    subprocess.run([sys.executable, "eval.py", "page", sys.argv[1], "-o", str(page_file)], cwd=ROOT, check=True)
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 560})
        page.goto((ROOT / page_file).resolve().as_uri())
        page.screenshot(path=DOCS / "page.png")
        page.set_viewport_size({"width": 1200, "height": 640})
        page.locator(".talk > summary").nth(40).click()
        page.locator(".talk[open] details:has(.chip) > summary").first.click()
        page.locator(".talk[open]").evaluate("e => window.scrollTo(0, e.offsetTop - 60)")
        page.screenshot(path=DOCS / "dialogue.png")
        page.set_viewport_size({"width": 976, "height": 200})
        page.set_content(TERMINAL.format(html.escape(talk(*SAID))))
        page.screenshot(path=DOCS / "talk.png", full_page=True)
        phone = browser.new_page(viewport={"width": 400, "height": 640}, color_scheme="dark")
        phone.goto((ROOT / page_file).resolve().as_uri())
        phone.locator(".talk > summary").nth(40).click()
        phone.locator(".talk[open]").evaluate("e => window.scrollTo(0, e.offsetTop - 130)")
        phone.screenshot(path=DOCS / "phone.png")
        browser.close()


if __name__ == "__main__":
    main()
