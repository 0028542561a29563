"""Choosing between two pictures in a real browser: click, keys, touch, undo, and clicks that can't be saved."""

import re
from collections.abc import Callable
from typing import Any

from browsing import Served

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


def test_a_click_is_saved_and_the_next_pair_is_there_already(visit: Callable[..., Any], served: Served) -> None:
    person = visit()
    requests: list[str] = []
    person.page.on("request", lambda request: requests.append(request.url))
    shown, queue = person.pair(), served.studio.desk.state()["queue"]
    assert shown == (queue[0]["left"], queue[0]["right"])
    assert person.page.locator("h1").inner_text() == queue[0]["prompt"]
    person.pause()
    person.page.get_by_role("button", name="Right picture").click()
    person.page.wait_for_function("text => document.querySelector('h1').textContent === text", arg=queue[1]["prompt"])
    assert person.pair() == (queue[1]["left"], queue[1]["right"])
    person.saved(1)
    assert [(one.asked.id, one.choice) for one in served.answers] == [(queue[0]["id"], "right")]
    # Pictures of the next two pairs were decoded before the click, so that it fetches those of later ones only.
    fetched = {int(found[1]) for found in (re.search(r"/api/images/(\d+)\?s=", url) for url in requests) if found}
    later = {one[side] for one in served.studio.desk.state()["queue"][2:] for side in ("left", "right")}
    assert fetched <= later


def test_by_keys_alone(visit: Callable[..., Any], served: Served) -> None:
    person = visit()
    pairs = []
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp"):
        pairs.append(person.pair())
        person.pause()
        person.page.keyboard.press(key)
    person.saved(4)
    assert [one.choice for one in served.answers] == ["left", "right", "tie", "skip"]
    assert [(one.asked.left, one.asked.right) for one in served.answers] == pairs
    person.pause()
    person.page.keyboard.press("Backspace")
    person.saved(3)
    assert person.pair() == pairs[-1]
    person.pause()
    person.page.keyboard.press("Control+z")
    person.saved(2)
    assert person.pair() == pairs[-2]
    person.pause()
    # With Tab and Enter, too: the focus stays where it is while the pictures change.
    for _ in range(12):
        person.page.keyboard.press("Tab")
        if person.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Left picture":
            break
    person.page.keyboard.press("Enter")
    person.saved(3)
    assert person.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Left picture"
    assert served.answers[-1].choice == "left"
    # A screen reader hears what was chosen, and what is asked next.
    said = person.page.locator("#announcer").inner_text()
    assert said == f"Left chosen. 3 clicks. Next: {person.page.locator('h1').inner_text()}"


def test_a_double_click_is_one_choice(visit: Callable[..., Any], served: Served) -> None:
    person = visit()
    person.pair()
    person.pause()
    person.page.get_by_role("button", name="Left picture").dblclick()
    person.saved(1)
    assert len(served.answers) == 1


def test_undo_takes_back_what_an_earlier_page_clicked(visit: Callable[..., Any], served: Served) -> None:
    person = visit()
    first = person.pair()
    person.pause()
    person.page.keyboard.press("ArrowLeft")
    person.saved(1)
    person.page.reload()
    person.saved(1)
    assert person.pair() != first
    person.page.get_by_role("button", name="Undo").click()
    person.saved(0)
    assert person.pair() == first
    assert person.page.get_by_role("button", name="Undo").is_disabled()


def test_on_a_phone(visit: Callable[..., Any], served: Served) -> None:
    person = visit(**PHONE)
    person.pair()
    buttons = person.page.locator("button:visible, nav a:visible")
    boxes = [buttons.nth(place).bounding_box() for place in range(buttons.count())]
    assert min(min(box["width"], box["height"]) for box in boxes) >= 44
    assert max(box["x"] + box["width"] for box in boxes) <= 390
    assert person.page.evaluate("document.documentElement.scrollWidth") == 390
    upper, lower = (
        person.page.get_by_role("button", name=f"{name} picture").bounding_box() for name in ("Upper", "Lower")
    )
    assert lower["y"] >= upper["y"] + upper["height"]
    assert upper["width"] >= 250
    assert lower["y"] + lower["height"] <= 844
    person.pause()
    person.page.get_by_role("button", name="Lower picture").tap()
    person.saved(1)
    assert served.answers[0].choice == "right"


