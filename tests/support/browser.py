"""A headless Chromium on the page that a server of models has."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

SECONDS = 60
"""For which answers are awaited; what waits in vain fails."""

_DRAWN_SPANS = """
const pieces = new Map();
for (const mark of arguments[0].querySelectorAll('[data-start]')) {
  const copy = mark.cloneNode(true);
  copy.querySelectorAll('.chip').forEach((chip) => chip.remove());
  const key = [mark.dataset.start, mark.dataset.end, mark.dataset.label].join(' ');
  pieces.set(key, (pieces.get(key) ?? '') + copy.textContent);
}
return [...pieces].map(([key, text]) => [...key.split(' ').slice(0, 2).map(Number), text]);
"""

_TEXT = """
const copy = arguments[0].cloneNode(true);
copy.querySelectorAll('.chip').forEach((chip) => chip.remove());
return copy.textContent;
"""


def needed(program: str) -> str:
    """Return where a program is; without it the test is skipped, or fails where FLAIR_PEFT_NEEDS_BROWSER is set."""
    found = shutil.which(program)
    if found is None:
        give_up = pytest.fail if os.environ.get("FLAIR_PEFT_NEEDS_BROWSER") else pytest.skip
        give_up(f"no {program} on this machine: CONTRIBUTING.md says how to get a browser")
    return str(found)


@contextlib.contextmanager
def chromium(*, width: int = 1280, height: int = 900) -> Iterator[Chrome]:
    """Start the browser, or skip the test where there is none."""
    browser, driver_program = needed("chromium"), needed("chromedriver")
    options = ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--disable-component-update",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(driver_program))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """What a reader does and sees."""

    def __init__(self, driver: Chrome, address: str) -> None:
        """Open the page as on a desk, in light."""
        self.driver, self.address = driver, address
        self.resize(1280, 900)
        self.prefer("light")
        driver.get(address)
        self.wait(lambda: self.all(".model") or self.all("#models .problem"))

    def resize(self, width: int, height: int) -> None:
        """Give the window another size; that of a phone makes it one."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str, *, motion: str = "no-preference") -> None:
        """Let the system prefer light or dark."""
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def wait(self, is_there: Callable[[], Any]) -> Any:
        """Return what ``is_there`` returns as soon as that is true."""
        return WebDriverWait(self.driver, SECONDS, poll_frequency=0.02).until(lambda _: is_there())

    def one(self, selector: str) -> WebElement:
        """Return an element."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        """Return all elements that a selector finds."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def script(self, code: str, *arguments: Any) -> Any:
        """Return what code returns in the page."""
        return self.driver.execute_script(code, *arguments)

    def write(self, text: str, field: str = "text") -> None:
        """Paste a text into a field."""
        self.script("document.getElementById(arguments[0]).value = arguments[1]", field, text)

    def tick(self, *names: str) -> None:
        """Tick these models and no others."""
        for model in self.all(".model"):
            box = model.find_element(By.CSS_SELECTOR, "input")
            if box.is_selected() != (model.find_element(By.CSS_SELECTOR, "label").text in names):
                self.script("arguments[0].click()", box)

    def run(self, text: str | None = None, models: Sequence[str] = ()) -> None:
        """Run a text, and return when there is an answer."""
        if models:
            self.tick(*models)
        if text is not None:
            self.write(text)
        self.one("#run").click()
        self.wait_for_answer()

    def wait_for_answer(self) -> None:
        """Return when nothing is under way."""
        self.wait(lambda: not self.all("[aria-busy]"))

    @property
    def status(self) -> str:
        """What is said beside the button."""
        return self.one("#status").text

    def panels(self, model: str) -> list[WebElement]:
        """Return what is shown of a model: one panel, or two with and without the adapter."""
        groups = [group for group in self.all(".group") if group.find_element(By.CSS_SELECTOR, "h2").text == model]
        assert len(groups) == 1
        return groups[0].find_elements(By.CSS_SELECTOR, "article")

    def spans(self, panel: WebElement) -> list[tuple[int, int, str]]:
        """Return start and end of what is marked, as the server counts them, and the text in the mark."""
        return sorted(tuple(span) for span in self.script(_DRAWN_SPANS, panel))

    def text(self, panel: WebElement) -> str:
        """Return the text that was read, without what was said of it."""
        return self.script(_TEXT, panel.find_element(By.CSS_SELECTOR, ".read"))

    def complaints(self) -> list[str]:
        """Return what the browser complained of since the last call, apart from answers that were no success."""
        log = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in log if "the server responded with a status of" not in message]
