"""Makes the pictures of README.md and of the site: the server's page after questions to the demo model.

    python tools/page_picture.py

Writes docs/assets/page-light.png and page-dark.png. Needs the extras `server` and `clients`, and Chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/clients"))

from browser import page, serving, until  # noqa: E402

from flash_moe import Model  # noqa: E402
from flash_moe.server.admission import Admission  # noqa: E402
from flash_moe.server.app import build  # noqa: E402
from flash_moe.server.service import Service  # noqa: E402

QUESTIONS = ("What is an expert?", "How much memory do I need for Qwen3.5-397B?", "What is the page cache?")


def main() -> None:
    with (
        Model.load("demo", experts_per_token=None) as model,
        serving(build(Service(model, ["demo"], Admission(1, 1)))) as address,
    ):
        for scheme in ("light", "dark"):
            model.expert_store.evict()  # so that the picture shows reads from the disk, too
            size = {"width": 1000, "height": 570}
            with page(address, viewport=size, color_scheme=scheme, device_scale_factor=1.5) as tab:
                for asked, question in enumerate(QUESTIONS, 1):
                    tab.fill("#input", question)
                    tab.keyboard.press("Enter")
                    until(tab, f"document.querySelectorAll('.reply .note').length == {asked}", 60)
                file = ROOT / f"docs/assets/page-{scheme}.png"
                tab.screenshot(path=file)
                print(file.relative_to(ROOT), f"{file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
