"""The control room as a person uses it: a run from the form, cancelled from its page, twice at once, on another machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, Locator, Page
from room import Room, Row, elsewhere, local, room, wait_for
from test_kills_on_pools import RECIPE, ROWS, tags

pytestmark = pytest.mark.slow
PIPELINE = "tests/tiny/rlhf.yaml"
SCREENSHOTS = "screenshots"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("room")
    (made / "rows.yaml").write_text(yaml.safe_dump(ROWS))
    (made / SCREENSHOTS).mkdir()
    return made


@pytest.fixture(scope="module")
def up(folder: Path) -> Iterator[Room]:
    with room(folder) as made:
        made.command("run", str(folder / "rows.yaml"))
        yield made


def recipe(folder: Path, **changes: object) -> Path:
    """The recipe of one long step on the pool gpu."""
    path = folder / f"{changes['name']}.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return path


def field(page: Page, *titles: str) -> Locator:
    """The group of a field in Prefect's form, by the titles of the groups that it is in."""
    scope = page.locator("form")
    for title in titles:
        label = f"normalize-space()='{title}' or normalize-space()='{title} (Optional)'"
        found = scope.locator(f"xpath=.//div[contains(concat(' ',@class,' '),' group ')][./div[1]//label[{label}]]")
        depths = [one.evaluate("e => { let d = 0; while ((e = e.parentElement)) d++; return d }") for one in found.all()]
        scope = found.nth(depths.index(min(depths)))
    return scope


def submitted(up: Room, page: Page, deployment: str) -> Row:
    """The run that the form starts. On SQLite the server may have no time for it, and a person presses the button again."""
    for _ in range(5):
        page.get_by_role("button", name="Submit").click()
        for _ in range(20):
            time.sleep(0.5)
            if made := [run for run in up.flow_runs() if run["deployment_id"] == deployment]:
                return made[0]
    raise AssertionError(page.inner_text("body"))


