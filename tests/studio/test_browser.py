"""The whole path in a browser: upload, check, plan, train, watch, stop, resume, talk, vote, compare, export, delete.

Debian's chromium draws the page; what is asserted is what a person sees. Screenshots are kept where
FIREFLY_SCREENSHOTS says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("gradio") is None:  # not imported here, where every collection would wait for it
    pytest.skip("gradio is not installed", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")

from studio_server import StudioServer  # noqa: E402

from firefly.runs.jobs import list_jobs  # noqa: E402

pytestmark = pytest.mark.browser

PATIENCE = 420_000
"""Milliseconds: a model is loaded, trained, served on two cores that others may use."""

ROWS = [
    {"instruction": f"What is your name? ({number})", "input": "", "output": "I am Firefly, a small assistant."}
    for number in range(60)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studio") / "root"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[StudioServer]:
    found = StudioServer(root)
    found.start()
    yield found
    found.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed (apt-get install chromium fonts-noto-cjk)")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


def open_page(browser: Any, server: StudioServer, **options: Any) -> Any:
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US"} | options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("request", lambda request: server.requests.append(request.url))
    page.on("response", lambda answer: server.refused.append(answer.url) if answer.status >= 400 else None)
    page.goto(server.address)
    page.locator("#data-file").wait_for()
    return page


@pytest.fixture(scope="module")
def page(browser: Any, server: StudioServer) -> Any:
    return open_page(browser, server)


def part(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def keep(page: Any, name: str) -> None:
    if folder := os.environ.get("FIREFLY_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder, f"{name}.png")), full_page=True)


def see(page: Any, selector: str, text: str | re.Pattern[str], timeout: int = PATIENCE) -> Any:
    found = page.locator(selector)
    sync_api.expect(found).to_contain_text(text, timeout=timeout)
    return found


def type_into(page: Any, selector: str, text: str) -> None:
    found = page.locator(f"{selector} textarea, {selector} input").first
    found.click()
    found.press("Control+a")
    page.keyboard.type(text)
    time.sleep(0.3)
    found.press("Tab")


def unfold(found: Any) -> None:
    found.click()
    time.sleep(1)  # what is in it is drawn now, and takes no text before


def configuration(page: Any) -> dict[str, Any]:
    return json.loads(page.locator("#config .cm-content").inner_text())


# The tests below build on each other, in this order: one walk.


def test_an_uploaded_file_is_checked_and_its_trained_tokens_are_coloured(page: Any, root: Path) -> None:
    rows = [
        *ROWS,
        {"instruction": "<script>document.title = 'hacked'</script>", "output": "<img src=x onerror=alert(1)>"},
    ]
    upload = root.parent / "rows.jsonl"
    upload.write_text("".join(json.dumps(row) + "\n" for row in [rows[-1], *rows[:-1], rows[0]]), encoding="utf-8")
    page.locator("input[type=file]").first.set_input_files(str(upload))
    sync_api.expect(page.locator("#data-file input")).to_have_value("uploads/rows.jsonl")
    page.locator("#check").first.click()
    see(page, "#verdict", "alpaca")
    see(page, "#rows", "I am Firefly")
    assert page.locator("#rows mark").count() >= 10
    see(page, "#rows mark >> nth=0", "onerror")
    assert page.title() == "Firefly Studio"  # what a row holds is text, and nothing else
    see(page, "#findings", "duplicate")
    keep(page, "data")
    page.locator("#rows-forth").click()
    see(page, "#rows", "#11")


def test_the_template_is_switched_beside_the_rows(page: Any) -> None:
    page.locator("#template input").click()
    page.get_by_role("option", name="qwen2.5", exact=True).click()
    see(page, "#rows", "created by Alibaba Cloud")


def test_a_form_and_its_text_say_the_same(page: Any, root: Path) -> None:
    part(page, "Train")
    see(page, "#config-verdict", "train_file")  # what is wrong with the form as it begins
    type_into(page, "#key-train_file", "uploads/rows.jsonl")
    see(page, "#config", "uploads/rows.jsonl")
    see(page, "#config-verdict", "✓")
    unfold(page.locator("#section-schedule button.label-wrap"))
    type_into(page, "#key-max_steps", "400")
    see(page, "#config", '"max_steps": 400')
    assert configuration(page)["max_steps"] == 400
    type_into(page, "#key-output_dir", "/etc/firefly")
    see(page, "#config-verdict", "outside of the folders")
    type_into(page, "#key-output_dir", "output/walk")
    see(page, "#config-verdict", "✓")
    unfold(page.locator("#section-run button.label-wrap"))
    type_into(page, "#key-logging_steps", "1")
    see(page, "#config", '"logging_steps": 1')
    unfold(page.locator("#section-evaluation button.label-wrap"))
    type_into(page, "#key-checkpoint_samples", "1")
    see(page, "#config", '"checkpoint_samples": 1')


def test_a_refresh_loses_nothing_that_was_typed(page: Any) -> None:
    before = configuration(page)
    time.sleep(1)
    page.reload()
    page.locator("#parts").wait_for()
    part(page, "Train")
    see(page, "#config", "output/walk")
    assert configuration(page) == before
    sync_api.expect(page.locator("#key-output_dir textarea, #key-output_dir input").first).to_have_value("output/walk")


def test_memory_and_time_are_planned(page: Any) -> None:
    see(page, "#planned", "it fits")  # without a click, behind every change
    see(page, "#planned", "activations")
    keep(page, "train")


def test_a_run_begins_and_its_curve_moves(page: Any, root: Path) -> None:
    page.locator("#start").click()
    metrics = root / "output" / "walk" / "metrics.jsonl"
    wait(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 2, "the run trains")
    part(page, "Watch")
    see(page, "#run-state", "running")
    first = see(page, "#run-state", re.compile(r"step \d+/400")).inner_text()
    wait(lambda: page.locator("#run-state").inner_text() != first, "the page follows the run")
    page.locator("#plot-loss canvas, #plot-loss svg").first.wait_for()
    keep(page, "watch")


def test_the_run_outlives_page_server_and_browser(browser: Any, server: StudioServer, page: Any, root: Path) -> None:
    metrics = root / "output" / "walk" / "metrics.jsonl"
    page.context.close()
    server.kill()
    before = len(metrics.read_text().splitlines())
    wait(lambda: len(metrics.read_text().splitlines()) > before + 2, "the run goes on")
    server.start()
    again = open_page(browser, server)
    part(again, "Watch")
    see(again, "#run-state", "running")
    page.again = again


def test_controls_answer_while_a_run_uses_both_cores(browser: Any, server: StudioServer, page: Any) -> None:
    again = page.again
    part(again, "Train")
    field = again.locator("#key-max_steps textarea, #key-max_steps input").first
    unfold(again.locator("#section-schedule button.label-wrap"))
    took = []
    for number in (401, 402, 403, 404, 405):
        began = time.monotonic()
        field.fill(str(number))
        field.press("Tab")
        see(again, "#config", f'"max_steps": {number}')
        took.append(time.monotonic() - began)
    fresh = open_page(browser, server)
    painted = fresh.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
    shown = fresh.evaluate("performance.now()") / 1000
    fresh.context.close()
    answer = sorted(took)[2]
    print(f"under load: a form's answer {answer:.2f} s (median of 5), paint {painted:.2f} s, fields {shown:.2f} s")
    assert painted < 4
    assert answer < 1.5  # 0.14 to 0.29 where nothing else was busy


def test_stopping_saves_and_the_run_is_resumed(page: Any, root: Path) -> None:
    again = page.again
    part(again, "Watch")
    again.locator("#stop").click()
    see(again, "#run-state", "interrupted")
    steps = [int(path.name.split("-")[1]) for path in (root / "output" / "walk").glob("checkpoint-*")]
    assert steps
    again.locator("#watch-resume").click()
    see(again, "#run-state", "running")
    see(again, "#run-state", re.compile(rf"step ({'|'.join(str(max(steps) + more) for more in range(1, 40))})/400"))
    again.locator("#stop").click()
    see(again, "#run-state", "interrupted")
    unfold(again.get_by_role("button", name="What the model said at its checkpoints"))
    see(again, "#samples", "step 0")
    assert "onerror" in again.locator("#samples").inner_text()  # of the first row, as text
    keep(again, "samples")
    assert json.loads((root / "output" / "walk" / "run.json").read_text())["resumed_from"]


def test_the_queue_goes_on_past_one_that_fails_and_says_why(page: Any, root: Path) -> None:
    again = page.again
    part(again, "Train")
    type_into(again, "#key-max_steps", "30")
    type_into(again, "#key-train_file", "uploads/missing.jsonl")
    type_into(again, "#key-output_dir", "output/missing")
    see(again, "#config", "output/missing")
    again.locator("#enqueue").click()
    type_into(again, "#key-train_file", "uploads/rows.jsonl")
    type_into(again, "#key-output_dir", "output/second")
    see(again, "#config", "output/second")
    again.locator("#enqueue").click()
    see(again, "#queue", "missing.jsonl")
    see(again, "#queue", "failed")
    wait(lambda: (root / "output" / "second" / "adapter_model.safetensors").is_file(), "the second is trained")
    keep(again, "queue")


def test_base_and_tuned_answer_side_by_side(page: Any) -> None:
    again = page.again
    part(again, "Talk")
    type_into(again, "#talk-tuned", "output/second")
    again.locator("#talk-load").click()
    see(again, "#talk-status", "ready")
    unfold(again.get_by_role("button", name="How answers are drawn"))
    type_into(again, "#talk-system", "You are brief.")
    type_into(again, "#talk-message", "What is your name?")
    again.locator("#talk-send").click()
    for side in ("#chat-base", "#chat-tuned"):
        see(again, side, "What is your name?")
        wait(lambda side=side: len(again.locator(f"{side} .bot").all_inner_texts()) > 0, "an answer")
    unfold(again.get_by_role("button", name="The prompt as the template wrote it"))
    wait(lambda: "You are brief." in again.locator("#talk-prompt textarea").input_value(), "the prompt is shown")
    wait(lambda: len(again.locator("#chat-tuned .bot").last.inner_text()) > 10, "the tuned model answers")
    keep(again, "talk")


def test_an_edited_question_is_asked_again_and_stopping_ends_both_answers(page: Any, root: Path) -> None:
    again = page.again
    again.locator("#chat-base button[title=Edit], #chat-base button[aria-label=Edit]").first.click()
    again.locator("#chat-base textarea").fill("Tell me a long story about a fox.")
    again.locator("#chat-base button[aria-label=Submit]").click()
    for side in ("#chat-base", "#chat-tuned"):
        see(again, side, "a long story")
        sync_api.expect(again.locator(side)).not_to_contain_text("What is your name?")
    wait(lambda: len(again.locator("#chat-base .bot").last.inner_text()) > 10, "an answer")
    again.locator("#talk-stop").click()
    (job,) = [job for job in list_jobs(root / ".firefly" / "jobs") if job.kind == "serve"]
    wait(lambda: job.log.count(" 499 "), "the server learns that nobody waits")


def test_a_blind_vote_becomes_a_pair_that_data_opens(page: Any, root: Path) -> None:
    again = page.again
    unfold(again.get_by_role("button", name="Blind votes: which answer is better?"))
    type_into(again, "#vote-question", "Who are you?")
    again.locator("#vote-ask").click()
    wait_until_whole(again, "#vote-a textarea", "#vote-b textarea")
    a = again.locator("#vote-a textarea").input_value()
    again.locator("#vote-for-a").click()
    see(again, "#vote-result", "1 votes")
    (vote,) = map(json.loads, (root / "votes.jsonl").read_text(encoding="utf-8").splitlines())
    assert vote["chosen"]["content"] == a
    keep(again, "vote")
    again.locator("#votes-open").click()
    part(again, "Data")
    again.locator("#check").first.click()
    see(again, "#verdict", "dpo")


def test_a_comparison_and_an_export_show_their_verdicts(page: Any, root: Path) -> None:
    again = page.again
    part(again, "Talk")
    again.locator("#talk-unload").click()
    part(again, "Compare and export")
    type_into(again, "#export-tuned", "output/second")
    type_into(again, "#compare-file", "uploads/rows.jsonl")
    again.locator("#begin-compare").click()
    again.locator("iframe.report").wait_for()
    frame = again.frame_locator("iframe.report")
    frame.locator("h1").first.wait_for()
    keep(again, "compare")
    again.locator("#begin-export").click()
    wait(lambda: (root / "output" / "second-gguf.gguf").is_file(), "a GGUF file")
    see(again, "#export-result", "✓ verified")
    keep(again, "export")


def test_a_run_is_deleted_only_by_its_name(page: Any, root: Path) -> None:
    again = page.again
    part(again, "History")
    again.locator("#history-again").click()
    see(again, "#history", "output/second")
    again.locator("#history-run input").click()
    again.get_by_role("option", name="output/walk").click()
    wait(lambda: "lora" in again.locator("#history-details textarea").input_value(), "the run's details")
    keep(again, "history")
    again.locator("#history-delete").click()
    again.get_by_text("type the name of its folder").first.wait_for()
    assert (root / "output" / "walk").is_dir()
    type_into(again, "#history-name", "walk")
    again.locator("#history-delete").click()
    wait(lambda: not (root / "output" / "walk").exists(), "the run is gone")


def test_no_request_left_this_machine(server: StudioServer) -> None:
    assert server.requests
    allowed = re.compile(r"(http://127\.0\.0\.1:\d+/|data:|blob:)")
    assert [url for url in server.requests if not allowed.match(url)] == []
    assert server.refused == []  # and the page asks for nothing that is not there


def test_two_pages_keep_what_each_was_told(browser: Any, server: StudioServer) -> None:
    one = open_page(browser, server)
    part(one, "Train")
    see(one, "#config-verdict", "train_file")
    other = one.context.new_page()
    other.goto(server.address)
    part(other, "Train")
    see(other, "#config-verdict", "train_file")
    for page, name in ((one, "output/one"), (other, "output/other")):
        type_into(page, "#key-output_dir", name)
        see(page, "#config", name)
    for page, name in ((one, "output/one"), (other, "output/other")):
        page.reload()
        see(page, "#config", name)
    one.context.close()


@pytest.mark.parametrize("spoken", ["en", "zh"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_every_part_fits_every_screen(browser: Any, server: StudioServer, spoken: str, scheme: str, width: int) -> None:
    found = open_page(
        browser,
        server,
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        locale="zh-CN" if spoken == "zh" else "en-US",
    )
    tabs = found.get_by_role("tab").all_inner_texts()
    assert ("数据" in " ".join(tabs)) == (spoken == "zh")
    parts = found.locator(".tab-container[aria-hidden=true] button").all_inner_texts()
    assert len(parts) == 6
    for number, name in enumerate(parts):
        tab = found.get_by_role("tab", name=name, exact=True)
        if not tab.count():  # a narrow screen keeps the last ones behind a button
            found.locator(".overflow-menu > button").click()
            tab = found.locator(".overflow-dropdown button", has_text=name)
        tab.click()
        time.sleep(0.7)
        wider = found.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        keep(found, f"{spoken}-{scheme}-{width}-{number}")
        assert wider <= 1
    found.context.close()


def wait_until_whole(page: Any, *selectors: str) -> None:
    """Until texts that grow are there and have stopped."""
    texts, since = [""], time.monotonic()

    def rests() -> bool:
        nonlocal texts, since
        now = [page.locator(selector).input_value() for selector in selectors]
        if now != texts or not all(now):
            texts, since = now, time.monotonic()
        return time.monotonic() - since > 5

    wait(rests, "two whole answers")


def wait(holds: Any, what: str) -> Any:
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end:
        if found := holds():
            return found
        time.sleep(0.2)
    pytest.fail(f"it never came to this: {what}")
