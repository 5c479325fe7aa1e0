"""A job's schedule as manifests for Kubernetes: one run, KubeRay's own schedule, or Kubernetes' CronJob.

- `rayjob`: one run now, on a Ray cluster that KubeRay creates for it and removes afterwards.
- `raycronjob`: the same on a schedule. KubeRay 1.6 and later, behind its feature gate RayCronJob (alpha). It
  allows overlap and starts every missed run; the store's lease keeps the runs apart.
- `cronjob`: a CronJob with concurrencyPolicy Forbid whose pod submits to an existing Ray cluster and waits
  for the end. Each run's submission id contains its scheduled minute, so that Ray refuses a duplicate.

The job's file is in a ConfigMap. Text from outside is data for the YAML writer, never pasted.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from r2scp.jobs.reindex.cron import ScheduleSettings
from r2scp.jobs.reindex.schedule.loop import ScheduledJob
from r2scp.store.errors import UsageError

FILE = "job.yaml"  # the key in the ConfigMap
MOUNT = "/etc/r2scp"
MAX_CONFIG_MAP_BYTES = 1 << 20  # Kubernetes' limit
CLUSTER_TTL_S = 3600  # the cluster of a finished RayJob stays for its logs
START_DEADLINE_S = 3600  # latest start of a missed run; Kubernetes gives up after 100 missed ones
PREFIX = "r2scp-"
#: The longest names that the controllers accept, which append to them.
MAX_NAME_LENGTH = {"RayJob": 47, "RayCronJob": 36, "CronJob": 52}
QUANTITY = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:m|k|Ki|M|Mi|G|Gi|T|Ti)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pods:
    """The pods of a Ray cluster.

    `image` contains r2scp-pipe and its Ray. Each of the `workers` has `cpu` cores, `memory` and `gpus`; the
    head has the same cores and memory. Raises `UsageError`.
    """

    image: str
    workers: int = 1
    cpu: str = "4"
    memory: str = "16Gi"
    gpus: int = 0

    def __post_init__(self) -> None:
        _check_image(self.image)
        if self.workers < 0 or self.gpus < 0:
            raise UsageError(f"workers and gpus must be 0 or more; got {self.workers} and {self.gpus}")
        for key in ("cpu", "memory"):
            if not QUANTITY.fullmatch(getattr(self, key)):
                raise UsageError(f"{key} must be a quantity such as 4 or 16Gi; got {getattr(self, key)!r}")


def rayjob(job: ScheduledJob, content: str, pods: Pods) -> str:
    """A ConfigMap with `content`, the text of the job's file, and a RayJob that runs it once."""
    name = _object_name(job, "RayJob")
    return _to_yaml(
        _config_map(name, content),
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": _metadata(name, job),
            "spec": _ray_job_spec(name, pods),
        },
    )


def raycronjob(job: ScheduledJob, settings: ScheduleSettings, content: str, pods: Pods) -> str:
    """A ConfigMap with `content` and a RayCronJob that creates a RayJob for each scheduled run."""
    name = _object_name(job, "RayCronJob")
    return _to_yaml(
        _config_map(name, content),
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCronJob",
            "metadata": _metadata(name, job),
            "spec": {
                "schedule": kubernetes_cron(settings),
                "timeZone": settings.timezone,
                "jobTemplate": _ray_job_spec(name, pods),
            },
        },
    )


