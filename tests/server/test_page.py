"""The page in a real headless Chromium: it streams, stops, edits, keeps, in two languages, and runs no model output."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.server.scripted import CONTEXT, ScriptedModel, running

pytestmark = pytest.mark.browser

ANSWER = [
    "**Par",
    "is** is the capital.\n\n",
    "```python\nprint(1 < 2)\n```\n\n",
    "- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |",
]
ATTACK = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> '
    "[x](javascript:window.hacked=1) **<b onclick=1>"
)
SHOTS = os.environ.get("HEADRACE_SCREENSHOTS")  # a folder to look at


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "lang=en-US", "window-size=1200,850",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ScriptedModel, str]]:
    model = ScriptedModel()
    with running(model) as address:
        yield model, address


@pytest.fixture
def model(served: tuple[ScriptedModel, str]) -> ScriptedModel:
    vars(served[0]).update(vars(ScriptedModel(words=list(ANSWER))))
    return served[0]


@pytest.fixture
def page(browser: Any, served: tuple[ScriptedModel, str], model: ScriptedModel) -> Any:
    """The page, opened for the first time."""
    browser.set_window_size(1200, 850)
    browser.get(served[1])
    browser.execute_script("localStorage.clear()")
    browser.get(served[1])
    until(lambda: browser.find_element(By.ID, "model").text == "tiny")
    return browser


def until(holds: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait until something holds; what it gave."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return value


def say(page: Any, text: str) -> None:
    page.find_element(By.ID, "input").send_keys(text + Keys.ENTER)


def answered(page: Any, count: int = 1) -> Any:
    """The newest answer, once it is whole."""
    until(lambda: len(page.find_elements(By.CSS_SELECTOR, ".assistant .stats")) == count)
    return page.find_elements(By.CSS_SELECTOR, ".assistant")[-1]


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.save_screenshot(str(Path(SHOTS) / f"{name}.png"))


def test_an_answer_streams_and_stays(page: Any, model: ScriptedModel) -> None:
    say(page, "Capital of France?")
    answer = answered(page)
    assert answer.find_element(By.TAG_NAME, "strong").text == "Paris"
    assert answer.find_element(By.CSS_SELECTOR, "pre code").text == "print(1 < 2)"
    assert [i.text for i in answer.find_elements(By.TAG_NAME, "li")] == ["one", "two"]
    assert [i.text for i in answer.find_elements(By.TAG_NAME, "td")] == ["1", "2"]
    stats = answer.find_element(By.CLASS_NAME, "stats").text
    assert "tok/s" in stats and "first token" in stats and "3 from cache" in stats
    assert page.find_element(By.ID, "gauge").text == f"11 / {CONTEXT}"
    shot(page, "desktop")
    page.refresh()
    assert "Paris" in until(lambda: page.find_elements(By.CSS_SELECTOR, ".assistant"))[0].text
    say(page, "And of Spain?")
    answered(page, 2)
    sent: Any = model.seen[-1].prompt
    assert [m["role"] for m in sent] == ["user", "assistant", "user"]
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def test_stop_keeps_what_was_said(page: Any, model: ScriptedModel) -> None:
    model.words, model.delay = ["word "] * 500, 0.02
    say(page, "Talk")
    until(lambda: page.find_elements(By.CSS_SELECTOR, ".assistant .body")[0].text.count("word") > 3)
    page.find_element(By.ID, "stop").click()
    answer = answered(page)
    assert 3 < answer.text.count("word") < 400
    assert answer.text.endswith("stopped")
    until(lambda: model.closed == 1)
    assert page.find_element(By.ID, "send").is_displayed()
    said = answer.find_element(By.CLASS_NAME, "body").text
    taken = len("Talk") + len(said) + 1  # the scripted model's tokens are bytes; what is shown ends without its space
    until(lambda: page.find_element(By.ID, "gauge").text == f"{taken} / {CONTEXT}")
    buttons = {b.text: b for b in page.find_elements(By.CSS_SELECTOR, ".actions button")}
    buttons["Edit"].click()
    until(lambda: page.find_element(By.ID, "gauge").text == f"0 / {CONTEXT}")


def test_a_reload_in_the_middle_of_an_answer_keeps_what_came(page: Any, model: ScriptedModel) -> None:
    model.words, model.delay = ["word "] * 500, 0.02
    say(page, "Talk")
    until(lambda: page.find_elements(By.CSS_SELECTOR, ".assistant .body")[0].text.count("word") > 3)
    page.refresh()
    until(lambda: model.closed == 1)
    assert until(lambda: page.find_elements(By.CSS_SELECTOR, ".user .body"))[0].text == "Talk"
    assert page.find_elements(By.CSS_SELECTOR, ".assistant .body")[0].text.count("word") > 3
    assert not page.find_elements(By.CSS_SELECTOR, ".error")


def test_copying_is_confirmed(page: Any, model: ScriptedModel) -> None:
    say(page, "Capital of France?")
    answer = answered(page)
    for secure in (True, False):  # a page over plain http from elsewhere has no clipboard of its own
        if not secure:
            page.execute_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        for button in answer.find_elements(By.CSS_SELECTOR, ".code button, .actions button:first-child"):
            until(lambda button=button: button.text == "Copy")
            button.click()
            until(lambda button=button: button.text == "Copied")
    field = page.find_element(By.ID, "input")
    field.send_keys(Keys.CONTROL + "v")
    assert until(lambda: field.get_attribute("value")).startswith("**Paris** is the capital.")


def test_edit_and_regenerate(page: Any, model: ScriptedModel) -> None:
    say(page, "First")
    answered(page)
    buttons = {b.text: b for b in page.find_elements(By.CSS_SELECTOR, ".actions button")}
    buttons["Regenerate"].click()
    until(lambda: len(model.seen) == 2)
    answered(page)
    page.find_element(By.CSS_SELECTOR, ".user .actions button:nth-of-type(2)").click()
    field = page.find_element(By.ID, "input")
    assert field.get_attribute("value") == "First"
    field.clear()
    say(page, "Second")
    until(lambda: len(model.seen) == 3)
    sent: Any = model.seen[-1].prompt
    assert [m["content"] for m in sent] == ["Second"]


def test_settings_reach_the_model(page: Any, model: ScriptedModel) -> None:
    page.find_element(By.ID, "settings-toggle").click()
    for name, value in (("system", "Be brief."), ("temperature", "0.5"), ("seed", "7"), ("max_tokens", "30")):
        page.find_element(By.ID, name).send_keys(value + Keys.TAB)
    page.find_element(By.ID, "show_probabilities").click()
    shot(page, "settings")
    model.words = [*ANSWER, "🦕"]
    say(page, "Hi")
    answered(page)
    asked = model.seen[-1]
    assert asked.sampling == {"temperature": 0.5, "seed": 7} and asked.max_tokens == 30
    assert asked.prompt[0] == {"role": "system", "content": "Be brief."}
    tokens = page.find_elements(By.CSS_SELECTOR, ".token")
    assert len(tokens) == len(ANSWER) + len("🦕".encode()) and "60.7 %" in tokens[0].get_attribute("title")
    assert "".join(token.get_attribute("textContent") for token in tokens) == "".join(model.words)
    shot(page, "probabilities")


def test_the_model_that_was_chosen_stays_chosen(browser: Any) -> None:
    first, second = ScriptedModel(), ScriptedModel(name="other")
    with running(first, second) as address:
        browser.get(address)
        browser.execute_script("localStorage.clear()")
        browser.get(address)

        def chosen() -> Any:
            return browser.find_element(By.ID, "model").get_property("value")

        until(lambda: chosen() == "tiny")
        browser.find_element(By.CSS_SELECTOR, "#model option[value=other]").click()
        browser.refresh()
        until(lambda: chosen() == "other")
        say(browser, "Hello")
        until(lambda: second.seen)
        assert not first.seen
    with running(ScriptedModel()) as address:  # one that is no longer served is not asked for
        browser.get(address)
        browser.execute_script("localStorage.setItem('headrace', JSON.stringify({ model: 'other' }))")
        browser.refresh()
        until(lambda: chosen() == "tiny")


def test_two_tabs_keep_each_others_conversations(page: Any, model: ScriptedModel) -> None:
    first, address = page.current_window_handle, page.current_url
    say(page, "One")
    answered(page)
    page.switch_to.new_window("tab")
    page.get(address)
    until(lambda: page.find_element(By.ID, "model").text == "tiny")
    page.find_element(By.ID, "new").click()
    say(page, "Two")
    answered(page)
    page.close()
    page.switch_to.window(first)
    until(lambda: len(page.find_elements(By.CSS_SELECTOR, ".row .open")) == 2)
    assert page.find_element(By.CSS_SELECTOR, ".user .body").text == "One"
    say(page, "Three")
    answered(page, 2)
    page.refresh()
    titles = until(lambda: [r.text for r in page.find_elements(By.CSS_SELECTOR, ".row .open")])
    assert titles == ["Two", "One"]


def test_conversations_apart(page: Any, model: ScriptedModel) -> None:
    say(page, "One")
    answered(page)
    page.find_element(By.ID, "new").click()
    assert not page.find_elements(By.CSS_SELECTOR, ".message")
    say(page, "Two")
    answered(page)
    assert [r.text for r in page.find_elements(By.CSS_SELECTOR, ".row .open")] == ["Two", "One"]
    page.find_elements(By.CSS_SELECTOR, ".row .open")[1].click()
    assert page.find_element(By.CSS_SELECTOR, ".user .body").text == "One"
    page.find_elements(By.CSS_SELECTOR, ".row .remove")[0].click()
    page.switch_to.alert.accept()
    until(lambda: [r.text for r in page.find_elements(By.CSS_SELECTOR, ".row .open")] == ["One"])


def test_chinese_dark_and_a_phone(page: Any, model: ScriptedModel) -> None:
    model.words = ["北京是", "中国的", "首都。"]
    page.find_element(By.ID, "language").click()
    assert page.find_element(By.ID, "new").text == "新对话"
    page.find_element(By.ID, "theme").click()
    page.set_window_size(500, 850)  # Chromium's narrowest window
    say(page, "中国的首都是哪里？")
    assert "首词元" in answered(page).text
    shot(page, "phone")
    page.find_element(By.ID, "menu").click()
    until(lambda: page.find_element(By.ID, "sidebar").rect["x"] >= 0)
    shot(page, "phone-menu")
    width = page.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert width <= 0, "the page is wider than the phone"
    for button in page.find_elements(By.CSS_SELECTOR, ".actions button"):
        assert button.rect["height"] < 30, f"{button.text} is broken over two lines"


def test_a_model_cannot_run_anything(page: Any, model: ScriptedModel) -> None:
    model.words = list(ATTACK)
    say(page, ATTACK)
    answer = answered(page)
    assert "onerror" in answer.text  # shown as the text that it is
    assert page.execute_script("return window.hacked === undefined")
    assert not page.find_elements(By.CSS_SELECTOR, "#log img, #log script, #log a[href^=javascript]")


def test_errors_are_told(page: Any, model: ScriptedModel) -> None:
    model.full = True
    say(page, "Hi")
    error = until(lambda: page.find_elements(By.CSS_SELECTOR, ".error"))[0]
    assert error.text == "too many requests wait"
    assert page.find_element(By.ID, "send").is_displayed()
