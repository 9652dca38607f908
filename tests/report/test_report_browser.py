"""The report page in headless Chromium: lists, keys, links, hostile texts, print, accessibility."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from engine.report.page import write_report
from engine.runtime.files import read_jsonl, write_jsonl
from tests.helpers.made_arms import run_of_four_arms
from tests.helpers.made_run import make_run

# Any part of this text that became markup or script would set window.owned or send a request.
HOSTILE = (
    "</script><script>window.owned=1</script><!--<script>"
    "<img src=x onerror=window.owned=2><svg onload=window.owned=3>"
    '"\'><a href="javascript:window.owned=4">me</a> [me](javascript:window.owned=5) &lt;b&gt;'
    "</style><style>*{display:none}</style>\u2028\u202e${owned}{{data}}\\u003c"
)


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium for the whole module."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    driver = shutil.which("chromedriver")
    if not browser or not driver or importlib.util.find_spec("selenium") is None:
        pytest.skip(
            "no chromium with chromedriver and selenium here: apt-get install chromium "
            "chromium-driver, pip install selenium (.ci/run does both)"
        )
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories with their pages: a small run, two together, a hostile one, a long one."""
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / "a", 200)
    second = make_run(folder / "b", 60, seed=1)
    hostile_name = HOSTILE.replace("/", "\u2215")[:60]  # no path may hold a slash
    hostile = make_run(folder / hostile_name, 12, text=HOSTILE, data=HOSTILE)
    long = make_run(folder / "long", 10_000, words=20)
    write_report([first], first / "report.html")
    write_report([first, second], folder / "two.html")
    write_report([hostile], folder / "hostile.html")
    write_report([long], folder / "long.html")
    arms = run_of_four_arms(folder / "arms")
    write_report([arms, second], folder / "arms.html")
    return folder


class Page:
    """An open page, and the actions of the tests on it."""

    def __init__(
        self, chrome, file: Path, fragment: str = "", width: int = 1280, scheme: str = "light"
    ):
        self.chrome = chrome
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chrome.get("about:blank")  # else a new fragment would only scroll
        chrome.get_log("browser")
        chrome.get(file.as_uri() + fragment)
        self.wait("return document.documentElement.dataset.ready === 'yes'")

    def js(self, script, *args):
        return self.chrome.execute_script(script, *args)

    def wait(self, script):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.chrome, 30).until(lambda _: self.js(script))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.chrome.get_log("browser")]

    def find(self, selector):
        return self.chrome.find_element("css selector", selector)

    def set(self, selector, value):
        """Choose a value in a select, as a person does it."""
        from selenium.webdriver.support.ui import Select

        Select(self.find(selector)).select_by_value(value)

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.chrome).send_keys(*keys).perform()

    def chosen(self, root="#rows"):
        return self.js(
            f"return document.querySelector('{root} .detail').getAttribute('aria-label')"
        )

    def count(self, root="#rows"):
        return self.find(f"{root} output").text


@pytest.fixture
def page(chromium, runs):
    return Page(chromium, runs / "a" / "report.html")


def test_the_page_loads_without_requests_or_errors(page):
    assert page.complaints() == []
    assert page.js("return performance.getEntriesByType('resource').length") == 0
    titles = page.js("return [...document.querySelectorAll('h2')].map(h => h.textContent.trim())")
    assert [title[0] for title in titles] == list("12345")
    assert page.chosen() == "row0/0" and page.count() == "200 rows"
    assert page.js("return document.querySelectorAll('figure svg[role=img] text').length") > 50


