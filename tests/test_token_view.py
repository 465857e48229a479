"""The token-level page: what is in the file, and what a real browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")  # fastdpo.cache writes the file

from fastdpo.study import results, token_view
from fastdpo.study.tokens import TokenRow, TokenSide

ATTACK = ["</script><script>", 'document.title = "owned"', "</script>", "<!--", "<img src=x onerror=alert(1)>", "&lt;"]
ODD = ["\u2028", "\u2029", "\ud800", "Ünïcödé", "", "\n", "{{script}}", "\\", '"']


def side(tokens: list[str], moved: float, reference: bool = True) -> TokenSide:
    """Token i: log p policy -2, start -2 - moved, reference -2 - moved for even i and -2 + moved for odd."""
    n = len(tokens)
    signs = [moved if i % 2 == 0 else -moved for i in range(n)]
    return TokenSide(tokens, [-2.0] * n, [-2.0 - moved] * n, [-2.0 - s for s in signs] if reference else None)


def rows(count: int, reference: bool = True) -> list[TokenRow]:
    """Row i: i + 2 chosen tokens that moved by (i + 1) / 8, one rejected token that did not."""
    return [
        TokenRow(
            f"prompt number {i}",
            side([f" word{i}"] * (i + 2), (i + 1) / 8, reference),
            side(["no"], 0.0, reference),
            0.5,
        )
        for i in range(count)
    ]


ATTACKED = TokenRow("<script>alert(1)</script>", side(ATTACK, 1.0), side(ODD, 1.0), 0.1)


class Elements(HTMLParser):
    """The page as a browser cuts it: (tag, attributes, text inside) of each element with text of its own kind."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict, str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag):
        self.found.append((f"/{tag}", {}, ""))

    def handle_data(self, data):
        if self.found:
            tag, attrs, text = self.found[-1]
            self.found[-1] = (tag, attrs, text + data)

    def of(self, tag: str) -> list[tuple[dict, str]]:
        return [(attrs, text) for name, attrs, text in self.found if name == tag]


def page_of(tmp_path: Path, some: list[TokenRow], title: str = "a page", notes: list[str] = ()) -> str:  # type: ignore[assignment]
    path = tmp_path / "page.html"
    token_view.write(path, some, title, notes)
    return path.read_text(encoding="utf-8")


# --- the file --------------------------------------------------------------------------------------------------------


def test_text_of_the_data_is_inert_and_comes_back_whole(tmp_path):
    title = "</title><script>alert(2)</script> & more"
    page = page_of(tmp_path, [ATTACKED], title, ["<b>note</b>"])
    elements = Elements(page)
    data, script = elements.of("script")
    assert data[0] == {"id": "data", "type": "application/json"} and script[0] == {}
    assert not elements.of("img") and not elements.of("b")
    assert elements.of("title")[0][1] == title
    assert not set(data[1]) & set("<>&\u2028\u2029") and data[1].isascii()
    (row,) = json.loads(data[1])["rows"]
    assert (row["prompt"], row["chosen"]["tokens"], row["rejected"]["tokens"]) == (ATTACKED.prompt, ATTACK, ODD)
    assert (
        row["chosen"]["policy"] == ATTACKED.chosen.policy
        and row["rejected"]["reference"] == ATTACKED.rejected.reference
    )


