"""report.html in a real browser: its videos stay in step, its curves are drawn, and nothing goes wrong.

Skipped where there is no Chromium, which Debian's packages `chromium` and `chromium-driver` bring.
"""

import shutil
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tokenflow.evaluation import meters
from tokenflow.evaluation.contact_sheet import thumbnails
from tokenflow.evaluation.report import Entry, write_report
from tokenflow.evaluation.subject import EDIT, RECONSTRUCTION, SOURCE, VAE
from tokenflow.evaluation.verdict import verdict
from tokenflow.video.write import write_video

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
N_FRAMES, FPS = 36, 12
SEEDS = {"one": 11, "two": 22}  # by the entries' names
PATIENCE = 120  # seconds, for a busy machine
MARKUP = "</script><script>window.ran = 1</script><!--<script><b>&amp;\u2028\x1b[31m"
SHOWN = "return player.videos.map((video) => Number(video.dataset.frame))"

pytestmark = needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="there is no chromium, or no chromedriver"
)


def entry_of(folder, name):
    """An entry whose videos show a square that moves by 2 pixels a frame."""
    frames = np.full((N_FRAMES, 64, 96, 3), 200, np.uint8)
    for index, frame in enumerate(frames):
        frame[20:44, 2 * index : 2 * index + 24] = (200, 60, 30)
    videos = {SOURCE: frames, EDIT: 255 - frames}
    files = {kind: folder / name / f"{kind} of #{name}.mp4" for kind in videos}
    for kind, path in files.items():
        write_video(path, videos[kind], FPS)
    moments = np.stack([*videos.values()], axis=1)
    measured = meters.measure(moments, [meters.BesideSource(), meters.Drift(FPS, N_FRAMES)])
    curves = meters.name_curves(measured, {SOURCE: 0, EDIT: 1})
    metrics = meters.summarize(curves, FPS)
    return Entry(
        name=name,
        prompt=f"{name}{MARKUP}",
        videos=files,
        fps=Fraction(FPS),
        n_frames=N_FRAMES,
        metrics=metrics,
        curves=curves,
        findings=verdict(metrics),
        skipped=[f"LPIPS: {MARKUP}"],
        options={"seed": SEEDS[name], "model": None, "lora": [], "mask": MARKUP},
        pictures={kind: thumbnails(frames, N_FRAMES) for kind, frames in videos.items()},
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a report")
    one, two = entries = [entry_of(folder, name) for name in SEEDS]
    write_report(folder / "report.html", "2 edits", entries)
    # A third one has the second's settings, and metrics of as many videos as an edit has.
    kinds = SOURCE, VAE, RECONSTRUCTION, EDIT
    curves = {key: dict.fromkeys(kinds, by_name[EDIT]) for key, by_name in two.curves.items()}
    # Half of a character is skipped; the browser's driver could not return it.
    three = {"name": f"three{MARKUP}", "prompt": None, "skipped": ["\udcff"]}
    three = replace(two, **three, curves=curves, metrics=meters.summarize(curves, FPS))
    # Another option is one that the second and the third share.
    found = {"tokens": [one], "flow": [two, three]}
    alike = [
        replace(entry, options=entry.options | {"correspondences": how})
        for how, entries in found.items()
        for entry in entries
    ]
    # Into a folder that does not exist yet.
    write_report(folder / "alike" / "report.html", "3 edits", alike)
    return folder / "report.html"


def launch_chromium(*flags):
    """Chromium without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def browser(page):
    """Chromium with the page open."""
    driver = launch_chromium("--disable-gpu")
    driver.set_window_size(1200, 1000)
    driver.get(page.as_uri())
    yield driver
    driver.quit()


def wait(browser, script):
    """Wait until a script returns something true, which is returned."""
    return WebDriverWait(browser, PATIENCE, 0.05).until(lambda b: b.execute_script(script))


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()


def find(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


def test_steps_show_the_same_frame_in_all_videos(browser):
    ready = "player.videos.every((v) => v.readyState >= 3 && !v.error)"
    wait(browser, f"return player.videos.length === 2 && {ready}")
    press(browser, Keys.END)
    wait(browser, f"{SHOWN}.every((frame) => frame === {N_FRAMES - 1})")
    press(browser, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    wait(browser, f"{SHOWN}.every((frame) => frame === {N_FRAMES - 2})")
    press(browser, Keys.HOME)
    wait(browser, f"{SHOWN}.every((frame) => frame === 0)")
    # A click in the middle of a curve, and one on the contact sheet's last frame but one.
    for selector, x, frame in (("#curves svg", 0, N_FRAMES // 2), ("#sheet", 0.3125, 30)):
        (target, *_) = find(browser, selector)
        browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", target)
        at = round(x * target.rect["width"])
        ActionChains(browser).move_to_element_with_offset(target, at, 0).click().perform()
        wait(browser, f"{SHOWN}.every((shown) => Math.abs(shown - {frame}) <= 1)")
        number, _, last = browser.find_element(By.ID, "frame").text.split()
        assert abs(int(number) - frame) <= 1 and last == str(N_FRAMES - 1)


WATCH = """
const starts = [0], samples = [];
window.watched = { starts, samples };
const look = () => {
  if (!player.playing) return;
  const times = player.videos.map((v) => v.currentTime * player.entry.fps);
  requestAnimationFrame(look);
  if (player.seeking) return; // to start over
  if (samples.length && times[0] < samples.at(-1)[0] - 10) starts.push(samples.length);
  samples.push(times);
};
look();
"""


def test_videos_play_in_step(browser):
    """While they play, and when they start over, no video is a frame ahead of another."""
    press(browser, Keys.HOME, Keys.SPACE)
    wait(browser, "return player.videos.every((v) => !v.paused)")
    browser.execute_script(WATCH)
    wait(browser, "return watched.starts.length > 1 && watched.samples.length > 40")
    press(browser, Keys.SPACE)
    wait(browser, "return !player.playing && player.videos.every((v) => v.paused)")
    times = np.array(browser.execute_script("return watched.samples"))
    apart = np.abs(times[:, 0] - times[:, 1])
    assert len(set(times[:, 0].astype(int))) > N_FRAMES / 3  # it did play
    # A page that gets no time to run, on a busy machine, cannot keep its videos in step meanwhile.
    assert np.quantile(apart, 0.9) <= 1, sorted(apart)


def test_frame_by_frame_mode(browser):
    browser.execute_script("$('speed').value = 0; $('speed').dispatchEvent(new Event('change'))")
    press(browser, Keys.HOME, Keys.SPACE)
    wait(browser, f"{SHOWN}.every((frame) => frame >= 2 && frame === player.frame)")
    press(browser, Keys.SPACE)


def test_what_the_page_shows(browser):
    assert browser.execute_script("return Object.keys(METRICS)") == meters.METRICS
    lines = "return [...document.querySelectorAll('polyline')].map((line) => line.points.length)"
    # Sharpness, drift (from the second second on), PSNR and SSIM.
    assert sorted(browser.execute_script(lines)) == [N_FRAMES - FPS] * 2 + [N_FRAMES] * 3
    assert [button.text for button in find(browser, "#entries button")] == ["11", "22"]
    floor, *rows = find(browser, "#overview tbody tr")
    assert [row.text.split()[:2] for row in rows] == [["one", "11"], ["two", "22"]]
    # The source, which both are of, stands first: it has only a drift, here, and that is none.
    cells = [cell.text for cell in floor.find_elements(By.TAG_NAME, "td")]
    assert cells == ["source", "", "\u2013", "0", "\u2013", "\u2013"]
    widths = [
        sheet.get_property("naturalWidth") for sheet in find(browser, "#overview img, #sheet")
    ]
    assert widths == [8 * 96] * 2
    options = [row.text for row in find(browser, "#options tr")]
    assert options[:3] == ["seed 11", "model null", "lora []"]  # as in YAML
    text = browser.find_element(By.TAG_NAME, "body").text
    for words in ("Verdict", "not measured: LPIPS", "SSIM", "seed"):
        assert words in text
    find(browser, "#entries button")[1].click()
    assert browser.find_element(By.ID, "prompt").text.startswith("two: \u201ctwo</script>")
    wait(browser, f"{SHOWN}.every((frame) => frame === 0)")


def test_markup_is_text(browser):
    """In a prompt, in an option, and where a metric could not be measured."""
    for selector in ("#prompt", "#options tr:last-child", "#skipped"):
        (shown,) = find(browser, selector)
        assert MARKUP in shown.get_property("textContent")
    assert browser.execute_script("return window.ran") is None


def test_it_fits_a_phone(browser):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    assert all(video.rect["width"] > 150 for video in find(browser, "video"))


def test_edits_of_equal_settings_are_told_apart_by_name(browser, page):
    browser.get((page.parent / "alike" / "report.html").as_uri())
    buttons = find(browser, "#entries button")
    assert [button.text.partition("</script>")[0] for button in buttons] == ["one", "two", "three"]
    buttons[2].click()
    (name,) = find(browser, "#prompt")
    assert name.get_property("textContent") == f"three{MARKUP}"
    # No head of the overview runs into the next.
    heads = find(browser, "#overview th")
    assert heads[2].text == "correspondences"
    for head in heads:
        assert head.get_property("scrollWidth") <= head.get_property("clientWidth")
    # On a phone, still, the last column of the metrics can be seen without scrolling: that of the edit.
    (table,) = find(browser, "#metrics")
    assert table.find_elements(By.TAG_NAME, "th")[-1].text == "edit"
    assert table.rect["x"] + table.rect["width"] <= 400


def test_nothing_was_logged(browser):
    assert browser.get_log("browser") == []
