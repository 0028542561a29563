"""Stars, best of four and ranking in a real browser, by mouse and by keys."""

from collections.abc import Callable
from typing import Any

from browsing import Served, Visitor


def shown(person: Visitor) -> list[int]:
    """Numbers of the images of the group, in their order on the page."""
    person.page.locator(".group .picture-frame img").nth(3).wait_for()
    urls = person.page.eval_on_selector_all(".group .picture-frame img", "all => all.map(one => one.src)")
    return [int(url.split("/api/images/")[1].split("?")[0]) for url in urls]


def choose_way(person: Visitor, name: str) -> None:
    button = person.page.get_by_role("button", name=name, exact=True)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"


def test_stars_by_mouse_and_keys(visit: Callable[..., Any], served: Served) -> None:
    person = visit()
    choose_way(person, "Stars")
    images = shown(person)
    save = person.page.get_by_role("button", name="Give stars to two")
    assert save.is_disabled()
    person.page.get_by_role("group", name="Stars for picture 1").get_by_role("radio", name="5 stars").check()
    second = person.page.get_by_role("group", name="Stars for picture 2").get_by_role(
        "radio", name="1 star", exact=True
    )
    second.focus()
    person.page.keyboard.press("Space")
    person.page.keyboard.press("ArrowRight")  # stars have their own use for the arrows
    person.page.get_by_role("button", name="Save").click()
    person.saved(1)
    assert dict(zip(served.answers[0].images, served.answers[0].values, strict=True)) == {
        images[0]: 5.0,
        images[1]: 2.0,
    }


def test_the_best_of_four(visit: Callable[..., Any], served: Served) -> None:
    person = visit()
    choose_way(person, "Best of four")
    images = shown(person)
    person.page.get_by_role("button", name="Picture 3 is the best").click()
    person.saved(1)
    best = served.answers[0]
    assert best.way == "best"
    assert best.images[best.values.index(max(best.values))] == images[2]
    # Taken back, the same four are there again.
    person.page.get_by_role("button", name="Undo").click()
    person.saved(0)
    assert shown(person) == images


def test_ranking_by_drag_and_by_keys(visit: Callable[..., Any], served: Served) -> None:
    person = visit(viewport={"width": 1280, "height": 800})
    choose_way(person, "Rank")
    images = shown(person)
    assert len(images) == 4
    boxes = [person.page.locator(".group-rank li").nth(place).bounding_box() for place in range(4)]
    middle = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3) for box in boxes]
    person.page.mouse.move(*middle[0])
    person.page.mouse.down()
    for place in (1, 2, 3):  # the first to the end
        person.page.mouse.move(middle[place][0] + boxes[place]["width"] / 4, middle[place][1], steps=4)
    person.page.mouse.up()
    assert shown(person) == [*images[1:], images[0]]
    # By keys: the second picture to the first place, with its button and then with an arrow.
    person.page.get_by_role("button", name="Picture at place 2: move to a better place").press("Enter")
    assert shown(person) == [images[2], images[1], images[3], images[0]]
    assert person.page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Picture at place 1")
    person.page.keyboard.press("ArrowRight")
    person.page.keyboard.press("ArrowRight")
    assert shown(person) == [images[1], images[3], images[2], images[0]]
    assert person.page.locator("#announcer").inner_text() == "Place 3 of 4."
    person.page.get_by_role("button", name="Save this order").click()
    person.saved(1)
    ranked = served.answers[0]
    order = sorted(ranked.images, key=lambda image: -ranked.values[ranked.images.index(image)])
    assert order == [images[1], images[3], images[2], images[0]]
