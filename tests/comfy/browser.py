"""Opens workflow files in ComfyUI's real frontend and prints what happened as JSON. Needs playwright and Chromium.

python browser.py URL CHROMIUM PICTURES RENDERER FILE...
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
STATE = """async () => {
  const nodes = window.app.graph._nodes;
  const prompt = (await window.app.graphToPrompt()).output;
  return {
    types: nodes.map(n => n.type),
    missing: nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type),
    prompt: Object.values(prompt).map(n => [n.class_type, n.inputs]),
    drawn: document.querySelectorAll("[data-node-id]").length,
  };
}"""


def main(url: str, chromium: str, pictures: str, renderer: str, *files: str) -> None:
    for setting, value in (("Comfy.TutorialCompleted", True), ("Comfy.VueNodes.Enabled", renderer == "vue")):
        _post(f"{url}/settings/{setting}", value)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, headless=True, args=FLAGS, viewport={"width": 1600, "height": 900}
        )
        page = context.new_page()
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function("() => window.app?.graph && window.app?.extensionManager", timeout=120_000)
        page.wait_for_timeout(2000)
        opened = {file: _open(page, file, Path(pictures) / f"{Path(file).stem}_{renderer}.png") for file in files}
        context.close()
    sys.stdout.write(json.dumps({"opened": opened, "errors": errors}))


def _open(page: Page, file: str, picture: Path) -> dict:
    page.evaluate("wf => window.app.loadGraphData(wf)", json.loads(Path(file).read_text(encoding="utf-8")))
    page.wait_for_timeout(2000)
    page.screenshot(path=str(picture))
    return page.evaluate(STATE)


def _post(url: str, value: object) -> None:
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(value).encode(), headers)):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