def test_a_full_disk_keeps_the_clicks_in_the_browser(
    visit: Callable[..., Any], served: Served, monkeypatch: Any
) -> None:
    person = visit()
    append = type(served.studio.session).append
    full = OSError(28, "No space left on device")

    def fail(*args: Any) -> None:
        from bt_hf.studio.session import NotSavedError

        raise NotSavedError(*full.args)

    monkeypatch.setattr(type(served.studio.session), "append", fail)
    person.pair()
    person.pause()
    person.page.keyboard.press("ArrowLeft")
    banner = person.page.get_by_role("alert")
    banner.wait_for()
    assert "1 click not saved yet" in banner.inner_text()
    assert "No space left on device" in banner.inner_text()
    person.pause()
    person.page.keyboard.press("ArrowRight")
    person.page.reload()  # kept in the browser, also over a reload
    person.page.get_by_role("alert").wait_for()
    assert "2 clicks not saved yet" in person.page.get_by_role("alert").inner_text()
    assert served.answers == []
    monkeypatch.setattr(type(served.studio.session), "append", append)
    person.page.get_by_role("button", name="Try now").click()
    person.saved(2)
    assert person.page.get_by_role("alert").count() == 0
    assert [one.choice for one in served.answers] == ["left", "right"]
    assert person.page.evaluate("localStorage.length") == 0


def test_a_lost_connection_is_made_up_for(visit: Callable[..., Any], served: Served) -> None:
    person = visit()
    person.pair()
    person.context.set_offline(True)
    for key in ("ArrowLeft", "ArrowRight"):
        person.pause()
        person.page.keyboard.press(key)
    person.page.get_by_role("alert").wait_for()
    assert served.answers == []
    person.context.set_offline(False)  # the browser tells the page, which sends at once
    person.saved(2)
    assert [one.choice for one in served.answers] == ["left", "right"]


def test_a_picture_that_vanished(visit: Callable[..., Any], served: Served) -> None:
    person = visit()
    gone = served.studio.desk.state()["queue"][2]
    person.page.route(re.compile(rf"/api/images/{gone['left']}\?"), lambda route: route.fulfill(status=404, body="{}"))
    person.page.reload()
    while person.page.locator(".notice").count() == 0:
        person.pause()
        person.page.keyboard.press("ArrowUp")
        person.page.wait_for_timeout(100)
    before = len(served.answers)
    assert "can't be loaded" in person.page.locator(".notice").inner_text()
    person.page.keyboard.press("ArrowLeft")  # nobody can choose between a picture and nothing
    person.page.wait_for_timeout(200)
    assert len(served.answers) == before
    person.page.unroute_all()
    person.page.get_by_role("button", name="Try again").click()
    person.page.locator(".notice").wait_for(state="detached")
    person.page.keyboard.press("ArrowLeft")
    person.saved(before + 1)


def test_two_tabs_don_t_lose_or_double_a_click(visit: Callable[..., Any], served: Served) -> None:
    person = visit()
    other = person.open(served.address.split("?")[0])
    for _round in range(4):
        for page, key in ((person.page, "ArrowLeft"), (other, "ArrowRight")):
            person.pair(page)
            person.pause()
            page.keyboard.press(key)
    person.saved(8, other)
    assert len(served.answers) == 8
    assert len({one.id for one in served.answers}) == 8
    assert [one.choice for one in served.answers].count("left") == 4


def test_a_caption_is_text_and_never_markup(visit: Callable[..., Any], served: Served) -> None:
    caption = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script> **bold** &amp;"
    pair = served.studio.desk.state()["queue"][0]
    served.studio.session.log.asked[pair["id"]].__dict__["prompt"] = caption
    person = visit()
    assert person.page.locator("h1").inner_text() == caption
    assert person.page.locator("h1 *").count() == 0
    assert person.page.title().startswith("Choose")
