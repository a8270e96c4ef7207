"""The report in a real browser: headless Chromium, on a desktop's and on a telephone's width."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from oracles import predictions
from PIL import Image

from dacal_addon import cli

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `apt-get install chromium` (.ci/run does)")
HOSTILE = "<img src=x onerror=document.title='owned'>"
NETWORK = "<script>document.write('owned')</script>"
# Put into a copy of the page, whose own rules forbid scripts: what a reader would see, as JSON.
PROBE = """<script>addEventListener('load', () => {
  const seen = {
    title: document.title,
    pictures: [...document.images].map(image => [image.naturalWidth, image.alt.length]),
    overflow: document.documentElement.scrollWidth - innerWidth,
    headings: [...document.querySelectorAll('h2')].map(heading => heading.textContent),
    rows: [...document.querySelectorAll('tr')].map(row => [...row.cells].map(cell => cell.textContent)),
    requests: performance.getEntriesByType('resource').filter(one => !one.name.startsWith('data:')).length,
    background: getComputedStyle(document.body).backgroundColor,
  };
  const pre = document.createElement('pre');
  pre.id = 'seen';
  pre.textContent = JSON.stringify(seen);
  document.body.append(pre);
})</script>"""


def chromium(folder, *arguments):
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars --disable-background-networking"
    )
    flags += f" --disable-component-update --disable-sync --user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *flags.split(), *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout.decode()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    z, target = predictions(1, (4, 4, 24, 32), ignored=0.1)
    for part in ("pred", "cooler", "gt"):
        (folder / part).mkdir()
    for i in range(4):
        name = f"a rather long name of an image, number {i}, " + 60 * "x"
        np.save(folder / "pred" / f"{name}.npy", z[i].numpy())
        np.save(folder / "cooler" / f"{name}.npy", z[i].numpy() / 2)
        Image.fromarray(target[i].numpy().astype("uint8")).save(folder / "gt" / f"{name}.png")
    (folder / "pred" / f"{HOSTILE}.npy").write_bytes(b"")
    words = f"--num-classes 4 --input logits --classwise --boundary 1 --keep-going --worst 2 --out {folder / 'out'}".split()
    words += ["--compare", f"{NETWORK}={folder / 'cooler'}"]
    assert cli.main(["evaluate", str(folder / "pred"), str(folder / "gt"), *words]) == 3
    return folder / "out" / "report.html"


def looked_at(page, folder, *arguments):
    content = page.read_text()
    copied = re.sub(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", "", content)
    assert copied != content
    (folder / "copy.html").write_text(copied.replace("</body>", PROBE + "</body>"))
    dom = chromium(folder, *arguments, "--virtual-time-budget=3000", "--dump-dom", (folder / "copy.html").as_uri())
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL).group(1)
    return json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_shows_what_the_report_holds(page, tmp_path, width):
    seen = looked_at(page, tmp_path, f"--window-size={width},900")
    report = json.loads((page.parent / "report.json").read_text())
    assert seen["title"] == "Calibration report"  # nothing in a file's name has run
    assert len(seen["pictures"]) == 4  # both diagrams, and the two worst images
    assert all(width > 400 and words > 20 for width, words in seen["pictures"])
    assert seen["overflow"] <= 0
    assert seen["requests"] == 0
    titles = ["Comparison", "Figures", "Reliability", "Classes", "Images with the largest calibration error"]
    assert seen["headings"][:5] == titles
    tables = {}  # several have a row of one name; the columns tell them apart
    for row in seen["rows"]:
        if row[0] in ("Metric", "Class", "IoU %", "Confidence at least"):
            cells = tables[" | ".join(row)] = {}
        elif tables:
            cells[row[0]] = row[1:]
    first, other = report["comparison"]["networks"]
    compared = tables[f"Metric | pred | {NETWORK} | Difference of {NETWORK}"]
    ece, cooler, difference = (
        100 * found["ece"]["value"] for found in (first["metrics"], other["metrics"], other["differences"])
    )
    low, high = (100 * other["differences"]["ece"][end] for end in ("low", "high"))
    assert high < 0
    assert compared["ECE"] == [f"{ece:.2f} %", f"{cooler:.2f} % \u2713", f"{difference:.2f} ({low:.2f} to {high:.2f})"]
    assert compared["Smooth ECE"][2] == "none: takes as long as all others together"
    assert tables[f"IoU % | pred | {NETWORK}"] == {row["name"]: 2 * [f"{100 * row['iou']:.2f}"] for row in report["classes"]}
    above = tables["Confidence at least | Share of pixels % | Their accuracy %"]
    assert above["0"] == ["100.00", f"{100 * report['metrics']['accuracy']['value']:.2f}"]
    cells = tables["Metric | Value | 95 % interval"]
    assert cells["ECE within 1 px of a boundary"][1] == "none: computed for all images together"
    for name, key in (("Accuracy", "accuracy"), ("ECE", "ece"), ("mIoU", "miou")):
        found = report["metrics"][key]
        assert cells[name] == [f"{100 * found['value']:.2f} %", f"{100 * found['low']:.2f} to {100 * found['high']:.2f}"]
    assert cells["NLL"][0] == f"{report['metrics']['nll']['value']:.4f} nats"
    (cells,) = (rows for columns, rows in tables.items() if columns.startswith("Class |"))
    for row in report["classes"]:
        figures = (row[key] for key in ("iou", "recall", "confidence", "precision", "classwise_ece", "gap"))
        assert cells[row["name"]] == [str(row["pixels"]), *(f"{100 * figure:.2f}" for figure in figures)]
    order = [row[0] for row in seen["rows"] if row[0].startswith("a rather long name")]
    worst = sorted(report["per_image"], key=lambda row: -row["ece"])
    assert order == [row["name"] for row in worst]
    assert any(HOSTILE in row[0] and row[1].startswith("no label of image") for row in seen["rows"])


def test_the_page_itself_can_be_opened_and_is_dark_at_night(page, tmp_path):
    dom = chromium(tmp_path, "--dump-dom", page.as_uri())
    assert "<h1>Calibration report</h1>" in dom
    content = page.read_text()
    assert "<script" not in content
    assert "<link" not in content
    assert set(re.findall(r'<img src="(.{5})', content)) == {"data:"} == set(re.findall(r'srcset="(.{5})', content))
    light = looked_at(page, tmp_path)["background"]
    dark = looked_at(page, tmp_path, "--blink-settings=preferredColorScheme=0")["background"]
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(13, 17, 23)")
    white = {}
    for mode, more in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        shot = tmp_path / f"{mode}.png"
        chromium(tmp_path, f"--screenshot={shot}", "--window-size=1280,5000", *more, page.as_uri())
        with Image.open(shot) as picture:
            grey = np.asarray(picture.convert("L"))
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
        white[mode] = (grey > 235).mean()
    # Figures too: each of the two diagrams would be 3 % of the picture. What the worst images show is what it is.
    assert white["light"] > 0.8
    assert white["dark"] < 0.02
