"""launch/tpu_vm.py: the commands it makes, and the shell in them, on a machine without TPUs."""

import os
import shlex
import subprocess
import sys
import time

import pytest

from launch import tpu_vm

AT = ["--name=mine", "--zone=us-west4-a"]
ZONE = "--zone=us-west4-a"


def dry_run(capsys, verb, *options, arguments=()):
    assert tpu_vm.main([verb, *AT, *options, "--dry-run", *arguments]) == 0
    return capsys.readouterr().out.rstrip("\n")


@pytest.mark.parametrize(
    ("verb", "options", "expected"),
    [
        (
            "create",
            ["--type=v5litepod-8"],
            "gcloud compute tpus queued-resources create mine --node-id=mine "
            f"--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite {ZONE}",
        ),
        (
            "create",
            ["--type=v5p-128", "--spot", "--project=ours"],
            "gcloud compute tpus queued-resources create mine --node-id=mine "
            "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --spot "
            f"{ZONE} --project=ours",
        ),
        (
            "create",
            ["--type=v9-8", "--version=newer"],
            "gcloud compute tpus queued-resources create mine --node-id=mine "
            f"--accelerator-type=v9-8 --runtime-version=newer {ZONE}",
        ),
        (
            "status",
            [],
            "gcloud compute tpus queued-resources describe mine "
            f"'--format=value(state.state)' {ZONE}",
        ),
        (
            "log",
            [],
            "gcloud compute tpus tpu-vm ssh mine --worker=0 "
            f"'--command=tail -n 100 -F ~/train.log' {ZONE}",
        ),
        (
            "stop",
            [],
            "gcloud compute tpus tpu-vm ssh mine --worker=all "
            f"'--command=kill -TERM \"$(cat ~/train.pid)\"' {ZONE}",
        ),
        (
            "fetch",
            ["--workdir=/mnt/runs/a", "--out=runs/a"],
            f"gcloud compute tpus tpu-vm scp 'mine:/mnt/runs/a/*.*' runs/a --worker=0 {ZONE}",
        ),
        (
            "fetch",
            ["--workdir=runs/a/", "--out=here"],
            f"gcloud compute tpus tpu-vm scp 'mine:rezero_jax/runs/a/*.*' here --worker=0 {ZONE}",
        ),
        ("delete", [], f"gcloud compute tpus queued-resources delete mine --force {ZONE}"),
    ],
)
def test_commands(verb, options, expected, capsys):
    assert dry_run(capsys, verb, *options) == expected


def remote(capsys, verb, *options, arguments=()):
    """What the hosts are told to do."""
    words = shlex.split(dry_run(capsys, verb, *options, arguments=arguments))
    expected = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mine", "--worker=all"]
    assert words[:7] == expected
    assert words[8:] == [ZONE]
    return words[7].removeprefix("--command=")


@pytest.fixture
def host(tmp_path):
    """host(command) -> its result, in a home with a Python and a train.py that waits."""
    python = tmp_path / "rezero_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "rezero_jax" / "train.py").write_text(
        "import sys, time\nprint(*sys.argv[1:], sep='|', flush=True)\ntime.sleep(60)\n"
    )

    def host(command, **environment):
        environment = os.environ | {"HOME": str(tmp_path)} | environment
        return subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=30
        )

    yield host
    host('kill -9 "$(cat ~/train.pid)"')


def test_a_run_is_started_once_and_stopped(host, tmp_path, capsys):
    words = ["--config=a.py:b=c,d", "--workdir=/mnt/my runs", "--config.x=$HOME"]
    run = remote(capsys, "run", arguments=["--", *words])
    began = time.monotonic()
    assert host(run).returncode == 0
    assert time.monotonic() - began < 20  # it does not wait for the run
    log = tmp_path / "train.log"
    while not log.read_text().endswith("\n"):
        assert time.monotonic() - began < 20
        time.sleep(0.01)
    assert log.read_text() == "|".join(words) + "\n"
    again = host(run)
    assert (again.returncode, again.stderr) == (1, "a run is going on; stop it first\n")
    pid = (tmp_path / "train.pid").read_text().strip()
    assert host(remote(capsys, "stop")).returncode == 0
    while host(f"ps -o stat= -p {pid}").stdout.strip("Zs\n"):  # nobody may take its status here
        assert time.monotonic() - began < 20


def test_the_number_of_a_run_that_is_over_does_not_hinder(host, tmp_path, capsys):
    over = subprocess.Popen(["true"])
    over.wait()
    (tmp_path / "train.pid").write_text(f"{over.pid}\n")
    assert host(remote(capsys, "run", arguments=["--", "--workdir=a"])).returncode == 0
    assert (tmp_path / "train.pid").read_text() != f"{over.pid}\n"


def test_install_clones_and_then_updates(host, tmp_path, capsys):
    home, origin = tmp_path / "home", tmp_path / "origin with space"
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run(["git", "init", "--quiet", str(origin)], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "one"], check=True)
    for file, text in {
        "bin/curl": "echo true",  # the installer, which does nothing
        ".local/bin/uv": 'echo uv "$@"',
    }.items():
        path = home / file
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {"HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}"}
    install = remote(capsys, "install", f"--repository={origin}")
    for message in ("one", "two"):
        done = host(install, **environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-2:] == [
            "uv venv --allow-existing --python=3.11 .venv",
            "uv pip install --python=.venv/bin/python jax[tpu] -r requirements.txt",
        ]
        newest = ["git", "-C", str(home / "rezero_jax"), "log", "-1", "--format=%s"]
        assert subprocess.check_output(newest, text=True) == f"{message}\n"
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "two"], check=True)


def test_a_failed_install_says_so(host, tmp_path, capsys):
    install = remote(capsys, "install", f"--repository={tmp_path / 'nowhere'}")
    assert host(install, HOME=str(tmp_path / "empty")).returncode != 0


@pytest.mark.parametrize("status", [0, 5])
def test_gcloud_is_run_and_its_status_returned(status, tmp_path, monkeypatch):
    fake = tmp_path / "gcloud"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{tmp_path}/words"\nexit {status}\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    out = tmp_path / "new" / "folder"
    assert tpu_vm.main(["fetch", *AT, "--workdir=/runs", f"--out={out}"]) == status
    assert out.is_dir()
    expected = ["compute", "tpus", "tpu-vm", "scp", "mine:/runs/*.*", str(out), "--worker=0", ZONE]
    assert (tmp_path / "words").read_text().splitlines() == expected


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["delete", *AT], "there is no gcloud here; install it (https://cloud.google.com/"),
        (["create", *AT, "--type=v9-8"], "--type=v9-8 is none of v5litepod, v5p, v6e, v4; give"),
        (["run", *AT], "run needs train.py's arguments after --, with a --workdir; see --help"),
    ],
)
def test_mistakes(argv, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tpu_vm.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tpu_vm.py: {sentence}")
    assert error.count("\n") == 1
