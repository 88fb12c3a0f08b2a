"""A run on Cloud TPU VMs, one host or many: `python launch/tpu_vm.py --help`."""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

DESCRIPTION = """\
Makes TPU VMs, installs the project on all their hosts, and runs train.py on all of them, by gcloud.

A TPU is asked for as a queued resource, which waits until there is one, where plain creation fails
at once. `run` goes on when the connection ends; train.py finds the other hosts by itself.

The workdir: on one host (v5litepod-8 and smaller) a folder on its disk serves, until the VM is
deleted or preempted. Several hosts need one that all of them share, such as a Filestore share
mounted on all of them (which needs OS Login on the VMs):

    gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="sudo apt-get \\
      install -y nfs-common; sudo mkdir -p /mnt/runs; sudo mount SERVER:/SHARE /mnt/runs"

A spot VM that was preempted: delete, create, install and mount again; then the same `run` goes on
from the newest checkpoint in the shared workdir.
"""
EXAMPLES = """\
examples:
    at="--name=mine --zone=us-west4-a"
    python launch/tpu_vm.py create $at --type=v5litepod-8 --spot
    python launch/tpu_vm.py status $at                     # until it says ACTIVE
    python launch/tpu_vm.py install $at --repository=https://HOST/PROJECT.git
    python launch/tpu_vm.py run $at -- \\
      --config=configs/transformer_enwik8.py:layers=128 --workdir=/mnt/runs/128
    python launch/tpu_vm.py log $at
    python launch/tpu_vm.py stop $at                       # saves its state first
    python launch/tpu_vm.py fetch $at --workdir=/mnt/runs/128 --out=runs/128
    python launch/tpu_vm.py delete $at
"""
RUNTIMES = {  # https://docs.cloud.google.com/tpu/docs/runtimes
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
    "v4": "tpu-ubuntu2204-base",
}
# The Python of the VMs is older than 3.11; uv brings one.
INSTALL = """\
if [ -d ~/rezero_jax ]; then git -C ~/rezero_jax pull --ff-only; \
else git clone {repository} ~/rezero_jax; fi && cd ~/rezero_jax && \
(curl -LsSf https://astral.sh/uv/install.sh | sh) && \
~/.local/bin/uv venv --allow-existing --python=3.11 .venv && \
~/.local/bin/uv pip install --python=.venv/bin/python 'jax[tpu]' -r requirements.txt"""
RUN = """\
if kill -0 "$(cat ~/train.pid 2>/dev/null)" 2>/dev/null; \
then echo 'a run is going on; stop it first' >&2; exit 1; fi; cd ~/rezero_jax && \
{{ nohup .venv/bin/python train.py {arguments} >~/train.log 2>&1 </dev/null & \
echo $! >~/train.pid; }}"""


def create(args: argparse.Namespace) -> list[str]:
    """Asks for a TPU and returns at once; it comes when there is one."""
    version = args.version or RUNTIMES.get(args.type.split("-")[0])
    if version is None:
        known = ", ".join(RUNTIMES)
        raise Mistake(
            f"--type={args.type} is none of {known}; give its runtime as --version, see "
            "https://docs.cloud.google.com/tpu/docs/runtimes"
        )
    return [
        *_queued("create", args),
        f"--node-id={args.name}",
        f"--accelerator-type={args.type}",
        f"--runtime-version={version}",
        *(["--spot"] if args.spot else []),
    ]


def status(args: argparse.Namespace) -> list[str]:
    """Says how the request stands: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED (preempted), ..."""
    return [*_queued("describe", args), "--format=value(state.state)"]


def install(args: argparse.Namespace) -> list[str]:
    """Installs the project on all hosts, or brings it up to date."""
    return _ssh(args, "all", INSTALL.format(repository=shlex.quote(args.repository)))


def run(args: argparse.Namespace) -> list[str]:
    """Starts train.py on all hosts; the same again goes on with an interrupted run."""
    if not any(argument.startswith("--workdir") for argument in args.arguments):
        raise Mistake("run needs train.py's arguments after --, with a --workdir; see --help")
    return _ssh(args, "all", RUN.format(arguments=shlex.join(args.arguments)))


def log(args: argparse.Namespace) -> list[str]:
    """Shows what train.py writes on the first host, until Ctrl-C."""
    return _ssh(args, "0", "tail -n 100 -F ~/train.log")


def stop(args: argparse.Namespace) -> list[str]:
    """Ends the run on all hosts; it saves its state first."""
    return _ssh(args, "all", 'kill -TERM "$(cat ~/train.pid)"')


def fetch(args: argparse.Namespace) -> list[str]:
    """Copies the record from the run folder: its files, not its checkpoints."""
    folder = Path("rezero_jax", args.workdir)  # where train.py runs; an absolute one stays
    return [*GCLOUD, "tpu-vm", "scp", f"{args.name}:{folder}/*.*", args.out, "--worker=0"]


def delete(args: argparse.Namespace) -> list[str]:
    """Deletes the VMs with their disks, and the request; gcloud asks first."""
    return [*_queued("delete", args), "--force"]


GCLOUD = ["gcloud", "compute", "tpus"]
COMMANDS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    function.__name__: function
    for function in (create, status, install, run, log, stop, fetch, delete)
}


class Mistake(Exception):
    """What the user did wrong, in a sentence."""


def _queued(verb: str, args: argparse.Namespace) -> list[str]:
    return [*GCLOUD, "queued-resources", verb, args.name]


def _ssh(args: argparse.Namespace, worker: str, command: str) -> list[str]:
    return [*GCLOUD, "tpu-vm", "ssh", args.name, f"--worker={worker}", f"--command={command}"]


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tpu_vm.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    options: dict[str, argparse.ArgumentParser] = {}
    for name, function in COMMANDS.items():
        verb = verbs.add_parser(name, help=function.__doc__, description=function.__doc__)
        verb.add_argument("--name", required=True, help="of the TPU")
        verb.add_argument("--zone", required=True, help="such as us-west4-a")
        verb.add_argument("--project", help="of Google Cloud; default: gcloud's own")
        verb.add_argument("--dry-run", action="store_true", help="print the command only")
        options[name] = verb
    kinds = ", ".join(RUNTIMES)
    options["create"].add_argument(
        "--type", required=True, help=f"{kinds}, and a size: v5litepod-8, v5p-128"
    )
    options["create"].add_argument("--version", help="of the runtime; default: by the type")
    options["create"].add_argument("--spot", action="store_true", help="cheap; may be preempted")
    options["install"].add_argument("--repository", required=True, metavar="URL", help="for git")
    options["fetch"].add_argument("--workdir", required=True, help="as given to train.py")
    options["fetch"].add_argument("--out", required=True, metavar="DIR", help="a folder here")

    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.arguments = words[cut + 1 :]
    try:
        command = [*COMMANDS[args.verb](args), f"--zone={args.zone}"]
        command += [f"--project={args.project}"] if args.project else []
        if args.dry_run:
            print(shlex.join(command))
            return 0
        if shutil.which("gcloud") is None:
            raise Mistake(
                "there is no gcloud here; install it (https://cloud.google.com/sdk/docs/install), "
                "or print the command with --dry-run"
            )
    except Mistake as mistake:
        print(f"tpu_vm.py: {mistake}", file=sys.stderr)
        return 2
    if args.verb == "fetch":
        Path(args.out).mkdir(parents=True, exist_ok=True)
    return subprocess.run(command).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
