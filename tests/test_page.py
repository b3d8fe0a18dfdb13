"""The page of a log: what it says is what `score` says, model text stays text, and a real browser can use it."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

from config import InputError
from eval import main
from score import by_profile, paired_bootstrap, read_log, summary
from ui.page import logs_of, paired

LOG = Path(__file__).parent / "every_ending.jsonl"
EVIL = """<img src=x onerror="document.title='hacked'"></script><script>document.title='hacked'</script>{{ 7 * 7 }}"""


def rows() -> list[dict]:
    return [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]


def write(path: Path, found: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def grown(gain: float) -> list[dict]:
    """The dialogues of the log with every final emotion `gain` higher (the page shows a log, it does not verify)."""
    return [row | ({"emo_point": row["emo_point"] + gain} if "emo_point" in row else {}) for row in rows()]


def many(count: int) -> list[dict]:
    """`count` dialogues of ten turns, each with an appraisal and its features."""
    heard, said = (next(m for m in rows()[0]["history"] if m["role"] == role and m.get("planning", role != "user"))
                   for role in ("user", "assistant"))
    heard = heard | {"content": "word " * 40, "thinking": "plan " * 20}
    features = {f"feature{n}": 0.5 for n in range(35)}
    heard["planning"] = heard["planning"] | {"analyse": "why " * 20, "features": features}
    history = [rows()[0]["history"][0], *[said | {"content": "kind " * 40}, heard] * 10]
    return [rows()[0] | {"id": f"person-{n}", "history": history} for n in range(count)]


def test_a_page_says_what_score_says(tmp_path):
    out = tmp_path / "a.html"
    second = write(tmp_path / "b.jsonl", grown(5.0))
    assert main(["page", str(LOG), second, "-o", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    logs = [read_log(str(LOG)), read_log(second)]
    for log in logs:
        assert f"<td>{summary(log)['score']:.1f}</td>" in html
    gain, low, high = paired_bootstrap(*map(by_profile, logs))
    assert gain == pytest.approx(5) and f"<b>{gain:+.1f}</b> points, 95 % interval {low:+.1f} to {high:+.1f}" in html
    assert html.count('<details class="talk"') == len(logs[0])
    for row in logs[0]:
        for message in row["history"]:
            assert message["content"] in unescape(html)


def test_two_logs_are_paired_by_person_and_order(tmp_path):
    first, *others = rows()
    second = write(tmp_path / "b.jsonl", [*reversed(others), first | {"emo_point": 90.0}, first | {"emo_point": 80.0}])
    talks = paired([*logs_of(LOG), *logs_of(Path(second))])
    mine = [talk for talk in talks if talk["row"]["id"] == first["id"]]
    assert sorted(str(talk["gain"]) for talk in mine) == ["-10.0", "None"]  # it ended at 100; the second is alone
    alone = next(talk for talk in mine if talk["gain"] is None)
    assert alone["sides"][0] is None and alone["sides"][1]["final"] == 80.0
    assert {talk["gain"] for talk in talks if talk not in mine} <= {0.0, None}


def test_whatever_a_model_says_stays_text(tmp_path):
    found = rows()[:2]
    for row in found:
        row |= {"id": row["id"] + EVIL, "player": EVIL, "scene": EVIL, "why": EVIL, "ended": EVIL}
        for message in row["history"]:
            message |= {"content": EVIL, "thought": EVIL, "thinking": EVIL, "stop": EVIL, "violation": EVIL}
            if "planning" in message:
                texts = dict.fromkeys(("content", "activity", "analyse", "TargetCompletion"), EVIL)
                message["planning"] |= texts | {"features": {EVIL: 0.5}}
    (tmp_path / "settings.json").write_text(json.dumps({EVIL: EVIL}))
    assert main(["page", write(tmp_path / "dialogues.jsonl", found), "-o", str(tmp_path / "a.html")]) == 0
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<img" not in html and html.count("<script") == 1 and EVIL in unescape(html) and "49" not in html[:3000]
    for row in found:
        row["history"][2]["planning"]["change"] = EVIL
    write(tmp_path / "dialogues.jsonl", found)
    with pytest.raises(InputError, match="dialogues.jsonl:1: not of SAGE's log format"):
        main(["page", str(tmp_path / "dialogues.jsonl"), "-o", str(tmp_path / "b.html")])
    assert not (tmp_path / "b.html").exists()


def test_a_run_shows_its_evaluations_and_its_curves(tmp_path):
    run = tmp_path / "run"
    for when in ("before", "after"):
        (run / "eval" / when).mkdir(parents=True)
        shutil.copy(LOG, run / "eval" / when / "dialogues.jsonl")
    metrics = [{"step": n, "emotion/final": 30.0 + n, "eval/score": None} for n in (1, 2)]
    write(run / "metrics.jsonl", metrics)
    pair = [str(run / "eval" / when / "dialogues.jsonl") for when in ("before", "after")]
    assert [name for name, _, _ in logs_of(run)] == pair
    assert main(["page", str(run), "-o", str(tmp_path / "a.html")]) == 0
    assert "emotion/final" in (tmp_path / "a.html").read_text(encoding="utf-8")
    shutil.rmtree(run / "eval/before")
    assert [name for name, _, _ in logs_of(run)] == pair[1:]
    shutil.rmtree(run / "eval")
    training = [row | {"step": step} for step in (1, 2) for row in rows()[: 2 + step]]
    write(run / "dialogues.jsonl", training)
    ((_, found, _),) = logs_of(run)
    assert len(found) == 4 and {row["step"] for row in found} == {2}


def test_a_page_of_a_hundred_dialogues_is_small_and_needs_nothing_else(tmp_path):
    out = tmp_path / "a.html"
    assert main(["page", write(tmp_path / "a.jsonl", many(100)), "-o", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    assert out.stat().st_size < 3e6
    assert not re.search(r"<(?:link|img|iframe)|@import|url\((?!#)", html)
    linked = set(re.findall(r"(?:src|href)=\"([^\"]*)", html))
    assert all(link.startswith("#") for link in linked), linked


@pytest.fixture(scope="module")
def chromium():
    """A real browser, the distribution's."""
    sync_api = pytest.importorskip("playwright.sync_api")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not binary:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=flags)
        yield browser
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("wide", [1200, 400])
def test_a_browser_can_filter_and_fold_by_click_and_by_key(chromium, tmp_path, theme, wide):
    found = rows()
    found[0]["history"][1]["content"] = EVIL + "needle" + "x" * 300
    out = tmp_path / "a.html"
    assert main(["page", str(LOG), write(tmp_path / "b.jsonl", found), "-o", str(out)]) == 0
    page = chromium.new_page(viewport={"width": wide, "height": 800}, color_scheme=theme)
    wrong = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file://") else wrong.append(request.url))
    page.goto(out.as_uri())
    visible = page.locator(".talk:visible")
    assert visible.count() == len(found) and page.locator("#count").inner_text() == f"{len(found)} of {len(found)}"
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) > 380) == (theme == "light")

    page.select_option("#intention", "empathy")
    assert 0 < visible.count() == sum(row["task"] == "empathy" for row in found) < len(found)
    page.select_option("#outcome", "content")
    assert visible.count() == sum(row["task"] == "empathy" and row["ended"] == "content" for row in found)
    page.select_option("#intention", "")
    page.select_option("#outcome", "")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("NEEDLE")
    assert visible.count() == 1
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    assert page.locator(".talk[open]").count() == 1
    reply = page.get_by_text("needle").first
    assert reply.is_visible() and "<img src=x" in reply.inner_text()
    fold = page.locator(".talk[open] details:has(.chip)").first
    analysis = fold.locator("dd").first
    assert not analysis.is_visible()
    fold.locator("summary").click()
    assert analysis.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.keyboard.press("o")
    assert page.locator(".talk[open]").count() == 0
    page.fill("#text", "")
    page.locator("#all").click()
    assert page.locator(".talk[open]").count() == len(found)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.title().startswith("rlver") and wrong == []
    page.close()


