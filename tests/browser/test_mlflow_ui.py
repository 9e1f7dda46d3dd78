"""A study in MLflow's own UI, as `drtune-ray ui` opens it, seen through a headless Chromium."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from drtune_ray.config.study import STUDY, TrackingConfig
from drtune_ray.storage.record import Record
from drtune_ray.tracking.events import Event, MetricsRecorded, RunFinished, RunStarted
from drtune_ray.tracking.mlflow_recorder import MlflowRecorder, default_tracking_uri

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytest.importorskip("selenium", reason="selenium is not installed")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
CHROMEDRIVER = shutil.which("chromedriver") or ""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium binary on the PATH"),
    pytest.mark.skipif(not CHROMEDRIVER, reason="no chromedriver binary on the PATH"),
]

STUDY_NAME, EXPERIMENT = "stamps", "drtune-ray"
# Trial to best validation accuracy; MLflow shows three decimals.
TRIALS = {"trial-0000-default": 0.625, "trial-0001-ce_tuning": 0.571, "trial-0002": 0.714}
START_SECONDS, STOP_SECONDS, PAGE_SECONDS = 180.0, 20.0, 60.0
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1200",
)

# What the page says, read in one go: its elements are replaced while it loads.
SHOWN_RUNS = """
const links = [...document.querySelectorAll('.ag-row a')].filter(a => a.hash.includes('/runs/'));
return Object.fromEntries(links.map(a => [
    a.closest('.ag-row').getAttribute('row-id'), a.textContent.trim()]));
"""
RUN_NAMES = """
const row = [...document.querySelectorAll('tr')].find(r => r.textContent.startsWith('Run Name:'));
return row ? [...row.querySelectorAll('td')].map(cell => cell.textContent.trim()) : [];
"""
# The metrics' names and values are two grids side by side: a row is what stands at one height.
METRIC_VALUES = """
const middle = e => { const r = e.getBoundingClientRect(); return (r.top + r.bottom) / 2; };
const name = [...document.querySelectorAll('[role=grid] a')]
    .find(a => a.textContent.trim() === arguments[0]);
if (!name) return [];
return [...document.querySelectorAll('[role=grid] span')]
    .filter(s => Math.abs(middle(s) - middle(name)) < 10).map(s => s.textContent.trim());
"""


@dataclass(frozen=True)
class Server:
    """MLflow's UI on a study: where it answers, and the ids of the runs it holds."""

    address: str
    experiment_id: str
    study_run: str
    trial_runs: dict[str, str]

    @property
    def runs_page(self) -> str:
        """MLflow opens an experiment as a GenAI one, without runs, unless told otherwise."""
        experiment = f"{self.address}/#/experiments/{self.experiment_id}"
        return f"{experiment}/runs?workflowType=machine_learning"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("storage") / STUDY_NAME
    folder.mkdir()
    study_id = f"{STUDY_NAME}-0123456789ab"
    tracking = TrackingConfig(experiment=EXPERIMENT).model_dump(mode="json")
    Record(folder, study_id, STUDY, config={}, deciding={}, tracking=tracking).write()
    uri = default_tracking_uri(folder.parent)
    recorder = MlflowRecorder(uri, EXPERIMENT, study_id, folder.parent / "mlartifacts")
    for event in study_events():
        recorder.record(event)
    run_ids = [recorder.run_id(number) for number in (None, *range(len(TRIALS)))]
    study_run, *trial_runs = [run_id for run_id in run_ids if run_id is not None]

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    log = folder.parent / "server.log"
    main = "from drtune_ray.cli import main; main()"
    command = [sys.executable, "-c", main, "ui", str(folder), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for_server(process, f"{address}/health", log)
        yield Server(
            address, experiment_id(uri), study_run, dict(zip(trial_runs, TRIALS, strict=True))
        )
    finally:
        end_group(process)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def study_events() -> list[Event]:
    """A finished study of three trials, two epochs each."""
    events: list[Event] = [RunStarted(None, STUDY_NAME, {"trials": len(TRIALS)}, {})]
    for number, (name, best) in enumerate(TRIALS.items()):
        params = {"method.name": "dr_tune", "method.bank_size": 64 * (number + 1)}
        final = {"best_val_accuracy": best}
        events += [
            RunStarted(number, name, params, {}),
            MetricsRecorded(number, 1, {"loss": 2.0, "best_val_accuracy": best / 2}),
            MetricsRecorded(number, 2, {"loss": 1.0} | final),
            RunFinished(number, "COMPLETE", "completed", final, {}),
        ]
    best = {"best_val_accuracy": max(TRIALS.values())}
    return [*events, RunFinished(None, "COMPLETE", "completed", best, {})]


def experiment_id(uri: str) -> str:
    import mlflow

    return str(mlflow.MlflowClient(uri).get_experiment_by_name(EXPERIMENT).experiment_id)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_server(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    # A proxy in the environment does not concern this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    state = "gives no answer" if process.poll() is None else f"ended with {process.returncode}"
    pytest.fail(f"the UI server {state}:\n{log.read_text(errors='replace')[-4000:]}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def wait_until(browser: Chrome, what: str, holds: Callable[[], Any]) -> Any:
    from selenium.common.exceptions import TimeoutException, WebDriverException
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, PAGE_SECONDS, 0.2, ignored_exceptions=[WebDriverException])
    try:
        return wait.until(lambda _: holds())
    except TimeoutException:
        text = browser.execute_script("return document.body.innerText")
        pytest.fail(f"{what}: not within {PAGE_SECONDS:.0f} s; {browser.current_url} shows\n{text}")


def click(browser: Chrome, selector: str) -> None:
    def clicked() -> bool:
        browser.find_element("css selector", selector).click()
        return True

    wait_until(browser, f"clicking {selector}", clicked)


def open_trials(browser: Chrome, server: Server) -> None:
    """Open the runs table and expand the study."""
    browser.get(server.runs_page)
    only_study = {server.study_run: STUDY_NAME}
    wait_until(browser, "the study alone", lambda: shown_runs(browser) == only_study)
    click(browser, f".ag-row[row-id='{server.study_run}'] button")
    everything = only_study | server.trial_runs
    wait_until(browser, "the study's trials", lambda: shown_runs(browser) == everything)


def shown_runs(browser: Chrome) -> dict[str, str]:
    """Run id to name, of the rows of the runs table."""
    shown: dict[str, str] = browser.execute_script(SHOWN_RUNS)
    return shown


def test_runs_table__study_expands_to_its_trials(browser: Chrome, server: Server) -> None:
    open_trials(browser, server)
    click(browser, f".ag-row[row-id='{server.study_run}'] button")
    only_study = {server.study_run: STUDY_NAME}
    wait_until(browser, "the study alone again", lambda: shown_runs(browser) == only_study)


def test_comparison__shows_names_and_accuracies(browser: Chrome, server: Server) -> None:
    open_trials(browser, server)
    for run_id in server.trial_runs:
        click(browser, f".ag-row[row-id='{run_id}'] input[type=checkbox]")
    compare = "//button[normalize-space()='Compare']"
    wait_until(browser, "a button to compare", lambda: browser.find_elements("xpath", compare))
    browser.find_element("xpath", compare).click()

    names = wait_until(browser, "names of runs", lambda: browser.execute_script(RUN_NAMES))
    values = wait_until(
        browser,
        "accuracies",
        lambda: browser.execute_script(METRIC_VALUES, "best_val_accuracy"),
    )
    assert "Comparing 3 Runs" in browser.find_element("tag name", "body").text
    shown = dict(zip(names, map(float, values), strict=True))
    assert shown == TRIALS