def test_filter_search_and_sort_choose_the_rows_in_the_list(page, runs):
    from selenium.webdriver.common.keys import Keys

    rows = read_jsonl(runs / "a" / "distilled.jsonl")
    wanted = [row for row in rows if row["status"] == "mismatch"]
    page.set("#rows [name=filter]", "status mismatch")
    assert page.count() == f"{len(wanted)} of 200 rows" and page.chosen() == wanted[0]["id"]

    def holds(row, word):
        question = row["messages"][0]["content"]
        texts = [row["id"], question, row["reference"], row["response"], row["status"]]
        return word in "\n".join(texts).lower()

    page.set("#rows [name=filter]", "all")
    page.find("#rows [name=search]").send_keys("MONDAY apples")  # every word, in any case
    both = [row for row in rows if holds(row, "monday") and holds(row, "apples")]
    assert 0 < len(both) < 200 and page.count() == f"{len(both)} of 200 rows"
    page.find("#rows [name=search]").send_keys(" nowhere")
    assert page.count() == "0 of 200 rows" and "Nothing fits" in page.find("#rows .detail").text
    page.find("#rows [name=search]").send_keys(Keys.CONTROL, "a")
    page.find("#rows [name=search]").send_keys(Keys.BACKSPACE)
    assert page.count() == "200 rows"

    def first():
        shown = page.js("return document.querySelector('#rows .option .id').textContent")
        assert shown == page.chosen()
        return shown

    page.set("#rows [name=sort]", "gap")
    scores = read_jsonl(runs / "a" / "distilled.jsonl.scores.jsonl")
    widest = max(scores, key=lambda score: score["reference_nll"] - score["response_nll"])
    assert first() == widest["id"]
    page.set("#rows [name=sort]", "long")
    longest = max(rows, key=lambda row: len(row["response"]))
    assert first() == longest["id"]
    page.set("#rows [name=sort]", "file")
    assert first() == "row0/0" and page.complaints() == []


def test_every_arm_of_a_run_is_shown_beside_a_run_of_other_arms(chromium, runs):
    page = Page(chromium, runs / "arms.html")
    titles = "return [...document.querySelectorAll('#prompts .column h4')].map(h => h.textContent)"
    assert page.js(titles)[:5] == ["seed", "SFT", "STM 2.5", "SFT x0.5", "self-output"]
    sorts = "return [...document.querySelectorAll('#prompts [name=sort] option')].map(o => o.value)"
    four = ["kl sft", "kl stm:2.5", "kl sft@0.5", "kl self"]
    assert page.js(sorts) == ["kl", *four, "file"]
    page.set("#prompts [name=sort]", "kl stm:2.5")
    page.set("#run-select", "2")  # the other run has no such arm
    assert page.js(sorts) == ["kl", "kl sft", "kl sdft", "file"]
    assert page.js(titles)[:3] == ["seed", "SFT", "SDFT"]
    colour = "return getComputedStyle(document.querySelector('.ink.arm1')).color"
    assert page.js(colour) == "rgb(91, 122, 28)" and page.complaints() == []


def test_keys_choose_rows_and_keep_the_focus(page):
    from selenium.webdriver.common.keys import Keys

    page.js("document.querySelector('#rows .list').focus({preventScroll: true})")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP)
    assert page.chosen() == "row1/0" and page.js("return location.hash") == "#row=row1%2F0"
    page.press(Keys.END)
    assert page.chosen() == "row199/0"
    active = "return document.getElementById(document.querySelector('#rows .list')"
    active += ".getAttribute('aria-activedescendant'))"
    assert page.js(f"{active}.getAttribute('aria-selected')") == "true"
    assert page.js(f"{active}.getAttribute('aria-posinset')") == "200"
    page.press(Keys.HOME, Keys.PAGE_DOWN)
    assert page.chosen() not in ("row0/0", "row1/0", "row199/0")
    page.press(Keys.HOME, "jjk")
    assert page.chosen() == "row1/0"
    page.press("/", "pencils")  # the letters go into the search, j and k among them would too
    assert page.js("return document.activeElement.name") == "search"
    assert page.js("return document.activeElement.value") == "pencils"
    page.press(Keys.ESCAPE)
    assert page.js("return document.activeElement.className") == "list"
    page.find("#rows .walk button[aria-label=Next]").click()
    before = page.chosen()
    page.press("j")  # the button was replaced, the focus must not be lost with it
    assert page.chosen() != before