def test_nothing_is_loaded_and_nothing_else_runs(tmp_path):
    page = page_of(tmp_path, rows(2))
    elements = Elements(page)
    policy = next(attrs["content"] for attrs, _ in elements.of("meta") if "http-equiv" in attrs)
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'" and "unsafe" not in policy
    for directive, text in (("style-src", elements.of("style")[0][1]), ("script-src", elements.of("script")[1][1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert allowed[directive] == f"'sha256-{digest}'"
    assert not re.search(r"\b(src|href)=|url\(|https?:|@import", page)


def test_references_and_rounding(tmp_path):
    def data(some):
        return json.loads(Elements(page_of(tmp_path, some)).of("script")[0][1])

    assert data(rows(1))["bases"] == ["reference", "start"]
    without = data(rows(1, reference=False))
    assert without["bases"] == ["start"] and without["rows"][0]["chosen"]["reference"] is None
    assert data([]) == {"bases": ["start"], "rows": []}
    precise = TokenRow("", TokenSide(["a"], [-1 / 3], [-2 / 3], None), TokenSide([], [], [], None), 0.1)
    assert data([precise])["rows"][0]["chosen"]["policy"] == [-0.3333]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (TokenSide(["a", "b"], [-1.0], [-1.0, -1.0], None), r"rows\[1\].chosen.policy: expected one number a token, 2"),
        (TokenSide(["a"], [-1.0], [], None), r"rows\[1\].chosen.start: expected one number a token, 1, got 0"),
        (TokenSide(["a"], [-1.0], [-1.0], [float("-inf")]), r"rows\[1\].chosen.reference: expected finite"),
        (TokenSide(["a"], [-1.0], [-1.0], None), "expected a reference in every completion or in none"),
    ],
)
def test_bad_rows(tmp_path, chosen, message):
    good = rows(1)[0]
    with pytest.raises(ValueError, match=message):
        token_view.write(tmp_path / "page.html", [good, good._replace(chosen=chosen)], "x")
    assert not (tmp_path / "page.html").exists()


def test_of_study(tmp_path, monkeypatch):
    asked = []
    load = lambda folder, id: asked.append((folder, id)) or rows(3)  # noqa: E731
    monkeypatch.setattr(results, "load_tokens", load)
    token_view.of_study(tmp_path, "sigmoid-ratio-start-beta0.1-seed0", tmp_path / "out.html")
    assert asked == [(tmp_path, "sigmoid-ratio-start-beta0.1-seed0")]
    assert Elements((tmp_path / "out.html").read_text()).of("title")[0][1] == "sigmoid-ratio-start-beta0.1-seed0"


# --- in a browser ----------------------------------------------------------------------------------------------------

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, driven by selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture
def see(browser, tmp_path):
    """Open the page of some rows; the test fails on whatever the console says."""
    from selenium.webdriver.support.ui import WebDriverWait

    def opener(some: list[TokenRow]):
        path = tmp_path / "page.html"
        token_view.write(path, some, "a page")
        browser.get(path.as_uri())
        # On a busy machine `get` may return while a long page is still being parsed
        WebDriverWait(browser, 60).until(lambda _: text(browser, "#count"))
        return browser

    yield opener
    assert browser.get_log("browser") == []


in_browser = pytest.mark.xdist_group("browser")  # one worker, one browser
NUMBERS = "return [...document.querySelectorAll('.pair h2')].map(x => Number(x.textContent.split(' ')[1]))"


def choose(browser, id: str, value: str) -> None:
    """Set a control as a user does: value and event."""
    script = """const control = document.getElementById(arguments[0]);
        if (control.type === "checkbox") control.checked = arguments[1] === "on"; else control.value = arguments[1];
        control.dispatchEvent(new Event("input", {bubbles: true}));"""
    browser.execute_script(script, id, value)


def text(browser, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


@in_browser
def test_every_token_is_a_span_with_the_colour_of_its_sign(see):
    browser = see(rows(3))
    counts = "return [...document.querySelectorAll('.tokens')].map(x => x.children.length)"
    assert browser.execute_script(counts) == [2, 1, 3, 1, 4, 1]
    choose(browser, "scale", "0.1")  # 0.1 nats and more are in full colour
    colours = """return [...document.querySelectorAll('.pair:nth-child(3) .tokens span')].map(
        x => [getComputedStyle(x).backgroundColor, x.className])"""
    more, less = ["rgb(86, 180, 233)", ""], ["rgb(230, 159, 0)", "less"]  # even tokens likelier, odd ones less
    assert browser.execute_script(colours) == [more, less, more, less, ["rgb(255, 255, 255)", ""]]
    assert text(browser, "#least") == "−0.10: less likely than under the reference"
    choose(browser, "base", "start")  # under which all were less likely
    assert browser.execute_script(colours) == [more, more, more, more, ["rgb(255, 255, 255)", ""]]


@in_browser
def test_the_numbers_of_a_pair(see):
    """Chosen: three tokens, differences 0.25, -0.25, 0.25; rejected: none moved. beta = 0.5."""
    browser = see(rows(2))
    pair = text(browser, ".pair:nth-child(2)")
    for number in ("reward margin +0.125", "change 0.188 nats per token", "3 tokens", "policy −6.00"):
        assert number in pair
    assert "reference −6.25" in pair and "per token +0.083" in pair
    assert "KL (k3) 0.031" in pair  # (2 (e^-0.25 - 1 + 0.25) + (e^0.25 - 1 - 0.25)) / 3
    choose(browser, "base", "start")  # differences 0.25 each
    assert "reward margin +0.375" in text(browser, ".pair:nth-child(2)")


@in_browser
def test_text_of_the_data_is_shown_and_does_not_run(see):
    browser = see([ATTACKED])
    assert browser.title == "a page"
    shown = "return [...document.querySelectorAll(arguments[0] + ' .tokens span')].map(x => x.textContent)"
    assert browser.execute_script(shown, ".chosen") == ATTACK
    counted = "return document.querySelectorAll('.rejected .tokens span').length"  # half a surrogate pair is no JSON
    assert browser.execute_script(counted) == len(ODD)
    assert text(browser, ".prompt") == ATTACKED.prompt
    assert browser.execute_script("return [document.scripts.length, document.images.length]") == [2, 0]


@in_browser
def test_search_sort_and_paging(see):
    browser = see(rows(60))
    assert browser.execute_script(NUMBERS) == list(range(1, 26))
    assert text(browser, "#count") == "60 pairs" and text(browser, "#pages") == "3"
    browser.find_element("id", "next").click()
    assert browser.execute_script(NUMBERS) == list(range(26, 51))
    browser.find_element("id", "next").click()
    assert browser.execute_script(NUMBERS) == list(range(51, 61))
    assert not browser.find_element("id", "next").is_enabled()
    choose(browser, "sort", "change")
    choose(browser, "descending", "on")
    assert browser.execute_script(NUMBERS) == list(range(60, 35, -1))
    choose(browser, "sort", "length")
    choose(browser, "descending", "off")
    assert browser.execute_script(NUMBERS) == list(range(1, 26))
    choose(browser, "sort", "margin")  # even lengths: 0 in sum; odd ones rise
    assert browser.execute_script(NUMBERS) == [*range(1, 50, 2)]
    choose(browser, "query", "WORD17")  # of a completion
    assert browser.execute_script(NUMBERS) == [18]
    assert text(browser, "#count") == "1 of 60 pairs"
    choose(browser, "query", "number 4")
    assert sorted(browser.execute_script(NUMBERS)) == [5, *range(41, 51)]
    choose(browser, "query", "nowhere")
    assert browser.execute_script(NUMBERS) == [] and text(browser, "#pages") == "1"


@in_browser
def test_keys(see):
    from selenium.webdriver.common.keys import Keys

    browser = see(rows(30))
    body = browser.find_element("tag name", "body")
    body.send_keys("n")
    assert browser.execute_script(NUMBERS) == list(range(26, 31))
    body.send_keys("p")
    body.send_keys("/")
    browser.switch_to.active_element.send_keys("number 29")
    assert browser.execute_script(NUMBERS) == [30]
    tokens = browser.find_element("css selector", ".chosen .tokens")
    tokens.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    tip = browser.find_element("id", "tip")
    assert tip.is_displayed()
    assert tip.text.split("\n") == [
        'token 2: " word29"',
        *("log p policy −2.000", "log p reference +1.750", "log p start −5.750", "policy − reference −3.750"),
    ]
    tokens.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


@in_browser
def test_a_thousand_pairs(see):
    long = [row._replace(chosen=side([" token"] * 300, 0.3)) for row in rows(1000)]
    browser = see(long)
    assert text(browser, "#count") == "1000 pairs" and text(browser, "#pages") == "40"
    choose(browser, "query", "number 99")
    assert text(browser, "#count") == "11 of 1000 pairs"


@in_browser
def test_nothing_to_show(see):
    assert text(see([]), "#count") == "0 pairs"