def test_a_run_from_the_form_goes_to_two_pools(up: Room, folder: Path, browser: Browser) -> None:
    up.command("run", PIPELINE)
    named = up.command("deploy", PIPELINE, "--set", "pools.ppo=gpu", "--set", "pools.evaluate=cpu").strip()
    assert named == "rlhf/tiny"
    deployment = up.api(f"deployments/name/{named}")["id"]
    page = browser.new_page(viewport={"width": 1400, "height": 1600})
    page.goto(f"{up.addresses[0]}/v2/deployments/deployment/{deployment}/run", wait_until="domcontentloaded")
    page.get_by_text("From step").wait_for()
    steps = field(page, "Recipe", "ppo", "Steps").locator("input")
    assert steps.input_value() == "4", "the recipe's"
    steps.fill("5")
    steps.scroll_into_view_if_needed()
    page.screenshot(path=folder / SCREENSHOTS / "form.png")
    began = time.monotonic()
    run = submitted(up, page, deployment)
    wait_for(lambda: up.children(run["id"]), 120, "a step on a pool")
    page.goto(f"{up.addresses[0]}/v2/runs/flow-run/{run['id']}", wait_until="domcontentloaded")
    page.get_by_text("tiny").first.wait_for()
    page.wait_for_timeout(3000)
    page.screenshot(path=folder / SCREENSHOTS / "running.png")
    up.completed(run["id"])
    print(f"from the form to the end: {time.monotonic() - began:.0f} s; screenshots in {folder / SCREENSHOTS}")

    sent = up.children(run["id"])
    assert [(one["name"], one["state_type"]) for one in sent] == [("ppo", "COMPLETED"), ("evaluate-ppo", "COMPLETED")]
    for pool, one in zip(("gpu", "cpu"), sent, strict=True):
        (log,) = (up.state / "logs").glob(f"*-{pool}.log")
        assert f"submitting flow run '{one['id']}'" in log.read_text()
    (trained,) = [made for made in up.mlflow_runs("ppo") if tags(made)["posttrain.pipeline"] == run["id"]]
    params = {param["key"]: param["value"] for param in trained["data"]["params"]}
    assert params["steps"] == "5", "what the form said"

    # The page has the bars, the table and the links, and MLflow's run leads back.
    artifacts = up.api("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    (table,) = [one for one in artifacts if one["type"] == "table"]
    assert "ppo" in table["data"]
    assert f"runs/{trained['info']['run_id']}" in table["data"]
    own = up.api("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [sent[0]["id"]]}}})
    assert {one["type"] for one in own} == {"progress", "markdown"}
    assert [one["data"] for one in own if one["type"] == "progress"] == [100]
    assert any(f"runs/{trained['info']['run_id']}" in str(one["data"]) for one in own)
    assert sent[0]["id"] in tags(trained)["posttrain.flow_run"]
    page.goto(f"{up.addresses[0]}/v2/runs/flow-run/{run['id']}?tab=Artifacts", wait_until="domcontentloaded")
    page.get_by_text("tiny").first.wait_for()
    page.wait_for_timeout(3000)
    page.screenshot(path=folder / SCREENSHOTS / "artifacts.png")
    page.close()


def test_cancelled_from_its_page_it_stops_and_can_go_on(up: Room, folder: Path, browser: Browser) -> None:
    path = recipe(folder, name="cancelled", seed=11, launch={"mode": "process"})
    parent = up.submit(path)
    wait_for(up.saved, 240, "a saved state")
    (child,) = [run["id"] for run in up.children(parent)]
    training = up.processes("-m stages")
    assert training
    page = browser.new_page()
    page.goto(f"{up.addresses[0]}/v2/runs/flow-run/{parent}", wait_until="domcontentloaded")
    page.get_by_role("button", name="Open menu").click()
    page.get_by_role("menuitem", name="Cancel").click()
    page.get_by_role("button", name="Cancel").last.click()
    began = time.monotonic()
    wait_for(lambda: not up.processes("-m stages") and not up.process_of(child), 60, "the end of the training process")
    took = time.monotonic() - began
    page.close()
    for run in (parent, child):
        wait_for(lambda run=run: up.state_of(run) == "CANCELLED", 60, "the state Cancelled")
    print(f"cancelled: the training process was gone after {took:.0f} s")
    assert up.saved(), "what it has saved is kept"
    (stopped,) = [run for run in up.mlflow_runs("sft") if tags(run)["posttrain.pipeline"] == parent]
    assert stopped["info"]["status"] == "FAILED"

    again = up.submit(path)
    up.completed(again)
    (resumed,) = [run for run in up.mlflow_runs("sft") if run["info"]["run_id"] == stopped["info"]["run_id"]]
    assert (resumed["info"]["status"], tags(resumed)["posttrain.status"]) == ("FINISHED", "resumed")


def test_of_two_at_once_one_computes(up: Room, folder: Path) -> None:
    path = recipe(folder, name="twins", seed=12)
    twins = [up.submit(path), up.submit(path)]
    for one in twins:
        up.completed(one)
    made = [run for run in up.mlflow_runs("sft") if tags(run)["posttrain.recipe"] == "twins"]
    assert len(made) == 1
    key = tags(made[0])["posttrain.key"]
    sent = [run for run in up.flow_runs() if f"key-{key[:32]}" in run["tags"]]
    # One that was sent a moment too late is taken back.
    ends = [run["state_type"] for run in sent]
    assert ends.count("COMPLETED") == 1
    assert set(ends) <= {"COMPLETED", "CANCELLED"}
    print(f"two at once: {len(sent)} child flow runs, one MLflow run")


def test_a_worker_elsewhere_shares_no_disk_and_another_goes_on(folder: Path) -> None:
    """A step begins on one machine, which is lost, and ends on another, with the bytes of one that ran at home."""
    path = recipe(folder, name="elsewhere", seed=13)
    local(folder / "alone", "run", str(folder / "rows.yaml"))
    alone = local(folder / "alone", "run", str(path), "--set", "pools={}")["sft"]
    with room(folder / "home", "--workers", "control") as home:
        home.command("run", str(folder / "rows.yaml"))
        nobody = home.submit(recipe(folder, name="nobody", launch={"worker_timeout": 4}))
        wait_for(lambda: home.state_of(nobody) == "FAILED", 120, "the end of waiting")
        said = home.api(f"flow_runs/{nobody}")["state"]["message"]
        assert said.startswith("sft: no worker of the pool gpu has answered for 4 s: start one by `posttrain up --workers gpu`")
        (unsent,) = home.children(nobody)
        assert unsent["state_type"] == "CANCELLED"
        with elsewhere(folder / "first", home, "--workers", "gpu", lost=True) as first:
            run = home.submit(path)
            wait_for(lambda: list(first.glob("runs/*/state/step-*")), 240, "a saved state elsewhere")
            wait_for(lambda: list(home.state.glob("artifacts/*/*/artifacts/state/newest.json")), 60, "the state at home")
            assert not home.saved()
        with elsewhere(folder / "second", home, "--workers", "gpu") as second:
            home.completed(run, 400)
            lost, sent = home.children(run)
            assert (lost["state_name"], sent["state_name"]) == ("Crashed", "Completed")
            assert "No sign of life" in lost["state"]["message"]
            assert list(second.glob("cache/*")), "what it reads came through the server"
            (made,) = [one for one in home.mlflow_runs("sft") if tags(one)["posttrain.recipe"] == "elsewhere"]
            assert tags(made)["posttrain.status"] == "resumed"
            assert alone["artifacts"]["checkpoint"]["digest"] in tags(made)["posttrain.outputs"]
        published = [file for file in home.state.rglob("*") if file.is_file() and file.suffix in (".json", ".parquet")]
        assert published
        assert not any(str(second).encode() in file.read_bytes() for file in published), "no path of another machine"
        assert not list(home.state.glob("artifacts/*/*/artifacts/state/*"))
    # What was made elsewhere is skipped at home, without servers.
    again = local(home.state, "run", str(path), "--set", "pools={}")["sft"]
    assert again["status"] == "skipped"
