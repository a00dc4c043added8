"""The interactive report in a real browser: from disk, offline, with many runs and hostile names."""

import json
import os
import shutil
import time

import pandas as pd
import pytest

from analysis.report.report import judge_and_report
from lorasweep.work.answer import KEPT
from tests.planted import kept_answer, planted
from tests.world import cli

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    why = "needs Chromium and ChromeDriver (Debian: apt-get install chromium chromium-driver)"
    if os.environ.get("LORASWEEP_NO_SKIP"):
        pytest.fail(why, pytrace=False)
    pytest.skip(why, allow_module_level=True)

pytestmark = pytest.mark.xdist_group("browser")  # one session for all
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>/*REPORT*/ & \u2028"


def runs(models, ranks, batches=(8,), ids="r{:05d}"):
    """Seven learning rates for each; at the highest ones of LoRA the runs have diverged."""
    one = planted(ranks, (0,))
    one.loc[one["lr"] > 1e-2, "status"] = "diverged"
    found = [one.assign(model=m, batch_size=b) for m in models for b in batches]
    table = pd.concat(found, ignore_index=True)
    curve = json.dumps({"curve": [{"step": s, "test_nll": 2 + 1 / s} for s in (1, 2, 4, 8, 16)]})
    return table.assign(run_id=[ids.format(k) for k in table.index], result=curve)


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    off = ("gpu", "quic", "sync", "background-networking", "component-update")
    flags = ("headless=new", "no-sandbox", "no-first-run", "window-size=1280,1600")
    for flag in (*flags, *(f"disable-{feature}" for feature in off)):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def drawn(browser, times=1):
    for _ in range(600):
        if int(browser.execute_script("return document.body.dataset.drawn || 0")) >= times:
            return
        time.sleep(0.1)
    raise AssertionError(f"not drawn: {browser.get_log('browser')}")


def opened(browser, tmp_path, table):
    table.to_parquet(tmp_path / "runs.parquet")
    page = tmp_path / "page.html"
    assert cli("fit", tmp_path / "runs.parquet", f"out={page}", cwd=tmp_path).returncode == 0
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(page.as_uri())
    drawn(browser)


def quiet(browser):
    assert browser.get_log("browser") == []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            assert url.split(":")[0] in ("file", "data", "blob"), message


def text_of(browser, element):
    return browser.execute_script(f"return document.getElementById('{element}').textContent")


def how_many(browser, selector):
    return browser.execute_script(f"return document.querySelectorAll('{selector}').length")


def choose(browser, key, value, times):
    """Set a filter; wait for the page to be drawn so many times, and return how many it shows."""
    select = f"const s = document.getElementById('filter-{key}'); s.value = '{value}';"
    browser.execute_script(f"{select} s.dispatchEvent(new Event('change'))")
    drawn(browser, times)
    return text_of(browser, "count")


def test_it_opens_from_disk_and_filters(browser, tmp_path):
    opened(browser, tmp_path, runs(["a/one", "b/two"], [None, 4, 16], batches=(8, 32)))
    assert text_of(browser, "count") == "12 curves, 84 runs"
    assert how_many(browser, "#lr-plot .points path") >= 84
    assert how_many(browser, "#forest-plot .points path") == 8
    assert choose(browser, "rank", "4", 2) == "4 curves, 28 runs"
    choose(browser, "model", "b/two", 3)
    assert choose(browser, "batch_size", "32", 4) == "1 curves, 7 runs"
    assert "lora r4" in text_of(browser, "curve-table")
    choose(browser, "rank", "null", 5)
    assert "fullft" in text_of(browser, "curve-table")
    quiet(browser)


def test_names_are_text_and_nothing_else(browser, tmp_path):
    opened(browser, tmp_path, runs([HOSTILE], [None, 4], ids=f"{HOSTILE}{{}}"))
    assert how_many(browser, "img") == 0
    assert HOSTILE in text_of(browser, "curve-table")
    browser.execute_script("document.querySelector('#run-table tbody tr').click()")
    assert HOSTILE in text_of(browser, "details")
    assert browser.execute_script("return window.hacked") is None
    quiet(browser)


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (375, 667)])
def test_the_answer_is_above_the_fold_and_only_tables_scroll_sideways(
    browser, tmp_path, width, height
):
    """Even where no script runs; `height`: what a phone shows below its bars."""
    table, question = kept_answer(KEPT / "lr_ratio-tiny")
    first = judge_and_report(table, question, tmp_path).splitlines()[0].replace("`", "")
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        for scripts in (False, True):
            off = {"value": not scripts}
            browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", off)
            browser.get_log("performance"), browser.get_log("browser")
            browser.get((tmp_path / "report.html").as_uri())
            (sentence, *_) = browser.find_elements("css selector", "#answer p")
            assert sentence.is_displayed() and sentence.text == first
            box = sentence.rect
            assert box["y"] >= 0 and box["y"] + box["height"] <= height
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
        drawn(browser)
        measured = "const s = document.documentElement; return [s.scrollWidth, innerWidth]"
        scrolled, shown = browser.execute_script(measured)
        assert scrolled <= shown == width
        assert float(sentence.value_of_css_property("font-size").removesuffix("px")) >= 16
        wide = "const b = document.getElementById('verdicts'); return b.scrollWidth > b.clientWidth"
        assert browser.execute_script(wide) == (width < 500)
        assert "(ratio)" in text_of(browser, "verdicts")
        quiet(browser)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(("name", "margin"), [("lr_ratio-tiny", [7.1, 14.1]), ("layers-tiny", [])])
def test_only_a_claim_about_the_ratio_of_rates_shades_its_margin(browser, tmp_path, name, margin):
    judge_and_report(*kept_answer(KEPT / name), tmp_path)
    browser.get((tmp_path / "report.html").as_uri())
    drawn(browser)
    plot = "document.getElementById('forest-plot').layout"
    shaded = f"return {plot}.shapes.filter(s => s.type === 'rect').flatMap(s => [s.x0, s.x1])"
    assert browser.execute_script(shaded) == margin
    assert ("shaded" in browser.execute_script(f"return {plot}.xaxis.title.text")) == bool(margin)
