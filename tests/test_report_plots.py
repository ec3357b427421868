"""``tsqp analyze --plot``: the files, and what is said where there is none."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import Outcome, serving, short_directory, tsqp, tsqp_here
from report_logs import made_log, made_row, old_log, real_log
from trace_format import check_trace

pytest.importorskip("matplotlib")

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("logs") / "ops.jsonl"
    real_log(path, "ops")
    return str(path)


def refused(done: Outcome, *words: str) -> None:
    """One sentence on the standard error, and status 1."""
    assert done.code == 1, done.err
    (line,) = done.err.strip().splitlines()
    assert line.startswith("tsqp: ")
    for word in words:
        assert word in line


class Page(HTMLParser):
    """Looks at every tag and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.references.append(value or "")
            assert "url(" not in (value or "").replace("url(#", "")

    def handle_data(self, data: str) -> None:
        self.words += data + "\n"


def check_page(text: str) -> Page:
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "image", "form", "base"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert "@import" not in text
    assert "default-src 'none'" in text
    return page


# --- as a user --------------------------------------------------------------------------------------------------


@pytest.mark.watchdog(180)
def test_from_a_served_model_to_a_page_and_a_trace() -> None:
    with short_directory() as directory:
        log, page, trace = (str(directory / name) for name in ("a.log", "report.html", "trace.json"))
        with serving(directory) as served:
            generate = ("generate", "--prompt", "And the king said unto them", "--max-new-tokens", "4")
            done = tsqp(*generate, "--placement", "fused", "--perf-log", log, "--endpoint", served.endpoint)
            assert done.code == 0, done.err
        done = tsqp("analyze", log, "--plot", page, "--trace", trace)
        assert done.code == 0, done.err
        assert f"wrote {page}" in done.err
        assert f"wrote {trace}" in done.err
        assert "FusedAttention" in done.out
        found = check_page(Path(page).read_text())
        assert "svg" in found.tags
        assert {"Calls by method", "FusedAttention", "FusedMLP", "p99 (ms)"} <= set(found.words.splitlines())
        check_trace(json.loads(Path(trace).read_text()))


# --- the files --------------------------------------------------------------------------------------------------


def test_png(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib import image

    path = tmp_path / "report.PNG"
    done = tsqp_here(capsys, "analyze", log, "--plot", str(path))
    assert done.code == 0, done.err
    pixels = image.imread(path, format="png")
    assert pixels.shape[0] > 1000
    assert pixels.shape[1] > 1500
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2])}) > 10


def test_svg(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        done = tsqp_here(capsys, "analyze", log, "--json", "--plot", str(path))
        assert done.code == 0, done.err
        json.loads(done.out)  # nothing but the JSON is on the standard output
    root = ET.parse(paths[0]).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(root.iter())) > 100
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"DOCTYPE" not in paths[0].read_bytes()


def test_a_forward_is_chosen(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = []
    for forward in ("1", "3"):
        path = tmp_path / f"{forward}.svg"
        done = tsqp_here(capsys, "analyze", log, "--plot", str(path), "--forward", forward)
        assert done.code == 0, done.err
        pictures.append(path.read_bytes())
    assert pictures[0] != pictures[1]
    refused(tsqp_here(capsys, "analyze", log, "--plot", str(path), "--forward", "99"), "--forward 99", "it has 1 to")


def test_the_old_log_and_several_logs(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = old_log(tmp_path / "old.log")
    for number, logs in enumerate(((old,), (log, old))):
        path = tmp_path / f"{number}.html"
        done = tsqp_here(capsys, "analyze", *logs, "--plot", str(path))
        assert done.code == 0, done.err
        check_page(path.read_text())


def test_a_log_of_one_call_of_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = dict.fromkeys(("serialize_ms", "send_ms", "recv_ms", "deserialize_ms", "total_ms", "sent_kb"), 0.0)
    nothing |= {"recv_kb": 0.0, "compute_ms": 0.0, "queue_ms": 0.0, "wait_ms": 0.0, "start_ms": 0.0}
    made = made_log(tmp_path / "a.jsonl", [made_row(0, **nothing)])
    done = tsqp_here(capsys, "analyze", made, "--plot", str(tmp_path / "a.png"))
    assert done.code == 0, done.err


def test_a_hostile_log_stays_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that are markup, formulas, other scripts or long, and figures of any size, in every place there is."""
    names = [HOSTILE, "$\\frac{", "'\"><svg onload=x>", "\u6570" * 60, "x" * 64, "&amp;", "{0}%s", *map(str, range(20))]
    rows = [
        made_row(number, method=name, placement=HOSTILE, layer=layer, forward=number % 3, total_ms=ms, start_ms=start)
        for number, (name, layer, ms, start) in enumerate(
            (name, layer, ms, start)
            for name in names
            for layer in (None, -(10**18), 7)
            for ms, start in ((1e-300, 0.0), (1e8, 1e8), (1e300, 5.0))
        )
    ]
    made = Path(made_log(tmp_path / "<b>$x$.jsonl", rows))
    header = {"model": HOSTILE, "placement": "<img src=http://x/>", "transport": "$\\"}
    made.write_text(json.dumps({"header": header}) + "\n" + made.read_text())
    for ending in ("html", "svg", "png"):
        path = tmp_path / f"report.{ending}"
        done = tsqp_here(capsys, "analyze", str(made), "--plot", str(path))
        assert done.code == 0, done.err
    page = check_page((tmp_path / "report.html").read_text())
    assert HOSTILE in page.words.splitlines()
    ET.parse(tmp_path / "report.svg")


# --- what is refused --------------------------------------------------------------------------------------------


def test_what_cannot_be_drawn_is_said(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(tmp_path / "a.png")
    refused(tsqp_here(capsys, "analyze", log, "--plot", "report.pdf"), "--plot report.pdf", ".png, .svg and .html")
    refused(tsqp_here(capsys, "analyze", log, "--plot", str(tmp_path / "no" / "a.svg")), "No such file", "give a path")
    (tmp_path / "full.png").symlink_to("/dev/full")
    refused(tsqp_here(capsys, "analyze", log, "--plot", str(tmp_path / "full.png")), "can't be written: No space left")
    refused(tsqp_here(capsys, "analyze", log, log, "--compare", "--plot", picture), "--compare")
    refused(tsqp_here(capsys, "analyze", log, "--forward", "1"), "--forward", "--plot")
    (tmp_path / "empty.log").write_text("")
    refused(tsqp_here(capsys, "analyze", str(tmp_path / "empty.log"), "--plot", picture), "is empty")
    assert not Path(picture).exists()


def test_a_log_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = made_log(tmp_path / "a.png", [made_row(0)])
    refused(tsqp_here(capsys, "analyze", made, "--plot", made), "is a log that is read")
    assert "BatchLinear" in Path(made).read_text()


def test_without_matplotlib(
    log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    picture = tmp_path / "a.png"
    refused(tsqp_here(capsys, "analyze", log, "--plot", str(picture)), "matplotlib", "tsqp[plot]")
    assert not picture.exists()
    assert tsqp_here(capsys, "analyze", log).code == 0
