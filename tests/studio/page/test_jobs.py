"""Work in the background as the page shows it: progress, stop, failure, and why something can't be done."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from browsing import Served
from bt_hf.studio.jobs import Handle


def test_progress_stop_and_failure(visit: Callable[..., Any], served: Served) -> None:
    turn = threading.Event()

    def work(handle: Handle, options: Mapping[str, Any]) -> None:
        handle.say("Learning your taste, step 3 of 8", 0.375)
        assert turn.wait(30)
        handle.say("Saving", 0.95)
        raise ValueError("no pair is left: click on some")

    served.studio.desk.jobs.works = {**served.studio.desk.jobs.works, "reward": work}
    person = visit()
    page = person.page
    page.get_by_role("link", name="Model").click()
    train = page.get_by_role("button", name="Train the reward")
    assert train.is_disabled()
    page.get_by_text("Choose a picture first.").first.wait_for()
    page.get_by_role("link", name="Choose", exact=True).click()
    person.pair()
    person.pause()
    page.keyboard.press("ArrowLeft")
    person.saved(1)

    page.get_by_role("link", name="Model").click()  # the page asks again for the jobs that can be started
    train.click()
    page.get_by_text("step 3 of 8").wait_for()
    assert page.get_by_role("progressbar").get_attribute("value") == "0.375"
    assert train.is_disabled()
    page.reload()  # the job goes on without the page, and the page finds it again
    page.get_by_text("step 3 of 8").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Stopping …").wait_for()
    turn.set()
    page.locator(".job", has_text="Stopped; nothing was saved.").wait_for()
    assert page.locator("#announcer").inner_text() == "Stopped; nothing was saved."

    train.click()  # the same work, which now fails
    page.locator(".job-failed", has_text="No pair is left: click on some.").wait_for()
    assert train.is_enabled()


def test_a_pipeline_is_asked_for(visit: Callable[..., Any]) -> None:
    person = visit()
    person.page.get_by_role("link", name="Model").click()
    person.page.get_by_text("Train the drawing LoRA first.").wait_for()
    assert person.page.get_by_role("button", name="Begin the blind test").is_disabled()
    assert person.page.get_by_role("button", name="Train the drawing LoRA").is_disabled()
