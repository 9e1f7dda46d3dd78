"""A study in MLflow's own UI, as `drtune-ray ui` opens it, seen through a headless Chromium."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from drtune_ray.config.study import STUDY, TrackingConfig
from drtune_ray.storage.record import Record
from drtune_ray.study.registration import model_ready
from drtune_ray.tracking.events import Event, MetricsRecorded, RunFinished, RunStarted, now_ms
from drtune_ray.tracking.mlflow_client import default_tracking_uri
from drtune_ray.tracking.mlflow_recorder import MlflowRecorder
from drtune_ray.tracking.views import runs_page
from tests import past_studies
from tests.browser.chromium import NEEDS_CHROMIUM
from tests.strays import plant

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytest.importorskip("selenium", reason="selenium is not installed")

pytestmark = NEEDS_CHROMIUM

STUDY_NAME, EXPERIMENT = "stamps", "drtune-ray"
# Name of a run to best validation accuracy and end; MLflow shows three decimals.
ENDS = {
    "t000 default": (0.625, "COMPLETE", "completed"),
    "t001 ce_tuning": (0.571, "COMPLETE", "completed"),
    "t002 [pruned] lambda=0.8 K=192": (0.714, "PRUNED", "stopped by the scheduler"),
    "t003 [failed] lambda=0.5 K=256": (0.333, "FAIL", "node lost"),
}
SETTINGS = ((1.0, 64), (1.0, 64), (0.8, 192), (0.5, 256))  # lambda and K
MINUTE_MS = 60_000
# Columns of the registered model, as the page calls their types.
SIGNATURE = {
    "image (required)": "any",
    "label (required)": "string",
    "probability (required)": "double",
    "probabilities (required)": "map",
}
TRIALS = {name: best for name, (best, _, _) in ENDS.items()}
START_SECONDS, STOP_SECONDS, PAGE_SECONDS = 180.0, 20.0, 60.0

# What the page says, read in one go: its elements are replaced while it loads.
SHOWN_RUNS = """
const links = [...document.querySelectorAll('.ag-row a')].filter(a => a.hash.includes('/runs/'));
return Object.fromEntries(links.map(a => [
    a.closest('.ag-row').getAttribute('row-id'), a.textContent.trim()]));
"""
# Whether the status of a run has the icon of a failure.
IS_RED = """
const row = [...document.querySelectorAll(`.ag-row[row-id='${arguments[0]}']`)];
return row.some(r => [...r.querySelectorAll('[role=img], svg')].some(i => {
    const [red, green, blue] = getComputedStyle(i).color.match(/\\d+/g).map(Number);
    return red > 150 && green < 100 && blue < 120;
}));
"""
RUN_NAMES = """
const row = [...document.querySelectorAll('tr')].find(r => r.textContent.startsWith('Run Name:'));
return row ? [...row.querySelectorAll('td')].map(cell => cell.textContent.trim()) : [];
"""
# Epochs and values of the lines that are drawn.
LINES = """
const plots = [...document.querySelectorAll('.js-plotly-plot')];
const lines = plots.flatMap(p => p.data.map(t => [[...t.x], [...t.y]]));
return lines.length > 1 && lines;
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
    page: str

    @property
    def runs_page(self) -> str:
        """The page that `drtune-ray ui` names."""
        return f"{self.address}{self.page}"


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
    model = replace(model_ready(past_studies.install(folder.parent / "past")), name=STUDY_NAME)
    recorder.record(model)
    assert recorder.promote(model).is_champion
    run_ids = [recorder.run_id(number) for number in (None, *range(len(TRIALS)))]
    study_run, *trial_runs = [run_id for run_id in run_ids if run_id is not None]

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    log = folder.parent / "server.log"
    command = [sys.executable, "-m", "drtune_ray", "ui", str(folder), "--port", str(port)]
    cwd = plant(folder.parent / "cwd")  # modules that must not be imported
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True
        )
    try:
        wait_for_server(process, f"{address}/health", log)
        yield Server(
            address,
            experiment_id(uri),
            study_run,
            dict(zip(trial_runs, TRIALS, strict=True)),
            runs_page(uri, EXPERIMENT, study_id),
        )
    finally:
        end_group(process)