def refused(path: str, out: Path) -> str:
    with pytest.raises(InputError) as caught:
        main(["page", path, "-o", str(out)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_log_that_is_off_is_one_line_that_names_the_row_and_the_older_page_stays(tmp_path):
    out = tmp_path / "a.html"
    out.write_text("older")
    for spoil, words in (
        (lambda row: row.update(emo_point="high"), "could not convert"),
        (lambda row: row.update(emo_point=float("inf")), "emo_point is inf"),
        (lambda row: row.update(emo_point=10**400), "OverflowError"),
        (lambda row: row["history"][2]["planning"].pop("change"), "KeyError"),
        (lambda row: row["history"][2].update({"emotion-point": "fine"}), "could not convert"),
        (lambda row: row.update(history="none"), "AttributeError"),
    ):
        found = rows()
        spoil(found[1])
        message = refused(write(tmp_path / "log.jsonl", found), out)
        assert words in message and (":2:" in message or found[1]["id"] in message), message
    assert out.read_text() == "older" and not list(tmp_path.glob(".a.html"))
    (tmp_path / "b.html").mkdir()
    assert "b.html: cannot be written" in refused(str(LOG), tmp_path / "b.html")
    assert "wants LOG_OR_RUN" in refused(str(LOG), tmp_path / "a.txt")


def test_a_log_with_less_than_ours_is_shown(tmp_path):
    """SAGE's own logs have thoughts under another name and no endings; some have less than that."""
    found = rows()[:3]
    for message in found[0]["history"]:
        message.pop("content")
        message.get("planning", {}).pop("analyse", None)
    for row in found:
        row.pop("ended")
    found[1]["history"][1] |= {"think": "a thought of SAGE's", "content": "half \ud83d"}
    found[2] |= {"history": []}
    found.append({"id": "x", "status": "failed", "history": [{"role": "user", "content": "hello"}]})
    out = tmp_path / "a.html"
    assert main(["page", write(tmp_path / "a.jsonl", found), "-o", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    assert "a thought of SAGE&#39;s" in html and "goodbye or max_turns" in html and "half ?" in html
    assert "<option>failed</option>" in html and "nan" not in html.split("<svg")[0]


def test_two_logs_of_different_people_are_not_called_before_and_after(tmp_path):
    second = write(tmp_path / "b.jsonl", [row | {"scene": "another"} for row in rows()])
    out = tmp_path / "a.html"
    assert main(["page", str(LOG), second, "-o", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    assert "Two logs" in html and "Before and after" not in html and "these are not the same people" in html
