"""A Chromium without a window, and a page as it shows it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Chromium connects to its makers unless these switch it off.
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
CHROMIUM += ("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")


class Browser:
    """Debian's or anybody's Chromium without a window, in a thread of its own.

    Playwright keeps an event loop in its thread, where `asyncio.run` of other tests would meet it.
    """

    def __init__(self, program: str, start: Callable[[], Any]) -> None:
        self.program, self.start = program, start
        self._thread = ThreadPoolExecutor(1, "browser")
        self._playwright = self.do(lambda: start().start())
        self.chromium = self.do(
            lambda: self._playwright.chromium.launch(executable_path=program, args=list(CHROMIUM))
        )

    def do(self, what: Callable[[], Any]) -> Any:
        """Have something done where the browser may be spoken to."""
        return self._thread.submit(what).result(timeout=120)

    def close(self) -> None:
        """End it, with its processes."""
        self.do(self.chromium.close)
        self.do(self._playwright.stop)
        self._thread.shutdown()


@dataclass
class Page:
    """A page as a browser shows it. `do(lambda page: ...)` gets playwright's own page."""

    browser: Browser
    page: Any
    errors: list[str] = field(default_factory=list)  # of the console: errors and warnings
    page_errors: list[str] = field(default_factory=list)  # exceptions that nobody caught
    requests: list[str] = field(default_factory=list)  # other than the file itself and data: addresses
    dialogs: list[str] = field(default_factory=list)

    def do(self, what: Callable[[Any], Any]) -> Any:
        """`what(page)`, in the browser's thread."""
        return self.browser.do(lambda: what(self.page))

    def ask(self, script: str, value: object = None) -> Any:
        """What a JavaScript expression, or a function of `value`, gives in the page."""
        return self.do(lambda page: page.evaluate(script, value))

    def screenshot(self, path: Path) -> Path:
        """A PNG of the whole page."""
        self.do(lambda page: page.screenshot(path=path, full_page=True))
        return path