def test_a_link_opens_its_row(chromium, runs):
    file = runs / "a" / "report.html"
    page = Page(chromium, file, "#row=row137%2F0")
    assert page.chosen() == "row137/0"
    top = "return document.querySelector('#data').getBoundingClientRect().top"
    assert -20 < page.js(top) < 120
    assert page.js("return document.querySelector('#rows [aria-selected=true] .id').textContent")
    # a search that hides the row gives way to a link followed later
    page.find("#rows [name=search]").send_keys("nowhere")
    page.js("location.hash = '#row=row5%2F0'")
    page.wait("return document.querySelector('#rows .detail').ariaLabel === 'row5/0'")
    assert page.find("#rows [aria-selected=true] .id").text == "row5/0"
    assert page.count() == "200 rows"
    page.js("location.hash = '#row=' + encodeURIComponent('<img src=x onerror=window.owned=9>')")
    page.wait("return document.querySelector('#rows output').textContent.includes('<img')")
    assert page.js("return window.owned") is None
    # the second of two runs
    page = Page(chromium, runs / "two.html", "#row=row7%2F0&run=2")
    asked = read_jsonl(runs / "b" / "distilled.jsonl")[7]["messages"][0]["content"]
    assert page.find("#rows .instruction").text == asked and page.count() == "60 rows"
    heads = "return [...document.querySelectorAll('#rows h4')].map(h => h.firstChild.textContent)"
    assert page.js(heads) == ["Reference", "Rewrite", "Rewrite · a"]  # the same row in both runs
    heads = heads.replace("#rows", "#prompts")
    page.set("#prompts [name=filter]", "held")
    assert page.js(heads) == ["seed", "SFT", "SDFT", "SFT · a", "SDFT · a"]
    page.set("#run-select", "1")
    assert page.count() == "200 rows" and page.complaints() == []


def test_words_that_differ_are_marked(chromium, runs, tmp_path):
    run = make_run(tmp_path / "run", 3)
    lines = read_jsonl(run / "distilled.jsonl")
    long_reference = " ".join(f"a{i} b" for i in range(3000))
    long_rewrite = " ".join(f"c{i} b" for i in range(3000))
    texts = [
        ("one two  three\nfour five", "one 2 three\nfour and five"),
        ("same", "same"),
        (long_reference, long_rewrite),
    ]
    for line, (reference, response) in zip(lines, texts, strict=True):
        line |= {"reference": reference, "response": response, "target": response}
        line["status"] = "accepted"
    write_jsonl(run / "distilled.jsonl", lines)
    write_report([run], run / "report.html")
    page = Page(chromium, run / "report.html")

    def marks():
        return page.js(
            "return [...document.querySelectorAll('#rows .column')].map(c => "
            "[...c.querySelectorAll('mark')].map(m => m.textContent))"
        )

    assert marks() == [["two"], ["2", "and"]]
    assert page.find("#rows .column .text").get_property("textContent") == texts[0][0]
    page.js("document.querySelector('#rows .list').focus()")
    page.press("j")
    assert marks() == [[], []]
    page.press("j")  # 6,000 words each: compared as sets of words
    assert len(marks()[0]) == 3000 and "b" not in marks()[0]


def test_answers_and_training_text_show_the_runs_files(page, runs):
    lines = read_jsonl(runs / "a" / "retention.jsonl")
    most = max(lines, key=lambda line: line["kl"])
    page.set("#prompts [name=filter]", "general")
    assert page.find("#prompts .instruction").text == most["prompt"]  # sorted by KL
    page.set("#prompts [name=filter]", "every")
    heads = page.js("return [...document.querySelectorAll('#prompts h4')].map(h => h.textContent)")
    assert heads == ["seed", "SFT", "SDFT"]
    page.set("#prompts [name=filter]", "flips")
    verdicts: dict[str, set] = {}
    for line in read_jsonl(runs / "a" / "evaluation.jsonl"):
        verdicts.setdefault(line["id"], set()).add(line["ok"])
    flips = sum(len(v) == 2 for v in verdicts.values())
    assert page.count("#prompts") == f"{flips} of 44 prompts"
    shown = page.find("#prompts .columns").text
    assert "right" in shown and "wrong: mismatch" in shown

    tokens = read_jsonl(runs / "a" / "tokens.jsonl")
    page.js(f"location.hash = '#tokens=' + encodeURIComponent('{tokens[2]['id']}')")
    page.wait(f"return document.querySelector('#tokens h3').textContent === '{tokens[2]['id']}'")
    column = "document.querySelector('#tokens .column')"
    spans = page.js(f"return [...{column}.querySelectorAll('.token')].map(s => s.className)")
    sft = tokens[2]["sft"]
    assert spans.count("token prompt") == sft["prompt"] and len(spans) == len(sft["pieces"])
    expected = []
    for nll in sft["nll"]:
        edges_below = [edge for edge in (0.5, 1, 2, 4, 7) if nll >= edge]
        expected.append(f"token n{len(edges_below)}")
    assert spans[sft["prompt"] :] == expected
    page.find("#tokens details summary").click()
    page.wait(f"return {column}.querySelectorAll('tbody tr').length === {len(sft['nll'])}")
    page.find("#tokens .walk button:last-child").click()
    assert page.find("#tokens h3").text == tokens[3]["id"]
    assert page.js("return document.activeElement.textContent") == "→"  # to press it again
    page.js("location.hash = '#tokens=row1%2F0'")
    page.wait("return document.querySelector('#tokens').innerText.includes('not among them')")


