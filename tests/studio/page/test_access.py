"""Audit of every state of the page by axe-core, in light and dark, wide and on a phone."""

from collections.abc import Callable
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Route

from browsing import Served, Visitor

# WCAG 2.2 A and AA, and what axe-core holds for good practice.
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
SERIOUS = ("serious", "critical")


def problems(person: Visitor) -> list[str]:
    """Rules that a state breaks seriously, with the elements."""
    person.page.wait_for_timeout(200)  # pictures fade in
    found = Axe().run(person.page, options=RULES).response["violations"]
    return [
        f"{one['id']} ({one['impact']}): {[node['target'] for node in one['nodes']][:3]}"
        for one in found
        if one["impact"] in SERIOUS
    ]


def states(person: Visitor, served: Served) -> dict[str, Callable[[], Any]]:
    """Ways into the states of the page, in their order."""
    page = person.page

    def click() -> None:
        for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "ArrowLeft"):
            person.pair()
            person.pause()
            page.keyboard.press(key)
        person.saved(4)
        page.locator(".saved[data-unsent='0']").wait_for()

    def way(name: str) -> Callable[[], None]:
        def open_it() -> None:
            page.get_by_role("button", name=name, exact=True).click()
            page.locator(".group .picture").nth(3).wait_for()

        return open_it

    def view(name: str) -> Callable[[], None]:
        return lambda: page.get_by_role("link", name=name, exact=True).click()

    def trouble() -> None:
        view("Choose")()
        page.get_by_role("button", name="Pairs").click()
        page.route("**/api/clicks", lambda route: route.fulfill(status=507, json={"error": "the disk is full"}))
        person.pair()
        person.pause()
        page.keyboard.press("ArrowLeft")
        page.get_by_role("alert").wait_for()

    return {
        "first pair": person.pair,
        "taste, empty": view("Taste"),
        "model": view("Model"),
        "pairs after clicks": lambda: (view("Choose")(), click()),
        "taste": view("Taste"),
        "stars": lambda: (view("Choose")(), way("Stars")()),
        "best of four": way("Best of four"),
        "rank": way("Rank"),
        "not saved": trouble,
    }


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_nothing_serious(visit: Callable[..., Any], served: Served, scheme: str, width: int) -> None:
    # axe-core is put into the page by the test, which the page's own policy rightly forbids.
    person = visit(color_scheme=scheme, viewport={"width": width, "height": 844}, bypass_csp=True)
    found = {}
    for name, enter in states(person, served).items():
        enter()
        found[name] = problems(person)
    assert {name: broken for name, broken in found.items() if broken} == {}
    assert len(found) == 9


@pytest.mark.parametrize(("scheme", "width"), [("dark", 1280), ("light", 390)])
def test_nothing_serious_once_a_model_is_trained(visit: Callable[..., Any], scheme: str, width: int) -> None:
    """States that take minutes of training are told to the page, which draws them as it would."""
    person = visit(color_scheme=scheme, viewport={"width": width, "height": 844}, bypass_csp=True)
    page = person.page
    job = {"kind": "reward", "state": "running", "progress": 0.4, "message": "Learning", "result": None}

    def trained(route: Route) -> None:
        able = dict.fromkeys(("draw", "train", "publish", "upload"), {"ok": True, "why": None})
        drawing = {"run": "a", "prompts": ["a cat", "a dog"], "before": [0, 1], "after": [2, 3]}
        route.fulfill(json=route.fetch().json() | {"can": able, "drawing": drawing, "job": job})

    page.route("**/api/state", trained)
    page.route("**/api/jobs/current", lambda route: route.fulfill(json=job))
    pair = {"id": "b", "prompt": "a house", "left": 4, "right": 5, "judged": 0, "of": 3}
    page.route("**/api/ab", lambda route: route.fulfill(json=pair))
    page.route("**/api/card*", lambda route: route.fulfill(json={"markdown": "# My taste\n\n" + "words " * 400}))
    page.reload()
    found = {}
    page.get_by_text("Add pictures").click()
    found["uploads"] = problems(person)
    page.get_by_role("link", name="Model").click()
    page.locator(".job progress").wait_for()
    page.get_by_role("button", name="Begin the blind test").click()
    page.locator(".blind .choice").first.wait_for()
    page.get_by_role("button", name="Publish on the Hub").click()
    page.locator("pre.card").wait_for()
    found["training, drawings, blind test, card"] = problems(person)
    job |= {"state": "failed", "message": "the disk is full", "progress": None}
    page.locator(".job-failed").wait_for()
    found["failed"] = problems(person)
    assert found == {"uploads": [], "training, drawings, blind test, card": [], "failed": []}


def test_the_audit_finds_what_is_wrong(visit: Callable[..., Any]) -> None:
    person = visit(bypass_csp=True)
    person.page.evaluate("document.querySelector('.choice').removeAttribute('aria-label')")
    person.page.evaluate("document.querySelector('h1').style.color = '#ddd'")
    assert {one.split()[0] for one in problems(person)} == {"button-name", "color-contrast"}
