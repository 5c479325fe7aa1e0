"""Exports to crontab, systemd, Ray and Kubernetes mean the same as the schedule.

Times are compared with systemd's own calendar and a slow reading of cron, commands with the shell and the
programs that will read them.
"""

import configparser
import random
import re
import shlex
import shutil
import subprocess
from datetime import datetime, timedelta
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cron_oracle import (
    BERLIN,
    matches,
    moment,
    random_cron,
    random_settings,
    values,
)
from ray.dashboard.modules.job.cli import submit as ray_job_submit

from r2scp.jobs.reindex.cron import ScheduleSettings, runs_after
from r2scp.jobs.reindex.schedule.exports import (
    crontab,
    on_calendar,
    ray_submission,
    ray_submit,
    systemd,
    systemd_units,
)
from r2scp.jobs.reindex.schedule.kubernetes import Pods, cronjob, kubernetes_cron, raycronjob, rayjob
from r2scp.jobs.reindex.schedule.loop import ScheduledJob
from r2scp.store.errors import UsageError

HOSTILE = 'it\'s 100% $HOME `id` "q" ;#&!*'  # a folder that every format must keep as it is
TEXT = "name: nightly\nschedule:\n  cron: '0 3 * * *'\nnote: \"{{ $(id) }} %n ---\"\n---\nyes: no\n"


def first_runs(settings: ScheduleSettings, start: datetime, count: int) -> list[datetime]:
    return list(islice(runs_after(settings, start), count))