def test_hostile_texts_stay_texts(chromium, runs):
    page = Page(chromium, runs / "hostile.html")
    parts = ["script", "style", "img", "iframe", "form", "a[href]:not([href^='#'])", "[onload]"]
    counts = page.js(f"return {parts}.map(s => document.querySelectorAll(s).length)")
    assert counts == [2, 1, 0, 0, 2, 0, 0]
    # show every entry of every list once, open every fold, press every button and link
    page.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    for root in ("#rows", "#prompts"):
        page.js(f"document.querySelector('{root} .list').focus()")
        page.press("j" * 40)
    page.js("document.querySelectorAll('#tokens button, .detail a').forEach(e => e.click())")
    for selector in ("#rows .instruction", "#rows .text", "#prompts .text", ".facts", "h1 + p"):
        text = page.js(f"return document.querySelector({selector!r}).textContent")
        assert "<script>" in text, selector
    assert page.js("return window.owned") is None and page.complaints() == []
    # the policy stops scripts that got through the escaping
    tries = [
        "document.body.innerHTML = '<img src=x onerror=window.owned=6>'",
        "document.body.setAttribute('onclick', 'window.owned=7')",
        "const s = document.createElement('script'); s.textContent = 'window.owned=8';"
        "document.body.append(s)",
        "new Image().src = 'https://example.org/'",
        "location.href = 'javascript:window.owned=9'",
    ]
    for attempt in tries:
        page.js(f"try {{ {attempt} }} catch {{}}; document.body.click()")
    assert page.js("return [window.owned ?? null, document.images.length]") == [None, 0]
    assert any("Content Security Policy" in said for said in page.complaints())


def test_of_ten_thousand_rows_only_the_visible_ones_are_in_the_document(chromium, runs):
    from selenium.webdriver.common.keys import Keys

    page = Page(chromium, runs / "long.html")
    assert page.count() == "10,000 rows"
    page.js("document.querySelector('#rows .list').focus()")
    page.press(Keys.END)
    assert page.chosen() == "row9999/0"
    assert 5 < page.js("return document.querySelectorAll('#rows .option').length") < 40
    page.find("#rows [name=search]").send_keys("question 4321:")
    assert page.count() == "1 of 10,000 rows" and page.chosen() == "row4321/0"


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_its_width_in_both_schemes_and_on_paper(chromium, runs, width):
    grounds = set()
    for scheme in ("light", "dark"):
        page = Page(chromium, runs / "two.html", width=width, scheme=scheme)
        assert page.js("return document.documentElement.scrollWidth") <= width
        detail = page.js("return document.querySelector('#rows .detail').clientWidth")
        assert detail > 0.6 * width  # beside the list where there is room, else below it
        grounds.add(page.js("return getComputedStyle(document.body).backgroundColor"))
        # figures take the page's colours, which follow the scheme
        ink = "return getComputedStyle(document.querySelector('figure svg text')).fill"
        grounds.add(page.js(ink))
    assert len(grounds) == 4
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = page.js(
        "return ['nav', '.controls', '.list'].map(s => "
        "getComputedStyle(document.querySelector(s)).display)"
    )
    assert hidden == ["none"] * 3
    if width > 700:  # a sheet of paper
        size = {"width": 700, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        page.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert page.js("return document.documentElement.scrollWidth") <= 700
    assert page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_screen_readers_find_names_headers_and_heading_levels(page):
    """Names for everything that takes the focus, tables with headers, one h1, no level left out."""
    nameless = page.js(
        "return [...document.querySelectorAll('input, select, button, a, [tabindex], svg')].filter("
        "e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))"
        ".map(e => e.outerHTML)"
    )
    assert nameless == []
    levels = page.js("return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert page.js("return document.querySelectorAll('th:not([scope])').length") == 0
    twice = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id);"
    assert page.js(f"{twice} return ids.filter((id, i) => ids.indexOf(id) !== i)") == []