def study_events() -> list[Event]:
    """A finished study of four trials, two epochs each."""
    searched = ["method.regularization_weight", "method.bank_size"]
    now = now_ms() - MINUTE_MS * (len(ENDS) + 1)
    study = RunStarted(None, STUDY_NAME, {"sampler.name": "tpe"}, {}, now, searched=searched)
    events: list[Event] = [study]
    for number, (name, (best, state, outcome)) in enumerate(ENDS.items()):
        is_dr_tune = "ce_tuning" not in name
        params = {"method.name": "dr_tune" if is_dr_tune else "ce_tuning"}
        params |= dict(zip(searched, SETTINGS[number], strict=True))
        now += MINUTE_MS
        epochs = [
            {"loss": 2.0, "best_val_accuracy": best / 2},
            {"loss": 1.5 - best, "best_val_accuracy": best},
        ]
        events += [
            RunStarted(
                number,
                re.sub(r" \[\w+\]", "", name),
                params,
                {},
                now,
                unused=[] if is_dr_tune else searched,
            ),
            *(MetricsRecorded(number, at, found, now) for at, found in enumerate(epochs, 1)),
            RunFinished(number, state, outcome, {}, {}, now + 50_000),
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
    """Open the runs table, which shows the study's trials at once."""
    browser.get(server.runs_page)
    everything = {server.study_run: STUDY_NAME} | server.trial_runs
    wait_until(browser, "the study with its trials", lambda: shown_runs(browser) == everything)


def shown_runs(browser: Chrome) -> dict[str, str]:
    """Run id to name, of the rows of the runs table."""
    shown: dict[str, str] = browser.execute_script(SHOWN_RUNS)
    return shown


def test_runs_table__shows_all_trials_and_tells_the_ends_apart(
    browser: Chrome, server: Server
) -> None:
    open_trials(browser, server)
    keep(browser, "runs.png")
    failed = {run_id: bool(browser.execute_script(IS_RED, run_id)) for run_id in server.trial_runs}
    names = {server.trial_runs[run_id]: is_red for run_id, is_red in failed.items()}
    assert names == {name: state == "FAIL" for name, (_, state, _) in ENDS.items()}


def keep(browser: Chrome, name: str) -> None:
    """Keep a picture of the page where DRTUNE_PICTURES names a folder."""
    if folder := os.environ.get("DRTUNE_PICTURES"):
        for close in browser.find_elements("css selector", "[aria-label='Close']"):
            close.click()  # the panel of MLflow's assistant
        time.sleep(1.0)  # what is still drawn
        browser.save_screenshot(str(Path(folder) / name))


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
    keep(browser, "compare.png")
    assert "Comparing 4 Runs" in browser.find_element("tag name", "body").text
    shown = dict(zip(names, map(float, values), strict=True))
    assert shown == TRIALS


def test_page_of_a_trial__plots_its_metrics_by_epoch(browser: Chrome, server: Server) -> None:
    run_id = next(iter(server.trial_runs))
    place = f"#/experiments/{server.experiment_id}/runs/{run_id}/model-metrics"
    browser.get(f"{server.address}/{place}")
    best = TRIALS[server.trial_runs[run_id]]
    lines = wait_until(browser, "charts", lambda: browser.execute_script(LINES))
    keep(browser, "metrics.png")
    assert [[1, 2], [best / 2, best]] in lines
    assert [[1, 2], [2.0, 1.5 - best]] in lines


def test_page_of_the_model__shows_alias_and_signature(browser: Chrome, server: Server) -> None:
    def row_with(*texts: str) -> Any:
        rows = (row.text for row in browser.find_elements("css selector", "[role=row], tr"))
        return next((row for row in rows if all(text in row for text in texts)), None)

    browser.get(f"{server.address}/#/models/{STUDY_NAME}")
    wait_until(browser, "version and alias", lambda: row_with("Version 1", "champion"))
    keep(browser, "model.png")
    browser.get(f"{server.address}/#/models/{STUDY_NAME}/versions/1")
    for part in ("Inputs (1)", "Outputs (3)"):
        xpath = f"//*[normalize-space()='{part}']"
        wait_until(browser, part, lambda xpath=xpath: browser.find_elements("xpath", xpath))
        browser.find_elements("xpath", xpath)[-1].click()
    for name, kind in SIGNATURE.items():
        wait_until(browser, f"{name}: {kind}", lambda n=name, k=kind: row_with(n, k))
    keep(browser, "version.png")
    assert "champion" in browser.find_element("tag name", "body").text
