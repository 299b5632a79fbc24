"""How tests read a page: its source as a browser would, and a browser itself where there is one."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page with")


class Page(HTMLParser):
    """What a reader of the page's source meets: tags, attributes, addresses that a browser would follow, plain text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        followed = ("src", "href", "data", "poster", "srcset", "action")
        self.addresses += [(tag, value or "") for name, value in attrs if name in followed]

    def handle_data(self, data: str) -> None:
        self.text += data


def open_in_chromium(address: str, folder: Path) -> tuple[str, str]:
    """The page's DOM after loading and what Chromium wrote to its log; its network log lies in `folder`."""
    folder.mkdir(exist_ok=True)
    quiet = ("quic", "background-networking", "component-update", "sync", "default-apps", "extensions")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # the browser's own errands stay on this machine too
    command += [f"--disable-{name}" for name in quiet]
    command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'network.json'}", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def requested(folder: Path) -> list[str]:
    """Addresses on the network that the page, not the browser for its own ends, asked for."""
    log = json.loads((folder / "network.json").read_text())
    started = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [event.get("params", {}) for event in log["events"] if event["type"] == started]
    addresses = [job["url"] for job in jobs if job.get("initiator", "not an origin") != "not an origin"]
    return [address for address in addresses if not address.startswith(("file:", "data:"))]