def cronjob(job: ScheduledJob, settings: ScheduleSettings, content: str, image: str, address: str) -> str:
    """A ConfigMap with `content` and a CronJob that submits it to a Ray cluster's dashboard at `address`.

    `image` needs Ray's command line; the cluster's own image needs r2scp-pipe. Kubernetes 1.27 or later.
    """
    _check_image(image)
    if not re.fullmatch(r"https?://[^\s$]+", address):
        raise UsageError(
            f"address must be that of Ray's dashboard, such as http://ray-head-svc:8265; got {address!r}"
        )
    name = _object_name(job, "CronJob")
    # Kubernetes names each Job after the CronJob and its scheduled minute, and substitutes $(RUN)
    submit = ["ray", "job", "submit", "--address", address, "--submission-id", "$(RUN)"]
    submit += ["--working-dir", MOUNT, "--", "python", "-m", "r2scp.jobs", "jobs", "run", FILE]
    label = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    container = {
        "name": "submit",
        "image": image,
        "command": submit,
        "env": [{"name": "RUN", "valueFrom": label}],
        "volumeMounts": [_job_mount()],
    }
    pod = {"restartPolicy": "Never", "containers": [container], "volumes": [_job_volume(name)]}
    spec = {
        "schedule": kubernetes_cron(settings),
        "timeZone": settings.timezone,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": START_DEADLINE_S,
        "jobTemplate": {"spec": {"backoffLimit": 0, "template": {"spec": pod}}},
    }
    manifest = {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": _metadata(name, job), "spec": spec}
    return _to_yaml(_config_map(name, content), manifest)


def kubernetes_cron(settings: ScheduleSettings) -> str:
    """The schedule for Kubernetes and KubeRay, which share a cron parser.

    It does not know 7 for Sunday, so it gets 0. Cron requires both day fields to match if one starts with a
    star; this parser only if one is a star without a step. A schedule with a different meaning for the two is
    refused with `UsageError`.
    """
    minute, hour, day, month, weekday = settings.fields
    times = settings.cronsim()
    if times.day_and != (_has_star(day) or _has_star(weekday)):
        both, either = ("both", "one") if times.day_and else ("one", "both")
        raise UsageError(
            f"cron: of day-of-month {day!r} and day-of-week {weekday!r}, {both} must match in cron "
            f"and {either} in Kubernetes; write the days out, or leave one of the two at *"
        )
    days = sorted({number % 7 for number in times.weekdays if isinstance(number, int)})
    return " ".join((minute, hour, day, month, "*" if _has_star(weekday) else ",".join(map(str, days))))


def _has_star(text: str) -> bool:
    return any(term in ("*", "*/1") for term in text.split(","))


def _ray_job_spec(name: str, pods: Pods) -> dict[str, Any]:
    """Shared by RayJob and RayCronJob: a cluster of its own, removed after the job; no retries."""
    gpus = {"nvidia.com/gpu": pods.gpus} if pods.gpus else {}
    amounts = {"cpu": pods.cpu, "memory": pods.memory}
    head = {
        "name": "ray-head",
        "image": pods.image,
        "resources": _resources(amounts),
        "volumeMounts": [_job_mount()],  # the job's driver runs on the head
    }
    worker = {"name": "ray-worker", "image": pods.image, "resources": _resources({**amounts, **gpus})}
    group = {
        "groupName": "workers",
        "replicas": pods.workers,
        "minReplicas": pods.workers,
        "maxReplicas": pods.workers,
        "rayStartParams": {},
        "template": {"spec": {"containers": [worker]}},
    }
    return {
        "entrypoint": shlex.join(["python", "-m", "r2scp.jobs", "jobs", "run", f"{MOUNT}/{FILE}"]),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": CLUSTER_TTL_S,
        "backoffLimit": 0,
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "headGroupSpec": {
                "rayStartParams": {},
                "template": {"spec": {"containers": [head], "volumes": [_job_volume(name)]}},
            },
            "workerGroupSpecs": [group] if pods.workers else [],
        },
    }


def _resources(amounts: Mapping[str, object]) -> dict[str, Any]:
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _job_volume(name: str) -> dict[str, Any]:
    return {"name": "job", "configMap": {"name": name}}


def _job_mount() -> dict[str, Any]:
    # only the file: mounting the folder would add Kubernetes' own links
    return {"name": "job", "mountPath": f"{MOUNT}/{FILE}", "subPath": FILE, "readOnly": True}


def _config_map(name: str, content: str) -> dict[str, Any]:
    if (size := len(content.encode())) > MAX_CONFIG_MAP_BYTES:
        raise UsageError(f"the job's file must have at most {MAX_CONFIG_MAP_BYTES} bytes; got {size}")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {FILE: content}}


def _metadata(name: str, job: ScheduledJob) -> dict[str, Any]:
    return {"name": name, "labels": {"app.kubernetes.io/name": "r2scp-pipe", "r2scp-pipe/job": job.name}}


def _object_name(job: ScheduledJob, kind: str) -> str:
    """The name of the job's objects. Raises `UsageError` for a name that Kubernetes refuses."""
    maximum = MAX_NAME_LENGTH[kind] - len(PREFIX)
    if len(job.name) > maximum or job.name.endswith("-"):
        raise UsageError(
            f"name must have at most {maximum} characters and not end with - for a {kind}; got {job.name!r}"
        )
    return PREFIX + job.name


def _check_image(image: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", image):
        raise UsageError(f"image must be a container image such as registry/r2scp-pipe:0.1.0; got {image!r}")


class _Dumper(yaml.SafeDumper):
    """Writes multi-line text as blocks, and no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda writer, text: writer.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def _to_yaml(*manifests: dict[str, Any]) -> str:
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, explicit_start=True, allow_unicode=True)