@pytest.fixture
def hostile(tmp_path: Path) -> ScheduledJob:
    """A job whose paths try to break out of quotes; its interpreter writes down where and how it ran."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    python = tmp_path / "100% $HOME `id` ;#&" / "python"  # no quotes: systemd takes no such program
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n{ pwd; printf "%s\\n" "$@"; } > ran\n')
    python.chmod(0o755)
    return ScheduledJob(name="nightly", file=folder / "job.yaml", folder=folder, python=python)


def test_the_crontab_line_runs_the_job(hostile: ScheduledJob) -> None:
    settings = ScheduleSettings("*/15 9-17 * JAN,jun MON-FRI,7", BERLIN)
    *comments, zone, line, rest = crontab(hostile, settings).split("\n")
    assert rest == ""
    assert all(comment.startswith("# ") for comment in comments)
    assert zone == f"CRON_TZ={BERLIN}"
    *fields, command = line.split(" ", 5)
    assert " ".join(fields) == "*/15 9-17 * 1,6 1-5,7"
    start, numeric = moment("2027-01-01T00:00"), ScheduleSettings(" ".join(fields), BERLIN)
    assert first_runs(numeric, start, 50) == first_runs(settings, start, 50)
    assert not re.search(r"(?<!\\)%", command)  # cron would end the command there
    subprocess.run(["/bin/sh", "-c", command.replace("\\%", "%")], check=True, env={}, cwd="/")
    lines = (hostile.folder / "ran").read_text().splitlines()
    assert lines == [str(hostile.folder), "-m", "r2scp.jobs", "jobs", "run", str(hostile.file)]


@pytest.mark.parametrize("broken", ["a\nb", "a\\b", "a\u202eb", "a "])
def test_paths_that_a_line_cannot_contain_are_refused(broken: str) -> None:
    job = ScheduledJob(name="nightly", file=Path("/srv") / broken)
    settings = ScheduleSettings("0 3 * * *")
    for export in (crontab, systemd, lambda *both: ray_submit(*both, moment("2027-01-01T00:00"))):
        with pytest.raises(UsageError, match="the path of the file must have no control characters"):
            export(job, settings)
    long = ScheduledJob(
        name="nightly", file=Path("/srv") / ("x" * 250) / ("y" * 250), folder=Path("/" + 500 * "z")
    )
    with pytest.raises(UsageError, match="must have at most 998 characters; got 1"):
        crontab(long, settings)


def test_systemd_units_parse(hostile: ScheduledJob) -> None:
    units = systemd_units(hostile, ScheduleSettings("0 0 1 * 1", BERLIN))
    assert list(units) == ["r2scp-nightly.service", "r2scp-nightly.timer"]
    parsed = {}
    for name, text in units.items():
        parsed[name] = configparser.ConfigParser(interpolation=None, strict=False, comment_prefixes=("#",))
        parsed[name].optionxform = str
        parsed[name].read_string(text)
        assert f"# ~/.config/systemd/user/{name}\n{text}" in systemd(
            hostile, ScheduleSettings("0 0 1 * 1", BERLIN)
        )
    service, timer = parsed["r2scp-nightly.service"]["Service"], parsed["r2scp-nightly.timer"]["Timer"]
    assert service["Type"] == "oneshot"
    assert service["WorkingDirectory"].replace("%%", "%") == str(hostile.folder)
    assert service["ExecStart"].startswith(":")
    assert not re.search("%", service["ExecStart"].replace("%%", ""))
    words = [word.replace("%%", "%") for word in re.findall(r'"((?:[^"\\]|\\.)*)"', service["ExecStart"])]
    assert [re.sub(r"\\(.)", r"\1", word) for word in words] == list(hostile.command)
    assert timer["Persistent"] == "true"
    assert units["r2scp-nightly.timer"].count("OnCalendar=") == 2


def systemd_analyze() -> str:
    program = shutil.which("systemd-analyze")
    if not program:
        pytest.skip("no systemd-analyze on this machine")
    return program


def test_systemd_accepts_the_units(hostile: ScheduledJob, tmp_path: Path) -> None:
    files = []
    for name, text in systemd_units(hostile, ScheduleSettings("*/7 3 1 * mon", BERLIN)).items():
        (tmp_path / name).write_text(text)
        files.append(str(tmp_path / name))
    done = subprocess.run([systemd_analyze(), "verify", *files], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("zone", ["UTC", BERLIN])
def test_systemd_has_the_same_times(zone: str) -> None:
    """Except where clocks change, where systemd differs and the timer says so."""
    program, start = systemd_analyze(), moment("2027-11-02T00:00")
    before_spring = moment("2028-03-20T00:00")
    settings = [ScheduleSettings("0 0 1 * 1", zone), ScheduleSettings("0 3 * * 7", zone)]
    for each in [*settings, *random_settings(16, zone, seed=9)]:
        stamps = set()
        for event in on_calendar(each):
            words = [
                program,
                "calendar",
                f"--base-time={start:%Y-%m-%d %H:%M:%S} UTC",
                "--iterations=12",
                event,
            ]
            shown = subprocess.run(
                words, capture_output=True, text=True, check=True, env={"TZ": "UTC", "LC_ALL": "C"}
            )
            texts = re.findall(r"(?:Next elapse|Iter\. #\d+): \w+ (\S+ \S+) UTC", shown.stdout)
            stamps |= {moment(text) for text in texts}
        expected = [run for run in first_runs(each, start, 12) if run < before_spring]
        assert sorted(stamps)[: len(expected)] == expected, each


def test_programs_that_systemd_cannot_name_are_refused() -> None:
    job = ScheduledJob(name="nightly", file=Path("job.yaml"), python=Path("/it's/python"))
    with pytest.raises(UsageError, match="the path of python must have no quotes for systemd"):
        systemd_units(job, ScheduleSettings("0 3 * * *"))


def test_the_timer_notes_differences_where_clocks_change() -> None:
    job = ScheduledJob(name="nightly", file=Path("/srv/job.yaml"))
    note = "Where clocks change, systemd differs from cron"
    assert note in systemd(job, ScheduleSettings("30 2 * * *", BERLIN))
    assert note not in systemd(job, ScheduleSettings("30 2 * * *"))


def test_rays_own_parser_accepts_the_line(hostile: ScheduledJob) -> None:
    settings, at = ScheduleSettings("0 3 * * *", BERLIN), moment("2027-01-10T12:00")
    line = ray_submit(hostile, settings, at, "http://head:8265", upload=True)
    assert line.count("\n") == 1
    words = shlex.split(line)
    assert words[:3] == ["ray", "job", "submit"]
    given = ray_job_submit.make_context("submit", words[3:]).params
    assert given["submission_id"] == "nightly-20270110T0200Z"
    assert given["address"] == "http://head:8265"
    assert given["working_dir"] == str(hostile.folder)
    assert given["entrypoint"] == ("python", "-m", "r2scp.jobs", "jobs", "run", "./job.yaml")
    plain = shlex.split(ray_submit(hostile, settings, at))
    given = ray_job_submit.make_context("submit", plain[3:]).params
    assert given["address"] is given["working_dir"] is None
    assert given["entrypoint"][-1] == str(hostile.file)


def test_a_submission_keeps_its_name_until_the_next_run() -> None:
    settings = ScheduleSettings("0 3 * * *", BERLIN)
    job, other = (ScheduledJob(name=name, file=Path("job.yaml")) for name in ("nightly", "weekly"))
    tonight = [
        ray_submission(job, settings, moment(at, BERLIN)) for at in ("2027-01-10T03:00", "2027-01-11T02:59")
    ]
    assert tonight == ["nightly-20270110T0200Z"] * 2
    assert ray_submission(job, settings, moment("2027-01-11T03:00", BERLIN)) not in tonight
    assert ray_submission(other, settings, moment("2027-01-10T03:00", BERLIN)) not in tonight


# --- Kubernetes ---


def thing(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """A schema of an object with these properties and no others."""
    known = {**required, **(optional or {})}
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


def some(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of, "minItems": 1}


STRING = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
LABEL = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 52}
METADATA = thing({"name": LABEL}, {"labels": {"type": "object"}})
CONTAINER = thing(
    {"name": LABEL, "image": STRING},
    {
        "command": some(STRING),
        "env": some(thing({"name": STRING, "valueFrom": {"type": "object"}})),
        "resources": thing({"requests": {"type": "object"}, "limits": {"type": "object"}}),
        "volumeMounts": some(
            thing({"name": LABEL, "mountPath": STRING}, {"subPath": STRING, "readOnly": {}})
        ),
    },
)
VOLUME = thing({"name": LABEL, "configMap": thing({"name": LABEL})})
POD = thing(
    {"spec": thing({"containers": some(CONTAINER)}, {"volumes": some(VOLUME), "restartPolicy": STRING})}
)
GROUP = thing(
    {"groupName": LABEL, "minReplicas": COUNT, "maxReplicas": COUNT, "template": POD},
    {"replicas": COUNT, "rayStartParams": {"type": "object"}},
)
RAY_CLUSTER = thing(
    {"headGroupSpec": thing({"template": POD}, {"rayStartParams": {"type": "object"}})},
    {"rayVersion": STRING, "workerGroupSpecs": {"type": "array", "items": GROUP}},
)
RAY_JOB = thing(
    {"entrypoint": STRING, "rayClusterSpec": RAY_CLUSTER},
    {"shutdownAfterJobFinishes": {"const": True}, "ttlSecondsAfterFinished": COUNT, "backoffLimit": COUNT},
)
RAY_CRON_JOB = thing({"schedule": STRING, "timeZone": STRING, "jobTemplate": RAY_JOB})
CRON_JOB = thing(
    {
        "schedule": STRING,
        "timeZone": STRING,
        "concurrencyPolicy": {"const": "Forbid"},
        "jobTemplate": thing({"spec": thing({"template": POD}, {"backoffLimit": COUNT})}),
    },
    {"startingDeadlineSeconds": COUNT},
)


def manifest(text: str, version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The spec of the object beside the ConfigMap, both validated."""
    config, document = yaml.safe_load_all(text)
    parts = {"apiVersion": {"const": "v1"}, "kind": {"const": "ConfigMap"}, "metadata": METADATA}
    jsonschema.validate(config, thing({**parts, "data": thing({"job.yaml": STRING})}))
    assert config["data"]["job.yaml"] == TEXT
    parts = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": METADATA, "spec": spec}
    jsonschema.validate(document, thing(parts))
    volumes = re.findall(r"configMap:\s+name: (\S+)", text)
    assert set(volumes) == {config["metadata"]["name"]}
    return document["spec"]


NIGHTLY = ScheduledJob(name="nightly", file=Path("job.yaml"))
PODS = Pods(image="registry:5000/r2scp-pipe:0.1.0", workers=2, gpus=1)


def test_the_ray_job_has_kuberays_schema() -> None:
    spec = manifest(rayjob(NIGHTLY, TEXT, PODS), "ray.io/v1", "RayJob", RAY_JOB)
    cluster = spec["rayClusterSpec"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (worker,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert spec["entrypoint"].split()[-1] == head["volumeMounts"][0]["mountPath"]
    assert cluster["workerGroupSpecs"][0]["replicas"] == 2
    assert worker["resources"]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": 1}
    assert "nvidia.com/gpu" not in head["resources"]["limits"]


def test_the_ray_cron_job_has_kuberays_schema() -> None:
    settings = ScheduleSettings("0 3 * * 7", BERLIN)
    text = raycronjob(NIGHTLY, settings, TEXT, PODS)
    spec = manifest(text, "ray.io/v1", "RayCronJob", RAY_CRON_JOB)
    assert (spec["schedule"], spec["timeZone"]) == ("0 3 * * 0", BERLIN)
    once = manifest(rayjob(NIGHTLY, TEXT, PODS), "ray.io/v1", "RayJob", RAY_JOB)
    assert spec["jobTemplate"] == once


def test_the_cron_job_forbids_overlap_and_names_each_run() -> None:
    text = cronjob(NIGHTLY, ScheduleSettings("0 3 * * *", BERLIN), TEXT, PODS.image, "http://head:8265")
    spec = manifest(text, "batch/v1", "CronJob", CRON_JOB)
    job = spec["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    given = ray_job_submit.make_context("submit", container["command"][3:]).params
    assert given["submission_id"] == "$(RUN)"  # substituted by Kubernetes with the name of the Job
    assert container["env"][0]["name"] == "RUN"
    assert container["volumeMounts"][0]["mountPath"] == f"{given['working_dir']}/{given['entrypoint'][-1]}"
    assert not given["no_wait"]  # the pod lives as long as the job, or Forbid would forbid nothing


def kubernetes_matches(cron: str, day: datetime) -> bool:
    """How Kubernetes' parser reads the days of a schedule: a star counts unless it has a step."""
    fields = cron.split()
    stars = any(term in ("*", "*/1") for text in (fields[2], fields[4]) for term in text.split(","))
    assert all(number < 7 for number in values(fields[4], 0, 6))
    return matches(["*", "*", *fields[2:]], day, day_and=stars)


def test_kubernetes_reads_the_same_days_or_the_schedule_is_refused() -> None:
    chance, refused, kept = random.Random(3), 0, 0
    for _ in range(150):
        try:
            settings = ScheduleSettings("0 0 " + random_cron(chance, stars=True).split(" ", 2)[2])
            exported = kubernetes_cron(settings)
        except UsageError as error:
            refused += "in Kubernetes" in str(error)
            continue
        kept += 1
        days = [moment("2027-01-01T00:00") + timedelta(days=at) for at in range(70)]
        expected = list(
            takewhile(lambda at, last=days[-1]: at <= last, runs_after(settings, moment("2026-12-31T23:59")))
        )
        assert [day for day in days if kubernetes_matches(exported, day)] == expected, (
            settings.cron,
            exported,
        )
    assert refused > 5
    assert kept > 50


def test_what_kubernetes_refuses_is_refused() -> None:
    settings = ScheduleSettings("0 3 * * *")
    long = ScheduledJob(name="a" * 31, file=Path("job.yaml"))
    rayjob(long, TEXT, PODS)
    with pytest.raises(UsageError, match="at most 30 characters and not end with - for a RayCronJob"):
        raycronjob(long, settings, TEXT, PODS)
    with pytest.raises(UsageError, match="not end with -"):
        rayjob(ScheduledJob(name="a-", file=Path("job.yaml")), TEXT, PODS)
    with pytest.raises(UsageError, match="image must be"):
        Pods(image="a b")
    with pytest.raises(UsageError, match="memory must be a quantity"):
        Pods(image="a", memory="16 GB")
    with pytest.raises(UsageError, match="address must be"):
        cronjob(NIGHTLY, settings, TEXT, "a", "http://x/$(id)")
    with pytest.raises(UsageError, match="at most 1048576 bytes"):
        rayjob(NIGHTLY, "x" * (1 << 20) + "x", PODS)
